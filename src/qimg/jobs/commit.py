"""commit: what an image holds, into an image below it (commit sheet).

The base is written first and made durable; only then is the image emptied. Until then both read as before,
seen through the top image, whatever happens.
"""

from __future__ import annotations

from qimg.errors import CorruptImage, NotSupported, QimgError, StorageError
from qimg.extent import HOLE, ZERO, clip
from qimg.graph.disk import Disk
from qimg.graph.open import open_with_base
from qimg.jobs.engine import Meter
from qimg.jobs.plan import CLEAR, COPY, Row, chunks, long_clear
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.graph.open import ImageSpec
    from qimg.jobs.copy import Copier
    from qimg.jobs.inplace import InPlace, Mover
    from qimg.jobs.progress import Progress


def commit(
    spec: ImageSpec,
    *,
    base: str | None = None,
    keep: bool = False,
    rate_limit: int = 0,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    context: Context,
) -> None:
    """Write what the image and those between it and `base` hold into `base`, which grows if it is shorter.

    `base`: a member of the backing chain by name, None for the image's own backing file, after which the
    image is emptied unless `keep`. `rate_limit`: bytes a second, 0 for none. Raises QimgError; the image
    then reads as before."""
    disk, depth = open_with_base(spec, base, context=context)
    with disk:
        meter = Meter(progress, cancelled)
        meter.tick()
        if depth is None:
            if base is None:
                raise QimgError("Image does not have a backing file")
            raise QimgError(f"Did not find '{base}' in the backing chain of '{disk.filename}'")
        try:
            _Commit(disk, depth, rate_limit, meter).execute()
            disk.layers[depth].image.publish()
            if depth == 1:
                disk.top.record_backing(disk.layers[1].image)
        except NotSupported as error:
            raise QimgError(f"Block job failed: {error}", hint=error.hint) from error
        except (StorageError, CorruptImage) as error:
            raise QimgError(f"Block job failed: {error.reason}") from error
        if base is None and not keep:
            _empty(disk)
        meter.done = meter.total
        meter.tick()


def _empty(disk: Disk) -> None:
    """Drop what the top image holds; a format that cannot stays as it is."""
    try:
        disk.top.make_empty()
    except NotSupported:
        pass
    except (StorageError, CorruptImage) as error:
        raise QimgError(f"Could not empty {disk.filename}: {error.reason}") from error


class _Commit:
    """The layers of `disk` above `depth` go into the one there."""

    def __init__(self, disk: Disk, depth: int, rate_limit: int, meter: Meter) -> None:
        self._upper = Disk(disk.layers[:depth])
        self._lower = Disk(disk.layers[depth:])
        self._rate_limit = rate_limit
        self._meter = meter

    def execute(self) -> None:
        """Raises NotSupported, StorageError, CorruptImage, Cancelled."""
        size = self._upper.size
        self._meter.total = size
        if self._lower.size < size:
            self._grow(size)
        self._copy()

    def _grow(self, size: int) -> None:
        """Raises NotSupported, StorageError."""
        from qimg.jobs.resize import resize_disk

        try:
            resize_disk(self._lower, size)
        except NotSupported as error:
            raise NotSupported("Operation not supported") from error
        self._lower = Disk(self._lower.layers)

    def _copy(self) -> None:
        from qimg.jobs.copy import Copier
        from qimg.jobs.inplace import InPlace, Mover
        from qimg.jobs.source import Source

        target = self._lower.top
        batches = InPlace(target, self._meter, rate=self._rate_limit)
        mover = Mover(target, self._upper.read_extent)
        copier = Copier(
            Source([self._upper]),
            target,
            sparse=0,
            clear=True,
            under=self._lower,
            in_place=True,
            ordered=target.cluster_size is not None,
        )
        for rows in self._windows():
            self._copy_window(rows, batches, mover, copier)
        target.flush()

    def _copy_window(self, rows: list[Row], batches: InPlace, mover: Mover, copier: Copier) -> None:
        from qimg.jobs.inplace import CHUNK, fills_units, gather

        target = self._lower.top
        unit = target.granularity
        plain: list[Row] = []
        other: list[Row] = []
        for row in rows:
            (plain if fills_units(row, unit, target.size) else other).append(row)
        if target.cluster_size is None:
            # There is no order of allocation to keep, so things are read in the order in which they lie.
            plain.sort(key=_place)
        batches.run(gather(plain), mover)
        batches.run(chunks(other, CHUNK, target.size, long_clear=long_clear(target)), copier)

    def _windows(self) -> Iterator[list[Row]]:
        """What to do, window by window."""
        for window in self._upper.windows(0, self._upper.size):
            rows = []
            for extent in window:
                if extent.flags & ZERO:
                    rows += self._clear(extent)
                else:
                    rows.append(Row(extent.start, extent.length, COPY, extent))
            done = sum(extent.length for extent in window) - sum(row.length for row in rows)
            self._meter.done += done
            self._meter.tick()
            yield rows

    def _clear(self, extent: Extent) -> list[Row]:
        """Rows that make the zeros of `extent` in the base, where it does not read so already.

        What no upper layer decides shows the base, except behind the end of a shorter layer between."""
        if extent.flags & HOLE and extent.depth == len(self._upper.layers) - 1:
            return []
        unit = self._lower.top.granularity
        rows: list[Row] = []
        start = extent.start  # what lies before is done
        for below in self._lower.extents(extent.start, extent.length):
            if below.flags & ZERO:
                continue
            # Whole units where that is possible: they can be noted as zeros, parts have to be written.
            low = max(start, round_down(below.start, unit))
            start = max(start, round_up(below.start + below.length, unit))
            parts = clip((extent,), low, start - low)
            rows += [Row(part.start, part.length, CLEAR, part) for part in parts]
        return rows


def _place(row: Row) -> tuple[int, int]:
    return row.extent.depth, row.extent.host or 0
