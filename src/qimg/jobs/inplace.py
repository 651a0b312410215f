"""Writing into an image that exists: rows of a plan through the engine, in batches that a crash cannot break.

A batch ends when the image wants its tables written; when the engine has finished it, `Image.flush` makes it
the image's. Between two batches the image is whole, with a part of the work done. The job flushes last.
"""

from __future__ import annotations

import mmap

from qimg.errors import StorageError
from qimg.extent import MAPPED, clip
from qimg.jobs.copy import Limited, writing_error
from qimg.jobs.engine import default_workers, lock_and_local, run
from qimg.jobs.plan import COPY, Chunk, cut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from qimg.extent import Extent
    from qimg.formats.base import Image
    from qimg.jobs.engine import Meter, Turn
    from qimg.jobs.plan import Row
    from qimg.storage.base import Storage

    Item = TypeVar("Item")

#: Guest bytes that one piece of work spans, where they are handled together.
CHUNK = 2 << 20
#: Bytes of rows that one piece of work moves, wherever they lie.
GATHERED = 2 << 20
#: Bytes moved by one request: few enough that they are still in the processor's cache when they are written.
STEP = 512 << 10
#: Below this many guest bytes one worker is quicker than starting several.
SMALL = 8 << 20
#: Bytes after which a worker has what was written go to the disk, while others go on: the flush at the end
#: then finds little left to wait for.
SPREAD = 32 << 20


class InPlace:
    """Batches of work on one image. `workers` at once, `rate` bytes a second (0: as fast as it goes); `flush`
    ends a batch (None: the image's)."""

    def __init__(
        self,
        image: Image,
        meter: Meter,
        *,
        workers: int | None = None,
        rate: int = 0,
        flush: Callable[[], None] | None = None,
    ) -> None:
        self._image = image
        self._flush = flush or image.flush
        self._meter = meter
        self._workers = 1 if rate else workers or (1 if image.size <= SMALL else default_workers(image) + 1)
        self._rate = rate

    def run(self, items: Iterator[Item], work: Callable[[Item, Turn], int]) -> None:
        """`work` on every item, with a flush where a batch ends. Raises what the work and `flush` raise."""
        limited = Limited(work, self._rate, wait_first=True)
        for first in items:
            run(self._batch(first, items), limited, workers=self._workers, meter=self._meter)
            if self._image.wants_flush:
                self._flush()

    def _batch(self, first: Item, rest: Iterator[Item]) -> Iterator[Item]:
        """`first` and what follows until the image has enough to write."""
        yield first
        while not self._image.wants_flush:
            following = next(rest, None)
            if following is None:
                return
            yield following


class Mover:
    """Moves rows that fill whole units and lie verbatim in a file, each by itself, without looking at what
    they hold. `read` fills a buffer with the first bytes of an extent."""

    def __init__(self, image: Image, read: Callable[[Extent, memoryview], None]) -> None:
        self._image = image
        self._read = read
        self._ordered = image.cluster_size is not None
        self._lock, self._local = lock_and_local()
        self._written = 0

    def __call__(self, chunk: Chunk, turn: Turn) -> int:
        """Move the rows of `chunk`; returns their bytes."""
        if self._ordered:
            turn.take()
        with self._lock:
            places = [self._allocate(row) for row in chunk.rows]
        turn.done()
        view = self._buffer()
        total = 0
        storages: dict[int, Storage] = {}
        for row, found in zip(chunk.rows, places, strict=True):
            for place in found:
                assert place.source is not None
                storages[id(place.source)] = place.source
                for at in range(place.start, place.start + place.length, STEP):
                    self._move(row, place, at, view[: min(STEP, place.start + place.length - at)])
            total += row.length
        self._spread(total, storages.values())
        return total

    def _spread(self, written: int, storages: Iterable[Storage]) -> None:
        with self._lock:
            self._written += written
            due = self._written >= SPREAD
            if due:
                self._written = 0
        for storage in storages if due else ():
            storage.flush()

    def _buffer(self) -> memoryview:
        view: memoryview | None = getattr(self._local, "view", None)
        if view is None:
            view = self._local.view = memoryview(mmap.mmap(-1, STEP))
        return view

    def _allocate(self, row: Row) -> list[Extent]:
        try:
            return self._image.allocate(row.start, row.length)
        except StorageError as error:
            raise writing_error(row.start, error) from error

    def _move(self, row: Row, place: Extent, at: int, view: memoryview) -> None:
        """Guest bytes from `at` on, as many as `view` has."""
        (part,) = clip((row.extent,), at, len(view))
        self._read(part, view)
        assert place.source is not None and place.host is not None
        try:
            place.source.write(view, place.host + at - place.start)
        except StorageError as error:
            raise writing_error(at, error) from error


def gather(rows: Iterable[Row]) -> Iterator[Chunk]:
    """Rows put together to pieces of work of `GATHERED` bytes, in order of their places on the host."""
    current: list[Row] = []
    total = 0
    for row in rows:
        end = row.start + row.length
        for start in range(row.start, end, GATHERED):
            part = cut(row, start, min(start + GATHERED, end))
            current.append(part)
            total += part.length
            if total >= GATHERED:
                yield _together(current)
                current, total = [], 0
    if current:
        yield _together(current)


def _together(rows: list[Row]) -> Chunk:
    start, last = rows[0].start, rows[-1]
    return Chunk(start, last.start + last.length - start, rows)


def fills_units(row: Row, unit: int, size: int) -> bool:
    """Whether `row` can be moved by a `Mover` into an image of `size` bytes with units of `unit`."""
    end = row.start + row.length
    return (
        row.action == COPY
        and bool(row.extent.flags & MAPPED)
        and row.start % unit == 0
        and (end % unit == 0 or end == size)
    )
