"""Refcounts of another width (``amend -o refcount_bits``; qcow2 sheet, sections 4 and 17)."""

from __future__ import annotations

from qimg.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.qcow2.image import Qcow2Image


def rewrite_refcounts(image: Qcow2Image, bits: int, progress: Callable[[int, int], None]) -> None:  # noqa: ARG001
    """Store the counts of `image` (opened writable, flushed) in `bits` bits each, 1 to 64.

    One write of the header switches to the new structure. `progress(done, total)` counts refcount blocks.
    Raises NotSupported (a count does not fit, or version 2), StorageError, CorruptImage. The caller
    reloads the image afterwards.
    """
    raise NotSupported("Changing the refcount width is not supported yet")
