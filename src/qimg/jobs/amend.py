"""amend: other values for options of creation (amend sheet)."""

from __future__ import annotations

from qimg.errors import NotSupported, OptionError
from qimg.formats import registry
from qimg.graph.open import open_disk
from qimg.jobs.resize import guest_size
from qimg.options import parse_values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import Format
    from qimg.graph.open import ImageSpec
    from qimg.jobs.progress import Progress
    from qimg.options import Option, Value

_CREATION_ONLY = "This option is only supported for image creation"


def amend_options(format: str) -> tuple[Option, ...]:
    """The options of `format` that can be changed. Raises OptionError, NotSupported."""
    try:
        found = registry.get(format)
    except OptionError:
        raise OptionError(f"Unknown file format '{format}'", option="format") from None
    return _able(found).amend_options


def amend_options_of(spec: ImageSpec, *, context: Context) -> tuple[str, tuple[Option, ...]]:
    """The format of an image, opened for writing, and its options that can be changed."""
    with open_disk(spec, context=context, writable=True) as disk:
        name = disk.top.format_name
        return name, _able(registry.get(name)).amend_options


def _able(format: Format) -> Format:
    if not format.can_amend:
        raise NotSupported(f"Format driver '{format.name}' does not support option amendment")
    return format


def amend(
    spec: ImageSpec,
    options: list[tuple[str, str]],
    *,
    force: bool = False,
    progress: Progress | None = None,
    context: Context,
) -> None:
    """Give options of creation new values; what `options` does not name keeps its value. `force` allows what
    may lock everybody out. Everything is checked before the first change.

    Raises OptionError, NotSupported, LimitError, OpenError, StorageError."""
    with open_disk(spec, context=context, writable=True) as disk:
        format = _able(registry.get(disk.top.format_name))
        values = _values(format, options)
        if "backing_fmt" in values:
            values["backing_fmt"] = registry.own_name(str(values["backing_fmt"]))

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress.update(done, total)

        report(0, 1)
        if values.get("size"):  # 0 is no size, as with the real program
            values["size"] = guest_size(disk, int(values["size"]))
        disk.top.amend(values, force=force, progress=report)


def _values(format: Format, options: list[tuple[str, str]]) -> dict[str, Value]:
    try:
        return parse_values(format.amend_options, options)
    except OptionError as error:
        if str(error).startswith("Invalid parameter") and _can_be_created(format, options):
            raise OptionError(str(error), option=error.option, hint=_CREATION_ONLY) from error
        raise


def _can_be_created(format: Format, options: list[tuple[str, str]]) -> bool:
    """Whether these are all options of the format, only some of them not to be changed."""
    try:
        parse_values((*format.amend_options, *format.create_options), options)
    except OptionError:
        return False
    return True
