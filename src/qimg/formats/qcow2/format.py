"""The qcow2 driver."""

from __future__ import annotations

from qimg.formats.base import Format
from qimg.formats.protection import KEY_OPTION
from qimg.formats.qcow2.amend_options import AMEND_OPTIONS
from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.formats.qcow2.open_options import OPEN_OPTIONS, check_open_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import CreateHelp, Image, Measure, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage


class Qcow2(Format):
    """QEMU copy-on-write, versions 2 and 3."""

    name = "qcow2"
    create_options = CREATE_OPTIONS
    open_options = OPEN_OPTIONS
    can_create = True
    can_compress = True
    can_check = True
    can_amend = True
    amend_options = AMEND_OPTIONS
    can_measure = True
    can_backing = True
    can_bitmaps = True

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
        """`options`: ``data-file`` (any value) says that the caller attaches a data file."""
        from qimg.formats.qcow2.image import Qcow2Image

        kind = Qcow2Image
        if writable and not for_check:
            from qimg.formats.qcow2.write import WritableQcow2

            kind = WritableQcow2
        image = kind.open(
            file,
            context=context,
            writable=writable,
            options=options,
            for_check=for_check,
            for_info=for_info,
        )
        if options:
            check_open_options(options, image.header)
        if writable and not for_check and image.dirty:
            from qimg.formats.qcow2.repair import repair_dirty

            image = repair_dirty(image, options)
        return image

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        from qimg.formats.qcow2.create import validate_create

        validate_create(size, options)

    def check_secrets(self, options: dict[str, Value], context: Context) -> None:
        if KEY_OPTION in options:
            context.secret(str(options[KEY_OPTION]))

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> Image:
        from qimg.formats.qcow2.create import create

        return create(file, size, options, help)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        from qimg.formats.qcow2.measure import measure

        return measure(source, options)
