"""The vmdk driver."""

from __future__ import annotations

from qimg.errors import OptionError
from qimg.formats.base import Format
from qimg.formats.vmdk.options import CREATE_OPTIONS, Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.context import Context
    from qimg.formats.base import CreateHelp, Image, Measure, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage


class Vmdk(Format):
    """VMware's virtual machine disks: a text descriptor and extents."""

    name = "vmdk"
    create_options = CREATE_OPTIONS
    can_create = True
    can_compress = True
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
        from qimg.formats.vmdk.opening import open_image

        return open_image(file, writable=writable)

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        Plan(size, options)

    def validate_compress(self, options: dict[str, Value]) -> None:
        if Plan(0, options).flat:
            raise OptionError("invalid cluster size", option="subformat")

    def further_files(self, name: str, size: int, options: dict[str, Value]) -> Iterable[str]:
        from qimg.formats.vmdk.create import extent_sizes

        plan = Plan(size, options)
        return (path for path, _size in extent_sizes(plan, name)) if plan.separate else ()

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> Image:
        from qimg.formats.vmdk.create import create

        return create(file, size, options, help)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        from qimg.formats.vmdk.measure import measure

        return measure(source, options)
