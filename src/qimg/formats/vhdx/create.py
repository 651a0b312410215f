"""New vhdx images (vhdx sheet 3). Until the first `flush` nothing in the file says that it is one."""

from __future__ import annotations

from array import array

from qimg.errors import OptionError
from qimg.formats.base import Measure
from qimg.formats.vhdx.bat import WORD
from qimg.formats.vhdx.header import Headers, fresh_guid
from qimg.formats.vhdx.image import VhdxImage
from qimg.formats.vhdx.metadata import LEAVE_ALLOCATED, TABLE_BYTES, Metadata
from qimg.formats.vhdx.regions import Regions, new_table
from qimg.formats.vhdx.structs import (
    DISK_SIZE,
    FILE_PARAMETERS,
    LOGICAL_SECTOR,
    MAX_BLOCK,
    MIB,
    PAGE_83,
    PHYSICAL_SECTOR,
    PRESENT,
    REGION_TABLES,
    SIGNATURE,
    ZEROED,
    MetadataEntry,
    MetadataTable,
)
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage

CREATOR = "qimg"
_CREATOR_BYTES = 512
_LOG_OFFSET = MIB
#: What lies behind the start of the metadata before the blocks: it, and room for more.
_METADATA_ROOM = 5 * MIB
_MAX_LOG = 4096 * MIB
#: (disk up to, block size) where none is asked for.
_BLOCK_SIZES = ((1 << 30, 8 * MIB), (100 << 30, 16 * MIB), (32 << 40, 32 * MIB))
_LARGEST_AUTO = 64 * MIB
_STEP = 1 << 16
_READABLE_BAT = 1 << 30


def log_size(options: dict[str, Value]) -> int:
    """Bytes of the log. Raises OptionError."""
    size = round_up(int(options.get("log_size", MIB)), MIB)
    if not size:
        raise OptionError("Log size must be a multiple of 1 MB", option="log_size")
    if size >= _MAX_LOG:
        raise OptionError("Log size must be smaller than 4 GB", option="log_size")
    return size


def block_size(size: int, options: dict[str, Value]) -> int:
    """Bytes of a block of a disk of `size` bytes. Raises OptionError."""
    asked = int(options.get("block_size", 0))
    if not asked:
        return next((block for limit, block in _BLOCK_SIZES if size <= limit), _LARGEST_AUTO)
    block = min(round_up(asked, MIB), MAX_BLOCK)
    if block & (block - 1):
        raise OptionError("Block size must be a power of two", option="block_size")
    return block


class Layout:
    """Where everything goes in a new image. Sizes in bytes."""

    def __init__(self, size: int, options: dict[str, Value]) -> None:
        """`size` in whole sectors."""
        self.fixed = options.get("subformat") == "fixed"
        block = block_size(size, options)
        self.metadata = Metadata(block, LEAVE_ALLOCATED if self.fixed else 0, size)
        self.log = log_size(options)
        self.zeroed = bool(options.get("block_state_zero", True))
        self.bat = (_LOG_OFFSET + self.log, self._bat_length())
        self.metadata_at = sum(self.bat)
        self.blocks_at = self.metadata_at + _METADATA_ROOM
        self.length = self.blocks_at + (size if self.fixed else 0)

    def _bat_length(self) -> int:
        words = self.metadata.words
        if not words:
            # For a disk without blocks the real program counts the sector bitmaps between -1 blocks, and does
            # not open what has no room for them; at 2 GiB it gives up.
            words = (1 << 32) // self.metadata.ratio
        length = round_up(words * WORD, MIB)
        return length if 0 < length <= _READABLE_BAT else MIB


class NewImage(VhdxImage):
    """An image whose headers are not in the file yet."""

    def __init__(self, file: Storage, headers: Headers, regions: Regions, layout: Layout) -> None:
        super().__init__(file, headers, regions, layout.metadata)
        self.can_write = False
        self.zero_init = file.zero_init
        self._layout = layout
        self._begun = True
        self._pending = True
        self._end = layout.blocks_at + layout.metadata.blocks * self.cluster_size * layout.fixed

    def settle(self) -> None:
        # A fixed image ends with its disk.
        if not self._layout.fixed:
            super().settle()

    def flush(self) -> None:
        if not self._pending:
            super().flush()
            return
        self.settle()
        self.bat.write()
        for at in REGION_TABLES:
            self.file.write(self.regions.raw, at)
        self.file.write(CREATOR.encode("utf-16-le").ljust(_CREATOR_BYTES, b"\0"), len(SIGNATURE))
        self.headers.write_new()
        self.file.write(SIGNATURE, 0)
        self.file.flush()
        self._pending = False


def create(file: Storage, size: int, options: dict[str, Value]) -> NewImage:
    """Prepare a new image in the empty `file`. Raises OptionError, StorageError."""
    size = round_up(size, SECTOR)
    layout = Layout(size, options)
    what = (size, sorted(options.items()))
    file.write(bytes(SECTOR), 0)
    if file.fixed_size:
        _clear(file, layout)
    else:
        file.resize(layout.length)
    raw = new_table(layout.bat, (layout.metadata_at, MIB))
    headers = Headers.new(file, _LOG_OFFSET, layout.log, *what)
    file.write(_metadata(layout.metadata, *what), layout.metadata_at)
    image = NewImage(file, headers, Regions.parse(file, raw, headers.current), layout)
    _fill(image, layout)
    return image


def _clear(file: Storage, layout: Layout) -> None:
    """Make everything before the blocks zeros, where there was something before."""
    file.zero(0, layout.blocks_at)


def _fill(image: NewImage, layout: Layout) -> None:
    """The words of the BAT, some at a time."""
    bat, block = image.bat, image.cluster_size
    for first, _table, low, high in bat.pieces(0, bat.blocks):
        count = high - low
        if layout.fixed:
            place = (layout.blocks_at + first * block) | PRESENT
            words = array("Q", range(place, place + count * block, block))
        elif layout.zeroed:
            words = array("Q", [ZEROED]) * count
        else:
            return
        bat.put(low, words)
        if bat.staged > _STEP:
            bat.write()
    bat.write()


def _metadata(metadata: Metadata, *what: object) -> bytes:
    """The metadata region up to the last item."""
    items = (
        (
            FILE_PARAMETERS,
            4,
            metadata.block_size.to_bytes(4, "little") + metadata.flags.to_bytes(4, "little"),
        ),
        (DISK_SIZE, 6, metadata.size.to_bytes(8, "little")),
        (PAGE_83, 6, fresh_guid("vhdx page 83", *what)),
        (LOGICAL_SECTOR, 6, SECTOR.to_bytes(4, "little")),
        (PHYSICAL_SECTOR, 6, SECTOR.to_bytes(4, "little")),
    )
    table = MetadataTable(signature=b"metadata", count=len(items)).pack()
    values = b""
    for guid, flags, value in items:
        offset = TABLE_BYTES + len(values)
        table += MetadataEntry(guid=guid, offset=offset, length=len(value), flags=flags).pack()
        values += value
    return table.ljust(TABLE_BYTES, b"\0") + values


def measure(source: MeasureSource, options: dict[str, Value]) -> Measure:
    """What `convert` would make."""
    size = round_up(source.size, SECTOR)
    layout = Layout(size, options)
    block, blocks = layout.metadata.block_size, layout.metadata.blocks
    if layout.fixed:
        return Measure(layout.length, layout.length)
    full = layout.blocks_at + blocks * block
    (used,) = source.touched(block)
    return Measure(layout.blocks_at + used * block, full)
