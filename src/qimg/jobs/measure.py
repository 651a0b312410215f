"""measure: how large a new image would become."""

from __future__ import annotations

from qimg.errors import CorruptImage, NotSupported, OptionError, QimgError, StorageError
from qimg.formats import registry
from qimg.formats.base import MeasureSource
from qimg.graph.open import open_disk, target
from qimg.jobs.create import merged_options
from qimg.jobs.source import Source, data_runs
from qimg.options import parse_values
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import Format, Image, Measure
    from qimg.graph.open import ImageSpec
    from qimg.jobs.convert import SnapshotParam
    from qimg.options import Value


class OptionsRefused(OptionError):
    """A creation option of the output format is wrong; told in two lines by the command."""


def measure(
    spec: ImageSpec | None,
    *,
    size: int | None = None,
    output_format: str = "raw",
    options: list[tuple[str, str]] | None = None,
    snapshot: SnapshotParam | None = None,
    context: Context,
) -> Measure:
    """Sizes of an `output_format` image with `options`, for a disk of `size` bytes or for what is in `spec`.

    Reads the source's allocation only, never its data. Raises OptionError, NotSupported, OpenError."""
    if spec is None:
        assert size is not None
        return _measure(output_format, options, round_up(size, SECTOR), None, None, context)
    with open_disk(spec, context=context, raw_shares_all=True) as disk:
        if snapshot is not None:
            snapshot.load(disk.top)
        source = Source([disk])
        return _measure(output_format, options, disk.size, source, _bitmaps(disk.top), context)


def _bitmaps(image: Image) -> list[tuple[int, str]] | None:
    try:
        return [(bitmap.granularity, bitmap.name) for bitmap in image.bitmaps()]
    except NotSupported:
        return None


def _output(name: str) -> Format:
    try:
        return registry.get(name)
    except OptionError:
        raise OptionError(f"Unknown file format '{name}'", option="format") from None


def _measure(
    name: str,
    options: list[tuple[str, str]] | None,
    size: int,
    source: Source | None,
    bitmaps: list[tuple[int, str]] | None,
    context: Context,
) -> Measure:
    driver = _output(name)
    if not driver.can_create:
        raise NotSupported(f"Format driver '{name}' does not support image creation")
    if not driver.can_measure:
        raise NotSupported(f"Block driver '{name}' does not support size measurement")
    # A new file has its storage's options, too; they change nothing here.
    known = merged_options(driver, target("new", context=context))
    try:
        values: dict[str, Value] = parse_values(known, options or [])
    except QimgError as error:
        raise OptionsRefused(str(error), hint=error.hint) from error
    runs = None if source is None else data_runs(source)
    driver.check_secrets(values, context)
    try:
        return driver.measure(MeasureSource(size, runs, bitmaps), values)
    except (StorageError, CorruptImage) as error:
        raise QimgError(f"Unable to get block status: {error.reason}") from error
