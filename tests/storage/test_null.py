"""``null-co``: takes everything, keeps nothing (protocols sheet 2)."""

from __future__ import annotations

import time

import pytest

from qimg.errors import LocationError, NotSupported, OptionError
from qimg.extent import ABSENT, MAPPED, ZERO
from qimg.storage import registry
from support.run import run_real


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("driver", ["null-co", "null-aio"])
def test_it_is_a_gibibyte_long_unless_told(driver: str) -> None:
    told = run_real(["info", f"{driver}://"]).ok()
    place = registry.get(driver).from_options({})
    assert f"({place.size} bytes)" in told.out
    assert place.name == f"{driver}://"
    assert registry.get(driver).from_options({"size": 4096}).size == 4096


@pytest.mark.peer("qemu-img")
def test_another_name_is_refused_in_the_words_of_qemu() -> None:
    told = run_real(["info", "null-co://x"])
    with pytest.raises(LocationError) as caught:
        registry.get("null-co").parse("null-co://x")
    assert told.err == f"qemu-img: Could not open 'null-co://x': {caught.value}\n"


def test_reads_leave_the_buffer_alone_or_give_zeros() -> None:
    buf = bytearray(b"abc")
    registry.get("null-co").from_options({}).read_into(buf, 0)
    assert buf == b"abc"
    place = registry.get("null-co").from_options({"read-zeroes": True})
    place.read_into(buf, 0)
    assert buf == bytes(3)


def test_writes_vanish() -> None:
    place = registry.get("null-co").from_options({"read-zeroes": True, "size": 4096}, writable=True)
    place.write(b"x" * 512, 0)
    place.zero(0, 512)
    place.flush()
    assert place.read(0, 512) == bytes(512)
    assert place.allocated_bytes() == 0
    with pytest.raises(NotSupported):
        place.resize(8192)


@pytest.mark.parametrize(("zeroes", "flags"), [(False, MAPPED | ABSENT), (True, ZERO)])
def test_zeros_are_known_only_where_reads_give_them(zeroes: bool, flags: int) -> None:
    place = registry.get("null-co").from_options({"read-zeroes": zeroes, "size": 4096})
    assert [tuple(extent[:3]) for extent in place.extents(0, 8192)] == [(0, 4096, flags), (4096, 4096, ZERO)]


def test_requests_take_the_time_that_was_asked_for() -> None:
    place = registry.get("null-co").from_options({"latency-ns": 20_000_000})
    before = time.monotonic()
    place.read(0, 512)
    assert time.monotonic() - before >= 0.02


def test_a_latency_that_no_clock_holds_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^latency-ns is invalid$"):
        registry.get("null-co").from_options({"latency-ns": 1 << 63})
