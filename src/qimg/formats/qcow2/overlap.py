"""Which host clusters hold an image's own tables: what no guest data may ever be written over.

An image whose reference counts lie would otherwise lose its tables to the first write (sheet, section 11).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from struct import unpack

from qimg.formats.qcow2.structs import MAX_L1_BYTES, OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.formats.qcow2.write import WritableQcow2

_STEP = 1 << 16


class Overlaps:
    """The tables of one image at one moment. Units: host clusters."""

    def __init__(self, image: WritableQcow2) -> None:
        """Reads the L1 and the refcount table, which the image has in memory anyway."""
        self._bits = image.header.cluster_bits
        #: (first, stop, name) of tables of which there is one.
        self._ranges = [
            (offset >> self._bits, (offset + length - 1 >> self._bits) + 1, name)
            for offset, length, name in _single(image)
            if length
        ]
        self._l2 = self._sorted(_l2_tables(image))
        self._blocks = self._sorted(iter(image.refcounts.table))

    def _sorted(self, offsets: Iterator[int]) -> array[int]:
        return array("Q", sorted(offset >> self._bits for offset in offsets if offset))

    def name(self, first: int, count: int) -> str | None:
        """What of the image's own lies in ``first .. first + count``; None: nothing."""
        stop = first + count
        for low, high, name in self._ranges:
            if low < stop and first < high:
                return name
        for table, name in ((self._l2, "active L2 table"), (self._blocks, "refcount block")):
            at = bisect_left(table, first)
            if at < len(table) and table[at] < stop:
                return name
        return None


def _single(image: WritableQcow2) -> Iterator[tuple[int, int, str]]:
    parsed, header = image.header, image.header.header
    yield 0, parsed.cluster_size, "qcow2_header"
    yield header.l1_table_offset, header.l1_size * 8, "active L1 table"
    table = header.refcount_table_clusters * parsed.cluster_size
    yield header.refcount_table_offset, table, "refcount table"
    if parsed.crypto is not None:
        yield parsed.crypto.offset, parsed.crypto.length, "LUKS header"
    if header.nb_snapshots:
        yield header.snapshots_offset, image.snapshot_table().length, "snapshot table"
    if parsed.bitmaps is not None:
        yield parsed.bitmaps.directory_offset, parsed.bitmaps.directory_size, "bitmap directory"
    for snapshot in image.snapshot_table().snapshots:
        entry = snapshot.entry
        yield entry.l1_table_offset, min(entry.l1_size * 8, MAX_L1_BYTES), "inactive L1 table"


def _l2_tables(image: WritableQcow2) -> Iterator[int]:
    table = image.tables.l1
    for at in range(0, len(table), _STEP):
        part = bytes(table[at : at + _STEP])
        if part.count(0) != len(part):
            for word in unpack(f">{len(part) // 8}Q", part):
                yield word & OFFSET_MASK
