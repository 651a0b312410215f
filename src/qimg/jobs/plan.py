"""What to do with each range of the source: pure functions from extents to rows to chunks."""

from __future__ import annotations

from qimg.extent import ZERO, clip
from qimg.records import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NamedTuple

    from qimg.extent import Extent
    from qimg.formats.base import Image

#: Units of the target that one chunk clears at most: bounds the tables that are staged for it.
LONG_CLEAR = 1 << 16
#: Actions of a row. What a plan leaves out is skipped: the target already reads right there.
COPY = 0  # move the bytes
CLEAR = 1  # make the range read as zeros

if TYPE_CHECKING:

    class Row(NamedTuple):
        """`action` for guest bytes ``start .. start + length``; `extent` describes exactly this range."""

        start: int
        length: int
        action: int
        extent: Extent

    class Chunk(NamedTuple):
        """Guest bytes ``start .. start + length`` handled in one go, and the rows inside, ascending."""

        start: int
        length: int
        rows: list[Row]

else:
    Row = record("Row", ("start", "length", "action", "extent"))
    Chunk = record("Chunk", ("start", "length", "rows"))


class Policy:
    """How the target wants the source's ranges treated.

    everything  copy zeros too, as data (``-S 0``).
    top_only    only what lies in the source's top image, or in no image at all, and so reads as zeros
                whatever is below; the rest shows through the new backing file.
    clear       zeros must be made, not assumed: the target may hold something else there.
    zero_from   from this guest offset on the target reads as zeros; None: unknown.
    """

    __slots__ = ("clear", "everything", "top_only", "zero_from")

    def __init__(
        self,
        *,
        everything: bool = False,
        top_only: bool = False,
        clear: bool = False,
        zero_from: int | None = None,
    ) -> None:
        self.everything = everything
        self.top_only = top_only
        self.clear = clear
        self.zero_from = zero_from


def plan_copy(extents: Iterable[Extent], policy: Policy) -> Iterator[Row]:
    """Rows for `extents`, ascending; skipped ranges are left out."""
    for extent in extents:
        if policy.top_only and extent.depth > 0:
            continue
        if not extent.flags & ZERO:
            yield Row(extent.start, extent.length, COPY, extent)
            continue
        action = COPY if policy.everything else CLEAR
        if not (policy.everything or policy.clear):
            continue
        if policy.zero_from is None:
            yield Row(extent.start, extent.length, action, extent)
        else:
            for part in clip((extent,), 0, policy.zero_from):
                yield Row(part.start, part.length, action, part)


def cut(row: Row, start: int, end: int) -> Row:
    """The part of `row` inside ``start .. end``."""
    if start <= row.start and row.start + row.length <= end:
        return row
    extent = next(clip((row.extent,), start, end - start))
    return Row(extent.start, extent.length, row.action, extent)


def long_clear(image: Image) -> int:
    """Bytes of `image` that one chunk may clear; 0 where zeros have to be written like data."""
    if not image.can_mark_zero:
        return 0
    return LONG_CLEAR * image.cluster_size if image.cluster_size is not None else image.size


def chunks(rows: Iterable[Row], chunk_size: int, size: int, *, long_clear: int = 0) -> Iterator[Chunk]:
    """Group ascending `rows` into chunks aligned to `chunk_size`, none beyond `size`.

    A chunk without rows is left out. A long range to clear becomes chunks of up to `long_clear` bytes, many
    times `chunk_size`.
    """
    longest = long_clear - long_clear % chunk_size
    current: list[Row] = []
    base = 0
    for row in rows:
        start = row.start
        end = row.start + row.length
        while start < end:
            home = start - start % chunk_size
            if current and home != base:
                yield Chunk(base, min(chunk_size, size - base), current)
                current = []
            if longest and row.action == CLEAR and not current and start == home:
                whole = min(end if end == size else end - end % chunk_size, start + longest)
                if whole > start:
                    yield Chunk(start, whole - start, [cut(row, start, whole)])
                    start = whole
                    continue
            stop = min(end, home + chunk_size)
            base = home
            current.append(cut(row, start, stop))
            start = stop
    if current:
        yield Chunk(base, min(chunk_size, size - base), current)
