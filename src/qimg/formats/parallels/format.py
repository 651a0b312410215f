"""The parallels driver."""

from __future__ import annotations

from qimg.context import Notice
from qimg.errors import FormatError, LimitError, OptionError
from qimg.formats.base import Format, Measure
from qimg.formats.parallels.image import ParallelsImage
from qimg.formats.parallels.structs import (
    HEADS,
    IN_USE,
    MAGIC_V2,
    MAX_TRACKS,
    VERSION,
    Header,
    check_size,
    parse,
)
from qimg.options import SIZE, STR, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage

CLUSTER = 1 << 20


class Parallels(Format):
    """The driver."""

    name = "parallels"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("cluster_size", SIZE, CLUSTER, "Parallels image cluster size"),
    )
    open_options = (
        Option("prealloc-size", SIZE, 128 << 20, "Preallocation size on image expansion"),
        Option("prealloc-mode", STR, "falloc", "Preallocation mode on image expansion"),
    )
    can_create = True
    can_check = True
    can_measure = True
    can_backing = False
    can_bitmaps = False

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> ParallelsImage:
        mode = (options or {}).get("prealloc-mode", "falloc")
        if mode not in ("falloc", "truncate"):
            raise OptionError(f"invalid parameter value: {mode}", option="prealloc-mode")
        header = parse(file)
        image = ParallelsImage(file, header, context)
        if header.ext_offset and not writable:
            from qimg.formats.parallels.extension import validate

            validate(file, header)
        if writable and not for_check:
            self._repair(image, context)
        return image

    def _repair(self, image: ParallelsImage, context: Context) -> None:
        """What the real program does with a damaged image that is opened for writing (section 5)."""
        from qimg.formats.parallels.check import is_damaged

        header = image.header
        if header.ext_offset:
            context.warn(Notice("Format Extension ignored in RW mode"))
        if header.in_use != IN_USE and not is_damaged(image):
            return
        result = image.check(lambda line: context.warn(Notice(line, plain=True)), "all")
        if result.corruptions > result.corruptions_fixed or result.check_errors:
            raise FormatError("Could not repair corrupted image", file=image.file.name)

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        cluster = int(options.get("cluster_size", CLUSTER))
        if cluster >= 1 << 31:
            raise LimitError("Cluster size is too large")
        check_size(size, round_up(cluster, SECTOR))
        if round_up(cluster, SECTOR) // SECTOR > MAX_TRACKS:
            raise LimitError("Cluster size is too large")

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> ParallelsImage:
        self.validate_create(size, options)
        header = self._header(size, options)
        start = header.data_start()
        file.write(bytes(SECTOR), 0)  # no header yet
        if file.fixed_size:
            file.zero(0, start)
        else:
            file.resize(start)
        return ParallelsImage(file, header, help.context, new=True)

    def _header(self, size: int, options: dict[str, Value]) -> Header:
        cluster = round_up(int(options.get("cluster_size", CLUSTER)), SECTOR)
        entries = -(-size // cluster)
        header = Header(
            magic=MAGIC_V2,
            version=VERSION,
            heads=HEADS,
            tracks=cluster // SECTOR,
            bat_entries=entries,
        )
        header.set_size(size)
        header.data_offset = header.least_data_offset // SECTOR
        return header

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        size = round_up(source.size, SECTOR)
        self.validate_create(size, options)
        header = self._header(size, options)
        cluster, fixed = header.cluster_size, header.data_start()
        full = fixed + header.bat_entries * cluster
        (used,) = source.touched(cluster)
        return Measure(fixed + used * cluster, full)
