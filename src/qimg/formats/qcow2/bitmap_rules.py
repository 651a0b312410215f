"""Which bitmaps an image can take (qcow2 sheet, section 9; bitmap sheet)."""

from __future__ import annotations

from qimg.errors import LimitError, NotSupported, QimgError
from qimg.formats.qcow2.structs import MAX_BITMAP_BYTES, MAX_BITMAP_NAME

_MIN_GRANULARITY = 1 << 9
_MAX_GRANULARITY = 1 << 31
_DEFAULT_GRANULARITIES = 4 << 10, 64 << 10


def default_granularity(cluster_size: int) -> int:
    """One bit a cluster, but 4 KiB at least and 64 KiB at most."""
    low, high = _DEFAULT_GRANULARITIES
    return min(max(cluster_size, low), high)


def ceil_div(value: int, unit: int) -> int:
    """`value` divided by `unit`, rounded up."""
    return -(-value // unit)


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """Clusters of data that a bitmap over `size` guest bytes takes."""
    return ceil_div(ceil_div(ceil_div(size, granularity), 8), cluster_size)


def check_granularity(granularity: int) -> None:
    """Raise LimitError for what no bitmap can have."""
    if granularity & (granularity - 1) or not _MIN_GRANULARITY <= granularity <= _MAX_GRANULARITY:
        raise LimitError("Granularity must be power of 2 and at least 512")


def check_storable(name: bytes, granularity: int, *, version: int, size: int, cluster_size: int) -> None:
    """Raise NotSupported or LimitError where an image of `size` guest bytes cannot keep such a bitmap."""
    if version < 3:
        raise NotSupported("Cannot store dirty bitmaps in qcow2 v2 files")
    entries = table_entries(size, granularity, cluster_size)
    if entries * cluster_size > MAX_BITMAP_BYTES:
        raise LimitError("Too much space will be occupied by the bitmap. Use larger granularity")
    if len(name) > MAX_BITMAP_NAME:
        raise LimitError(f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)")
    if entries == 0:
        raise NotSupported("An image of size 0 cannot store bitmaps")


def already_exists(name: str) -> QimgError:
    """What is raised for a second bitmap of one name."""
    return NotSupported(f"Bitmap already exists: {name}")


def inconsistent(name: str) -> QimgError:
    """What is raised for any use but removal of a bitmap that was not written back."""
    return NotSupported(
        f"Bitmap '{name}' is inconsistent and cannot be used",
        hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
    )
