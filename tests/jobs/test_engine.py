"""The engine: every item once, turns in order, the last item last, the first error wins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from qimg.errors import Cancelled, QimgError
from qimg.jobs.engine import Meter, run

if TYPE_CHECKING:
    from qimg.jobs.engine import Turn

WORKERS = [1, 2, 5]


@pytest.mark.parametrize("workers", WORKERS)
def test_every_item_is_worked_on_once(workers: int) -> None:
    seen: list[object] = []
    meter = Meter(total=100)

    def work(item: object, turn: Turn) -> int:
        seen.append(item)
        return 1

    run(iter(range(100)), work, workers=workers, meter=meter)
    assert sorted(seen, key=lambda item: int(str(item))) == list(range(100))
    assert meter.done == 100


@pytest.mark.parametrize("workers", WORKERS)
def test_turns_are_taken_in_the_order_of_the_items(workers: int) -> None:
    order: list[object] = []

    def work(item: int, turn: Turn) -> int:
        time.sleep(0.002 if item % 3 == 0 else 0)
        if item % 5:  # every fifth forgets its turn
            turn.take()
            order.append(item)
            turn.done()
        return 0

    run(iter(range(60)), work, workers=workers, meter=Meter())
    assert order == [item for item in range(60) if item % 5]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_last_item_starts_when_all_others_are_finished(workers: int) -> None:
    finished: list[int] = []

    def work(item: int, turn: Turn) -> int:
        if item == 19:
            assert sorted(finished) == list(range(19))
        time.sleep(0.003 if item % 4 == 0 else 0)
        finished.append(item)
        return 0

    run(iter(range(20)), work, workers=workers, meter=Meter())
    assert len(finished) == 20


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("bad", [0, 7, 39])
def test_an_error_stops_everybody_and_is_raised(workers: int, bad: int) -> None:
    def work(item: int, turn: Turn) -> int:
        if item == bad:
            raise QimgError("no more")
        turn.take()
        turn.done()
        return 0

    with pytest.raises(QimgError, match="no more"):
        run(iter(range(40)), work, workers=workers, meter=Meter())
    assert threading.active_count() == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_of_the_items_themselves_is_raised(workers: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise QimgError("tables are broken")

    with pytest.raises(QimgError, match="tables"):
        run(items(), lambda item, turn: 0, workers=workers, meter=Meter())


@pytest.mark.parametrize("workers", WORKERS)
def test_cancelling_ends_the_run(workers: int) -> None:
    started = []

    def work(item: int, turn: Turn) -> int:
        started.append(item)
        time.sleep(0.005)
        return 1

    with pytest.raises(Cancelled):
        run(iter(range(10000)), work, workers=workers, meter=Meter(cancelled=lambda: len(started) > 3))
    assert len(started) < 1000


def test_progress_comes_from_the_calling_thread_and_ends_with_all() -> None:
    reports: list[tuple[int, int]] = []
    caller = threading.get_ident()

    class Progress:
        exact = True

        def update(self, done: int, total: int) -> None:
            assert threading.get_ident() == caller
            reports.append((done, total))

    run(iter(range(50)), lambda item, turn: 2, workers=3, meter=Meter(Progress(), None, 100))
    assert reports[-1] == (100, 100)
    assert reports == sorted(reports)
