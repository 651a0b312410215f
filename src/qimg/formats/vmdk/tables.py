"""The two levels of tables of a sparse extent: grain directory and grain tables (vmdk sheet 4, 5.1).

Grain tables that follow each other in the file are one `WordTable`, so that a large sound image has few. Of
the directory's pages, a few are kept with their tables; tables with staged words stay until they are
written.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from qimg.errors import CorruptImage
from qimg.extent import HOLE
from qimg.formats.blocks import BlockCode
from qimg.formats.tables import WordTable
from qimg.formats.vmdk.structs import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.formats.vmdk.header import Geometry
    from qimg.storage.base import Storage

    # (first grain table, how many, their words or None where there are none)
    Segment = tuple[int, int, "WordTable | None"]

#: Directory entries that are looked at together, and how many such pages are kept.
_PAGE = 1 << 12
_PAGES = 4
#: Words given at once.
PIECE = 1 << 16
_WORD = 4


class GrainTables(WordTable):
    """Neighbouring grain tables, each of which may have a second copy elsewhere in the file."""

    def __init__(
        self, file: Storage, offset: int, count: int, step: int, copy_of: Callable[[int], int | None]
    ) -> None:
        """`step` bytes are one grain table; `copy_of` gives the place of the copy of the n-th."""
        super().__init__(file, offset, count, size=_WORD, big=False)
        self._step = step
        self._copy_of = copy_of

    def store(self, raw: bytes, at: int) -> None:
        super().store(raw, at)
        done = 0
        while done < len(raw):
            number, inside = divmod(at + done, self._step)
            part = raw[done : done + self._step - inside]
            place = self._copy_of(number)
            if place is not None:
                self.file.write(part, place + inside)
            done += len(part)


class Tables:
    """All tables of one extent. Grain tables are numbered as the directory has them."""

    def __init__(self, file: Storage, geometry: Geometry) -> None:
        self._file = file
        self._geometry = geometry
        listed = geometry.listed
        self.directory = WordTable(file, geometry.directory, listed, size=_WORD, big=False)
        self.redundant: WordTable | None = None
        if geometry.redundant is not None:
            self.redundant = WordTable(file, geometry.redundant, listed, size=_WORD, big=False)
        step = geometry.table_bytes
        self._code = BlockCode(step, unit=SECTOR, special={0: HOLE}, stride=step)
        self._pages: dict[int, list[Segment]] = {}
        self._touched: dict[int, WordTable] = {}  # by first grain table
        self._pinned: set[int] = set()

    # -- finding

    def _segments(self, page: int) -> list[Segment]:
        found = self._pages.get(page)
        if found is None:
            first = page * _PAGE
            words = self.directory.words(first, min(first + _PAGE, self._geometry.listed))
            found = [
                (first + at, stop - at, self._table(first + at, stop - at, host))
                for at, stop, _flags, host in self._code.runs(words)
            ]
            self._make_room()
            self._pages[page] = found
        return found

    def _make_room(self) -> None:
        """Forget a page without changed tables if there are many."""
        if len(self._pages) >= _PAGES:
            for page in list(self._pages):  # several threads may be here
                if page not in self._pinned:
                    self._pages.pop(page, None)
                    return

    def _table(self, first: int, count: int, host: int | None) -> WordTable | None:
        if host is None:
            return None
        step = self._geometry.table_bytes
        return GrainTables(
            self._file, host, count * step // _WORD, step, lambda number: self._copy_of(first + number)
        )

    def _copy_of(self, number: int) -> int | None:
        """Where the second copy of grain table `number` is."""
        if self.redundant is None:
            return None
        (word,) = self.redundant.words(number, number + 1)
        start = word * SECTOR
        # What does not look like a table is left alone.
        if start < SECTOR or start + self._geometry.table_bytes > self._file.size:
            return None
        return start

    def _segment(self, number: int) -> Segment:
        """The segment that grain table `number` belongs to."""
        if number >= self._geometry.listed:
            return number, 1 << 62, None
        segments = self._segments(number // _PAGE)
        return segments[bisect_right(segments, number, key=lambda segment: segment[0]) - 1]

    def pieces(
        self, first: int, last: int, make: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, WordTable, int, int]]:
        """`BlockImage.pieces`. With `make`, which calls `add`, missing grain tables are made, and those given
        count as changed."""
        per = self._geometry.per_table
        padded = self._geometry.table_bytes // _WORD
        while first < last:
            number, inside = divmod(first, per)
            start, count, table = self._segment(number)
            if table is None and make is not None:
                make(number)
                start, count, table = self._segment(number)
            # Tables whose words do not fill their sectors are taken one by one.
            stop = start + count if padded == per or table is None else number + 1
            end = min(last, stop * per, first + PIECE)
            if table is not None:
                low = (number - start) * padded + inside
                skipped = table.hole(low, low + end - first) if make is None else 0
                if skipped:
                    first += skipped
                    continue
                if make is not None:
                    self._touched[start] = table
                    self._pinned.add(start // _PAGE)
                yield first, table, low, low + end - first
            first = end

    # -- changing

    def add(self, number: int, host: int, copy: int | None) -> None:
        """Stage a new grain table `number` of zeros at `host`, and its second copy. Raises CorruptImage."""
        if number >= self._geometry.listed:
            raise CorruptImage("The grain directory is too short for the disk", file=self._file.name)
        start, count, _ = found = self._segment(number)
        self.directory.put(number, array("I", [host // SECTOR]))
        if self.redundant is not None and copy is not None:
            self.redundant.put(number, array("I", [copy // SECTOR]))
        fresh = self._table(number, 1, host)
        assert fresh is not None
        self._touched[number] = fresh
        self._pinned.add(number // _PAGE)
        parts: list[Segment] = [
            (start, number - start, None),
            (number, 1, fresh),
            (number + 1, start + count - number - 1, None),
        ]
        segments = self._pages[number // _PAGE]
        at = segments.index(found)
        segments[at : at + 1] = [part for part in parts if part[1]]

    @property
    def staged(self) -> int:
        """Bytes in memory that wait for `write`."""
        return sum(table.staged for level in self.levels() for table in level)

    def levels(self) -> list[list[WordTable]]:
        """Tables that may have changed, the deepest level first."""
        directories = [self.directory] if self.redundant is None else [self.directory, self.redundant]
        return [list(self._touched.values()), directories]

    def written(self) -> None:
        """All levels are in the file."""
        self._touched.clear()
        self._pinned.clear()
