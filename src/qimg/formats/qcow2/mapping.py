"""Guest offset -> host offset through the L1 and L2 tables (qcow2 sheet, sections 5, 6 and 11).

Tables are decoded in bulk, a window at a time. Two paths give the same result (a property test proves it):
this module for few tables, `qimg.vec.l2` where there are many; `Mapping._many` decides. Meaning and
error text of an entry are defined here only.
"""

from __future__ import annotations

from _thread import allocate_lock
from struct import unpack

from qimg.errors import CorruptImage
from qimg.extent import COMPRESSED, HOLE, MAPPED, ZERO, Runs
from qimg.formats.qcow2.structs import (
    COPIED,
    L2_COMPRESSED,
    L2_ZERO,
    OFFSET_MASK,
    SUBCLUSTERS,
    compressed_shift,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qimg.extent import Extent
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage
    from qimg.vec.l2 import TableDecoder

    #: (start, length, flags, host): an extent in the making.
    Piece = tuple[int, int, int, int | None]

#: L2 entries decoded in plain Python before numpy pays for its import (80 ms, about 50 tables of 8192).
PLAIN_ENTRIES = 50 * 8192
#: Most bytes of an L2 table read at once and kept in the cache.
SLICE = 64 << 10
_CACHED_SLICES = 64
#: Bytes of L2 tables that one call of numpy decodes.
BATCH = 64 << 10
#: Requests of fewer clusters are never worth numpy.
_FEW = 512
_ZEROS = bytes(SLICE)
_ALL = (1 << SUBCLUSTERS) - 1


def c_hex(value: int) -> str:
    """`value` as C's ``%#x`` prints it: zero has no prefix."""
    return f"{value:#x}" if value else "0"


class Geometry:
    """What of a header decides how tables are read. Sizes in bytes."""

    def __init__(self, header: ParsedHeader) -> None:
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.extended = header.extended_l2
        self.entry_size = header.l2_entry_size
        self.l2_entries = header.l2_entries
        #: Guest bytes below one L1 entry.
        self.l1_span = header.l2_entries * header.cluster_size
        self.subcluster = header.cluster_size // SUBCLUSTERS if self.extended else header.cluster_size
        self.zero_clusters = header.version >= 3
        self.data_file = header.has_data_file
        #: Bits of a compressed cluster's descriptor: offset below `count_shift`, then sectors.
        self.count_shift = compressed_shift(header.cluster_bits)
        self.compressed_mask = (1 << self.count_shift) - 1
        self.count_mask = (1 << (62 - self.count_shift)) - 1

    def compressed_range(self, word: int) -> tuple[int, int]:
        """(host offset, bytes) that may hold the compressed data which `word` describes."""
        offset = word & self.compressed_mask
        sectors = (word >> self.count_shift & self.count_mask) + 1
        return offset, sectors * 512 - offset % 512


class Decoder:
    """Turns L2 entries into pieces, ascending and joined. One instance a request."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.pieces: list[Piece] = []

    def decode(self, raw: bytes | bytearray, guest: int, table: int, index: int) -> None:
        """Entries `raw` of the table at host offset `table`, from its entry `index` on; the first describes
        the guest cluster at `guest`. Raises CorruptImage."""
        if self.geometry.extended:
            self._decode_extended(raw, guest, table, index)
        else:
            self._decode_standard(raw, guest, table, index)

    def add(self, start: int, length: int, flags: int, host: int | None) -> None:
        """Append a piece, joining it with the last one where they continue each other."""
        pieces = self.pieces
        if pieces:
            last, size, kind, place = pieces[-1]
            expected = None if place is None else place + size
            if kind == flags and last + size == start and expected == host:
                pieces[-1] = last, size + length, kind, place
                return
        pieces.append((start, length, flags, host))

    def _decode_standard(self, raw: bytes | bytearray, guest: int, table: int, index: int) -> None:
        size = self.geometry.cluster_size
        classify = self.standard
        add = self.add
        begin = guest  # of the run in progress
        flags, host = -1, None
        expected: int | None = None  # host of the next cluster if it continues the run
        last = -1
        for word in unpack(f">{len(raw) // 8}Q", raw):
            if word == last and host is None and flags >= 0:
                guest += size  # the commonest case by far: one more of the same without a place
                continue
            new_flags, new_host = classify(word, guest, table, index + (guest - begin) // size)
            if new_flags != flags or new_host != expected:
                if flags >= 0:
                    add(begin, guest - begin, flags, host)
                index += (guest - begin) // size
                begin, flags, host = guest, new_flags, new_host
            guest += size
            expected = None if new_host is None else new_host + size
            last = word
        if flags >= 0:
            add(begin, guest - begin, flags, host)

    def standard(self, word: int, guest: int, table: int, index: int) -> tuple[int, int | None]:
        """(flags, host) of a standard entry: entry `index` of the table at `table`. Raises CorruptImage."""
        geometry = self.geometry
        offset = word & OFFSET_MASK
        if word & L2_COMPRESSED:
            if geometry.data_file:
                raise compressed_in_data_file(guest, table, index)
            return COMPRESSED, None
        if word & L2_ZERO:
            if not geometry.zero_clusters:
                raise zero_before_v3(guest, table, index)
            if not offset:
                return ZERO, None
            flags = ZERO
        elif offset or (geometry.data_file and word & COPIED):
            flags = MAPPED
        else:
            return HOLE, None
        self._check_host(offset, guest, table, index)
        return flags, offset

    def _check_host(self, offset: int, guest: int, table: int, index: int) -> None:
        geometry = self.geometry
        if offset & (geometry.cluster_size - 1):
            raise corrupt(
                f"Cluster allocation offset {c_hex(offset)} unaligned (L2 offset: {c_hex(table)},"
                f" L2 index: {c_hex(index)})",
                guest,
                table + index * geometry.entry_size,
            )
        if geometry.data_file and offset != guest:
            raise corrupt(
                f"External data file host cluster offset {c_hex(offset)} does not match guest cluster"
                f" offset: {c_hex(guest)}, L2 index: {c_hex(index)})",
                guest,
                table + index * geometry.entry_size,
            )

    def _decode_extended(self, raw: bytes | bytearray, guest: int, table: int, index: int) -> None:
        size = self.geometry.cluster_size
        words = unpack(f">{len(raw) // 8}Q", raw)
        for at in range(0, len(words), 2):
            self.extended(words[at], words[at + 1], guest, table, index + at // 2)
            guest += size

    def extended(self, word: int, bitmap: int, guest: int, table: int, index: int) -> None:
        """Add the pieces of one extended entry. Raises CorruptImage."""
        geometry = self.geometry
        size = geometry.cluster_size
        if word & L2_COMPRESSED:
            if geometry.data_file:
                raise compressed_in_data_file(guest, table, index)
            self.add(guest, size, COMPRESSED, None)
            return
        offset = word & OFFSET_MASK
        host: int | None = offset
        if not offset and not (geometry.data_file and word & COPIED):
            host = None
        allocated, zero = bitmap & _ALL, bitmap >> SUBCLUSTERS
        if allocated & zero or (allocated and host is None):
            raise self._invalid_bitmap(guest, table, index)
        if host is not None:
            self._check_host(offset, guest, table, index)
        if allocated == _ALL:
            self.add(guest, size, MAPPED, host)
        elif zero == _ALL:
            self.add(guest, size, ZERO, host)
        elif not bitmap:
            self.add(guest, size, HOLE, host)
        else:
            for number, flags in enumerate(subcluster_flags(allocated, zero)):
                at = number * geometry.subcluster
                self.add(guest + at, geometry.subcluster, flags, None if host is None else host + at)

    def _invalid_bitmap(self, guest: int, table: int, index: int) -> CorruptImage:
        """The real program counts a run to its end and so meets the bad entry from the run before it."""
        where = guest
        if self.pieces and index * self.geometry.entry_size % SLICE:
            start, length, flags, _host = self.pieces[-1]
            if start + length == guest and flags != COMPRESSED:
                where = max(start, guest - index * self.geometry.cluster_size)
        return corrupt(
            f"Invalid cluster entry found  (L2 offset: {c_hex(table)}, L2 index: {c_hex(index)})",
            where,
            table + index * self.geometry.entry_size,
        )


def subcluster_flags(allocated: int, zero: int) -> Iterator[int]:
    """Extent flags of the 32 subclusters of an entry with these bitmaps."""
    for bit in range(SUBCLUSTERS):
        if allocated >> bit & 1:
            yield MAPPED
        elif zero >> bit & 1:
            yield ZERO
        else:
            yield HOLE


def corrupt(reason: str, guest: int, offset: int) -> CorruptImage:
    """Damage met while looking up `guest`, found in the file at `offset`."""
    return CorruptImage(f"Image is corrupt: {reason}", offset=offset, guest=guest)


def compressed_in_data_file(guest: int, table: int, index: int) -> CorruptImage:
    """Compressed data cannot lie in an external data file (section 6)."""
    return corrupt(
        "Compressed cluster entry found in image with external data file"
        f" (L2 offset: {c_hex(table)}, L2 index: {c_hex(index)})",
        guest,
        table,
    )


def zero_before_v3(guest: int, table: int, index: int) -> CorruptImage:
    """Version 2 has no zero clusters (section 2)."""
    return corrupt(
        f"Zero cluster entry found in pre-v3 image (L2 offset: {c_hex(table)}, L2 index: {c_hex(index)})",
        guest,
        table,
    )


class Mapping:
    """One L1 table of an image and what hangs below it. Read-only; used from several threads at once.

    The L1 table is read on first use, at most 32 MiB (`ParsedHeader` bounds it). `data` is where guest
    data lies: the image file or the external data file.
    """

    def __init__(self, file: Storage, geometry: Geometry, l1_offset: int, l1_size: int) -> None:
        self.file = file
        self.data: Storage = file
        self.geometry = geometry
        self.l1_offset = l1_offset
        self.l1_size = l1_size
        self._l1: bytes | bytearray | None = None
        self._lock = allocate_lock()
        self._slices: dict[int, bytearray] = {}
        self._plain = 0  # entries decoded in plain Python so far

    # -- tables

    @property
    def l1(self) -> bytes | bytearray:
        """The L1 table as stored (big-endian)."""
        if self._l1 is None:
            self._l1 = self.file.read(self.l1_offset, self.l1_size * 8)
        return self._l1

    def tables(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(L1 index, host offset) of every L2 table that describes guest bytes of ``start .. end``.

        Raises CorruptImage for an unaligned one."""
        span = self.geometry.l1_span
        first = start // span
        last = min(-(-end // span), self.l1_size)
        l1 = memoryview(self.l1)
        step = SLICE // 8
        for low in range(first, last, step):
            part = l1[low * 8 : min(low + step, last) * 8]
            if _ZEROS.startswith(part):
                continue
            for number, word in enumerate(unpack(f">{len(part) // 8}Q", part)):
                offset = word & OFFSET_MASK
                if offset:
                    yield low + number, self._checked(offset, low + number, start)

    def _checked(self, offset: int, index: int, start: int) -> int:
        if offset & (self.geometry.cluster_size - 1):
            raise corrupt(
                f"L2 table offset {c_hex(offset)} unaligned (L1 index: {c_hex(index)})",
                max(start, index * self.geometry.l1_span),
                self.l1_offset + index * 8,
            )
        return offset

    def _slice(self, offset: int, length: int) -> bytearray:
        """A piece of an L2 table, from the cache if it can be."""
        with self._lock:
            found = self._slices.get(offset)
        if found is not None and len(found) == length:
            return found
        found = self.file.read(offset, length)
        with self._lock:
            while len(self._slices) >= _CACHED_SLICES:
                del self._slices[next(iter(self._slices))]
            self._slices[offset] = found
        return found

    def forget(self) -> None:
        """Drop what is cached: the tables changed."""
        with self._lock:
            self._l1 = None
            self._slices.clear()

    def _pieces_of_table(self, table: int, first: int, last: int) -> Iterator[tuple[int, bytearray]]:
        """(index, raw entries) that together are entries ``first .. last`` of the table at `table`."""
        entry = self.geometry.entry_size
        size = min(SLICE, self.geometry.cluster_size)
        for low in range(first * entry // size * size, last * entry, size):
            raw = self._slice(table + low, size)
            begin = max(first * entry - low, 0)
            end = min(last * entry - low, size)
            yield (low + begin) // entry, raw if end - begin == size else raw[begin:end]

    def entries(self, start: int, end: int) -> Sequence[int]:
        """First words of the L2 entries of the clusters that ``start .. end`` touches, 0 where there is no
        table. For few clusters. Raises CorruptImage."""
        geometry = self.geometry
        bits = geometry.cluster_bits
        first, last = start >> bits, -(-end >> bits)
        words = [0] * (last - first)
        for index, table in self.tables(start, end):
            base = index * geometry.l2_entries
            low, high = max(first, base), min(last, base + geometry.l2_entries)
            for at, raw in self._pieces_of_table(table, low - base, high - base):
                found = unpack(f">{len(raw) // 8}Q", raw)[:: geometry.entry_size // 8]
                words[base + at - first : base + at - first + len(found)] = found
        return words

    # -- lookup

    def extents(self, start: int, length: int) -> list[Extent]:
        """What ``start .. start + length`` is. Raises CorruptImage, StorageError."""
        if self._many(start, length):
            found = self.vector_extents(start, length)
            if found is not None:
                return found
        return self.plain_extents(start, length)

    def plain_extents(self, start: int, length: int) -> list[Extent]:
        """`extents` without numpy."""
        geometry = self.geometry
        decoder = Decoder(geometry)
        for base, table, first, last in self._parts(start, start + length):
            for at, raw in self._pieces_of_table(table, first, last):
                decoder.decode(raw, base + (at << geometry.cluster_bits), table, at)
        runs = Runs(start, length)
        data = self.data
        for begin, size, flags, host in decoder.pieces:
            runs.append(begin, size, flags, host, None if host is None else data)
        return runs.take()

    def vector_extents(self, start: int, length: int) -> list[Extent] | None:
        """`extents` by numpy. None if something is damaged: the plain path says what."""
        from qimg.vec.l2 import TableDecoder

        geometry = self.geometry
        decoder = TableDecoder(
            geometry.cluster_size,
            extended=geometry.extended,
            zero_clusters=geometry.zero_clusters,
            data_file=geometry.data_file,
        )
        batch = Batch(geometry)
        try:
            for base, table, first, last in self._parts(start, start + length):
                batch.add(base, table, first, last)
                if batch.length >= BATCH and not batch.decode(self.file, decoder):
                    return None
            if not batch.decode(self.file, decoder):
                return None
        except CorruptImage:
            return None
        return decoder.extents(start, length, self.data)

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(guest offset of its first entry, table offset, first, last entry) of the L2 tables that describe
        ``start .. end``, and which of their entries do."""
        span, bits = self.geometry.l1_span, self.geometry.cluster_bits
        for index, table in self.tables(start, end):
            base = index * span
            yield base, table, max(start - base, 0) >> bits, -(-min(end - base, span) >> bits)

    def _many(self, start: int, length: int) -> bool:
        """Whether numpy is the better way: it is loaded already, or the tables of the request, together
        with those decoded so far, are worth its import."""
        geometry = self.geometry
        clusters = length >> geometry.cluster_bits
        if clusters < _FEW:
            return False
        import sys

        if "numpy" in sys.modules:
            return True
        self._plain += min(clusters, self._tables_between(start, start + length) * geometry.l2_entries)
        return self._plain > PLAIN_ENTRIES

    def _tables_between(self, start: int, end: int) -> int:
        span = self.geometry.l1_span
        part = self.l1[start // span * 8 : -(-end // span) * 8]
        return len(part) // 8 - unpack(f">{len(part) // 8}Q", part).count(0)


class Batch:
    """Pieces of L2 tables to be read and decoded together."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._clear()

    def _clear(self) -> None:
        self.length = 0  # bytes
        self._reads: list[list[int]] = []  # [offset in the file, bytes]
        self._guests: list[int] = []
        self._counts: list[int] = []

    def add(self, base: int, table: int, first: int, last: int) -> None:
        """Entries ``first .. last`` of the table at `table`, whose entry 0 is the guest cluster at `base`."""
        entry = self._geometry.entry_size
        offset, length = table + first * entry, (last - first) * entry
        if self._reads and sum(self._reads[-1]) == offset:
            self._reads[-1][1] += length
        else:
            self._reads.append([offset, length])
        self._guests.append(base + first * self._geometry.cluster_size)
        self._counts.append(last - first)
        self.length += length

    def decode(self, file: Storage, decoder: TableDecoder) -> bool:
        """Read and decode what was added, and start anew. False if something is damaged."""
        if not self.length:
            return True
        raw = bytearray(self.length)
        view = memoryview(raw)
        at = 0
        for offset, length in self._reads:
            file.read_into(view[at : at + length], offset)
            at += length
        sound = decoder.feed(raw, self._guests, self._counts)
        self._clear()
        return sound
