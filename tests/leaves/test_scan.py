"""Zero detection finds exactly the blocks that hold something."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qimg.vec import scan


def expected(data: bytes, block: int, first: int) -> list[tuple[int, int]]:
    """The definition, byte by byte."""
    runs: list[tuple[int, int]] = []
    start = 0
    size = first
    while start < len(data):
        part = data[start : start + size]
        if any(part):
            if runs and runs[-1][0] + runs[-1][1] == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + len(part))
            else:
                runs.append((start, len(part)))
        start += len(part)
        size = block
    return runs


@st.composite
def buffers(draw: st.DrawFn) -> tuple[bytes, int, int]:
    block = draw(st.sampled_from([512, 1024, 1536]))
    data = bytearray(draw(st.integers(0, 12 * 512)))
    for _ in range(draw(st.integers(0, 6))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(1, 255))
    first = draw(st.integers(1, block))
    return bytes(data), block, first


@given(buffers())
def test_the_runs_are_those_of_the_definition(sample: tuple[bytes, int, int]) -> None:
    data, block, first = sample
    assert scan.data_runs(memoryview(data), block, first) == expected(data, block, first)


@given(st.binary(max_size=70000))
def test_is_zero_is_true_of_zeros_only(data: bytes) -> None:
    assert scan.is_zero(data) == (not any(data))
    assert scan.is_zero(bytes(len(data)))
