"""The vhdx driver: opening and creating images, and what can be said of them beforehand."""

from __future__ import annotations

from qimg.errors import FormatError, LimitError, NotSupported, OptionError
from qimg.formats.base import Format
from qimg.formats.vhdx.bat import WORD, Checker, check_places
from qimg.formats.vhdx.header import Headers, check_signature
from qimg.formats.vhdx.image import DifferencingImage, VhdxImage
from qimg.formats.vhdx.metadata import read_metadata
from qimg.formats.vhdx.regions import Regions
from qimg.formats.vhdx.structs import MAX_SIZE, MIB, fail
from qimg.options import BOOL, SIZE, STR, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import CreateHelp, Image, Measure, MeasureSource
    from qimg.formats.vhdx.log import Overlay
    from qimg.formats.vhdx.metadata import Metadata
    from qimg.options import Value
    from qimg.storage.base import Storage


class Vhdx(Format):
    """The driver."""

    name = "vhdx"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size, at most 64T"),
        Option("log_size", SIZE, MIB, "Size of the log, at least 1M"),
        Option("block_size", SIZE, 0, "Size of a block, 1M to 256M; 0: by the size of the disk"),
        Option("subformat", STR, None, "Type of image: dynamic (the default) or fixed"),
        Option("block_state_zero", BOOL, None, "Record blocks without data as zeros (on) or as not present"),
    )
    can_create = True
    can_check = True
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
        check_signature(file)
        headers = Headers.read(file)
        overlay = _overlay(file, headers, writable=writable)
        if overlay is not None:
            headers.file = file = overlay
        regions = Regions.read(file, headers.current)
        metadata = read_metadata(file, regions.metadata)
        if writable and metadata.parent is not None and not for_check:
            raise NotSupported("Writing to differencing VHDX images is not supported")
        _check_bat(file, regions, metadata)
        kind = VhdxImage if metadata.parent is None else DifferencingImage
        image = kind(file, headers, regions, metadata, overlay=overlay)
        if not for_check:
            checker = Checker(file, metadata.block_size, image.size, regions.taken)
            check_places(file, image.bat, checker)
        return image

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        from qimg.formats.vhdx.create import block_size, log_size

        if size > MAX_SIZE:
            raise LimitError("Image size too large; max of 64TB")
        kind = options.get("subformat")
        if kind not in (None, "dynamic", "fixed"):
            raise OptionError(f"Parameter 'subformat' does not accept value '{kind}'", option="subformat")
        log_size(options)
        block_size(size, options)

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> Image:
        from qimg.formats.vhdx.create import create

        self.validate_create(size, options)
        return create(file, size, options)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        from qimg.formats.vhdx.create import measure

        self.validate_create(source.size, options)
        return measure(source, options)


def _overlay(file: Storage, headers: Headers, *, writable: bool) -> Overlay | None:
    """The file as its log wants it, None where the log is empty. Raises FormatError where there is no way to
    apply it."""
    if not headers.has_log:
        return None
    from qimg.formats.vhdx.log import Overlay, find_changes

    entries = find_changes(file, headers.current)
    if not entries:
        return None
    if not writable:
        raise FormatError(
            f"VHDX image file '{file.name}' opened read-only, but contains a log that needs to be replayed",
            file=file.name,
            field="header.log_guid",
            hint=f"To replay the log, run:\nqemu-img check -r all '{file.name}'",
        )
    return Overlay(file, entries)


def _check_bat(file: Storage, regions: Regions, metadata: Metadata) -> None:
    """Raise FormatError where the BAT is too short for the disk, or lies past the end of the file."""
    region, needed = regions.bat, metadata.words * WORD
    if needed > region.length:
        message = f"The BAT region has {region.length} bytes, the disk needs {needed}"
        fail(file, message, "region.length", region.offset, expected=needed, found=region.length)
    if region.offset + needed > file.size:
        fail(file, "The BAT lies past the end of the file", "region.offset", region.offset)
