"""Space-efficient sparse extents of ESX, for reading (vmdk sheet 5.2). All words have 64 bits."""

from __future__ import annotations

import sys
from array import array

from qimg.errors import CorruptImage, FormatError, NotSupported, UnsupportedFeature
from qimg.extent import HOLE, MAPPED, ZERO, Runs
from qimg.formats.tables import WordTable
from qimg.formats.vmdk.part import Part
from qimg.formats.vmdk.structs import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.extent import Extent
    from qimg.storage.base import Storage

MAGIC = 0xCAFEBABE
VOLATILE_MAGIC = 0xCAFECAFE
VERSION = 0x0000000200000001
GRAIN_SECTORS = 8
TABLE_SECTORS = 64
GRAIN = GRAIN_SECTORS * SECTOR
_PER_TABLE = TABLE_SECTORS * SECTOR // 8
_WORDS = SECTOR // 8

# Words of the constant header.
_CAPACITY, _GRAIN, _TABLE, _FLAGS, _RESERVED, _VOLATILE = 2, 3, 4, 5, 6, 10
_DIRECTORY, _DIRECTORY_SIZE, _TABLES, _GRAINS = 16, 17, 18, 24
_PADDING = 26
# Words of the volatile header.
_REPLAY, _VOLATILE_PADDING = 3, 4

_DIRECTORY_PRESENT = 0x10000000
#: Top 4 bits of a grain table entry.
_NONE, _UNMAPPED, _ZERO, _ALLOCATED = 0, 1, 2, 3
#: Sectors of anything lie below this: more than any file has.
_MAX_SECTOR = 1 << 54


def _words(file: Storage, sector: int) -> array[int]:
    words = array("Q", bytes(file.read(sector * SECTOR, SECTOR)))
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _check(file: Storage, wrong: bool, message: str, field: str) -> None:
    if wrong:
        raise UnsupportedFeature(message, file=file.name, field=field)


class SeSparsePart(Part):
    """One extent, read-only."""

    format_name = "vmdk"
    kind = "SESPARSE"
    read_only = True
    cluster_size = GRAIN

    def __init__(self, file: Storage, *, writable: bool = False) -> None:
        """Raises FormatError, UnsupportedFeature in the order of section 5.2."""
        words = _words(file, 0)
        if words[0] != MAGIC:
            raise FormatError(f"Bad const header magic: {words[0]:#x}", file=file.name, field="header.magic")
        _check(file, words[1] != VERSION, f"Unsupported version: {words[1]:#x}", "header.version")
        size = words[_GRAIN]
        _check(file, size != GRAIN_SECTORS, f"Unsupported grain size: {size}", "header.grain_size")
        size = words[_TABLE]
        _check(file, size != TABLE_SECTORS, f"Unsupported grain table size: {size}", "header.table_size")
        _check(file, words[_FLAGS] != 0, f"Unsupported flags: {words[_FLAGS]:#x}", "header.flags")
        reserved = words[_RESERVED:_VOLATILE]
        shown = " ".join(f"{word:#x}" for word in reserved)
        _check(file, any(reserved), f"Unsupported reserved bits: {shown}", "header.reserved")
        padding = any(words[_PADDING:])
        _check(file, padding, "Unsupported non-zero const header padding", "header.padding")
        for at in (_CAPACITY, _VOLATILE, _DIRECTORY, _DIRECTORY_SIZE, _TABLES, _GRAINS):
            _check(file, words[at] >= _MAX_SECTOR, "Offset or size beyond any file", f"header.word{at}")
        _check_volatile(file, words[_VOLATILE])
        if writable:
            raise UnsupportedFeature("No write support for seSparse images available", file=file.name)
        self.file = file
        self.size = words[_CAPACITY] * SECTOR
        self._tables = words[_TABLES] * SECTOR
        self._grains = words[_GRAINS] * SECTOR
        needed = -(-self.size // (GRAIN * _PER_TABLE))
        count = words[_DIRECTORY_SIZE] * _WORDS
        if count < needed:
            raise FormatError("L1 size too small", file=file.name, field="header.directory_size")
        self._directory = WordTable(file, words[_DIRECTORY] * SECTOR, needed, size=8, big=False)

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        span = GRAIN * _PER_TABLE
        at, end = start, start + length
        while at < end:
            number = at // span
            stop = min(end, (number + 1) * span)
            self._add(runs, number, at // GRAIN, -(-stop // GRAIN))
            at = stop
        return runs.take()

    def _add(self, runs: Runs, number: int, first: int, last: int) -> None:
        """Add the grains `first` .. `last`, which table `number` describes."""
        (word,) = self._directory.words(number, number + 1)
        if not word:
            return
        if word >> 32 != _DIRECTORY_PRESENT:
            raise self._damaged(f"grain directory entry {number} is {word:#x}", number * _PER_TABLE * GRAIN)
        low = first - number * _PER_TABLE
        place = self._tables + (word & 0xFFFFFFFF) * TABLE_SECTORS * SECTOR + low * 8
        words = array("Q", bytes(self.file.read(place, (last - first) * 8)))
        if sys.byteorder == "big":
            words.byteswap()
        for block, word in enumerate(words, first):
            kind = word >> 60
            if kind == _ALLOCATED:
                index = (word >> 48 & 0xFFF) | (word & 0xFFFFFFFFFFFF) << 12
                runs.append(block * GRAIN, GRAIN, MAPPED, self._grains + index * GRAIN, self.file)
            elif kind in (_UNMAPPED, _ZERO):
                runs.append(block * GRAIN, GRAIN, ZERO)
            elif word:
                raise self._damaged(f"grain table entry {block} is {word:#x}", block * GRAIN)
            else:
                runs.append(block * GRAIN, GRAIN, HOLE)

    def _damaged(self, what: str, guest: int) -> CorruptImage:
        return CorruptImage(f"Damaged seSparse extent: {what}", file=self.file.name, guest=guest)

    def allocate(self, start: int, length: int) -> list[Extent]:
        raise NotSupported("No write support for seSparse images available")


def _check_volatile(file: Storage, sector: int) -> None:
    words = _words(file, sector)
    if words[0] != VOLATILE_MAGIC:
        raise FormatError(f"Bad volatile header magic: {words[0]:#x}", file=file.name, field="volatile.magic")
    if words[_REPLAY]:
        raise UnsupportedFeature(
            "Image is dirty, Replaying journal not supported", file=file.name, field="volatile.replay"
        )
    padding = any(words[_VOLATILE_PADDING:])
    _check(file, padding, "Unsupported non-zero volatile header padding", "volatile.padding")
