"""The block allocation table (BAT): a word for each block and, after every chunk of blocks, one for the
sector bitmap of the chunk (vhdx sheet 1)."""

from __future__ import annotations

from array import array

from qimg.errors import FormatError
from qimg.extent import MAPPED, ZERO
from qimg.formats.blocks import BlockCode
from qimg.formats.tables import PAGE, WordTable, uniform
from qimg.formats.vhdx.structs import LOG_SECTOR, MIB, PARTIAL, PLACE, PRESENT, STATE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.storage.base import Storage

WORD = 8
_STEP = PAGE // WORD


class BatCode(BlockCode):
    """Words of blocks that are fully present."""

    def __init__(self, block: int, special: dict[int, int]) -> None:
        super().__init__(block, unit=1, special=special, mask=PLACE)

    def word(self, host: int) -> int:
        return host | PRESENT


class Bat(WordTable):
    """The BAT of a disk of `blocks` blocks. `words` are without reserved bits, and without a place where the
    state has none."""

    def __init__(
        self, file: Storage, offset: int, count: int, *, blocks: int, ratio: int, parent: bool
    ) -> None:
        """`count` of all words; `ratio`: blocks of a chunk; `parent`: there is one, so blocks may be here in
        part, and sector bitmaps count."""
        super().__init__(file, offset, count, size=WORD, big=False)
        self.blocks = blocks
        self.ratio = ratio
        self.parent = parent
        self.placed = (PRESENT, PARTIAL) if parent else (PRESENT,)

    def _plain(self, word: int) -> int:
        state = word & STATE
        return word & PLACE | state if state in self.placed else state

    def index(self, block: int) -> int:
        """Which word is the block's."""
        return block + block // self.ratio

    def bitmap_index(self, block: int) -> int:
        """Which word is that of the sector bitmap of the block's chunk."""
        return (block // self.ratio + 1) * (self.ratio + 1) - 1

    def words(self, first: int, last: int) -> array[int]:
        found = super().words(first, last)
        if not found:
            return found
        if uniform(found):
            return array("Q", [self._plain(found[0])]) * len(found)
        return array("Q", map(self._plain, found))

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, WordTable, int, int]]:
        """(first block, table, low, high) of the blocks `first` .. `last`: see `BlockImage.pieces`."""
        last = min(last, self.blocks)
        while first < last:
            step = min(last - first, self.ratio - first % self.ratio, _STEP)
            low = self.index(first)
            yield first, self, low, low + step
            first += step

    def changed_sectors(self) -> list[tuple[int, bytes]]:
        """(offset in the file, content) of the sectors that differ from the file, ascending; they count as
        written."""
        found = []
        per_sector = LOG_SECTOR // WORD
        for number in sorted(self._changed):
            low, high = self._changed[number]
            for first in range(low - low % per_sector, high, per_sector):
                at = self.offset + number * PAGE + first * WORD
                part = self._pages[number][first : first + per_sector]
                if self._swap:
                    part.byteswap()
                raw = part.tobytes()
                if len(raw) < LOG_SECTOR:  # the table's end: what follows stays
                    raw += bytes(self.file.read(at + len(raw), LOG_SECTOR - len(raw)))
                found.append((at, raw))
        self._changed.clear()
        return found

    def scan(self) -> Iterator[tuple[int, int, int]]:
        """(word's index, length of what it places, place) of all blocks and sector bitmaps that have a place;
        `length` 0 means a block. Looks at the file only, and skips its holes.

        Raises StorageError."""
        chunk = self.ratio + 1
        for low, high in self.filled():
            found = WordTable.words(self, low, high)
            if found[0] & STATE not in self.placed and uniform(found):
                continue
            for index, word in enumerate(found, low):
                if word & STATE not in self.placed:
                    continue
                if index % chunk != self.ratio:
                    yield index, 0, word & PLACE
                elif self.parent:
                    yield index, MIB, word & PLACE

    def filled(self) -> Iterator[tuple[int, int]]:
        """[low, high) of words that are not known to be zero, at most a page each."""
        at = 0
        for part in self.file.extents(self.offset, self.count * WORD):
            if part.flags & ZERO or not part.flags & MAPPED:
                continue
            low = max(at, (part.start - self.offset) // WORD)
            end = min(self.count, -(-(part.start + part.length - self.offset) // WORD))
            while low < end:
                high = min(end, low - low % _STEP + _STEP)
                yield low, high
                low = high
            at = max(at, end)


class Checker:
    """What is wrong with the places of blocks: they lie past the end of the file, or on something else."""

    def __init__(self, file: Storage, block: int, size: int, taken: list[tuple[int, int]]) -> None:
        """`size` of the disk. `taken`: [start, end) of what no block may lie in. Sizes in bytes."""
        self._end = file.size
        self._block = block
        self._tail = size % block or block
        self._taken = taken
        self._free = max(end for _start, end in taken)

    def problems(self, index: int, place: int, length: int, *, last: bool) -> Iterator[str]:
        """Lines, none where all is well; `length` 0: a block. Of the `last` one of the disk only what the
        disk needs has to be there."""
        end = place + (length or self._block)
        if place >= self._free and end <= self._end:
            return
        if end >= 1 << 63:
            yield f"VHDX BAT entry {index} offset overflow."
        truncated = f"points after end of file ({self._end}). Image has probably been truncated."
        if place >= self._end:
            yield f"VHDX BAT entry {index} start offset {place} {truncated}"
        elif end > self._end and not (last and place + self._tail <= self._end):
            yield f"VHDX BAT entry {index} end offset {end - 1} {truncated}"
        for start, stop in self._taken:
            if place < stop and start < end:
                yield f"VHDX region {place}-{end} overlaps with region {start}-{stop}"


def find_problems(bat: Bat, checker: Checker, report: Callable[[str], None]) -> int:
    """Look at every place; the problems, which go to `report`."""
    count = 0
    last = bat.index(bat.blocks - 1) if bat.blocks else 0
    for index, length, place in bat.scan():
        for problem in checker.problems(index, place, length, last=index == last):
            report(problem)
            count += 1
    return count


def check_places(file: Storage, bat: Bat, checker: Checker) -> None:
    """Raise FormatError for the first block that cannot be where its word says."""

    def stop(problem: str) -> None:
        raise FormatError(problem, file=file.name, field="bat", offset=bat.offset)

    find_problems(bat, checker, stop)
