"""compare: whether a guest would see the same in two disks."""

from __future__ import annotations

from qimg.errors import CorruptImage, QimgError, StorageError
from qimg.extent import ABSENT, COMPRESSED, MAPPED, ZERO, Extent, is_data, is_present, is_zero
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
#: Most bytes of which the real program asks at once what they are.
_LONGEST = (1 << 31) - SECTOR


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
    with (
        open_disk(first, context=context, raw_shares_all=True) as one,
        open_disk(second, context=context, raw_shares_all=True) as two,
    ):
        return _Comparer(one, two, Meter(progress, cancelled), warn_size).compare(strict)


class _Stop(Exception):
    """The result is known: what comes later does not matter."""


class _Comparer:
    def __init__(self, one: Disk, two: Disk, meter: Meter, warn_size: Callable[[], None] | None) -> None:
        self.one = one
        self.two = two
        self.meter = meter
        self.warn_size = warn_size
        # Where the result lies: a difference (None) or an error.
        self.end: tuple[int, QimgError | None] | None = None
        self._lock, self._local = lock_and_local()

    def compare(self, strict: bool) -> Comparison:
        one, two = self.one, self.two
        differ = one.size != two.size
        if strict and differ:
            return Comparison(SIZE, sizes_differ=True)
        common = min(one.size, two.size)
        self.meter.total = max(one.size, two.size)
        self.meter.tick()
        mismatch: list[int] = []
        pairs = _strict_pairs(one, two, mismatch) if strict else _pairs(one, two, common)
        found = self._walk(pairs)
        if found is not None:
            return Comparison(CONTENT, found, sizes_differ=differ)
        if mismatch:
            return Comparison(STATUS, mismatch[0])
        if differ:
            if self.warn_size is not None:
                self.warn_size()
            longer = one if one.size > two.size else two
            found = self._walk(_tail(longer, common, is_first=longer is one))
            if found is not None:
                return Comparison(CONTENT, found, sizes_differ=True)
        self.meter.done = self.meter.total
        self.meter.tick()
        return Comparison(IDENTICAL, sizes_differ=differ)

    def _walk(self, pairs: Iterator[tuple[Extent, Extent]]) -> int | None:
        """Where the data of `pairs` differs first, None: nowhere. Raises AllocationError, ReadError."""
        small = max(self.one.size, self.two.size) <= SMALL
        workers = 1 if small else default_workers(self.one, self.two)
        try:
            run(self._pieces(pairs), self._compare_piece, workers=workers, meter=self.meter)
        except _Stop:
            pass
        if self.end is None:
            return None
        at, error = self.end
        if error is not None:
            raise error
        return at

    def _pieces(self, pairs: Iterator[tuple[Extent, Extent]]) -> Iterator[Piece | QimgError]:
        """What to compare. An error takes its place in the order: differences before it come first."""
        try:
            for a, b in pairs:
                length = min(a.length, b.length)
                if a.flags & ZERO and b.flags & ZERO:
                    yield Piece(a.start, length, None, None)
                    continue
                for offset in range(0, length, CHUNK):
                    step = min(CHUNK, length - offset)
                    yield Piece(a.start + offset, step, _data(a, offset, step), _data(b, offset, step))
        except AllocationError as error:
            yield error

    def _compare_piece(self, piece: Piece | QimgError, turn: Turn) -> int:
        if isinstance(piece, QimgError):
            self._stop(max(self.one.size, self.two.size), piece)
        elif piece.first is not None or piece.second is not None:
            try:
                at = self._difference(piece)
            except ReadError as error:
                self._stop(piece.start, error)
            else:
                if at is not None:
                    self._stop(at, None)
        return 0 if isinstance(piece, QimgError) else piece.length

    def _stop(self, at: int, error: QimgError | None) -> None:
        """End the walk; of several ends the first in the order of the disks counts."""
        with self._lock:
            if self.end is None or at < self.end[0]:
                self.end = at, error
        raise _Stop

    def _difference(self, piece: Piece) -> int | None:
        """Offset of the first differing sector of `piece`. Raises ReadError."""
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
        except QimgError as error:
            reason = error.reason if isinstance(error, (StorageError, CorruptImage)) else error
            raise ReadError(
                f"Error while reading offset {extent.start} of {disk.filename}: {reason}"
            ) from error
        return buffers[which]


def _data(extent: Extent, offset: int, length: int) -> Extent | None:
    if extent.flags & (ZERO | ABSENT):
        return None
    host = extent.host + offset if extent.flags & MAPPED and extent.host is not None else extent.host
    return extent._replace(start=extent.start + offset, length=length, host=host)


def _merged(disk: Disk, start: int, length: int) -> Iterator[Extent]:
    """Extents of a range with neighbours joined as `map` joins them. Raises AllocationError."""
    last: Extent | None = None
    failure: QimgError | None = None
    windows = disk.windows(start, length)
    while failure is None:
        try:
            window = next(windows, None)
        except QimgError as error:
            failure = AllocationError(f"Sector allocation test failed for {disk.filename}")
            failure.__cause__ = error
            break
        if window is None:
            break
        for extent in window:
            if last is not None and _joins(last, extent):
                last = last._replace(length=last.length + extent.length)
                continue
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last
    if failure is not None:
        raise failure


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
    first = _merged(one, 0, length)
    second = _merged(two, 0, length)
    a = next(first, None)
    b = next(second, None)
    while a is not None and b is not None:
        yield a, b
        used = min(a.length, b.length)
        a = _rest(a, used) if used < a.length else next(first, None)
        b = _rest(b, used) if used < b.length else next(second, None)


def _strict_pairs(one: Disk, two: Disk, mismatch: list[int]) -> Iterator[tuple[Extent, Extent]]:
    """`_pairs` of disks of one size, up to the first position from which on the two are not of one kind;
    that is put into `mismatch`."""
    for a, b in _pairs(one, two, one.size):
        at, end = a.start, a.start + min(a.length, b.length)
        while at < end:
            first, second = _rest(a, at - a.start), _rest(b, at - a.start)
            told = _told(one, first), _told(two, second)
            if _kind(one, first, told[0]) != _kind(two, second, told[1]):
                mismatch.append(at)
                return
            step = min(*told, end - at)
            yield first._replace(length=step), second._replace(length=step)
            at += step


def _told(disk: Disk, extent: Extent) -> int:
    """Of how many bytes from the start of `extent` the real program learns at once that they are alike."""
    start = extent.start
    length = min(extent.length, _LONGEST)
    spans = [layer.image.lookup_span for layer in disk.layers[: extent.depth + 1]]
    if extent.flags & COMPRESSED:
        spans.append(disk.layers[extent.depth].image.cluster_size)
    told = min([length, *(span - start % span for span in spans if span)])
    for layer in disk.layers[: extent.depth]:
        # Each image above was asked first, and answered for a run of its own.
        told = min(told, layer.image.extents(start, told)[0].length)
    return told


def _kind(disk: Disk, extent: Extent, told: int) -> tuple[bool, bool, bool, bool, bool]:
    """What strict mode compares: data, zero, present, has a place in a file, reaches the end.

    A range past the end of a shorter backing file is present, and nowhere. The last backing file's end
    counts as an end to what no image decides."""
    end = extent.start + told
    place, data, present = extent.host is not None, is_data(extent), is_present(extent)
    last = end == disk.size
    if not present and extent.depth < len(disk.layers) - 1:
        present, place = True, False
    elif not present:
        last = last or end == disk.layers[-1].image.size
    if extent.flags & ABSENT:
        place = data = present = False
    return data, is_zero(extent), present, place, last


def _tail(longer: Disk, start: int, *, is_first: bool) -> Iterator[tuple[Extent, Extent]]:
    """The longer disk's end beside zeros. Raises AllocationError."""
    for extent in _merged(longer, start, longer.size - start):
        zeros = Extent(extent.start, extent.length, ZERO)
        yield (extent, zeros) if is_first else (zeros, extent)
