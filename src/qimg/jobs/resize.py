"""resize: another size for the guest's disk (resize sheet; qcow2 sheet, section 16).

The format changes its tables. What needs guest bytes is done here: the unit that the disk's end lies in may
hold bytes behind the end (what was cut off there earlier, or what a longer backing file has), and they must
not come up when the disk grows.
"""

from __future__ import annotations

from qimg.errors import LockError, OpenError, OptionError, QimgError
from qimg.extent import HOLE, MAPPED, ZERO
from qimg.graph.open import open_disk
from qimg.guest_size import GuestSize
from qimg.storage.base import USE_ALL, USE_READ, USE_RESIZE, USE_WRITE
from qimg.units import INT64_MAX, round_down

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.graph.disk import Disk
    from qimg.graph.open import ImageSpec
    from qimg.storage.base import Storage


class ShrinkRefused(QimgError):
    """The disk would become smaller, and nobody confirmed that."""


def resize(
    spec: ImageSpec,
    size: int,
    *,
    relative: bool = False,
    preallocation: str = "off",
    shrink: bool = False,
    context: Context,
) -> None:
    """Give the disk `size` bytes, or with `relative` that many more (fewer where negative).

    `preallocation` (off, metadata, falloc, full) is how growth is backed; `shrink` confirms that data may get
    lost. Raises OptionError, ShrinkRefused, NotSupported, LimitError, OpenError, StorageError."""
    with open_disk(spec, context=context, writable=True) as disk:
        _claim_length(disk, spec)
        total = disk.size + size if relative else size
        if not 0 < total <= INT64_MAX:
            raise OptionError("New image size must be positive", option="size")
        if preallocation != "off" and total <= disk.size:
            raise OptionError("Preallocation can only be used for growing images", option="preallocation")
        if total < disk.size and not shrink:
            raise ShrinkRefused("Use the --shrink option to perform a shrink operation.")
        resize_disk(disk, total, preallocation)


def _claim_length(disk: Disk, spec: ImageSpec) -> None:
    """Keep out who relies on the length of a raw file (protocols sheet 4); other formats exclude everybody.

    Raises OpenError."""
    image = disk.top
    if image.format_name not in ("raw", image.file.driver):
        return
    try:
        image.file.lock(USE_READ | USE_WRITE | USE_RESIZE, USE_ALL)
    except LockError as error:
        raise OpenError(spec.text, error) from error


def resize_disk(disk: Disk, size: int, preallocation: str = "off") -> None:
    """Resize an opened disk to `size` bytes; afterwards only its top image may be used.

    Raises NotSupported, OptionError, LimitError, StorageError."""
    wanted = guest_size(disk, size)
    disk.top.resize(wanted, preallocation, shown=wanted.shown)


def guest_size(disk: Disk, size: int) -> GuestSize:
    """`size` bytes for the top image of `disk`."""
    shown = disk.layers[1].image.size if len(disk.layers) > 1 else 0
    return GuestSize.of(size, shown, lambda end, shows: _settle(disk, end, shows=shows))


def _settle(disk: Disk, end: int, *, shows: bool) -> None:
    """What `GuestSize.settle` says. What has to be written is written, what has to be said in tables is
    staged: bytes behind the end belong to nobody, so nothing changes that can be seen."""
    image = disk.top
    start = round_down(end, image.granularity)
    if start == end:
        return
    extent = image.extents(start, end - start)[0]
    if extent.flags & ZERO and not extent.flags & (HOLE | MAPPED):
        return  # a hole of the file (MAPPED) tells nothing of the rest of the unit
    if extent.flags & HOLE and not shows:
        return
    place = image.in_place(start, end - start)[0]
    if place.flags & MAPPED:
        assert place.source is not None and place.host is not None
        _clear(place.source, place.host + end - place.start, image.granularity - (end - start))
        return
    unit = bytearray(image.granularity)
    disk.read_into(memoryview(unit)[: end - start], start)
    if image.can_mark_zero and not any(unit):
        image.mark_zero(start, end - start)
        return
    place = image.allocate(start, end - start)[0]
    assert place.source is not None and place.host is not None
    place.source.write(unit, place.host + start - place.start)


def _clear(storage: Storage, offset: int, length: int) -> None:
    if any(storage.read(offset, length)):
        storage.write(bytes(length), offset)
