"""parallels: expandable images of Parallels, versions 1 and 2 (parallels sheet).

A header, the block allocation table (BAT), clusters. While a writer is at work the header says so; data goes
into clusters that nothing refers to, and the table follows after a barrier.
"""

from __future__ import annotations

from array import array

from qimg.errors import LimitError, NotSupported, OptionError
from qimg.extent import HOLE
from qimg.formats.blocks import BlockCode, BlockImage, pieces_of
from qimg.formats.parallels.structs import IN_USE, WORD, Header, check_size
from qimg.formats.tables import WordTable
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.formats.base import BitmapData, CheckResult
    from qimg.storage.base import Storage


class ParallelsImage(BlockImage):
    """One image."""

    format_name = "parallels"
    shows_cluster_size = False
    can_mark_zero = True

    def __init__(self, file: Storage, header: Header, context: Context, *, new: bool = False) -> None:
        """`new`: `header` is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.header = header
        self.context = context
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.can_write = not new
        self.granularity = self.cluster_size if file.fixed_size else SECTOR
        self.zero_init = new and file.zero_init
        unit = self.cluster_size if header.is_v2 else SECTOR
        self.code = BlockCode(self.cluster_size, unit=unit, special={0: HOLE})
        self._bat = WordTable(file, Header.SIZE, header.bat_entries, size=WORD, big=False)
        self._pending = new
        self._marked = False  # the file says that it is in use
        self._end: int | None = header.data_start() if new else None

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return pieces_of(self._bat, first, last)

    def levels(self) -> list[list[WordTable]]:
        return [[self._bat]]

    def words(self) -> Iterator[tuple[int, int]]:
        """(guest cluster, word) of every cluster that has a place."""
        for first, table, low, high in self.pieces(0, self.header.bat_entries, create=False):
            for number, word in enumerate(table.words(low, high), first):
                if word:
                    yield number, word

    # -- writing

    def begin(self) -> None:
        if self._pending or self._marked:
            return
        if self.header.ext_offset:
            raise NotSupported("Writing to parallels images with a format extension is not supported")
        self.mark(IN_USE)
        self._marked = True

    def mark(self, value: int) -> None:
        """Write the header's word that says whether the image is in use. Durable when it returns."""
        self.header.in_use = value
        self.file.write(value.to_bytes(4, "little"), Header.offset_of("in_use"))
        self.file.flush()

    def _used_end(self) -> int:
        """End of the last cluster in use, in bytes."""
        last = max((word for _number, word in self.words()), default=0)
        return max(self.code.host(last) + self.cluster_size if last else 0, self.header.data_start())

    def place(self, block: int, count: int) -> tuple[int, int]:
        if self._end is None:
            self._end = self._used_end()
        host, length = self._end, count * self.cluster_size
        if (host + length) // self.code.unit >> 32:
            raise LimitError("The image has no more room for clusters")
        if host < self.file.size:
            self.file.zero(host, min(length, self.file.size - host))
        self._end = host + length
        return host, count

    def settle(self) -> None:
        if self._end is not None and not self.file.fixed_size and self.file.size < self._end:
            self.file.resize(self._end)

    def finish(self) -> None:
        if self._pending:
            self.file.write(self.header.pack(), 0)
            self.file.flush()
            self._pending = False
        elif self._marked:
            self.mark(0)
            self._marked = False

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """Grow, as long as the table's entries fit before the data (qimg only)."""
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
        if size < self.size:
            raise NotSupported("Shrinking images is currently not supported")
        if size % SECTOR:
            raise OptionError(f"The new size must be a multiple of {SECTOR}", option="size")
        self.flush()
        header = self.header
        entries = -(-size // self.cluster_size)
        check_size(size, self.cluster_size)
        if not header.is_v2 and size // SECTOR >> 32:
            raise LimitError("The image size is too large for this image's version")
        self.begin()
        if Header.SIZE + WORD * entries > header.data_start():
            self._make_room(Header.SIZE + WORD * entries)
        if entries > header.bat_entries:
            start = Header.SIZE + WORD * header.bat_entries
            self.file.write(bytes(WORD * (entries - header.bat_entries)), start)
            self.file.flush()
            header.bat_entries = entries
        header.sectors = size // SECTOR
        header.in_use = 0
        self.file.write(header.pack(), 0)
        self.file.flush()
        self._marked = False
        self.size = size
        self._bat = WordTable(self.file, Header.SIZE, header.bat_entries, size=WORD, big=False)

    def _make_room(self, end: int) -> None:
        """Move the clusters that begin before `end` behind all others; the data area begins later then."""
        start = round_up(end, self.cluster_size if self.header.is_v2 else SECTOR)
        for number, word in list(self.words()):
            host = self.code.host(word)
            if host >= start:
                continue
            place, _count = self.place(number, 1)
            self.file.write(self.file.read(host, self.cluster_size), place)
            self._bat.put(number, array("I", [self.code.word(place)]))
        self.settle()
        self.file.flush()
        self._bat.write()
        self.file.flush()
        self.header.data_offset = start // SECTOR
        if not self.file.fixed_size and self.file.size < start:
            self.file.resize(start)
        self.file.write(self.header.data_offset.to_bytes(4, "little"), Header.offset_of("data_offset"))
        self.file.flush()
        self._end = max(self._used_end(), start)

    # -- bitmaps

    def bitmaps(self) -> list[BitmapData]:
        from qimg.formats.parallels.extension import read_bitmaps

        return read_bitmaps(self.file, self.header)

    # -- check

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        from qimg.formats.parallels.check import Checker

        return Checker(self, report, fix).run()
