"""Batches of work on an image that exists: when they end, what is moved how, and how fast it may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qimg.errors import StorageError
from qimg.extent import HOLE, MAPPED, ZERO, Extent
from qimg.formats.raw import RawImage
from qimg.jobs.engine import Meter
from qimg.jobs.fill import Unsure, together
from qimg.jobs.inplace import GATHERED, InPlace, Mover, fills_units, gather
from qimg.jobs.plan import CLEAR, COPY, Chunk, Row
from qimg.storage.fault import FaultStorage
from qimg.storage.memory import MemoryStorage

K = 1 << 10


class Staging:
    """An image that wants a flush after every third piece of work."""

    size = 1 << 30
    remote = False

    def __init__(self) -> None:
        self.staged = 0
        self.flushed: list[int] = []

    @property
    def wants_flush(self) -> bool:
        return self.staged >= 3

    def flush(self) -> None:
        self.flushed.append(self.staged)
        self.staged = 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_ends_when_the_image_wants_to_be_flushed_and_nothing_is_in_flight_then(workers: int) -> None:
    image = Staging()
    running: list[int] = []
    done: list[int] = []

    def work(item: int, turn: object) -> int:
        running.append(item)
        image.staged += 1
        running.remove(item)
        done.append(item)
        return 1

    meter = Meter(total=10)
    InPlace(image, meter, workers=workers).run(iter(range(10)), work)  # type: ignore[arg-type]
    assert sorted(done) == list(range(10))
    assert not running
    assert meter.done == 10
    assert all(staged >= 3 for staged in image.flushed)
    assert image.flushed
    assert sum(image.flushed) + image.staged == 10


def test_the_last_flush_is_the_callers() -> None:
    image = Staging()

    def work(item: int, turn: object) -> int:
        image.staged += 1
        return 1

    InPlace(image, Meter()).run(iter([1, 2]), work)  # type: ignore[arg-type]
    assert (image.flushed, image.staged) == ([], 2)


def test_nothing_is_flushed_after_work_that_failed() -> None:
    image = Staging()

    def work(item: int, turn: object) -> int:
        image.staged += 5
        raise StorageError("no", errno=5)

    with pytest.raises(StorageError, match="no"):
        InPlace(image, Meter()).run(iter([1, 2]), work)  # type: ignore[arg-type]
    assert image.flushed == []


def _row(start: int, length: int, action: int = COPY, flags: int = MAPPED) -> Row:
    return Row(start, length, action, Extent(start, length, flags, 0, 10 * start, None))


def test_rows_are_gathered_wherever_they_lie_and_long_ones_are_cut() -> None:
    rows = [_row(number << 30, 64 * K) for number in range(40)] + [_row(50 << 30, 2 * GATHERED)]
    chunks = list(gather(rows))
    moved = [part for chunk in chunks for part in chunk.rows]
    assert sum(part.length for part in moved) == 40 * 64 * K + 2 * GATHERED
    assert max(sum(part.length for part in chunk.rows) for chunk in chunks) < 2 * GATHERED
    assert all(part.length == part.extent.length and part.start == part.extent.start for part in moved)
    assert all(
        part.extent.host == 10 * row.start + part.start - row.start
        for row in rows
        for part in moved
        if row.start <= part.start < row.start + row.length
    )


def test_only_plain_data_that_fills_units_is_moved_without_a_look() -> None:
    size = 1000 * K + 512
    assert fills_units(_row(64 * K, 128 * K), 64 * K, size)
    assert fills_units(_row(960 * K, 40 * K + 512), 64 * K, size)  # up to the end
    assert not fills_units(_row(64 * K, 100 * K), 64 * K, size)
    assert not fills_units(_row(32 * K, 64 * K), 64 * K, size)
    assert not fills_units(_row(64 * K, 64 * K, CLEAR), 64 * K, size)
    assert not fills_units(_row(64 * K, 64 * K, COPY, 0), 64 * K, size)
    assert fills_units(_row(3, 5), 1, size)


def test_a_mover_puts_each_row_where_it_belongs() -> None:
    source = MemoryStorage(bytes(range(256)) * 4)
    target = MemoryStorage(bytes(1024))
    rows = [
        Row(512, 256, COPY, Extent(512, 256, MAPPED, 0, 0, source)),
        Row(10, 3, COPY, Extent(10, 3, MAPPED, 0, 700, source)),
    ]
    mover = Mover(RawImage(target, 1024), lambda extent, buf: source.read_into(buf, extent.host or 0))
    turn = SimpleNamespace(take=lambda: None, done=lambda: None)
    assert mover(Chunk(0, 1024, rows), turn) == 259
    wanted = bytearray(1024)
    wanted[512:768] = bytes(range(256))
    wanted[10:13] = bytes((700 % 256, 701 % 256, 702 % 256))
    assert bytes(target.read(0, 1024)) == bytes(wanted)


def test_a_mover_says_where_it_could_not_write() -> None:
    target = FaultStorage(MemoryStorage(bytes(4096)), ["wE"])
    rows = [Row(at, 512, COPY, Extent(at, 512, MAPPED, 0, at, None)) for at in (512, 2048)]
    mover = Mover(RawImage(target, 4096), lambda extent, buf: None)
    turn = SimpleNamespace(take=lambda: None, done=lambda: None)
    with pytest.raises(StorageError, match="error while writing at byte 2048: Input/output error"):
        mover(Chunk(0, 4096, rows), turn)


def test_pieces_to_compare_are_put_together() -> None:
    zero = [Extent(0, 1, ZERO)]
    pieces = [Unsure(number << 20, 1 << 20, zero, [Extent(0, 1, HOLE)]) for number in range(9)]
    bunches = list(together(pieces))
    assert [len(bunch.pieces) for bunch in bunches] == [4, 4, 1]
    assert [piece for bunch in bunches for piece in bunch.pieces] == pieces
    assert not list(together([]))
