"""Extents: what a range of guest bytes is, and where its bytes lie.

Flag bits are promises. None set means "read it through the image", so joining two descriptions of one
range is a bitwise AND and ignorance is safe.

=========== ====================================================================================
HOLE        this layer does not decide what the range holds; a deeper layer, or zeros, show through
ZERO        reads as zeros
MAPPED      the bytes lie verbatim at `host` in `source`
COMPRESSED  stored compressed: only the image can read it
ABSENT      the place says that it has nothing here, whatever reading gives (with MAPPED)
=========== ====================================================================================

Truth table of what occurs (``host`` given or None):

================ ===== ======================================================= ===== ===== =======
flags            host  meaning                                                 data  zero  present
================ ===== ======================================================= ===== ===== =======
0                None  data that only the image can read (encrypted, ...)      yes   no    yes
COMPRESSED       None  compressed data                                         yes   no    yes
MAPPED           yes   plain data                                              yes   no    yes
MAPPED|ABSENT    yes   what null-co reads as; what is dirty (NBD's x-dirty-bitmap)     no    no    no
MAPPED|ZERO      yes   data cluster whose host range is a hole in the file     yes   yes   yes
ZERO             None  zero cluster without space                              no    yes   yes
ZERO             yes   space reserved (preallocated zero, hole of a raw file)  no    yes   yes
HOLE             any   not decided here (a guest of `Image.extents` only)      no    no    no
HOLE|ZERO        any   decided by no layer of the chain                        no    yes   no
================ ===== ======================================================= ===== ===== =======

The last three columns are the fields of ``map --output=json``; `is_data`, `is_zero` and `is_present`
compute them.
"""

from __future__ import annotations

from qimg.records import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NamedTuple

    from qimg.storage.base import Storage

HOLE = 1
ZERO = 2
MAPPED = 4
COMPRESSED = 8
ABSENT = 16

if TYPE_CHECKING:

    class Extent(NamedTuple):
        """A run of guest bytes `start` .. `start + length` of one kind.

        All sizes in bytes. `depth` is the layer that answers (0 = top). `host` is an offset in `source`,
        None where no host range belongs to the run.
        """

        start: int
        length: int
        flags: int
        depth: int = 0
        host: int | None = None
        source: Storage | None = None

else:
    Extent = record("Extent", ("start", "length", "flags", "depth", "host", "source"), (0, None, None))


def is_data(extent: Extent) -> bool:
    """Whether the run occupies storage as data (`map`'s ``data``)."""
    flags = extent.flags
    return not flags & (HOLE | ABSENT) and (not flags & ZERO or bool(flags & MAPPED))


def is_zero(extent: Extent) -> bool:
    """Whether the run is known to read as zeros (`map`'s ``zero``)."""
    return bool(extent.flags & ZERO)


def is_present(extent: Extent) -> bool:
    """Whether some layer of the chain decides the run (`map`'s ``present``)."""
    return not extent.flags & (HOLE | ABSENT)


def _continues(last: Extent, start: int, flags: int, depth: int, host: int | None, source: object) -> bool:
    if last.flags != flags or last.depth != depth or last.source is not source:
        return False
    if last.start + last.length != start:
        return False
    if host is None or last.host is None:
        return host is last.host
    return last.host + last.length == host


class Runs:
    """Accumulates extents: ascending, contiguous, clipped to a range and coalesced, in this one place.

    Ranges that `append` is never told about become HOLE when they are skipped over or when the list is
    taken. Give the runs in ascending order; what lies outside `start` .. `start + length` is cut off.
    """

    __slots__ = ("_depth", "_end", "_next", "_runs")

    def __init__(self, start: int, length: int, depth: int = 0) -> None:
        self._next = start
        self._end = start + length
        self._depth = depth
        self._runs: list[Extent] = []

    def append(
        self,
        start: int,
        length: int,
        flags: int,
        host: int | None = None,
        source: Storage | None = None,
        depth: int | None = None,
    ) -> None:
        """Add a run; a gap before it is filled with HOLE."""
        if start < self._next:
            cut = self._next - start
            start += cut
            length -= cut
            if host is not None:
                host += cut
        if start + length > self._end:
            length = self._end - start
        if length <= 0:
            return
        if depth is None:
            depth = self._depth
        if start > self._next:
            self._push(self._next, start - self._next, HOLE, self._depth, None, None)
        self._push(start, length, flags, depth, host, source)

    def extend(self, extents: Iterable[Extent]) -> None:
        """Add runs as they are, each with its own depth."""
        for extent in extents:
            self.append(extent.start, extent.length, extent.flags, extent.host, extent.source, extent.depth)

    def _push(
        self, start: int, length: int, flags: int, depth: int, host: int | None, source: Storage | None
    ) -> None:
        runs = self._runs
        self._next = start + length
        if runs and _continues(runs[-1], start, flags, depth, host, source):
            last = runs[-1]
            runs[-1] = last._replace(length=last.length + length)
            return
        runs.append(Extent(start, length, flags, depth, host, source))

    def take(self) -> list[Extent]:
        """The finished list, which covers the whole range."""
        if self._next < self._end:
            self._push(self._next, self._end - self._next, HOLE, self._depth, None, None)
        return self._runs


def clip(extents: Iterable[Extent], start: int, length: int) -> Iterator[Extent]:
    """The parts of ascending `extents` inside ``start .. start + length``."""
    end = start + length
    for extent in extents:
        low = max(extent.start, start)
        high = min(extent.start + extent.length, end)
        if low >= high:
            continue
        if low == extent.start and high == extent.start + extent.length:
            yield extent
            continue
        host = None if extent.host is None else extent.host + (low - extent.start)
        yield extent._replace(start=low, length=high - low, host=host)
