"""compare: whether a guest would see the same in two disks."""

from __future__ import annotations

from qimg.errors import QimgError, StorageError
from qimg.extent import MAPPED, ZERO, Extent, is_data, is_present, is_zero
from qimg.graph.open import open_disk
from qimg.jobs.engine import Meter, default_workers, lock_and_local, run
from qimg.records import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NamedTuple

    from qimg.context import Context
    from qimg.graph.disk import Disk
    from qimg.graph.open import ImageSpec
    from qimg.jobs.engine import Turn
    from qimg.jobs.progress import Progress

IDENTICAL = "identical"
CONTENT = "content"
SIZE = "size"
STATUS = "status"

#: Bytes compared at once; the first difference is reported as a whole sector counted from such a start.
CHUNK = 2 << 20
SECTOR = 512
SMALL = 8 << 20


class AllocationError(QimgError):
    """What a range is could not be found out."""


class ReadError(QimgError):
    """One of the images could not be read."""


class Comparison:
    """`verdict`: IDENTICAL; CONTENT at `offset`; SIZE; or STATUS at `offset` (the last two in strict mode).

    `sizes_differ` even though the contents may be equal (the longer one has zeros at its end)."""

    __slots__ = ("offset", "sizes_differ", "verdict")

    def __init__(self, verdict: str, offset: int | None = None, *, sizes_differ: bool = False) -> None:
        self.verdict = verdict
        self.offset = offset
        self.sizes_differ = sizes_differ


if TYPE_CHECKING:

    class Piece(NamedTuple):
        """The same range of both disks; None: known to be zeros there (or past the end)."""

        start: int
        length: int
        first: Extent | None
        second: Extent | None

else:
    Piece = record("Piece", ("start", "length", "first", "second"))


def compare(
    first: ImageSpec,
    second: ImageSpec,
    *,
    strict: bool = False,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    warn_size: Callable[[], None] | None = None,
    context: Context,
) -> Comparison:
    """Compare two disks (compare sheet). `strict`: sizes and allocation must be equal as well.

    `warn_size` is called when the common part is equal and the sizes are not. Raises OpenError,
    AllocationError, ReadError, Cancelled."""
    with open_disk(first, context=context) as one, open_disk(second, context=context) as two:
        return _Comparer(one, two, Meter(progress, cancelled), warn_size).compare(strict)


class _Comparer:
    def __init__(
        self, one: Disk, two: Disk, meter: Meter, warn_size: Callable[[], None] | None
    ) -> None:
        self.one = one
        self.two = two
        self.meter = meter
        self.warn_size = warn_size
        self.found: int | None = None
        self._lock, self._local = lock_and_local()

    def compare(self, strict: bool) -> Comparison:
        one, two = self.one, self.two
        differ = one.size != two.size
        if strict and differ:
            return Comparison(SIZE, sizes_differ=True)
        common = min(one.size, two.size)
        self.meter.total = max(one.size, two.size)
        self.meter.tick()
        status = self._walk(_pairs(one, two, common), strict)
        found = self._difference_found()
        if found is not None:
            return Comparison(CONTENT, found, sizes_differ=differ)
        if status is not None:
            return Comparison(STATUS, status)
        if differ:
            if self.warn_size is not None:
                self.warn_size()
            longer = one if one.size > two.size else two
            self._walk(_tail(longer, common, is_first=longer is one), False)
            tail = self._difference_found()
            if tail is not None:
                return Comparison(CONTENT, tail, sizes_differ=True)
        self.meter.done = self.meter.total
        self.meter.tick()
        return Comparison(IDENTICAL, sizes_differ=differ)

    def _difference_found(self) -> int | None:
        return self.found

    def _walk(self, pairs: Iterator[tuple[Extent, Extent]], strict: bool) -> int | None:
        """Compare the data of `pairs`; stops at the first difference (`found`). Returns where, in strict
        mode, the extents themselves differ, if they do before that."""
        mismatch: list[int] = []
        pieces = self._pieces(pairs, strict, mismatch)
        small = max(self.one.size, self.two.size) <= SMALL
        run(pieces, self._compare_piece, workers=1 if small else default_workers(), meter=self.meter)
        return mismatch[0] if mismatch else None

    def _pieces(
        self, pairs: Iterator[tuple[Extent, Extent]], strict: bool, mismatch: list[int]
    ) -> Iterator[Piece]:
        for a, b in pairs:
            if strict and (_kind(a) != _kind(b) or a.length != b.length):
                mismatch.append(a.start)
                return
            length = min(a.length, b.length)
            if a.flags & ZERO and b.flags & ZERO:
                yield Piece(a.start, length, None, None)
                continue
            for offset in range(0, length, CHUNK):
                if self.found is not None:
                    return
                step = min(CHUNK, length - offset)
                yield Piece(a.start + offset, step, _data(a, offset, step), _data(b, offset, step))

    def _compare_piece(self, piece: Piece, turn: Turn) -> int:
        if self.found is not None and piece.start > self.found:
            return piece.length
        if piece.first is None and piece.second is None:
            return piece.length
        at = self._difference(piece)
        if at is not None:
            with self._lock:
                if self.found is None or at < self.found:
                    self.found = at
        return piece.length

    def _difference(self, piece: Piece) -> int | None:
        """Offset of the first differing sector of `piece`."""
        from qimg.vec.scan import is_zero

        one = self._read(self.one, piece.first, piece.length, 0)
        two = self._read(self.two, piece.second, piece.length, 1)
        if one is None or two is None:
            data = one if two is None else two
            assert data is not None
            if is_zero(data):
                return None
            sectors = range(0, piece.length, SECTOR)
            return piece.start + next(s for s in sectors if any(data[s : s + SECTOR]))
        if one == two:
            return None
        low, high = 0, piece.length
        while high - low > SECTOR:
            middle = low + (high - low) // 2 // SECTOR * SECTOR or low + SECTOR
            if one[low:middle] != two[low:middle]:
                high = middle
            else:
                low = middle
        return piece.start + low

    def _read(self, disk: Disk, extent: Extent | None, length: int, which: int) -> bytearray | None:
        if extent is None:
            return None
        buffers: list[bytearray] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = [bytearray(), bytearray()]
        if len(buffers[which]) != length:
            buffers[which] = bytearray(length)
        try:
            disk.read_extent(extent, buffers[which])
        except StorageError as error:
            raise ReadError(
                f"Error while reading offset {extent.start} of {disk.filename}: {error.reason}"
            ) from error
        except QimgError as error:
            where = f"offset {extent.start} of {disk.filename}"
            raise ReadError(f"Error while reading {where}: {error}") from error
        return buffers[which]


def _data(extent: Extent, offset: int, length: int) -> Extent | None:
    if extent.flags & ZERO:
        return None
    host = extent.host + offset if extent.flags & MAPPED and extent.host is not None else extent.host
    return extent._replace(start=extent.start + offset, length=length, host=host)


def _kind(extent: Extent) -> tuple[bool, bool, bool, bool]:
    return is_data(extent), is_zero(extent), is_present(extent), extent.host is not None


def _merged(disk: Disk, length: int) -> Iterator[Extent]:
    """Extents of ``0 .. length`` with neighbours joined as `map` joins them."""
    last: Extent | None = None
    try:
        for window in disk.windows(0, length):
            for extent in window:
                if last is not None and _joins(last, extent):
                    last = last._replace(length=last.length + extent.length)
                    continue
                if last is not None:
                    yield last
                last = extent
    except (StorageError, QimgError) as error:
        raise AllocationError(f"Sector allocation test failed for {disk.filename}") from error
    if last is not None:
        yield last


def _joins(last: Extent, extent: Extent) -> bool:
    if last.flags != extent.flags or last.depth != extent.depth or last.source is not extent.source:
        return False
    if last.host is None or extent.host is None:
        return last.host is extent.host
    return last.host + last.length == extent.host


def _rest(extent: Extent, used: int) -> Extent:
    host = None if extent.host is None else extent.host + used
    return extent._replace(start=extent.start + used, length=extent.length - used, host=host)


def _pairs(one: Disk, two: Disk, length: int) -> Iterator[tuple[Extent, Extent]]:
    """What both disks say from each position on; the next position follows the shorter of the two."""
    first = _merged(one, length)
    second = _merged(two, length)
    a = next(first, None)
    b = next(second, None)
    while a is not None and b is not None:
        yield a, b
        used = min(a.length, b.length)
        a = _rest(a, used) if used < a.length else next(first, None)
        b = _rest(b, used) if used < b.length else next(second, None)


def _tail(longer: Disk, start: int, *, is_first: bool) -> Iterator[tuple[Extent, Extent]]:
    """The longer disk's end beside zeros."""
    for window in longer.windows(start, longer.size - start):
        for extent in window:
            zeros = Extent(extent.start, extent.length, ZERO)
            yield (extent, zeros) if is_first else (zeros, extent)
