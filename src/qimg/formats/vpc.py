"""vpc: Virtual PC and Hyper-V's first format, VHD: fixed, dynamic and (read only) differencing (vpc sheet).

All integers big-endian. A dynamic image: a copy of the footer, the dynamic header, the block allocation
table (BAT), blocks, the footer. A block is a bitmap of its sectors and its data.
"""

from __future__ import annotations

from errno import EFBIG, EINVAL

from qimg.errors import CorruptImage, FormatError, LimitError, NotSupported, OptionError, StorageError
from qimg.extent import HOLE, MAPPED, ZERO, Extent, Runs
from qimg.formats.base import Format, Image, Measure, Reference
from qimg.formats.blocks import BlockCode, BlockImage, pieces_of
from qimg.formats.tables import WordTable
from qimg.identity import now, random_uuid
from qimg.ondisk import U8, U16, U32, U64, Struct
from qimg.options import BOOL, SIZE, STR, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Annotated, NoReturn

    from qimg.context import Context
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage

COOKIE, SPARSE_COOKIE = b"conectix", b"cxsparse"
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
NOWHERE = (1 << 64) - 1
VERSION = 0x00010000
#: Seconds from 1970 to 2000, where time stamps count from.
EPOCH = 946684800
ABSENT = 0xFFFFFFFF
BLOCK = 2 << 20
_WORD = 4
_BAT_OFFSET = 3 * SECTOR
MAX_SECTORS = 0xFF000000
MAX_ENTRIES = 0x1FFFFFFF
#: Entries of a BAT that are looked at when the image is opened (8 TiB in blocks of the usual size).
CHECKED = 1 << 22
#: The largest geometry; disks that have it have their size from the footer's size field.
MAX_GEOMETRY = 65535 * 16 * 255
#: Creators whose images have the size that their geometry says (section 3).
_BY_GEOMETRY = (b"vpc ", b"qemu")
_LOCATORS = 8


class Footer(Struct, order=">"):
    """The last sector, and the first of dynamic images (section 1)."""

    cookie: Annotated[bytes, 8]
    features: U32
    version: U32
    data_offset: U64
    timestamp: U32
    creator_app: Annotated[bytes, 4]
    creator_major: U16
    creator_minor: U16
    creator_os: Annotated[bytes, 4]
    original_size: U64
    current_size: U64
    cylinders: U16
    heads: U8
    sectors: U8
    type: U32
    checksum: U32
    uuid: Annotated[bytes, 16]
    saved_state: U8
    reserved: Annotated[bytes, 427]

    @property
    def geometry(self) -> int:
        """Sectors that cylinders, heads and sectors make."""
        return self.cylinders * self.heads * self.sectors


class Locator(Struct, order=">"):
    """Where a parent may be found; `offset` in bytes."""

    code: Annotated[bytes, 4]
    space: U32
    length: U32
    reserved: U32
    offset: U64


class DynamicHeader(Struct, order=">"):
    """Behind the copy of the footer (section 1)."""

    cookie: Annotated[bytes, 8]
    data_offset: U64
    bat_offset: U64
    version: U32
    max_entries: U32
    block_size: U32
    checksum: U32
    parent_uuid: Annotated[bytes, 16]
    parent_timestamp: U32
    reserved1: U32
    parent_name: Annotated[bytes, 512]
    locators: Annotated[bytes, 192]
    reserved2: Annotated[bytes, 256]


def sealed(structure: Footer | DynamicHeader) -> bytes:
    """The structure packed, with its checksum: the complement of the sum of all other bytes."""
    structure.checksum = 0
    structure.checksum = ~sum(structure.pack()) & 0xFFFFFFFF
    return structure.pack()


def is_sealed(structure: Footer | DynamicHeader) -> bool:
    """Whether the checksum is right."""
    stored = structure.checksum
    right = stored == int.from_bytes(sealed(structure)[_checksum_at(structure) :][:4], "big")
    structure.checksum = stored
    return right


def _checksum_at(structure: Footer | DynamicHeader) -> int:
    return type(structure).offset_of("checksum")


def geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors a track for a disk of `sectors` (the specification's appendix)."""
    sectors = min(sectors, MAX_GEOMETRY)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    track = 17
    tracks = sectors // track
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        tracks = sectors // track
    if tracks >= heads * 1024:
        track, heads = 63, 16
        tracks = sectors // track
    return tracks // heads, heads, track


def fitting_geometry(sectors: int) -> tuple[int, int, int]:
    """The geometry of the smallest disk that has one and holds `sectors` (section 3)."""
    wanted = min(sectors, MAX_GEOMETRY)
    for more in range(MAX_GEOMETRY):
        cylinders, heads, track = geometry(sectors + more)
        if cylinders * heads * track >= wanted:
            break
    return cylinders, heads, track


class _Growing:
    """What both kinds of images that qimg writes share: footer and its size."""

    footer: Footer

    def _set_size(self, size: int) -> None:
        """Record another size. Geometry cannot say it, so it is recorded as the creator does that says sizes
        exactly."""
        self.footer.current_size = size
        self.footer.cylinders, self.footer.heads, self.footer.sectors = 65535, 16, 255
        if self.footer.creator_app in _BY_GEOMETRY:
            self.footer.creator_app = b"qem2"


class FixedImage(Image, _Growing):
    """The guest's bytes as they are, and the footer behind them."""

    format_name = "vpc"
    granularity = SECTOR
    can_mark_zero = True
    dirty = False

    def __init__(self, file: Storage, footer: Footer, size: int, *, new: bool = False) -> None:
        """`new`: the footer is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.footer = footer
        self.size = size
        self.can_write = not new
        self.zero_init = new and file.zero_init
        self._pending = new

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        for part in self.file.extents(start, length):
            # All of it is there; zeros are what the host has not written.
            runs.append(part.start, part.length, MAPPED | (part.flags & ZERO), part.start, self.file)
        return runs.take()

    def in_place(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, MAPPED, 0, start, self.file)]

    def allocate(self, start: int, length: int) -> list[Extent]:
        return self.in_place(start, length)

    def mark_zero(self, start: int, length: int) -> None:
        self.file.zero(start, length)

    def flush(self) -> None:
        if self._pending:
            if not self.file.fixed_size and self.file.size < self.size:
                self.file.resize(self.size)
            self.file.flush()
            self.file.write(sealed(self.footer), self.size)
            self._pending = False
        self.file.flush()

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        _check_resize(self, size, preallocation, self.file)
        if size == self.size:
            return
        # The file has to end with a footer at any time. The old one lies where the guest will read zeros, so
        # it may go only when there is a copy at the new end; the copy says the new size last.
        self.file.write(sealed(self.footer), size)
        self.file.flush()
        self.file.zero(self.size, SECTOR)
        self.file.flush()
        self._set_size(size)
        self.file.write(sealed(self.footer), size)
        self.file.flush()
        self.size = size


class DynamicImage(BlockImage, _Growing):
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
        self._bat = WordTable(file, header.bat_offset, header.max_entries, size=_WORD, big=True)
        self._pending = new
        self._end: int | None = None  # where the next block goes
        self._footer_at: int | None = None
        if new:
            self._end = header.bat_offset + round_up(_WORD * header.max_entries, SECTOR)
        self._whole: set[int] = set()  # blocks whose bitmap says that all sectors are there

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return pieces_of(self._bat, first, last)

    def levels(self) -> list[list[WordTable]]:
        return [[self._bat]]

    def validate(self, block: int, count: int, host: int) -> None:
        header, first = self.header, host - self.bitmap_size
        bat = header.bat_offset, header.bat_offset + _WORD * header.max_entries
        tables = (0, SECTOR), (self.footer.data_offset, self.footer.data_offset + DynamicHeader.SIZE), bat
        if block >= CHECKED and self._end is None and host + self.cluster_size > self.file.size + SECTOR:
            raise CorruptImage(
                f"Block {block} lies at {host:#x}, past the end of the file",
                file=self.file.name,
                field="bat",
                offset=header.bat_offset + _WORD * block,
                guest=block * self.cluster_size,
            )
        if any(first < end and start < first + self.code.stride for start, end in tables):
            raise CorruptImage(
                f"Block {block} lies at {host:#x}, inside the metadata",
                file=self.file.name,
                field="bat",
                offset=self.header.bat_offset + _WORD * block,
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
            end = self.header.bat_offset + round_up(_WORD * self.header.max_entries, SECTOR)
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
        _check_resize(self, size, preallocation, self.file)
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
        place, length = self._next(), round_up(_WORD * entries, SECTOR)
        old = self.header.max_entries
        table = WordTable(self.file, place, entries, size=_WORD, big=True)
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


def bitmap_bytes(block_size: int) -> int:
    """Bytes of a block's bitmap, in whole sectors."""
    return round_up(-(-block_size // SECTOR // 8), SECTOR)


def _check_resize(image: Image, size: int, preallocation: str, file: Storage) -> None:
    if preallocation != "off":
        raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
    if size < image.size:
        raise NotSupported("Shrinking images is currently not supported")
    if size % SECTOR:
        raise OptionError(f"The new size must be a multiple of {SECTOR}", option="size")
    if size > MAX_SECTORS * SECTOR:
        raise LimitError("The image size is too large for file format 'vpc'")
    if file.fixed_size:
        raise NotSupported("Cannot resize device files")


# -- opening


def _fail(file: Storage, message: str, field: str, offset: int, found: object = None) -> NoReturn:
    raise FormatError(message, file=file.name, field=field, offset=offset, found=found)


def read_footer(file: Storage) -> tuple[Footer, int]:
    """The footer that counts, and where it is. Raises FormatError (section 2)."""
    end = round_up(file.size, SECTOR)
    if end < SECTOR:
        _fail(file, "invalid VPC image", "footer.cookie", 0)
    footer = Footer.unpack(bytes(file.read(0, SECTOR)))
    if footer.cookie == COOKIE:
        if is_sealed(footer):
            return footer, 0
        last = Footer.unpack(bytes(file.read(end - SECTOR, SECTOR)))
        if end > SECTOR and last.cookie == COOKIE and is_sealed(last) and last.type != FIXED:
            return last, 0  # the copy at the front is damaged, the original is not
        _fail(file, "Incorrect header checksum", "footer.checksum", 64, footer.checksum)
    footer = Footer.unpack(bytes(file.read(end - SECTOR, SECTOR)))
    if footer.cookie != COOKIE or footer.type != FIXED:
        _fail(file, "invalid VPC image", "footer.cookie", end - SECTOR, footer.cookie)
    if not is_sealed(footer):
        _fail(file, "Incorrect header checksum", "footer.checksum", end - SECTOR + 64, footer.checksum)
    return footer, end - SECTOR


def virtual_size(footer: Footer, mode: str | None) -> int:
    """Guest bytes (section 3). `mode`: ``chs`` or ``current_size`` forces one of the two ways.

    Raises StorageError (EFBIG)."""
    by_geometry = footer.creator_app in _BY_GEOMETRY
    if mode is not None:
        by_geometry = mode == "chs"
    sectors = footer.geometry
    if not by_geometry or sectors == MAX_GEOMETRY:
        sectors = footer.current_size // SECTOR
    if sectors > MAX_SECTORS:
        raise StorageError("File too large", errno=EFBIG)
    return sectors * SECTOR


def read_header(file: Storage, footer: Footer, size: int) -> DynamicHeader:
    """The dynamic header, validated (section 9). Raises FormatError."""
    offset = footer.data_offset
    if offset > (1 << 63) - 1 - DynamicHeader.SIZE:
        _fail(file, "Invalid header offset", "footer.data_offset", 16, offset)
    header = DynamicHeader.unpack(bytes(file.read(offset, DynamicHeader.SIZE)))

    def fail(message: str, field: str) -> NoReturn:
        where = offset + DynamicHeader.offset_of(field)
        _fail(file, message, f"dynamic header.{field}", where, getattr(header, field))

    if header.cookie != SPARSE_COOKIE:
        fail("Invalid header magic", "cookie")
    block = header.block_size
    if block < SECTOR or block & (block - 1):
        fail(f"Invalid block size {block}", "block_size")
    if size > header.max_entries * block:
        fail("Page table too small", "max_entries")
    if header.max_entries > MAX_ENTRIES:
        fail(f"Max Table Entries too large ({header.max_entries})", "max_entries")
    if header.bat_offset > (1 << 63) - 1 - _WORD * header.max_entries:
        fail("Invalid block allocation table offset", "bat_offset")
    if header.bat_offset + _WORD * -(-size // block) > round_up(file.size, SECTOR):
        fail("The block allocation table reaches past the end of the file", "bat_offset")
    return header


def check_table(image: DynamicImage) -> None:
    """Raise FormatError where a block ends past the end of the file."""
    end = round_up(image.file.size, SECTOR)
    last = (end - image.code.stride) // SECTOR
    for first, table, low, high in image.pieces(0, min(image.header.max_entries, CHECKED), create=False):
        words = table.words(low, high)
        if max(words) == ABSENT and len(set(words)) == 1:
            continue
        for number, word in enumerate(words, first):
            if word != ABSENT and word > last:
                _fail(
                    image.file,
                    "block-vpc: free_data_block_offset points after the end of file. The image has been"
                    " truncated.",
                    "bat",
                    image.header.bat_offset + _WORD * number,
                    word,
                )


def parent(file: Storage, header: DynamicHeader) -> Reference:
    """What a differencing image names as its parent: relative path, else absolute, else its bare name.

    Raises FormatError."""
    found: dict[bytes, str] = {}
    for number in range(_LOCATORS):
        raw = header.locators[number * Locator.SIZE : (number + 1) * Locator.SIZE]
        locator = Locator.unpack(raw)
        if locator.code in (b"W2ru", b"W2ku") and locator.length <= 4096 and locator.offset < 1 << 62:
            text = bytes(file.read(locator.offset, locator.length)).decode("utf-16-le", "replace")
            found[locator.code] = text.split("\0", 1)[0].replace("\\", "/")
    name = found.get(b"W2ru") or header.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
    name = name or found.get(b"W2ku", "")
    if not name:
        _fail(file, "The differencing image does not name its parent", "parent_name", 64)
    return Reference(name.removeprefix("./"), "vpc")


class Vpc(Format):
    """The driver."""

    name = "vpc"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("subformat", STR, None, "Type of virtual hard disk format: fixed or dynamic (the default)"),
        Option("force_size", BOOL, None, "Record exactly the size asked for, whatever the geometry"),
    )
    open_options = (Option("force_size_calc", STR, None, "How the size is found: chs or current_size"),)
    can_create = True
    can_measure = True
    can_backing = True

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> Image:
        mode = (options or {}).get("force_size_calc")
        if mode not in (None, "chs", "current_size"):
            raise OptionError(f"Invalid size calculation mode: '{mode}'", option="force_size_calc")
        footer, place = read_footer(file)
        size = virtual_size(footer, None if mode is None else str(mode))
        if footer.type == FIXED:
            if place == 0 and file.size > SECTOR:
                _fail(file, "The footer of a fixed image is at its beginning", "footer.type", 60, footer.type)
            return FixedImage(file, footer, size)
        header = read_header(file, footer, size)
        if footer.type == DIFFERENCING:
            image: DynamicImage = DifferencingImage(file, footer, header, size, parent(file, header))
        else:
            image = DynamicImage(file, footer, header, size)
        check_table(image)
        return image

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        if options.get("preallocation") == "metadata":
            raise NotSupported("Unsupported preallocation mode: metadata")
        kind = options.get("subformat")
        if kind not in (None, "dynamic", "fixed"):
            raise OptionError(f"Parameter 'subformat' does not accept value '{kind}'", option="subformat")
        if size > MAX_SECTORS * SECTOR:
            raise LimitError("The image size is too large for file format 'vpc'")

    def _footer(self, size: int, options: dict[str, Value]) -> Footer:
        """The footer of a new image; its `current_size` is the disk's."""
        exact = bool(options.get("force_size"))
        sectors = -(-size // SECTOR)
        cylinders, heads, track = (65535, 16, 255) if exact else fitting_geometry(sectors)
        if not exact and cylinders * heads * track != MAX_GEOMETRY:
            sectors = cylinders * heads * track
        fixed = options.get("subformat") == "fixed"
        return Footer(
            cookie=COOKIE,
            features=2,
            version=VERSION,
            data_offset=NOWHERE if fixed else SECTOR,
            timestamp=max(0, now() - EPOCH) & 0xFFFFFFFF,
            creator_app=b"qem2" if exact else b"qemu",
            creator_major=5,
            creator_minor=3,
            creator_os=b"Wi2k",
            original_size=sectors * SECTOR,
            current_size=sectors * SECTOR,
            cylinders=cylinders,
            heads=heads,
            sectors=track,
            type=FIXED if fixed else DYNAMIC,
            uuid=random_uuid("vpc", size, fixed),
        )

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> Image:
        self.validate_create(size, options)
        footer = self._footer(size, options)
        if footer.type == FIXED:
            if not file.fixed_size:
                file.resize(0)
            return FixedImage(file, footer, footer.current_size, new=True)
        entries = -(-footer.current_size // BLOCK)
        header = DynamicHeader(
            cookie=SPARSE_COOKIE,
            data_offset=NOWHERE,
            bat_offset=_BAT_OFFSET,
            version=VERSION,
            max_entries=entries,
            block_size=BLOCK,
        )
        file.write(bytes(_BAT_OFFSET), 0)  # no footer yet
        if entries:
            file.write(b"\xff" * round_up(_WORD * entries, SECTOR), _BAT_OFFSET)
        return DynamicImage(file, footer, header, footer.current_size, new=True)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        self.validate_create(source.size, options)
        footer = self._footer(source.size, options)
        if footer.type == FIXED:
            full = footer.current_size + SECTOR
            return Measure(full, full)
        entries = -(-footer.current_size // BLOCK)
        fixed = _BAT_OFFSET + round_up(_WORD * entries, SECTOR) + SECTOR
        stride = BLOCK + bitmap_bytes(BLOCK)
        if source.data_runs is None:
            return Measure(fixed, fixed + entries * stride)
        used = last = 0  # blocks counted, and the number behind the last of them
        for start, length in source.data_runs:
            end = -(-(start + length) // BLOCK)
            used += max(0, end - max(start // BLOCK, last))
            last = max(last, end)
        return Measure(fixed + used * stride, fixed + entries * stride)
