"""The filters that tests of crashes stand on: faults where they are asked for, any past moment again."""

from __future__ import annotations

import errno

import pytest

from qimg.errors import StorageError
from qimg.storage.fault import FaultStorage, Rule
from qimg.storage.memory import MemoryStorage
from qimg.storage.record import RecordStorage
from qimg.storage.window import Window


def test_the_named_request_fails_and_only_that_one() -> None:
    place = FaultStorage(MemoryStorage(size=4096), ["wwE"])
    place.write(b"1", 0)
    place.write(b"2", 1)
    with pytest.raises(StorageError, match=r"^Input/output error$") as caught:
        place.write(b"3", 2)
    assert caught.value.offset == 2
    place.write(b"4", 3)
    assert place.read(0, 4) == b"12\x004"
    assert place.counts == {"write": 4, "change": 4, "read": 1}


def test_the_first_request_can_fail() -> None:
    place = FaultStorage(MemoryStorage(size=4096), ["-fN"])
    with pytest.raises(StorageError) as caught:
        place.flush()
    assert caught.value.errno == errno.ENOSPC
    place.flush()


def test_after_a_power_cut_nothing_works() -> None:
    child = MemoryStorage(size=4096)
    place = FaultStorage(child, ["wP"])
    place.write(b"12", 0)
    for request in (
        lambda: place.write(b"34", 2),
        lambda: place.read(0, 1),
        place.flush,
        lambda: place.zero(0, 1),
        lambda: place.resize(1),
        lambda: list(place.extents(0, 1)),
    ):
        with pytest.raises(StorageError):
            request()
    assert child.read(0, 4) == b"12\0\0"
    place.close()


def test_a_torn_write_puts_the_sectors_of_its_first_half_in_place() -> None:
    child = MemoryStorage(size=4096)
    place = FaultStorage(child, [Rule("write", 1, torn=True), Rule("write", 2, torn=True)])
    with pytest.raises(StorageError):
        place.write(b"1" * 1000 + b"2" * 1000, 100)
    with pytest.raises(StorageError):
        place.write(b"3" * 512, 2048)
    assert child.read(0, 4096) == bytes(100) + b"1" * 924 + bytes(3072)


def test_any_change_can_be_counted_together() -> None:
    place = FaultStorage(MemoryStorage(size=4096), [Rule("change", 3)])
    place.write(b"1", 0)
    place.flush()
    with pytest.raises(StorageError):
        place.resize(100)
    assert place.size == 4096


@pytest.mark.parametrize("script", ["", "E", "ww", "wfE", "xE", "wX", "-E"])
def test_a_wrong_script_is_an_error(script: str) -> None:
    with pytest.raises(ValueError, match="not a fault script"):
        Rule.parse(script)


def recorded() -> RecordStorage:
    place = RecordStorage(MemoryStorage(b"start", size=16))
    place.write(b"AA", 0)
    place.flush()
    place.write(b"BB", 2)
    place.zero(0, 1)
    place.resize(8)
    return place


@pytest.mark.parametrize(
    ("prefix", "content"),
    [
        (0, b"start" + bytes(11)),
        (1, b"AAart" + bytes(11)),
        (2, b"AAart" + bytes(11)),
        (3, b"AABBt" + bytes(11)),
        (4, b"\0ABBt" + bytes(11)),
        (5, b"\0ABBt" + bytes(3)),
        (None, b"\0ABBt" + bytes(3)),
    ],
)
def test_every_moment_can_be_had_again(prefix: int | None, content: bytes) -> None:
    assert recorded().replay(prefix).content() == content


def test_what_no_barrier_made_durable_can_be_lost() -> None:
    place = recorded()
    assert place.barriers() == [1]
    assert place.unsafe(1) == [0]
    assert place.unsafe(2) == []
    assert place.unsafe(5) == [2, 3, 4]
    assert place.replay(5, lost=[2]).content() == b"\0Aart" + bytes(3)
    assert place.replay(5, lost=[2, 3, 4]).content() == b"AAart" + bytes(11)


def test_a_failed_change_is_not_recorded() -> None:
    place = RecordStorage(FaultStorage(MemoryStorage(size=16), ["-wE"]))
    with pytest.raises(StorageError):
        place.write(b"x", 0)
    assert place.events == []


def test_a_window_never_reaches_beyond_its_edges() -> None:
    child = MemoryStorage(b"\xaa" * 4096)
    place = Window(child, 1024, 512)
    with pytest.raises(StorageError, match=r"^No space left on device$"):
        place.write(bytes(513), 0)
    with pytest.raises(StorageError):
        place.zero(512, 1)
    place.discard(0, 4096)
    assert place.read(500, 100) == bytes(100)
    assert child.read(0, 1024) == b"\xaa" * 1024
    assert child.read(1536, 2560) == b"\xaa" * 2560
