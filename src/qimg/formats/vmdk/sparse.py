"""Sparse extents: hosted sparse (``KDMV``) and ESX delta extents (``COWD``) (vmdk sheet 4, 5.1, 6).

New grains go behind everything that the file holds or its tables name, at a multiple of the grain. Order of
writes: data, barrier, grain tables (both copies), barrier, directories if tables were added, barrier. A new
extent gets its header last.
"""

from __future__ import annotations

import errno
import os

from qimg.errors import CorruptImage, StorageError
from qimg.extent import HOLE, ZERO
from qimg.formats.base import Reference
from qimg.formats.blocks import STAGE_LIMIT, BlockCode, BlockImage
from qimg.formats.vmdk.part import Part
from qimg.formats.vmdk.structs import MAX_SECTOR, SECTOR, ZERO_GRAIN
from qimg.formats.vmdk.tables import PIECE, Tables
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator

    from qimg.formats.tables import WordTable
    from qimg.formats.vmdk.header import Geometry
    from qimg.formats.vmdk.structs import SparseHeader
    from qimg.storage.base import Storage

#: All bits of a table entry.
_ANY = 0xFFFFFFFF
_ZEROS = bytes(4 * PIECE)


class SparsePart(Part, BlockImage):
    """One sparse extent."""

    format_name = "vmdk"
    can_write = True

    def __init__(
        self,
        file: Storage,
        geometry: Geometry,
        *,
        kind: str = "",
        writable: bool = False,
        covered: bool = False,
        header: bytes | None = None,
    ) -> None:
        """`header`: the extent is new, and this is to be written at its beginning when all else is there.
        `covered`: something lies below, so that grains have to be written whole."""
        self.file = file
        self.geometry = geometry
        self.size = geometry.size
        self.kind = kind
        # The image has the name; here it only says that something shows through.
        self.backing = Reference("", "vmdk") if covered else None
        self.cluster_size = geometry.grain
        self.compressed = geometry.compressed
        self.granularity = geometry.grain if covered or geometry.compressed else SECTOR
        self.can_write = header is None
        self.zero_init = header is not None and file.zero_init and not covered
        self.can_mark_zero = not covered or geometry.zeroed_grain
        special = {0: HOLE, ZERO_GRAIN: ZERO} if geometry.zeroed_grain else {0: HOLE}
        self.code = BlockCode(
            geometry.grain, unit=SECTOR, special=special, compressed=_ANY if geometry.compressed else 0
        )
        self.tables = Tables(file, geometry)
        self._header = header
        self._writable = writable
        self._next = round_up(geometry.data_start, geometry.grain) if header is not None else None

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return self.tables.pieces(first, min(last, self.geometry.grains), self._add_table if create else None)

    def validate(self, block: int, count: int, host: int) -> None:
        # Reading follows every entry; writing through one that leads into the tables would destroy them.
        if self._writable and host < self.geometry.data_start:
            raise CorruptImage(
                f"The grain at guest offset {block * self.cluster_size:#x} lies in the metadata",
                file=self.file.name,
                offset=host,
                guest=block * self.cluster_size,
            )

    # -- writing

    def take(self, length: int, unit: int = 0) -> int:
        """Offset of `length` new bytes, at a multiple of `unit` (0: the grain). Raises StorageError."""
        if self._next is None:
            self._next = self._used()
        start = round_up(self._next, unit or self.cluster_size)
        if (start + length) // SECTOR > MAX_SECTOR:
            number = errno.EFBIG
            raise StorageError(os.strerror(number), errno=number, offset=start)
        if start < self.file.size:
            self.file.zero(start, min(length, self.file.size - start))
        self._next = start + length
        return start

    def place(self, block: int, count: int) -> tuple[int, int]:
        return self.take(count * self.cluster_size), count

    def _used(self) -> int:
        """The end of what the file holds and of what its tables name: a file that was cut off must not get
        new grains where an old one was."""
        end = 0 if self.file.fixed_size else self.file.size
        for _first, words in self.filled():
            end = max(end, max(words) * SECTOR + self.cluster_size)
        return max(end, self.geometry.data_start)

    def filled(self) -> Iterator[tuple[int, array[int]]]:
        """(number of the first grain, entries) of all pieces of the tables that do not consist of zeros."""
        for first, table, low, high in self.pieces(0, self.geometry.grains, create=False):
            words = table.words(low, high)
            if words.tobytes() != _ZEROS[: 4 * len(words)]:
                yield first, words

    def _add_table(self, number: int) -> None:
        size = self.geometry.table_bytes
        copies = 1 if self.tables.redundant is None else 2
        host = self.take(copies * size, SECTOR)
        self.tables.add(number, host, host + size if copies == 2 else None)

    def zero_absent(self, start: int, length: int) -> None:
        if not self.geometry.zeroed_grain:
            super().zero_absent(start, length)
        from array import array

        size = self.cluster_size
        for _first, table, low, high in self.pieces(start // size, -(-(start + length) // size), create=True):
            table.put(low, array("I", [ZERO_GRAIN]) * (high - low))

    def clear_entries(self, first: int, last: int) -> None:
        """Stage that the grains `first` .. `last` have no place."""
        from array import array

        for _first, table, low, high in self.pieces(first, last, create=True):
            if any(table.words(low, high)):
                table.put(low, array("I", bytes(4 * (high - low))))

    def adopt(self, header: SparseHeader) -> None:
        """Go on with the tables and the size of `header`. Nothing must be staged."""
        self.geometry = self.geometry.with_tables(header)
        self.tables = Tables(self.file, self.geometry)
        self.size = self.geometry.size

    # -- the end

    def levels(self) -> list[list[WordTable]]:
        return self.tables.levels()

    @property
    def wants_flush(self) -> bool:  # type: ignore[override]
        return self.tables.staged > STAGE_LIMIT

    def settle(self) -> None:
        if self._next is not None and not self.file.fixed_size and self.file.size < self._next:
            self.file.resize(self._next)

    def finish(self) -> None:
        self.tables.written()
        if self.geometry.next_free is not None and self._next is not None:
            word = min(self._next // SECTOR, _ANY).to_bytes(4, "little")
            if self.file.read(self.geometry.next_free, 4) != word:
                self.file.write(word, self.geometry.next_free)
                self.file.flush()
        if self._header is not None:
            self.file.write(self._header, 0)
            self.file.flush()
            self._header = None

    # -- check

    def check_grains(self, report: Callable[[str], None], first_sector: int) -> int:
        from qimg.formats.vmdk.check import check_grains

        return check_grains(self, report, first_sector)
