"""Writing a stream-optimized extent from front to back (vmdk sheet 4.2).

The first sector says that the tables are at the end; grains follow, each behind its marker, by ascending
guest offset; each grain table follows its grains, the directory follows the last one; the footer, a copy of
the header that knows where the directory is, and an end mark complete the file. Nothing is written twice,
and no byte before another: importers take such a file from a pipe. Until the footer is there, every reader
refuses the file.
"""

from __future__ import annotations

from array import array

from qimg.errors import NotSupported
from qimg.extent import COMPRESSED, HOLE, Runs
from qimg.formats.vmdk.part import Part
from qimg.formats.vmdk.stream import encode_grain, marker, with_marker
from qimg.formats.vmdk.structs import (
    AT_END,
    GRAIN,
    MARKER_DIRECTORY,
    MARKER_END,
    MARKER_FOOTER,
    MARKER_TABLE,
    MAX_SECTOR,
    SECTOR,
    TABLE_ENTRIES,
    TABLE_SECTORS,
    ZERO_GRAIN,
)
from qimg.formats.vmdk.writing import BatchWriter, little

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.extent import Extent
    from qimg.formats.vmdk.structs import SparseHeader
    from qimg.storage.base import Buffer, Bytes, Storage


class FreshStream(Part):
    """A new extent that takes its grains in ascending order, once, and is complete after `flush`."""

    format_name = "vmdk"
    compressed = True
    cluster_size = GRAIN
    granularity = GRAIN
    can_compress = True

    def __init__(
        self, file: Storage, header: SparseHeader, descriptor: bytes, *, zeroed_grain: bool, covered: bool
    ) -> None:
        """`header` as the footer will have it, `descriptor` filled up to its sectors. `covered`: something
        lies below, so that zeros have to be said."""
        self.file = file
        self.size = header.capacity * SECTOR
        self.zero_init = not covered
        self.can_mark_zero = True
        self._covered = covered
        self._zeroed_grain = zeroed_grain
        self._header = header
        self._descriptor = descriptor
        self._writer = BatchWriter(file)
        self._end = 0
        self._directory = array("I", bytes(4 * (-(-self.size // (GRAIN * TABLE_ENTRIES)))))
        self._table = array("I", bytes(4 * TABLE_ENTRIES))
        self._number = -1  # of the table that is being filled
        self._done = False
        self._zeros: bytes | None = None

    # -- reading what has been written so far: nothing of it can be read before the end

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        runs.append(start, length, COMPRESSED if self._end else HOLE)
        return runs.take()

    def read_into(self, buf: Buffer, guest: int) -> None:
        raise NotSupported("A stream that is being written cannot be read")

    # -- writing

    def _put(self, *parts: Bytes) -> int:
        """Append whole sectors; the sector of the first."""
        sector, length = self._end // SECTOR, sum(map(len, parts))
        if sector + length // SECTOR > MAX_SECTOR:
            from errno import EFBIG

            from qimg.errors import StorageError

            raise StorageError("File too large", errno=EFBIG, offset=self._end)
        self._writer.put(self._end, *parts)
        self._end += length
        return sector

    def _start(self) -> None:
        if not self._end:
            from qimg.formats.vmdk.structs import SparseHeader

            head = SparseHeader.unpack(self._header.pack())
            head.directory_offset = AT_END
            front = head.pack() + self._descriptor
            self._put(front.ljust(self._header.overhead * SECTOR, b"\0"))

    def _entry(self, guest: int) -> int:
        """Index of a grain in the table that is being filled, which becomes the one that has it."""
        number, index = divmod(guest // GRAIN, TABLE_ENTRIES)
        if number < self._number:
            raise NotSupported("A stream takes its grains in ascending order only")
        if number > self._number:
            self._end_table()
            self._number = number
        return index

    def _end_table(self) -> None:
        """Write the table, unless it is empty."""
        if any(self._table):
            self._put(marker(TABLE_SECTORS, MARKER_TABLE))
            self._directory[self._number] = self._put(little(self._table))
            self._table = array("I", bytes(4 * TABLE_ENTRIES))

    def encode(self, data: Bytes) -> bytes:
        return encode_grain(data)

    def write_encoded(self, guest: int, data: bytes) -> None:
        self._start()
        index = self._entry(guest)
        self._table[index] = self._put(*with_marker(guest, data))

    def allocate(self, start: int, length: int) -> list[Extent]:
        raise NotSupported("Compressed extents take whole compressed grains only")

    def mark_zero(self, start: int, length: int) -> None:
        if not self._covered:
            return
        self._start()
        for guest in range(start, start + length, GRAIN):
            if self._zeroed_grain:
                self._table[self._entry(guest)] = ZERO_GRAIN
                continue
            if self._zeros is None:
                self._zeros = encode_grain(bytes(GRAIN))
            self.write_encoded(guest, self._zeros)

    def flush(self) -> None:
        """Complete the file; nothing can be added afterwards."""
        if self._done:
            self.file.flush()
            return
        self._start()
        self._end_table()
        raw = little(self._directory)
        raw += bytes(-len(raw) % SECTOR)
        self._put(marker(len(raw) // SECTOR, MARKER_DIRECTORY))
        self._header.directory_offset = self._put(raw)
        self._writer.flush()
        self.file.flush()
        self._put(marker(1, MARKER_FOOTER) + self._header.pack() + marker(0, MARKER_END))
        self._writer.flush()
        self.file.flush()
        self._done = True
