"""The vpc driver: Virtual PC and Hyper-V's first format, VHD: fixed, dynamic and (read only) differencing."""

from __future__ import annotations

from qimg.errors import LimitError, NotSupported, OptionError
from qimg.formats.base import Format, Image, Measure
from qimg.formats.vpc.dynamic import DifferencingImage, DynamicImage
from qimg.formats.vpc.fixed import FixedImage
from qimg.formats.vpc.parse import check_table, parent, read_footer, read_header, refuse, virtual_size
from qimg.formats.vpc.structs import (
    BAT_OFFSET,
    BLOCK,
    COOKIE,
    DIFFERENCING,
    DYNAMIC,
    EPOCH,
    FIXED,
    MAX_GEOMETRY,
    MAX_SECTORS,
    NOWHERE,
    SPARSE_COOKIE,
    VERSION,
    WORD,
    DynamicHeader,
    Footer,
    bitmap_bytes,
    fitting_geometry,
)
from qimg.identity import now, random_uuid
from qimg.options import BOOL, SIZE, STR, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage


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
                refuse(
                    file, "The footer of a fixed image is at its beginning", "footer.type", 60, footer.type
                )
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
            bat_offset=BAT_OFFSET,
            version=VERSION,
            max_entries=entries,
            block_size=BLOCK,
        )
        file.write(bytes(BAT_OFFSET), 0)  # no footer yet
        if entries:
            file.write(b"\xff" * round_up(WORD * entries, SECTOR), BAT_OFFSET)
        return DynamicImage(file, footer, header, footer.current_size, new=True)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        self.validate_create(source.size, options)
        footer = self._footer(source.size, options)
        if footer.type == FIXED:
            full = footer.current_size + SECTOR
            return Measure(full, full)
        entries = -(-footer.current_size // BLOCK)
        fixed = BAT_OFFSET + round_up(WORD * entries, SECTOR) + SECTOR
        stride = BLOCK + bitmap_bytes(BLOCK)
        (used,) = source.touched(BLOCK)
        return Measure(fixed + used * stride, fixed + entries * stride)
