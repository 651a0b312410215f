"""The refcount structure as it is stored, and the clusters that are free by it: where new metadata can go.

For changes that build new metadata beside the old (see `shadow`). Units: host clusters, unless said.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right

from qimg.errors import CorruptImage
from qimg.formats.qcow2.alloc import file_too_large
from qimg.formats.qcow2.refcounts import counters_per_block, most_clusters, unpack_counts
from qimg.formats.qcow2.structs import MAX_L1_BYTES, REFTABLE_OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.snapshot import SnapshotTable
    from qimg.storage.base import Storage

    Run = tuple[int, int]  # (first cluster, clusters)


def native(raw: bytes | bytearray | memoryview) -> array[int]:
    """The big-endian 64-bit words in `raw`."""
    words = array("Q")
    words.frombytes(raw)
    if sys.byteorder == "little":
        words.byteswap()
    return words


class StoredBlocks:
    """Refcount table and blocks of an image. Nothing is kept but the table (at most 8 MiB)."""

    def __init__(self, file: Storage, header: ParsedHeader) -> None:
        """Raises StorageError."""
        self._file = file
        self.cluster_size = header.cluster_size
        self.bits = 1 << header.header.refcount_order
        self.maximum = (1 << self.bits) - 1
        self.per_block = counters_per_block(header.cluster_size, self.bits)
        self._table_offset = header.header.refcount_table_offset
        length = header.header.refcount_table_clusters * header.cluster_size
        #: Host offset of every block in bytes, 0 where there is none.
        self.table = native(file.read(self._table_offset, length))

    def place(self, block: int) -> int:
        """Host offset of `block` in bytes, 0 if there is none. Raises CorruptImage."""
        offset = self.table[block] & REFTABLE_OFFSET_MASK if block < len(self.table) else 0
        if offset % self.cluster_size or offset >> 62:
            where = f"{block:#x}" if block else "0"
            raise CorruptImage(
                f"Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {where})",
                offset=self._table_offset + 8 * block,
            )
        return offset

    def raw(self, block: int) -> bytearray | None:
        """The bytes of `block`; None: there is none, all its counts are 0."""
        offset = self.place(block)
        return self._file.read(offset, self.cluster_size) if offset else None

    def counts(self, block: int) -> array[int] | None:
        """The counts of `block`; None: there is none."""
        raw = self.raw(block)
        return None if raw is None else unpack_counts(self.bits, raw)


class FreeSpace:
    """Hands out clusters that are free, from the start of the file on, each once."""

    def __init__(self, stored: StoredBlocks, used: Tables) -> None:
        """`used`: clusters that are not handed out, whatever their count says."""
        self._stored = stored
        self._used = used
        self._limit = most_clusters(stored.cluster_size, stored.bits)
        self._next = 1
        self._spare: list[Run] = []
        self._looked_at: tuple[int, bytes | None, int] = (-1, None, 1)

    def take(self, count: int = 1) -> int:
        """The first of `count` free neighbours. Raises StorageError (EFBIG), CorruptImage."""
        if count == 1 and self._spare:
            first, length = self._spare.pop()
            if length > 1:
                self._spare.append((first + 1, length - 1))
            return first
        while True:
            first, length = self._run(count)
            if length >= count:
                return first
            self._spare.append((first, length))

    def _run(self, most: int) -> Run:
        """The next run of free clusters, as far as `most`. It is not found again."""
        first = self._next_free(self._next)
        length = 1
        at = first + 1
        while length < most and self._is_free(at):
            length += 1
            at += 1
        self._next = at
        return first, length

    def _next_free(self, at: int) -> int:
        per_block = self._stored.per_block
        while True:
            block, slot = divmod(at, per_block)
            found = self._free_slot(block, slot)
            at = block * per_block + found
            if at >= self._limit:
                raise file_too_large()
            if found == per_block:
                continue
            if at not in self._used:
                return at
            at += 1

    def _is_free(self, cluster: int) -> bool:
        if cluster >= self._limit:
            raise file_too_large()
        block, slot = divmod(cluster, self._stored.per_block)
        data, step = self._zeros(block)
        if data is not None and data[slot * step : (slot + 1) * step].count(0) != step:
            return False
        return cluster not in self._used

    def _free_slot(self, block: int, slot: int) -> int:
        """The first counter from `slot` on that is 0; the number of counters if there is none."""
        data, step = self._zeros(block)
        if data is None:
            return slot
        zero = bytes(step)
        at = data.find(zero, slot * step)
        while at % step and at >= 0:
            at = data.find(zero, at // step * step + step)
        return self._stored.per_block if at < 0 else at // step

    def _zeros(self, block: int) -> tuple[bytes | None, int]:
        """The counters of `block` and the bytes of each; None: there is no block, all are 0."""
        if self._looked_at[0] != block:
            raw = self._stored.raw(block)
            step = max(1, self._stored.bits // 8)
            data = None if raw is None else bytes(raw)
            if data is not None and self._stored.bits < 8:
                data = unpack_counts(self._stored.bits, data).tobytes()
            self._looked_at = block, data, step
        return self._looked_at[1], self._looked_at[2]


class Tables:
    """Clusters that hold an image's own tables. An image whose counts lie must not lose them."""

    def __init__(self, image: Qcow2Image, stored: StoredBlocks, snapshots: SnapshotTable | None) -> None:
        """Reads nothing that is not in memory already."""
        size = image.cluster_size
        found = sorted(
            (offset // size, -(-(offset + length) // size))
            for offset, length in _known(image, snapshots)
            if length
        )
        self._starts: list[int] = []
        self._stops: list[int] = []
        for first, stop in found:
            if self._stops and first <= self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], stop)
            else:
                self._starts.append(first)
                self._stops.append(stop)
        places = (word & REFTABLE_OFFSET_MASK for word in filter(None, stored.table))
        self._blocks = array("Q", sorted(place // size for place in places))

    def __contains__(self, cluster: int) -> bool:
        at = bisect_right(self._starts, cluster)
        if at and cluster < self._stops[at - 1]:
            return True
        at = bisect_left(self._blocks, cluster)
        return at < len(self._blocks) and self._blocks[at] == cluster


def _known(image: Qcow2Image, snapshots: SnapshotTable | None) -> Iterator[Run]:
    """(offset, bytes) of the tables of which there are few."""
    header = image.header.header
    yield 0, image.cluster_size
    yield header.l1_table_offset, header.l1_size * 8
    yield header.refcount_table_offset, header.refcount_table_clusters * image.cluster_size
    if snapshots is not None:
        yield header.snapshots_offset, snapshots.length
        for snapshot in snapshots.snapshots:
            entry = snapshot.entry
            if entry.l1_size * 8 <= MAX_L1_BYTES:
                yield entry.l1_table_offset, entry.l1_size * 8
    if image.header.bitmaps is not None:
        yield image.header.bitmaps.directory_offset, image.header.bitmaps.directory_size
        for bitmap in image.directory:
            yield bitmap.entry.table_offset, bitmap.entry.table_size * 8
