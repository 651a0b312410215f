"""What `check` looks at in sparse extents (vmdk sheet 8).

First what the real program looks for, which ends the check: a grain behind the end of the file. Then what
it does not see: tables outside of the file, grains inside of the metadata, grains that lie over one
another, and a second copy of a grain table that says something else. Memory is bounded: overlaps are looked
for in slices of the file.
"""

from __future__ import annotations

import errno
from array import array
from itertools import pairwise

from qimg.errors import StorageError
from qimg.formats.vmdk.structs import SECTOR, ZERO_GRAIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.vmdk.sparse import SparsePart

    Report = Callable[[str], None]

#: Grains whose places are compared at once.
_SLICE = 4 << 20
#: Directory entries looked at together.
_STEP = 1 << 14
#: Findings that are told one by one.
_TOLD = 100


class _Count:
    """Reports up to a number of findings and counts all."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._told = 0
        self.total = 0

    def add(self, text: str) -> None:
        self.total += 1
        if self._told < _TOLD:
            self._told += 1
            self._report(f"ERROR: {text}")


def check_grains(part: SparsePart, report: Report, first_sector: int) -> int:
    """`Part.check_grains`."""
    found = _Count(report)
    if not _have_room(part):
        found.add("grain tables lie over one another")
        return found.total
    count = _find_beyond(part, report, first_sector)
    _check_tables(part, found)
    if count:
        _check_metadata(part, found, first_sector)
        _check_overlaps(part, found, count)
    return found.total


def _is_place(part: SparsePart, word: int) -> bool:
    return word > ZERO_GRAIN or (word == ZERO_GRAIN and not part.geometry.zeroed_grain)


def _find_beyond(part: SparsePart, report: Report, first_sector: int) -> int:
    """How many grains have a place. Raises StorageError for one behind the end of the file."""
    end = -(-part.file.size // SECTOR)
    count = 0
    for first, words in part.filled():
        if max(words) >= end:
            number = next(at for at, word in enumerate(words) if word >= end) + first
            sector = first_sector + number * (part.geometry.grain // SECTOR)
            report(f"ERROR: cluster offset for sector {sector} points after EOF")
            raise StorageError("Invalid argument", errno=errno.EINVAL)
        count += len(words) - words.count(0)
    return count


def _have_room(part: SparsePart) -> bool:
    """Whether the file has room for all grain tables that are named; to look at more may take forever."""
    room = part.file.size // part.geometry.table_bytes
    for first in range(0, part.geometry.listed, _STEP):
        words = part.tables.directory.words(first, min(first + _STEP, part.geometry.listed))
        room -= len(words) - words.count(0)
    return room >= 0


def _check_tables(part: SparsePart, found: _Count) -> None:
    """Grain tables have to lie in the file, and their copies to say the same."""
    geometry, tables = part.geometry, part.tables
    size = geometry.table_bytes
    for first in range(0, geometry.listed, _STEP):
        last = min(first + _STEP, geometry.listed)
        words = tables.directory.words(first, last)
        copies = None if tables.redundant is None else tables.redundant.words(first, last)
        for number, word in enumerate(words, first):
            if word and word * SECTOR + size > part.file.size:
                found.add(f"grain table {number} lies behind the end of the file")
            elif copies is not None and word:
                copy = copies[number - first]
                if not _same(part, word, copy, size):
                    found.add(f"grain table {number} differs from its second copy")


def _same(part: SparsePart, word: int, copy: int, size: int) -> bool:
    if word == copy:
        return True
    return part.file.read(word * SECTOR, size) == part.file.read(copy * SECTOR, size)


def _check_metadata(part: SparsePart, found: _Count, first_sector: int) -> None:
    """No grain lies in front of where data begins."""
    start = part.geometry.data_start // SECTOR
    for first, words in part.filled():
        # Sound tables have nothing but zeros (and marks of zeros) below.
        if min(words, default=0) >= start:
            continue
        for at, word in enumerate(words):
            if word < start and word and _is_place(part, word):
                sector = first_sector + (first + at) * (part.geometry.grain // SECTOR)
                found.add(f"cluster offset for sector {sector} lies in the metadata")


def _check_overlaps(part: SparsePart, found: _Count, count: int) -> None:
    """Two grains have two places."""
    length = 1 if part.geometry.compressed else part.geometry.grain // SECTOR
    slices = -(-count // _SLICE)
    if not slices:
        return
    end = -(-part.file.size // SECTOR) + 1
    step = -(-end // slices)
    for low in range(0, end, step):
        # A grain that begins in front of the slice may reach into it.
        here = _sorted(part, max(0, low - length + 1), low + step)
        for before, after in pairwise(here):
            if after - before < length and after >= low:
                found.add(f"two grains lie over one another at offset {after * SECTOR:#x}")


def _sorted(part: SparsePart, low: int, high: int) -> list[int]:
    """Places in ``low .. high``, ascending."""
    kept = array("I")
    for _first, words in part.filled():
        kept.extend([word for word in words if low <= word < high and _is_place(part, word)])
    return sorted(kept)
