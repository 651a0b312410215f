"""The copy engine's motor: items through workers, with an order where the work asks for one.

The only place (besides network clients) that starts threads. `run` hands out items one by one; each worker
calls ``work(item, turn)``. What must happen in item order (giving out host space) goes between
``turn.take()`` and ``turn.done()``. The first error stops all workers and is the one that is raised.
"""

from __future__ import annotations

import os

from qimg.errors import Cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from qimg.formats.base import Image
    from qimg.graph.disk import Disk
    from qimg.jobs.progress import Progress

    class Turn(Protocol):
        """An item's place in the order."""

        def take(self) -> None:
            """Wait until every earlier item is done with its turn; nobody else has one until `done`."""

        def done(self) -> None:
            """Let the next item take its turn. Called for the item if it forgets."""


#: How often a waiting job looks at `cancelled`, in seconds.
_POLL = 0.1
#: Requests on the way to a server.
REMOTE_WORKERS = 16
#: Worker threads need little stack: what they call is not deep, and address space may be limited.
_STACK = 512 << 10


class _Stopped(Exception):
    """Another worker failed; leave quietly."""


class _InlineTurn:
    """The turn of work that runs alone."""

    def take(self) -> None:
        """Always at once."""

    def done(self) -> None:
        """Nobody waits."""


class Meter:
    """Where a run reports: progress, cancellation, and the bytes done so far."""

    def __init__(
        self,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        total: int = 0,
    ) -> None:
        self.progress = progress
        self.cancelled = cancelled
        self.total = total
        self.done = 0

    def tick(self) -> None:
        """Report, and raise Cancelled if the caller wants so. Called in the caller's thread only."""
        if self.progress is not None:
            self.progress.update(min(self.done, self.total), self.total)
        if self.cancelled is not None and self.cancelled():
            raise Cancelled


def default_workers(*disks: Disk | Image) -> int:
    """Threads that keep the processors of this machine busy with work that releases the GIL; or where one of
    `disks` is reached over a network, so many requests on the way that nobody waits for one answer."""
    if any(disk.remote for disk in disks):
        return REMOTE_WORKERS
    return max(2, min(16, len(os.sched_getaffinity(0))))


def run(
    items: Iterator[object],
    work: Callable[..., int],
    *,
    workers: int,
    meter: Meter,
) -> None:
    """Call ``work(item, turn)`` for every item, up to `workers` at once; it returns the bytes done.

    The last item starts only when all others are finished, so that a file whose end it writes is not
    long enough before everything else is there. Raises the first error, or Cancelled.
    """
    if workers <= 1:
        turn = _InlineTurn()
        for item in items:
            meter.done += work(item, turn)
            meter.tick()
        return
    _Run(items, work, meter).execute(workers)


def together(
    work: Callable[[Crew], None], *, workers: int, meeting: Callable[[], None] | None = None
) -> None:
    """Call ``work(crew)`` in so many threads (in this one, if it is one) at the same time, until all return.

    For work that costs little beside what `run` does for each item. Each time that all of them have come to
    ``crew.meet()``, one of them calls `meeting`. The first error is the one that is raised; the others find
    ``crew.stopped``."""
    Crew(meeting or (lambda: None)).execute(work, workers)


class Crew:
    """The threads of one `together`."""

    def __init__(self, meeting: Callable[[], None]) -> None:
        import threading

        self.stopped = False
        self._threading = threading
        self._meeting = meeting
        self._begin = threading.Event()
        self._barrier = threading.Barrier(1, meeting)
        self._errors: list[BaseException] = []

    def meet(self) -> None:
        """Wait for all others to come here, or for an error of one of them."""
        try:
            self._barrier.wait()
        except self._threading.BrokenBarrierError:
            raise _Stopped from None

    def execute(self, work: Callable[[Crew], None], workers: int) -> None:
        """Run it all; raise what the work raised first."""
        threads = self._start(work, workers) if workers > 1 else []
        if threads:
            self._barrier = self._threading.Barrier(len(threads), self._meeting)
        self._begin.set()
        try:
            if not threads:
                self._work(work)
            for thread in threads:
                thread.join()
        except BaseException as error:  # noqa: BLE001 - raised below, when the threads have stopped
            self._fail(error)
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]

    def _start(self, work: Callable[[Crew], None], workers: int) -> list[threading.Thread]:
        """As many threads as there is room for, waiting for the beginning."""
        previous = self._threading.stack_size(_STACK)
        threads = []
        try:
            for number in range(workers):
                thread = self._threading.Thread(
                    target=self._work, args=(work,), name=f"qimg-{number}", daemon=True
                )
                thread.start()
                threads.append(thread)
        except RuntimeError:
            pass  # No room for another one: go on with those that run.
        finally:
            self._threading.stack_size(previous)
        return threads

    def _work(self, work: Callable[[Crew], None]) -> None:
        self._begin.wait()
        try:
            work(self)
        except BaseException as error:  # noqa: BLE001 - raised by `execute`
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, _Stopped):
            self._errors.append(error)
        self.stopped = True
        self._barrier.abort()


def lock_and_local() -> tuple[threading.Lock, threading.local]:
    """A lock, and a place for what each worker keeps to itself."""
    import threading

    return threading.Lock(), threading.local()


class _WorkerTurn:
    """The turn of item number `index` of a `_Run`."""

    __slots__ = ("_index", "_run", "_taken")

    def __init__(self, run: _Run, index: int) -> None:
        self._run = run
        self._index = index
        self._taken = False

    def take(self) -> None:
        """Wait for it."""
        if not self._taken:
            self._run.wait_turn(self._index)
            self._taken = True

    def done(self) -> None:
        """Pass it on."""
        self._run.pass_turn(self._index)


class _Run:
    """State shared by the workers of one `run`; everything below is guarded by `_changed`."""

    def __init__(self, items: Iterator[object], work: Callable[..., int], meter: Meter) -> None:
        import threading

        self._threading = threading
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._work = work
        self._meter = meter
        self._unreported: list[int] = []
        self._items = items
        self._ahead: list[object] = []
        self._exhausted = False
        self._started = 0
        self._finished = 0
        self._turn = 0
        self._passed: set[int] = set()
        self._active = 0
        self._error: BaseException | None = None

    def execute(self, workers: int) -> None:
        """Start the workers, report until they are done, raise what they raised."""
        previous = self._threading.stack_size(_STACK)
        threads: list[threading.Thread] = []
        self._active = workers
        try:
            for number in range(workers):
                thread = self._threading.Thread(target=self._worker, name=f"qimg-{number}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no room for another thread: go on with those that run
                    self._leave(workers - number)
                    break
                threads.append(thread)
        finally:
            self._threading.stack_size(previous)
        if not threads:
            self._active = 1
            self._worker()
        try:
            self._watch()
        except BaseException as error:  # noqa: BLE001 - raised below, when the workers have stopped
            self._fail(error)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        """Report every finished item, some late. Waking up for each would take the processor, and Python's
        lock, from the workers."""
        finished = False
        while not finished:
            finished = self._ended.wait(_POLL)
            with self._changed:
                steps, self._unreported = self._unreported, []
            for step in steps or (0,):
                self._meter.done += step
                if not self._stopped():
                    self._meter.tick()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not isinstance(error, _Stopped):
                self._error = error
            self._exhausted = True
            self._changed.notify_all()

    def _worker(self) -> None:
        try:
            while (fetched := self._fetch()) is not None:
                index, item = fetched
                done = self._work(item, _WorkerTurn(self, index))
                with self._changed:
                    self._pass(index)
                    self._finished += 1
                    self._unreported.append(done)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised by `execute`
            self._fail(error)
        self._leave(1)

    def _leave(self, workers: int) -> None:
        """So many workers have ended."""
        with self._changed:
            self._active -= workers
            if not self._active:
                self._ended.set()

    def _fetch(self) -> tuple[int, object] | None:
        """The next item with its number; None at the end or after an error."""
        with self._changed:
            if self._exhausted and not self._ahead:
                return None
            while not self._exhausted and len(self._ahead) < 2:
                try:
                    self._ahead.append(next(self._items))
                except StopIteration:
                    self._exhausted = True
            if self._stopped() or not self._ahead:
                return None
            item = self._ahead.pop(0)
            index = self._started
            self._started += 1
            last = self._exhausted and not self._ahead
            while last and self._finished < index and not self._stopped():
                self._changed.wait()
            return None if self._stopped() else (index, item)

    def _stopped(self) -> bool:
        return self._error is not None

    def wait_turn(self, index: int) -> None:
        """Block until all items before `index` have passed their turn."""
        with self._changed:
            while self._turn != index and not self._stopped():
                self._changed.wait()
            if self._stopped():
                raise _Stopped

    def pass_turn(self, index: int) -> None:
        """The turn of `index` is over."""
        with self._changed:
            self._pass(index)
            self._changed.notify_all()

    def _pass(self, index: int) -> None:
        if index < self._turn:
            return
        self._passed.add(index)
        while self._turn in self._passed:
            self._passed.discard(self._turn)
            self._turn += 1
