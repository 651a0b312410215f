"""rebase: another backing file under an image (rebase sheet).

What the image itself does not hold is compared, old backing disk with new one, by its smallest units of
allocation; units that differ are written into the image. Its header is changed last, so that the image reads
the same at any moment.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right

from qimg.context import Notice
from qimg.errors import CorruptImage, NotSupported, OpenError, OptionError, QimgError, StorageError
from qimg.extent import HOLE, MAPPED, ZERO, Extent, clip
from qimg.formats import registry as formats
from qimg.formats.base import Reference
from qimg.graph.disk import Disk
from qimg.graph.open import ImageSpec, open_disk, resolve_relative
from qimg.jobs.engine import Meter
from qimg.jobs.fill import CHUNK, PIECE, Filler, Unsure, fill_error, together
from qimg.jobs.inplace import InPlace
from qimg.storage import registry as storages
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.formats.base import Image
    from qimg.graph.disk import Layer
    from qimg.jobs.progress import Progress
    from qimg.storage.base import Storage

    Run = tuple[int, int]  # (start, length) in guest bytes

JSON_PREFIX = "json:"


def rebase(
    spec: ImageSpec,
    backing: str | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    compress: bool = False,
    source_cache: str = "writeback",
    share: bool = False,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    context: Context,
) -> None:
    """Give the image the backing file `backing`, a name as its header is to have it; empty or None: none.

    With `unsafe` only the header is changed; else the image reads as before, over its whole size.
    `compress`: the clusters that have to be written are compressed. `source_cache`, `share`: how the new
    backing file is opened. Raises QimgError; the image then has its old backing file and reads as before."""
    meter = Meter(progress, cancelled)
    meter.tick()
    if backing_format is not None:
        backing_format = formats.own_name(backing_format)
    with open_disk(spec, context=context, writable=True, backing=not unsafe) as disk:
        if backing_format is not None and not _is_driver(backing_format):
            raise OptionError(f"Invalid format name: '{backing_format}'", option="backing_fmt")
        found = None
        if not unsafe:
            new = None
            if backing:
                cache = ImageSpec("", format=backing_format, cache=source_cache, force_share=share)
                new = _open_new(disk, backing, cache, context)
            try:
                found = None if new is None else new.top.format_name
                meter.total = disk.size
                _Rebase(disk, new, meter, compress=compress).execute()
            finally:
                if new is not None:
                    new.close()
        if backing and not unsafe and backing_format is None:
            context.warn(
                Notice(
                    "Deprecated use of backing file without explicit backing format"
                    f" (detected format of {found})"
                )
            )
            backing_format = found
        _change(disk.top, backing, backing_format)
        meter.done = meter.total
        meter.tick()


def _is_driver(name: str) -> bool:
    return name in formats.FORMATS or name in storages.STORAGES


def _change(image: Image, backing: str | None, backing_format: str | None) -> None:
    try:
        image.change_backing(Reference(backing, backing_format) if backing else None)
    except QimgError as error:
        reason = error.reason if isinstance(error, (StorageError, CorruptImage)) else error
        name = "(null)" if backing is None else backing  # the real program's word for none
        raise QimgError(f"Could not change the backing file to '{name}': {reason}") from error


def _open_new(disk: Disk, backing: str, how: ImageSpec, context: Context) -> Disk:
    """Open the new backing file `backing` of `disk`, as `how` says."""
    try:
        how.text = resolve_relative(disk.top.file.name, backing)
        return open_disk(how, context=context, raw_shares_all=True)
    except QimgError as error:
        reason = error.reason if isinstance(error, OpenError) else error
        raise QimgError(f"Could not open new backing file '{backing}': {reason}", hint=error.hint) from error


class _Rebase:
    """`disk`, whose layers below the top are compared with the disk `new` (None: nothing, zeros)."""

    def __init__(self, disk: Disk, new: Disk | None, meter: Meter, *, compress: bool) -> None:
        self._top = disk.top
        self._size = disk.size
        self._alone = Disk(disk.layers[:1])
        self._old = Disk(disk.layers[1:]) if len(disk.layers) > 1 else None
        self._new = new
        self._meter = meter
        if compress and not self._top.can_compress:
            raise NotSupported("Compression not supported for this file format")
        self._compress = compress
        #: How many layers both disks have at their ends.
        self._common = _common(disk.layers[1:], new)
        self._files: dict[str, object] = {}

    def execute(self) -> None:
        """Raises QimgError."""
        if self._new is not None and self._is_old(self._new):
            return
        if self._top.backing is None and self._new is not None:
            # From now on what is not there is no zeros.
            self._top.backing = Reference(self._new.filename, self._new.top.format_name)
        filler = Filler(self._top, self._old, self._new, compress=self._compress)
        batches = InPlace(self._top, self._meter)
        disks = [disk for disk in (self._alone, self._old, self._new) if disk is not None]
        step = round_down(min(disk.window for disk in disks), CHUNK)
        try:
            for start in range(0, self._size, step):
                self._window(start, min(step, self._size - start), batches, filler)
            self._top.flush()
        except (StorageError, CorruptImage) as error:
            raise fill_error(error) from error

    def _is_old(self, new: Disk) -> bool:
        """Whether the new disk is the old one, by whatever name."""
        return self._old is not None and self._common == len(new.layers) == len(self._old.layers)

    def _window(self, start: int, length: int, batches: InPlace, filler: Filler) -> None:
        # The image's own tables change while the work goes on, so they are asked before.
        holes = [extent for extent in _extents(self._alone, start, length) if extent.flags & HOLE]
        old = _Part(_extents(self._old, start, length))
        new = _Part(_extents(self._new, start, length))
        batches.run(together(self._pieces(holes, old, new)), filler)
        self._meter.done = start + length
        self._meter.tick()

    def _pieces(self, holes: list[Extent], old: _Part, new: _Part) -> Iterator[Unsure]:
        """What of the ranges that the image does not hold has to be looked at, in handy pieces."""
        step = max(PIECE, self._top.granularity)
        for hole in holes:
            end = hole.start + hole.length
            unlike = self._unlike(old.between(hole.start, end), new.between(hole.start, end))
            for start, length in self._units(unlike, end):
                for low in range(round_down(start, step), start + length, step):
                    first, last = max(start, low), min(start + length, low + step)
                    yield Unsure(first, last - first, old.between(first, last), new.between(first, last))

    def _units(self, runs: Iterator[Run], end: int) -> list[Run]:
        """`runs` rounded out to the image's units, none behind `end`, joined."""
        unit = self._top.granularity
        joined: list[Run] = []
        for start, length in runs:
            low, high = round_down(start, unit), min(round_up(start + length, unit), end)
            if joined and low <= sum(joined[-1]):
                joined[-1] = joined[-1][0], high - joined[-1][0]
            else:
                joined.append((low, high - low))
        return joined

    def _unlike(self, old: list[Extent], new: list[Extent]) -> Iterator[Run]:
        """Where old and new content are not known to be the same."""
        number = 0
        for one in old:
            at, end = one.start, one.start + one.length
            while at < end:
                while new[number].start + new[number].length <= at:
                    number += 1
                two = new[number]
                stop = min(end, two.start + two.length)
                if not self._alike(one, two):
                    yield at, stop - at
                at = stop

    def _alike(self, one: Extent, two: Extent) -> bool:
        if one.flags & two.flags & ZERO:
            return True
        if one.flags == two.flags and self._is_common(one, two):
            return True
        if not one.flags & two.flags & MAPPED:
            return False
        assert one.host is not None and two.host is not None
        if one.host - one.start != two.host - two.start:
            return False
        return self._file(one.source) == self._file(two.source)

    def _is_common(self, one: Extent, two: Extent) -> bool:
        """Whether one and the same image decides what both are."""
        if self._old is None or self._new is None:
            return False
        above_end = len(self._old.layers) - one.depth, len(self._new.layers) - two.depth
        return above_end[0] == above_end[1] <= self._common

    def _file(self, storage: Storage | None) -> object:
        """What tells whether two storages are one regular file."""
        assert storage is not None
        known = self._files.get(storage.name)
        if known is None:
            known = _identity(storage.name) if storage.driver == "file" else id(storage)
            self._files[storage.name] = known
        return known


def _identity(name: str) -> object:
    """Device and inode; something unique where there is no such file."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return object()
    return status.st_dev, status.st_ino


def _common(layers: list[Layer], new: Disk | None) -> int:
    """How many of the last `layers` are the last ones of `new` too."""
    if new is None:
        return 0
    count = 0
    for one, two in zip(reversed(layers), reversed(new.layers), strict=False):
        if not _is_same(one, two):
            break
        count += 1
    return count


def _is_same(one: Layer, two: Layer) -> bool:
    """Whether both are one image, opened by plain names."""
    if one.filename.startswith(JSON_PREFIX) or two.filename.startswith(JSON_PREFIX):
        return False
    if one.image.format_name != two.image.format_name or one.image.file.driver != "file":
        return False
    return _identity(one.image.file.name) == _identity(two.image.file.name)


def _extents(disk: Disk | None, start: int, length: int) -> list[Extent]:
    """The extents of ``start .. start + length``, zeros behind the end of the disk."""
    size = 0 if disk is None else disk.size
    shown = max(0, min(length, size - start))
    found: list[Extent] = []
    if disk is not None and shown:
        found = disk.extents(start, shown)
    if shown < length:
        found.append(Extent(start + shown, length - shown, ZERO))
    return found


class _Part:
    """The extents of a part of a disk, to be asked for smaller parts."""

    def __init__(self, extents: list[Extent]) -> None:
        self._extents = extents
        self._starts = [extent.start for extent in extents]

    def between(self, start: int, end: int) -> list[Extent]:
        """The extents of ``start .. end``."""
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, end, first)
        return list(clip(self._extents[first:last], start, end - start))
