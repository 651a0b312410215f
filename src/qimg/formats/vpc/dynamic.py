"""Dynamic images: header, block allocation table, blocks (vpc sheet, sections 1 and 5)."""

from __future__ import annotations

from errno import EINVAL

from qimg.errors import CorruptImage, LimitError, NotSupported, StorageError
from qimg.extent import HOLE, MAPPED, ZERO, Extent, Runs
from qimg.formats.base import Image, Reference
from qimg.formats.blocks import BlockCode, BlockImage, pieces_of
from qimg.formats.tables import WordTable
from qimg.formats.vpc.fixed import Growing, check_resize
from qimg.formats.vpc.structs import (
    ABSENT,
    CHECKED,
    WORD,
    DynamicHeader,
    Footer,
    bitmap_bytes,
    sealed,
)
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.storage.base import Storage


class DynamicImage(BlockImage, Growing):
    """Blocks that come into being when they are written to."""

    format_name = "vpc"
    can_mark_zero = True
    dirty = False

    def __init__(
        self, file: Storage, footer: Footer, header: DynamicHeader, size: int, *, new: bool = False
    ) -> None:
        """`new`: footer and header are not in the file yet; the first `flush` writes them."""
        self.file = file
        self.footer = footer
        self.header = header
        self.size = size
        self.cluster_size = header.block_size
        self.bitmap_size = bitmap_bytes(header.block_size)
        self.can_write = not new
        self.granularity = header.block_size if file.fixed_size else SECTOR
        self.zero_init = new and file.zero_init
        self.code = BlockCode(
            header.block_size,
            unit=SECTOR,
            base=self.bitmap_size,
            special={ABSENT: ZERO},
            stride=self.bitmap_size + header.block_size,
        )
        self._bat = WordTable(file, header.bat_offset, header.max_entries, size=WORD, big=True)
        self._pending = new
        self._end: int | None = None  # where the next block goes
        self._footer_at: int | None = None
        if new:
            self._end = header.bat_offset + round_up(WORD * header.max_entries, SECTOR)
        self._whole: set[int] = set()  # blocks whose bitmap says that all sectors are there

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return pieces_of(self._bat, first, last)

    def levels(self) -> list[list[WordTable]]:
        return [[self._bat]]

    def validate(self, block: int, count: int, host: int) -> None:
        header, first = self.header, host - self.bitmap_size
        bat = header.bat_offset, header.bat_offset + WORD * header.max_entries
        tables = (0, SECTOR), (self.footer.data_offset, self.footer.data_offset + DynamicHeader.SIZE), bat
        if block >= CHECKED and self._end is None and host + self.cluster_size > self.file.size + SECTOR:
            raise CorruptImage(
                f"Block {block} lies at {host:#x}, past the end of the file",
                file=self.file.name,
                field="bat",
                offset=header.bat_offset + WORD * block,
                guest=block * self.cluster_size,
            )
        if any(first < end and start < first + self.code.stride for start, end in tables):
            raise CorruptImage(
                f"Block {block} lies at {host:#x}, inside the metadata",
                file=self.file.name,
                field="bat",
                offset=self.header.bat_offset + WORD * block,
                guest=block * self.cluster_size,
            )

    # -- writing

    def allocate(self, start: int, length: int) -> list[Extent]:
        places = super().allocate(start, length)
        for place in places:
            assert place.host is not None
            block, inside = divmod(place.start, self.cluster_size)
            if block not in self._whole:
                self.file.write(b"\xff" * self.bitmap_size, place.host - inside - self.bitmap_size)
                self._whole.add(block)
        return places

    def _next(self) -> int:
        """Where the next block goes: behind all others, over the footer."""
        if self._end is None:
            end = self.header.bat_offset + round_up(WORD * self.header.max_entries, SECTOR)
            end = max(end, self.footer.data_offset + DynamicHeader.SIZE)
            for _first, table, low, high in self.pieces(0, self.header.max_entries, create=False):
                placed = [word for word in table.words(low, high) if word != ABSENT]
                if placed:
                    end = max(end, max(placed) * SECTOR + self.code.stride)
            self._end = round_up(end, SECTOR)
        return self._end

    def place(self, block: int, count: int) -> tuple[int, int]:
        host = self._next()
        length = count * self.code.stride
        if (host + length) // SECTOR >= ABSENT:
            raise LimitError("The image has no more room for blocks")
        if host < self.file.size:
            self.file.zero(host, min(length, self.file.size - host))
        self._end = host + length
        return host + self.bitmap_size, count

    def settle(self) -> None:
        if self._end is not None and self._footer_at != self._end:
            # Behind the last block, over nothing: the blocks are not in the table yet.
            self.file.write(sealed(self.footer) if not self._pending else bytes(SECTOR), self._end)
            self._footer_at = self._end

    def finish(self) -> None:
        if self._pending:
            self.file.write(sealed(self.header), SECTOR)
            self.file.write(sealed(self.footer), self._next())
            self.file.flush()
            self.file.write(sealed(self.footer), 0)
            self.file.flush()
            self._pending = False
        if self._footer_at is not None and not self.file.fixed_size:
            # What a crash left behind the footer belongs to nobody.
            end = self._footer_at + SECTOR
            if self.file.size > end:
                self.file.resize(end)

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        check_resize(self, size, preallocation, self.file)
        self.clear_end()
        self.flush()
        entries = -(-size // self.cluster_size)
        if entries > self.header.max_entries:
            self._move_table(entries)
        self._set_size(size)
        self.file.write(sealed(self.footer), 0)
        self.file.write(sealed(self.footer), self._next())
        self.file.flush()
        self.size = size

    def _move_table(self, entries: int) -> None:
        """A longer BAT, behind the blocks; the dynamic header switches to it."""
        place, length = self._next(), round_up(WORD * entries, SECTOR)
        old = self.header.max_entries
        table = WordTable(self.file, place, entries, size=WORD, big=True)
        self.file.write(b"\xff" * length, place)
        for first, source, low, high in self.pieces(0, old, create=False):
            table.put(first, source.words(low, high))
            table.write()
        self.file.write(sealed(self.footer), place + length)
        self.file.flush()
        self.header.bat_offset, self.header.max_entries = place, entries
        self.file.write(sealed(self.header), self.footer.data_offset)
        self.file.flush()
        self._bat = table
        self._end = self._footer_at = place + length


class DifferencingImage(DynamicImage):
    """Blocks of which the bitmap says, sector by sector, what is here and what in the parent."""

    def __init__(
        self, file: Storage, footer: Footer, header: DynamicHeader, size: int, parent: Reference
    ) -> None:
        super().__init__(file, footer, header, size)
        self.can_write = False
        self.backing: Reference | None = parent
        self.code.special = {ABSENT: HOLE}

    def begin(self) -> None:
        raise NotSupported("Writing to differencing VHD images is not supported")

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        self.begin()

    def meet_backing(self, below: Image) -> None:
        footer = getattr(below, "footer", None)
        if self.backing is not None and (footer is None or footer.uuid != self.header.parent_uuid):
            self.distrust = StorageError(
                f"'{below.file.name}' is not the parent that '{self.file.name}' was made on top of",
                errno=EINVAL,
            )

    def _add(self, runs: Runs, block: int, count: int, flags: int, host: int | None) -> None:
        if host is None:
            super()._add(runs, block, count, flags, host)
            return
        for number in range(count):
            self._add_block(runs, block + number, host + number * self.code.stride)

    def _add_block(self, runs: Runs, block: int, host: int) -> None:
        self.validate(block, 1, host)
        bitmap = bytes(self.file.read(host - self.bitmap_size, self.bitmap_size))
        start = block * self.cluster_size
        sectors = self.cluster_size // SECTOR
        at = 0
        while at < sectors:
            here = bitmap[at >> 3] >> (7 - at % 8) & 1
            whole = 0xFF if here else 0
            stop = at + 1
            while stop < sectors and (bitmap[stop >> 3] >> (7 - stop % 8) & 1) == here:
                stop += 8 if stop % 8 == 0 and bitmap[stop >> 3] == whole else 1
            stop = min(stop, sectors)
            place = host + at * SECTOR if here else None
            runs.append(
                start + at * SECTOR,
                (stop - at) * SECTOR,
                MAPPED if here else HOLE,
                place,
                self.file if here else None,
            )
            at = stop
