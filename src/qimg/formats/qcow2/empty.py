"""Dropping all that an image holds, so that everything shows through from below (sheet, section 13).

The caller has seen to it that the same can be read below. So any part of the tables may be gone at any time:
first the L1 table is cleared where it lies, after which nothing but metadata is in use. Then the metadata
gets the places that it has in a new image, and the file is cut behind it. Where old and new places overlap,
it goes to free clusters first and from there to its places; each time one write of the header switches.
"""

from __future__ import annotations

from struct import pack

from qimg.formats.qcow2.refcounts import counters_per_block, pack_counts, unpack_counts
from qimg.formats.qcow2.structs import CRYPT_NONE, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.qcow2.write import WritableQcow2

_SECTOR = 512


class EmptyChanges:
    """`make_empty` of `WritableQcow2`."""

    @staticmethod
    def make_empty(image: WritableQcow2) -> None:
        """`Image.make_empty`. Raises StorageError, CorruptImage; the image is sound all the same."""
        image.flush()
        layout = _Layout(image)
        if layout.possible:
            layout.reset()
        else:
            _drop_tables(image)
        image.reload()


def _drop_tables(image: WritableQcow2) -> None:
    """Give up every L2 table and what it maps, then cut the file behind what is left."""
    image.begin()
    tables, entries = image.tables, image.entries
    for index in range(image.header.header.l1_size):
        if not tables.l1_entry(index):
            continue
        table = tables.look(index)
        if table is not None:
            entries.forget(table, 0, tables.entries)
            tables.drop(index)
        if image.wants_flush:
            image.flush()
    image.flush()
    end = image.refcounts.used_end() * image.cluster_size
    _cut(image, end)


def _cut(image: WritableQcow2, end: int) -> None:
    """Let the file end at `end`, where it can be cut. What is behind is in no use, now or after a crash."""
    file = image.file
    if not file.fixed_size and file.size > end:
        file.resize(end)


class _Layout:
    """Where the metadata of a new image lies: table at cluster 1, block at 2, L1 table at 3 (section 12)."""

    def __init__(self, image: WritableQcow2) -> None:
        self.image = image
        self.file = image.file
        parsed, header = image.header, image.header.header
        self.size = image.cluster_size
        self.entries = -(-image.size // (parsed.l2_entries * self.size))
        self.l1_clusters = -(-8 * self.entries // self.size)
        self.end = 3 + self.l1_clusters
        self.bits = 1 << header.refcount_order
        self.per_block = counters_per_block(self.size, self.bits)
        #: Clusters of the metadata as it is now.
        self.old: set[int] = set()
        self.shadow: list[int] = []
        plain = (
            parsed.version >= 3
            and not header.nb_snapshots
            and parsed.bitmaps is None
            and not header.autoclear_features
            and not parsed.has_data_file
            and header.crypt_method == CRYPT_NONE
        )
        self.possible = plain and self._find_places()

    def _find_places(self) -> bool:
        """Find places beside all metadata for the way there, all counted by one refcount block."""
        header, size = self.image.header.header, self.size
        table = header.refcount_table_offset // size
        l1 = header.l1_table_offset // size
        self.old = {
            *range(table, table + header.refcount_table_clusters),
            *(offset // size for offset in self.image.refcounts.table if offset),
            *range(l1, l1 - (-8 * header.l1_size // size)),
        }
        wanted = 2 + self.l1_clusters
        at = self.end
        # The L1 table needs neighbours, so all are neighbours.
        while at + wanted <= self.per_block:
            taken = [cluster for cluster in range(at, at + wanted) if cluster in self.old]
            if not taken:
                self.shadow = list(range(at, at + wanted))
                return True
            at = taken[-1] + 1
        return False

    @property
    def settled(self) -> bool:
        """Whether the metadata is where a new image has it, but for more refcount blocks."""
        header, size = self.image.header.header, self.size
        return (
            header.refcount_table_offset == size
            and header.refcount_table_clusters == 1
            and self.image.refcounts.table[0] == 2 * size
            and header.l1_size == self.entries
            and header.l1_table_offset == (3 * size if self.entries else 0)
        )

    def reset(self) -> None:
        """Raises StorageError."""
        header = self.image.header.header
        if header.l1_size:
            self.file.write(bytes(8 * header.l1_size), header.l1_table_offset)
            self.file.flush()
        if self.settled:
            self._lower()
        else:
            self._switch(self.shadow[0])
            self._switch(1)
        _cut(self.image, self.end * self.size)

    def _lower(self) -> None:
        """Count what is left, where everything has its place already: blocks go before their counts."""
        if any(self.image.refcounts.table[1:]):
            self.file.write(bytes(self.size - 8), self.size + 8)
            self.file.flush()
        self._write_block(2, range(self.end))
        self.file.flush()

    def _switch(self, first: int) -> None:
        """Write new metadata from cluster `first` on and make it the image's."""
        size = self.size
        self.file.write(pack(">Q", (first + 1) * size).ljust(size, b"\0"), first * size)
        self._write_block(first + 1, (0, *range(first, first + 2 + self.l1_clusters)))
        l1 = (first + 2) * size if self.entries else 0
        if self.entries:
            self.file.write(bytes(self.l1_clusters * size), l1)
        self.file.flush()
        sector = self.file.read(0, min(_SECTOR, size))
        at = Header.offset_of("l1_size")
        fields = pack(">IQQI", self.entries, l1, first * size, 1)
        sector[at : at + len(fields)] = fields
        self.file.write(sector, 0)
        self.file.flush()

    def _write_block(self, cluster: int, used: Iterable[int]) -> None:
        """A refcount block at `cluster`: one for each cluster of `used`, none for others."""
        counts = unpack_counts(self.bits, bytes(self.size))
        for number in used:
            counts[number] = 1
        self.file.write(pack_counts(self.bits, counts), cluster * self.size)
