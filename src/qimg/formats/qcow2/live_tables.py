"""L1 and L2 tables of an existing image that is being changed (sheet, sections 5, 13 and 14).

The L1 table is kept as it is stored. An L2 table comes into memory when it is to be changed; one that is
shared with an internal snapshot, or that does not exist yet, gets a new host cluster at that moment.
`WritableQcow2.flush` calls the steps in order:

    write_new    tables (and an L1 table that moved) that nothing on disk points to yet
    write_links  changed tables in their old places, L1 entries of new ones

What is staged shows in `LiveMapping`, so that the image reads as it will be.
"""

from __future__ import annotations

import sys
from array import array

from qimg.errors import CorruptImage
from qimg.formats.qcow2.live_refcounts import Span
from qimg.formats.qcow2.mapping import Mapping, c_hex
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.structs import COPIED, OFFSET_MASK
from qimg.storage.base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.live_refcounts import LiveRefcounts
    from qimg.formats.qcow2.mapping import Geometry
    from qimg.storage.base import Buffer, Storage

#: Bytes of unchanged tables that stay in memory.
_CACHE = 8 << 20
_SECTOR = 512


class LiveTables:
    """The guest map of one image. Sizes in bytes, unless said; `header.header` gets the L1 table's new
    place when it moves."""

    def __init__(self, file: Storage, header: ParsedHeader, refcounts: LiveRefcounts) -> None:
        """Reads nothing yet."""
        self._file = file
        self._header = header.header
        self._refcounts = refcounts
        self._cluster_size = header.cluster_size
        self._bits = header.cluster_bits
        self._words = header.l2_entry_size // 8
        #: Entries of one L2 table.
        self.entries = header.l2_entries
        self._l1: bytearray | None = None
        self._l1_dirty: Span | None = None
        self._l1_moved = False
        self._tables: dict[int, array[int]] = {}  # by index in the L1 table
        self._dirty: dict[int, Span] = {}
        self._new: set[int] = set()
        self._places: dict[int, int] = {}  # host offset -> index, of those in memory

    # -- the L1 table

    @property
    def l1(self) -> bytearray:
        """The L1 table as it is stored, staged changes included."""
        if self._l1 is None:
            self._l1 = self._file.read(self._header.l1_table_offset, self._header.l1_size * 8)
        return self._l1

    def l1_entry(self, index: int) -> int:
        """Entry `index`; 0 past the end of the table."""
        return int.from_bytes(self.l1[8 * index : 8 * index + 8], "big")

    def set_l1_entry(self, index: int, word: int) -> None:
        """Stage an entry; `write_links` writes it."""
        self.l1[8 * index : 8 * index + 8] = word.to_bytes(8, "big")
        if self._l1_dirty is None:
            self._l1_dirty = Span(index, index + 1)
        else:
            self._l1_dirty.cover(index, index + 1)

    def resize_l1(self, entries: int) -> None:
        """Give the L1 table a new place with room for `entries`; the header's fields change with it, so the
        header has to be written. Raises StorageError (EFBIG)."""
        size = self._cluster_size
        table = self.l1
        old = self._header.l1_table_offset // size, -(-len(table) // size)
        table = table[: 8 * entries].ljust(8 * entries, b"\0")
        clusters = -(-len(table) // size)
        self._header.l1_table_offset = self._refcounts.take(clusters) * size if clusters else 0
        self._header.l1_size = entries
        self._l1 = table
        self._l1_moved = True
        if old[1]:
            self._refcounts.release(*old)

    # -- L2 tables

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Guest clusters `first` .. `last` cut at the borders of tables: (table, low, high), entries."""
        while first < last:
            index, low = divmod(first, self.entries)
            high = min(self.entries, low + last - first)
            yield index, low, high
            first += high - low

    def place(self, index: int) -> int:
        """Host offset of a table, 0 where there is none. Raises CorruptImage."""
        word = self.l1_entry(index)
        offset = word & OFFSET_MASK
        if offset % self._cluster_size or (word and not offset):
            raise CorruptImage(
                f"Image is corrupt: L2 table offset {c_hex(offset)} unaligned (L1 index: {c_hex(index)})",
                offset=self._header.l1_table_offset + 8 * index,
                guest=index * self.entries << self._bits,
            )
        return offset

    def look(self, index: int) -> array[int] | None:
        """The words of a table, not to be changed; None where there is none. Raises CorruptImage."""
        table = self._tables.get(index)
        if table is None:
            place = self.place(index)
            if not place:
                return None
            table = array("Q", bytes(self._file.read(place, self._cluster_size)))
            if sys.byteorder == "little":
                table.byteswap()
            self._make_room()
            self._tables[index] = table
            self._places[place] = index
        return table

    def change(self, index: int, low: int, high: int) -> array[int]:
        """The words of a table, of which entries `low` .. `high` are about to be changed in place.

        Raises CorruptImage, StorageError."""
        table = self.look(index)
        word = self.l1_entry(index)
        if table is None or not word & COPIED:
            table = self._renew(index, table, word & OFFSET_MASK)
        span = self._dirty.get(index)
        low, high = low * self._words, high * self._words
        if span is None:
            self._dirty[index] = Span(low, high)
        else:
            span.cover(low, high)
        return table

    def _renew(self, index: int, table: array[int] | None, old: int) -> array[int]:
        """A table of its own for `index`: an empty one, or a copy of the shared one at `old`."""
        ((cluster, _count),) = self._refcounts.take_any(1)
        if table is None:
            table = array("Q", bytes(self._cluster_size))
        else:
            del self._places[old]
            self._refcounts.release(old >> self._bits)
        place = cluster << self._bits
        self._tables[index] = table
        self._places[place] = index
        self._new.add(index)
        self.set_l1_entry(index, place | COPIED)
        return table

    def drop(self, index: int) -> None:
        """Forget a table and all its entries: whoever calls has released what they refer to."""
        place = self.place(index)
        if not place:
            return
        self._tables.pop(index, None)
        self._dirty.pop(index, None)
        self._new.discard(index)
        self._places.pop(place, None)
        self._refcounts.release(place >> self._bits)
        self.set_l1_entry(index, 0)

    def _make_room(self) -> None:
        """Forget unchanged tables if there are many."""
        if len(self._tables) * self._cluster_size < _CACHE:
            return
        for index in list(self._tables):
            if index not in self._dirty and index not in self._new:
                del self._tables[index]
                self._places.pop(self.l1_entry(index) & OFFSET_MASK, None)
                return

    def by_place(self, host: int) -> array[int] | None:
        """The words of the table in memory that lies, or is going to lie, at `host`."""
        index = self._places.get(host)
        return None if index is None else self._tables.get(index)

    # -- writing

    @property
    def staged(self) -> int:
        """Bytes in memory that wait to be written."""
        return len(self._dirty) * self._cluster_size

    @property
    def linking(self) -> bool:
        """Whether `write_links` has anything to write."""
        return bool(self._dirty or self._l1_dirty)

    def write_new(self) -> bool:
        """Write what nothing on disk points to yet; whether there is anything."""
        written = bool(self._new) or self._l1_moved
        for index in sorted(self._new):
            self._file.write(big_endian(self._tables[index]), self.place(index))
            self._dirty.pop(index, None)
        self._new.clear()
        if self._l1_moved:
            if self.l1:
                self._file.write(self.l1, self._header.l1_table_offset)
            self._l1_moved = False
            self._l1_dirty = None
        return written

    def write_links(self) -> bool:
        """Write changed tables in place and the L1 entries of new ones; whether there were any."""
        written = self.linking
        for index in sorted(self._dirty):
            span, table = self._dirty[index], self._tables[index]
            low = span.low * 8 // _SECTOR * _SECTOR // 8
            high = min(-(-span.high * 8 // _SECTOR) * _SECTOR // 8, len(table))
            self._file.write(big_endian(table[low:high]), self.place(index) + 8 * low)
        self._dirty.clear()
        if self._l1_dirty is not None:
            low, high = self._l1_dirty.low * 8, self._l1_dirty.high * 8
            self._file.write(self.l1[low:high], self._header.l1_table_offset + low)
            self._l1_dirty = None
        return written


class _StagedFile(Filter):
    """The image file with L2 tables as they are in memory."""

    def __init__(self, file: Storage, tables: LiveTables, cluster_size: int) -> None:
        super().__init__(file)
        self._tables = tables
        self._cluster_size = cluster_size

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        self.child.read_into(view, offset)
        size = self._cluster_size
        end = offset + len(view)
        for host in range(offset - offset % size, end, size):
            words = self._tables.by_place(host)
            if words is not None:
                low, high = max(host, offset), min(host + size, end)
                view[low - offset : high - offset] = big_endian(words)[low - host : high - host]


class LiveMapping(Mapping):
    """Lookup in tables that are being changed."""

    def __init__(self, file: Storage, geometry: Geometry, tables: LiveTables) -> None:
        staged = _StagedFile(file, tables, geometry.cluster_size)
        super().__init__(staged, geometry, 0, len(tables.l1) // 8)
        self._live = tables

    @property
    def l1(self) -> bytearray:
        """The L1 table, staged changes included."""
        return self._live.l1

    def _slice(self, offset: int, length: int) -> bytearray:
        size = self.geometry.cluster_size
        words = self._live.by_place(offset - offset % size)
        if words is None:
            return super()._slice(offset, length)
        at = offset % size
        return bytearray(big_endian(words[at // 8 : (at + length) // 8]))
