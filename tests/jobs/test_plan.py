"""Plans are pure: extents in, rows out, nothing forgotten and nothing twice."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qimg.extent import HOLE, MAPPED, ZERO, Extent
from qimg.formats.base import Image
from qimg.jobs.plan import CLEAR, COPY, Policy, chunks, long_clear, plan_copy

DATA = Extent(0, 10, MAPPED, 0, 1000)
ZEROS = Extent(10, 10, ZERO)
NOTHING = Extent(20, 10, HOLE | ZERO, 1)
BELOW = Extent(30, 10, MAPPED, 1, 5000)


def actions(policy: Policy) -> list[tuple[int, int]]:
    return [(row.start, row.action) for row in plan_copy([DATA, ZEROS, NOTHING, BELOW], policy)]


def test_into_a_new_image_only_data_is_copied() -> None:
    assert actions(Policy()) == [(0, COPY), (30, COPY)]


def test_what_may_hold_old_bytes_is_cleared() -> None:
    assert actions(Policy(clear=True)) == [(0, COPY), (10, CLEAR), (20, CLEAR), (30, COPY)]


def test_without_sparseness_zeros_are_copied_like_data() -> None:
    assert actions(Policy(everything=True)) == [(0, COPY), (10, COPY), (20, COPY), (30, COPY)]


def test_over_a_backing_file_only_the_top_layer_counts() -> None:
    assert actions(Policy(top_only=True, clear=True)) == [(0, COPY), (10, CLEAR)]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([MAPPED, ZERO, HOLE | ZERO])), max_size=20),
    st.booleans(),
    st.sampled_from([0, 16, 47, 80, 1 << 20]),
)
def test_chunks_cover_the_rows_exactly_and_stay_in_their_grid(
    pieces: list[tuple[int, int]], clear: bool, long_clear: int
) -> None:
    extents = []
    position = 0
    for length, flags in pieces:
        host = position + 7 if flags == MAPPED else None
        extents.append(Extent(position, length, flags, 0, host))
        position += length
    rows = list(plan_copy(extents, Policy(clear=clear)))
    wanted = {
        byte: (row.action, row.extent.host and row.extent.host + byte - row.start)
        for row in rows
        for byte in range(row.start, row.start + row.length)
    }
    found: dict[int, tuple[int, int | None]] = {}
    last = -1
    for chunk in chunks(rows, 16, position, long_clear=long_clear):
        assert chunk.start > last
        assert chunk.start % 16 == 0
        assert chunk.start + chunk.length <= position
        if chunk.length > 16:
            assert [row.action for row in chunk.rows] == [CLEAR]
            assert chunk.length <= long_clear
        last = chunk.start
        for row in chunk.rows:
            assert row.length == row.extent.length
            assert chunk.start <= row.start
            assert row.start + row.length <= chunk.start + chunk.length
            for byte in range(row.start, row.start + row.length):
                assert byte not in found
                found[byte] = (row.action, row.extent.host and row.extent.host + byte - row.start)
    assert found == wanted


@pytest.mark.parametrize(
    ("cluster_size", "most"), [(512, 32 << 20), (64 << 10, 4 << 30), (2 << 20, 128 << 30), (None, 1 << 40)]
)
def test_what_one_chunk_clears_is_bounded_in_the_targets_clusters(
    cluster_size: int | None, most: int
) -> None:
    image = Image()
    image.size = 1 << 40
    image.can_mark_zero = True
    image.cluster_size = cluster_size
    rows = plan_copy([Extent(0, image.size, ZERO)], Policy(clear=True))
    found = [
        chunk.length for chunk in islice(chunks(rows, 2 << 20, image.size, long_clear=long_clear(image)), 9)
    ]
    assert set(found) == {most}


def test_where_zeros_cannot_be_noted_no_chunk_is_long() -> None:
    assert long_clear(Image()) == 0
    rows = plan_copy([Extent(0, 1 << 30, ZERO)], Policy(clear=True))
    assert {chunk.length for chunk in chunks(rows, 2 << 20, 1 << 30)} == {2 << 20}
