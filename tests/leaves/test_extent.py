"""Extents arrive ascending, contiguous, clipped and coalesced, whatever was put in."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qimg.extent import HOLE, MAPPED, ZERO, Extent, Runs, clip, is_data, is_present, is_zero


def test_gaps_become_holes_and_the_range_is_covered() -> None:
    runs = Runs(100, 100)
    runs.append(120, 10, ZERO)
    assert runs.take() == [Extent(100, 20, HOLE), Extent(120, 10, ZERO), Extent(130, 70, HOLE)]


def test_neighbours_join_only_where_the_host_continues() -> None:
    runs = Runs(0, 40)
    runs.append(0, 10, MAPPED, 1000)
    runs.append(10, 10, MAPPED, 1010)
    runs.append(20, 10, MAPPED, 5000)
    runs.append(30, 10, ZERO)
    assert runs.take() == [
        Extent(0, 20, MAPPED, 0, 1000),
        Extent(20, 10, MAPPED, 0, 5000),
        Extent(30, 10, ZERO),
    ]


def test_what_lies_outside_is_cut_off_and_the_host_moves_along() -> None:
    runs = Runs(50, 10)
    runs.append(0, 100, MAPPED, 7000)
    assert runs.take() == [Extent(50, 10, MAPPED, 0, 7050)]


def test_clip_keeps_host_and_guest_together() -> None:
    assert list(clip([Extent(0, 10, MAPPED, 0, 100), Extent(10, 10, ZERO)], 5, 10)) == [
        Extent(5, 5, MAPPED, 0, 105),
        Extent(10, 5, ZERO),
    ]


def test_the_truth_table_holds() -> None:
    def fields(flags: int, host: int | None = None) -> tuple[bool, bool, bool]:
        extent = Extent(0, 1, flags, 0, host)
        return is_data(extent), is_zero(extent), is_present(extent)

    assert fields(0) == (True, False, True)
    assert fields(MAPPED, 5) == (True, False, True)
    assert fields(MAPPED | ZERO, 5) == (True, True, True)
    assert fields(ZERO) == (False, True, True)
    assert fields(ZERO, 5) == (False, True, True)
    assert fields(HOLE | ZERO) == (False, True, False)


@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 50), st.sampled_from([0, HOLE, ZERO, MAPPED])),
        max_size=12,
    ),
    st.integers(0, 100),
    st.integers(1, 120),
)
def test_any_ascending_input_gives_a_gapless_cover(
    pieces: list[tuple[int, int, int]], start: int, length: int
) -> None:
    runs = Runs(start, length)
    model: dict[int, tuple[int, int | None]] = dict.fromkeys(range(start, start + length), (HOLE, None))
    position = 0
    for gap, size, flags in pieces:
        position += gap
        host = position + 1000 if flags == MAPPED else None
        runs.append(position, size, flags, host)
        for byte in range(position, position + size):
            if byte in model:
                model[byte] = (flags, None if host is None else byte + 1000)
        position += size
    taken = runs.take()
    at = start
    for extent in taken:
        assert extent.start == at
        assert extent.length > 0
        for byte in range(extent.start, extent.start + extent.length):
            host = None if extent.host is None else extent.host + byte - extent.start
            assert model[byte] == (extent.flags, host)
        at += extent.length
    assert at == start + length
    for before, after in itertools.pairwise(taken):
        assert (before.flags, before.host is None) != (
            after.flags,
            after.host is None,
        ) or after.flags == MAPPED
