"""bench: how long many requests of one size take, one place after the other (bench sheet).

Requests in flight are threads, one for each up to `MAX_WORKERS`; every request is a blocking call into the
storage. That is what the real program's ``-i threads`` does, with as many threads; its other ways of
asynchronous I/O are accepted, have the same conditions, and work the same way here.
"""

from __future__ import annotations

import mmap
from errno import EIO

from qimg.errors import CorruptImage, NotSupported, OptionError, QimgError, StorageError
from qimg.extent import MAPPED, ZERO, clip
from qimg.graph.open import open_disk
from qimg.jobs.engine import lock_and_local, together
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.graph.disk import Disk
    from qimg.graph.open import ImageSpec
    from qimg.jobs.engine import Crew
    from qimg.storage.base import Storage

COUNT = 75000
DEPTH = 64
SIZE = 4096
#: Threads at most, whatever the depth.
MAX_WORKERS = 64
#: Larger requests are made in pieces of so many bytes, which bounds memory.
PIECE = 1 << 20
#: Guest bytes whose places are looked up at once.
WINDOW = 4 << 20
#: Units of a written image whose places are kept in mind.
REMEMBERED = 256


class BenchRequest:
    """What to send: `count` requests of `size` bytes, `depth` at once, the first at `offset`, each `step`
    bytes (0: `size`) behind the one before. `write`: bytes of value `pattern` are written.

    `flush_interval`: a flush whenever so many more requests are done, counted so that the last flush comes
    last (0: none); it waits for the requests in flight unless `drain` is off."""

    def __init__(
        self,
        image: ImageSpec,
        *,
        count: int = COUNT,
        depth: int = DEPTH,
        size: int = SIZE,
        step: int = 0,
        offset: int = 0,
        write: bool = False,
        pattern: int = 0,
        flush_interval: int = 0,
        drain: bool = True,
    ) -> None:
        """Raises OptionError for what makes no sense."""
        if min(count, size, step, offset, flush_interval) < 0 or depth < 1 or not 0 <= pattern <= 255:
            raise OptionError("Counts, sizes and offsets must not be negative, the depth must be positive")
        if flush_interval and not write:
            raise OptionError("--flush-interval is only available in write tests")
        if flush_interval and flush_interval < depth:
            raise OptionError("Flush interval can't be smaller than depth")
        self.image = image
        self.count = count
        self.depth = depth
        self.size = size
        self.step = step or size
        self.offset = offset
        self.write = write
        self.pattern = pattern
        self.flush_interval = flush_interval
        self.drain = drain


def bench(request: BenchRequest, *, started: Callable[[], None] | None = None, context: Context) -> float:
    """Open the image, call `started`, send all requests; the seconds that these took.

    What makes a written image whole is done afterwards, outside of that time, as a program does it that
    closes its image. Raises QimgError: OpenError, StorageError (``Failed request: ...``), NotSupported."""
    with open_disk(request.image, writable=request.write, raw_shares_all=True, context=context) as disk:
        if request.write and not disk.top.can_write:
            raise NotSupported(f"Writing to this kind of {disk.top.format_name} image is not supported")
        if request.count and not disk.size:
            raise QimgError("The image has no bytes that requests could be for")
        run = _WriteRun(request, disk) if request.write else _Run(request, disk)
        if started is not None:
            started()
        return run.execute()


class _Run:
    """A read test. Subclasses say what else a request does."""

    def __init__(self, request: BenchRequest, disk: Disk) -> None:
        self.request = request
        self.disk = disk
        self.workers = max(1, min(request.depth, MAX_WORKERS, request.count))
        self._numbers: Iterator[int] = iter(range(request.count))
        self._verbatim = [layer.image.granularity == 1 for layer in disk.layers]
        #: Extents around the latest request; replaced as a whole, so that no thread sees a half of it.
        self._known: list[Extent] = []

    def execute(self) -> float:
        """Send all requests; the seconds that took. Raises QimgError."""
        import time

        before = time.perf_counter()
        if self.request.count:
            self.send()
        return time.perf_counter() - before

    def send(self) -> None:
        """All requests."""
        together(self._work, workers=self.workers)

    def _work(self, crew: Crew) -> None:
        """What every thread does: requests, as long as there are any."""
        view = memoryview(mmap.mmap(-1, max(1, min(self.request.size, PIECE))))
        for number in self._numbers:
            self.one(number, view)
            if crew.stopped:
                return

    def one(self, number: int, view: memoryview) -> None:
        """Request `number`; `view` is memory of the thread. Raises StorageError."""
        request = self.request
        start = request.offset + number * request.step
        if number and start >= self.disk.size:
            start %= self.disk.size  # only the advance wraps
        try:
            if start + request.size > self.disk.size:
                raise StorageError("Input/output error", errno=EIO)
            if not request.size:
                return
            if request.size <= len(view):
                self.transfer(start, view[: request.size])
                return
            for at in range(start, start + request.size, len(view)):
                self.transfer(at, view[: min(len(view), start + request.size - at)])
        except (StorageError, CorruptImage) as error:
            raise StorageError(f"Failed request: {error.reason}", errno=error.errno) from error

    def transfer(self, start: int, view: memoryview) -> None:
        """Fill `view` with guest bytes from `start` on."""
        end = start + len(view)
        known = self._known
        if not (known and known[0].start <= start and end <= known[-1].start + known[-1].length):
            low = round_down(start, WINDOW)
            high = min(round_up(end, WINDOW), self.disk.size)
            known = self._known = self.disk.extents(low, high - low)
        for extent in known if len(known) == 1 else _overlapping(known, start, end):
            low, high = max(extent.start, start), min(extent.start + extent.length, end)
            self._read(extent, low, view[low - start : high - start])

    def _read(self, extent: Extent, start: int, view: memoryview) -> None:
        straight = extent.flags & MAPPED or self._verbatim[extent.depth]
        if straight and extent.source is not None and extent.host is not None:
            # A hole of a raw file is read as well: that is what a request there costs.
            extent.source.read_into(view, extent.host + start - extent.start)
            return
        (part,) = clip((extent,), start, len(view))
        self.disk.read_extent(part, view)


def _overlapping(extents: list[Extent], start: int, end: int) -> list[Extent]:
    """Those of ascending `extents` with bytes in ``start .. end``."""
    from bisect import bisect_left, bisect_right

    first = bisect_right(extents, start, key=_start) - 1
    return extents[first : bisect_left(extents, end, lo=first, key=_start)]


def _start(extent: Extent) -> int:
    return extent.start


class _WriteRun(_Run):
    """A write test. Requests that find no place, or share a new one with what is not theirs, follow one after
    the other; all others run side by side."""

    def __init__(self, request: BenchRequest, disk: Disk) -> None:
        super().__init__(request, disk)
        self._image = disk.top
        self._lock, _ = lock_and_local()
        self._broken = False  # a place was given out that was not written
        #: Places of whole units that were given out, by their guest offset; some of the latest.
        self._given: dict[int, list[Extent]] = {}
        self._storages: set[Storage] = set()
        self._ahead = 0 if self._waits else request.count
        if self._waits:
            self._next_batch()
        self._finished = iter(range(1, request.count + 1))
        self._data = memoryview(bytes((request.pattern,)) * min(request.size, PIECE))

    @property
    def _waits(self) -> bool:
        """Whether flushes wait for the requests in flight."""
        return self.request.drain and self.request.flush_interval > 0

    def _next_batch(self) -> None:
        """The requests up to the next flush: as many as make what is left a multiple of the interval."""
        left = self.request.count - self._ahead
        interval = self.request.flush_interval
        step = left % interval or min(interval, left)
        self._numbers = iter(range(self._ahead, self._ahead + step))
        self._ahead += step

    def send(self) -> None:
        try:
            together(self._work, workers=self.workers, meeting=self._meeting)
        except BaseException:
            self._save()
            raise

    def execute(self) -> float:
        seconds = super().execute()
        if self.request.count and not self.request.flush_interval:
            self._flush()
        return seconds

    def _save(self) -> None:
        """After a failure: keep what was written, if it can be kept."""
        try:
            self._flush()
        except QimgError:
            pass  # The failure is what is told.

    def _flush(self) -> None:
        """Make all requests that are done durable. Raises StorageError."""
        with self._lock:
            if self._broken:
                return
            try:
                # The image may have flushed while requests were in flight: it does not wait for these.
                for storage in self._storages:
                    storage.flush()
                self._image.flush()
            except (StorageError, CorruptImage) as error:
                self._broken = True
                raise StorageError(f"Failed flush request: {error.reason}", errno=error.errno) from error

    def _meeting(self) -> None:
        self._flush()
        self._next_batch()

    def _work(self, crew: Crew) -> None:
        interval = self.request.flush_interval
        while True:
            for number in self._numbers:
                self.one(number, self._data)
                if crew.stopped:
                    return
                if interval and not self._waits:
                    done = next(self._finished)
                    if (self.request.count - done) % interval == 0:
                        self._flush()
            if not self._waits:
                return
            last = self._ahead >= self.request.count
            crew.meet()
            if last:
                return

    def transfer(self, start: int, view: memoryview) -> None:
        """Write `view` at guest offset `start`."""
        image = self._image
        if image.granularity == 1:
            places = image.allocate(start, len(view))
        else:
            low = start - start % image.granularity
            given = self._given.get(low) if start + len(view) <= low + image.granularity else None
            if given is None:
                with self._lock:
                    given = self._places(start, view)
            places = given
        _put(places, start, len(view), view)

    def _places(self, start: int, view: memoryview) -> list[Extent]:
        """Where the bytes of `view` may be written right now; none are left where the image had to make room:
        these units are written here, whole, before anybody else can write into a part of them."""
        image = self._image
        unit = image.granularity
        low = round_down(start, unit)
        high = min(round_up(start + len(view), unit), image.size)
        if low >= high:
            return []
        try:
            missing = [place for place in image.in_place(low, high - low) if not place.flags & MAPPED]
            around = self._around(missing, start, start + len(view))
            if image.wants_flush and not self._broken:
                image.flush()
            places = image.allocate(low, high - low)
            if missing:
                for at, length, data in around:
                    _put(places, at, length, data)
                _put(places, start, len(view), view)
            self._remember(low, high, places)
        except BaseException:
            self._broken = True
            raise
        return [] if missing else places

    def _remember(self, low: int, high: int, places: list[Extent]) -> None:
        """Keep the places of a single unit for further requests, which need not wait for each other then."""
        self._storages.update(place.source for place in places if place.source is not None)
        if high - low <= self._image.granularity:
            if len(self._given) >= REMEMBERED:
                self._given.clear()
            self._given[low] = places

    def _around(
        self, missing: list[Extent], start: int, end: int
    ) -> list[tuple[int, int, memoryview | None]]:
        """(offset, length, content) of what the guest sees in `missing` before `start` and from `end` on, to
        be written before what is between; no content: zeros."""
        found: list[tuple[int, int, memoryview | None]] = []
        for place in missing:
            stop = place.start + place.length
            gaps = ((place.start, min(stop, start)), (max(place.start, end), stop))
            parts = [part for low, high in gaps if low < high for part in self.disk.extents(low, high - low)]
            if all(part.flags & ZERO for part in parts) and parts:
                # In one piece, also below what is written afterwards: file systems keep a hole then.
                found.append((place.start, place.length, None))
                continue
            for part in parts:
                data = None if part.flags & ZERO else memoryview(bytearray(part.length))
                if data is not None:
                    self.disk.read_extent(part, data)
                found.append((part.start, part.length, data))
        return found


def _put(places: list[Extent], start: int, length: int, data: memoryview | None) -> None:
    """Write the guest's bytes from `start` on to those of `places` that hold them: `data`, or zeros."""
    for place in places:
        low = max(place.start, start)
        high = min(place.start + place.length, start + length)
        if low >= high:
            continue
        assert place.source is not None and place.host is not None
        host = place.host + low - place.start
        if data is None:
            place.source.zero(host, high - low, unmap=False)
        else:
            place.source.write(data[low - start : high - start], host)
