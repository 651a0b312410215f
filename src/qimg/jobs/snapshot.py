"""snapshot: list, create, apply and delete internal snapshots (snapshot sheet)."""

from __future__ import annotations

import time

from qimg.errors import CorruptImage, QimgError, StorageError
from qimg.graph.disk import Disk
from qimg.graph.open import open_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import Image, SnapshotInfo
    from qimg.graph.open import ImageSpec


class SnapshotFailed(QimgError):
    """A snapshot could not be created, applied or deleted. `detail`: what was in the way, where the message
    only sums it up."""

    def __init__(self, message: str, detail: str | None = None) -> None:
        super().__init__(message)
        self.detail = detail


def snapshots(spec: ImageSpec, *, context: Context) -> list[SnapshotInfo]:
    """The internal snapshots in the image's order; none where the format has none. Raises OpenError."""
    with open_disk(spec, context=context, raw_shares_all=True) as disk:
        return _holder(disk).snapshots()


def try_open(spec: ImageSpec, *, context: Context) -> None:
    """Open the image as for a change, and change nothing. Raises OpenError."""
    open_disk(spec, context=context, writable=True).close()


def create_snapshot(spec: ImageSpec, name: str, *, now_ns: int | None = None, context: Context) -> None:
    """Add a snapshot of the disk as it is. `now_ns`: its date, Unix time in nanoseconds; now if not given.

    Raises OpenError, SnapshotFailed."""
    seconds, nanoseconds = divmod(time.time_ns() if now_ns is None else now_ns, 1_000_000_000)
    with open_disk(spec, context=context, writable=True) as disk:
        try:
            _holder(disk).create_snapshot(name, date_sec=seconds, date_nsec=nanoseconds)
        except (StorageError, CorruptImage) as error:
            raise _failed("create", name, error.reason, str(error)) from error
        except QimgError as error:
            raise _failed("create", name, str(error)) from error


def apply_snapshot(spec: ImageSpec, which: str, *, context: Context) -> None:
    """Go back to the snapshot with the id `which`, else with that name: the disk's content and size.

    Raises OpenError, SnapshotFailed."""
    with open_disk(spec, context=context, writable=True) as disk:
        try:
            _holder(disk).apply_snapshot(which)
        except (StorageError, CorruptImage) as error:
            reason = f"Failed to load snapshot: {error.reason}"
            raise _failed("apply", which, reason, str(error)) from error
        except QimgError as error:
            detail = getattr(error, "detail", None)
            raise _failed("apply", which, str(error), detail and str(detail)) from error


def delete_snapshot(spec: ImageSpec, name: str, *, context: Context) -> None:
    """Remove the first snapshot called `name`. Raises OpenError, SnapshotFailed."""
    with open_disk(spec, context=context, writable=True) as disk:
        try:
            _holder(disk).delete_snapshot(name)
        except QimgError as error:
            raise _failed("delete", name, str(error)) from error


def _failed(verb: str, name: str, reason: str, detail: str | None = None) -> SnapshotFailed:
    return SnapshotFailed(
        f"Could not {verb} snapshot '{name}': {reason}", None if detail == reason else detail
    )


def _holder(disk: Disk) -> Image:
    """The image whose snapshots are meant: raw shows what is below as it is, its snapshots too."""
    image = disk.top
    while image.format_name == "raw":
        below = getattr(image.file, "disk", None)  # where an image stands on another one
        if not isinstance(below, Disk):
            break
        image = below.top
    return image
