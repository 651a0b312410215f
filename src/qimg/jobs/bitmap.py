"""bitmap: add, remove, clear, switch and merge the persistent dirty bitmaps of an image (bitmap sheet)."""

from __future__ import annotations

from qimg.errors import LimitError, NotSupported, OptionError, QimgError
from qimg.formats import registry
from qimg.graph.open import open_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qimg.context import Context
    from qimg.formats.base import BitmapData, Image
    from qimg.graph.disk import Disk
    from qimg.graph.open import ImageSpec

ADD, REMOVE, CLEAR, ENABLE, DISABLE, MERGE = "add", "remove", "clear", "enable", "disable", "merge"
#: What a bit can stand for: powers of two among these numbers of bytes.
_GRANULARITIES = range(512, (1 << 31) + 1)


class Action:
    """One thing to do to a bitmap: `kind` is one of the words above; `source` names what is merged."""

    __slots__ = ("kind", "source")

    def __init__(self, kind: str, source: str | None = None) -> None:
        self.kind = kind
        self.source = source


def bitmap(
    spec: ImageSpec,
    name: str,
    actions: Sequence[Action],
    *,
    granularity: int | None = None,
    source: ImageSpec | None = None,
    context: Context,
) -> None:
    """Do `actions` to the bitmap `name`, one after the other; each is durable before the next begins, and
    stays when a later one fails.

    `granularity`: guest bytes for a bit of an added bitmap; None or 0: the format's default. `source`: the
    image that merged bitmaps are in, else the same one. Raises QimgError (``Operation ... on bitmap ...
    failed: ...``), OpenError."""
    with open_disk(spec, context=context, writable=True, backing=False) as disk:
        if source is None:
            _carry_out(disk, name, actions, granularity, disk)
            return
        with open_disk(source, context=context, backing=False, raw_shares_all=True) as other:
            _carry_out(disk, name, actions, granularity, other)


def bitmaps(spec: ImageSpec, *, context: Context) -> list[BitmapData]:
    """The bitmaps of an image with their contents. Raises NotSupported, OpenError."""
    with open_disk(spec, context=context, backing=False, raw_shares_all=True) as disk:
        return disk.top.bitmaps()


def check_target(disk: Disk, more: Sequence[BitmapData], size: int) -> None:
    """Raise what keeps the bitmaps `more`, of a disk of `size` bytes, from being stored in the top image of
    `disk` beside its own: NotSupported, QimgError. Called before anything is copied there."""
    image = disk.top
    try:
        taken = {bitmap.name for bitmap in image.bitmaps()}
    except NotSupported:
        raise NotSupported(f"Format driver '{image.format_name}' does not support bitmaps") from None
    for bitmap in more:
        if bitmap.name in taken:
            raise QimgError(f"Failed to create bitmap {bitmap.name}: Bitmap already exists: {bitmap.name}")
        if size != disk.size:
            raise QimgError(f"Failed to populate bitmap {bitmap.name}: {_sizes_differ(disk.size, size)}")


def _sizes_differ(target: int, source: int) -> NotSupported:
    return NotSupported(
        f"Bitmaps are of different sizes (destination size is {target}, source size is {source}) and can't"
        " be merged"
    )


def _carry_out(
    disk: Disk, name: str, actions: Sequence[Action], granularity: int | None, source: Disk
) -> None:
    for action in actions:
        try:
            if action.kind == ADD:
                _add(disk, name, granularity or None)
            elif action.kind == MERGE:
                _merge(disk, name, source, action.source or "")
            else:
                _change(disk.top, name, action.kind)
        except QimgError as error:
            text = f"Operation {action.kind} on bitmap {name} failed: {error}"
            raise QimgError(text, hint=error.hint) from error


def _add(disk: Disk, name: str, granularity: int | None) -> None:
    if not name:
        raise OptionError("Bitmap name cannot be empty")
    if granularity is not None and (granularity & (granularity - 1) or granularity not in _GRANULARITIES):
        raise LimitError(f"Granularity must be power of 2 and at least {_GRANULARITIES.start}")
    if not _can_hold(disk.top):
        raise NotSupported(f"Can't store persistent bitmaps to {disk.filename}: Operation not supported")
    disk.top.add_bitmap(name, granularity)


def _change(image: Image, name: str, kind: str) -> None:
    if not _can_hold(image):
        raise _not_found(name)
    if kind == REMOVE:
        image.remove_bitmap(name)
    elif kind == CLEAR:
        image.change_bitmap(name, clear=True)
    else:
        image.change_bitmap(name, enabled=kind == ENABLE)


def _merge(disk: Disk, name: str, source: Disk, wanted: str) -> None:
    try:
        more = _usable(source.top, wanted)
        if source.size != disk.size:
            raise _sizes_differ(disk.size, source.size)
    except QimgError:
        _usable(disk.top, name)  # what is wrong with the target is told first
        raise
    if source is not disk or wanted != name:
        _change_by(disk.top, name, more)


def _change_by(image: Image, name: str, more: BitmapData) -> None:
    if not _can_hold(image):
        raise _not_found(name)
    image.change_bitmap(name, merge=more)


def _can_hold(image: Image) -> bool:
    """Whether the format knows bitmaps."""
    try:
        return registry.get(image.format_name).can_bitmaps
    except QimgError:
        return False  # a storage by itself


def _usable(image: Image, name: str) -> BitmapData:
    """The bitmap of this name with its contents. Raises QimgError where there is none or it means nothing."""
    try:
        found = [bitmap for bitmap in image.bitmaps() if bitmap.name == name]
    except NotSupported:
        found = []
    if not found:
        raise _not_found(name)
    if found[0].inconsistent:
        raise NotSupported(
            f"Bitmap '{name}' is inconsistent and cannot be used",
            hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
        )
    return found[0]


def _not_found(name: str) -> QimgError:
    return QimgError(f"Dirty bitmap '{name}' not found")
