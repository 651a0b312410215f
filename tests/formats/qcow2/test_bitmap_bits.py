"""Bits of bitmaps: set, cut, united and brought to other granularities, against sets of numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qimg.formats.qcow2 import bitmap_bits
from qimg.formats.qcow2.bitmap_bits import clear_from, coarser, finer, rescaled, set_bits, unite

BITS = st.sets(st.integers(0, 4000), max_size=60)


def packed(numbers: set[int]) -> bytes:
    out = bytearray(max(numbers, default=-8) // 8 + 1)
    for number in numbers:
        out[number // 8] |= 1 << number % 8
    return bytes(out)


def numbers(bits: bytes) -> set[int]:
    return {at * 8 + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


@given(BITS, st.integers(0, 4000), st.integers(1, 500))
def test_a_range_is_set_and_nothing_else(before: set[int], low: int, count: int) -> None:
    bits = bytearray(packed(before).ljust(600, b"\0"))
    set_bits(bits, low, low + count)
    assert numbers(bits) == before | set(range(low, low + count))
    assert len(bits) == 600


@given(BITS, st.integers(0, 5000))
def test_all_from_a_bit_on_is_cleared(before: set[int], low: int) -> None:
    bits = bytearray(packed(before).ljust(600, b"\0"))
    clear_from(bits, low)
    assert numbers(bits) == {number for number in before if number < low}
    assert len(bits) == 600


@given(BITS, BITS, st.integers(0, 90))
def test_a_union_begins_at_a_byte(first: set[int], second: set[int], at: int) -> None:
    bits = bytearray(packed(first).ljust(600, b"\0"))
    unite(bits, at, packed(second))
    assert numbers(bits) == first | {number + 8 * at for number in second}


@given(BITS, st.integers(0, 13))
def test_a_coarser_bit_is_set_where_one_of_its_bits_is(bits: set[int], shift: int) -> None:
    assert numbers(coarser(packed(bits), shift)) == {number >> shift for number in bits}


@given(st.sets(st.integers(0, 200), max_size=20), st.integers(0, 9))
def test_a_finer_bit_is_set_where_its_bit_is(bits: set[int], shift: int) -> None:
    found = numbers(finer(packed(bits), shift))
    assert found == {(number << shift) + part for number in bits for part in range(1 << shift)}


@given(BITS, st.integers(9, 18), st.integers(9, 18), st.sampled_from([1, 16, 4096]))
def test_any_granularity_becomes_any_other(bits: set[int], given: int, wanted: int, piece: int) -> None:
    bits = {number % 700 for number in bits}
    dirty = {number << given >> 9 for number in bits}  # first unit of 512 bytes of each
    units = {unit + part for unit in dirty for part in range(1 << given - 9)}
    found: set[int] = set()
    step = bitmap_bits._PIECE
    bitmap_bits._PIECE = piece
    try:
        for at, part in rescaled(packed(bits), 1 << given, 1 << wanted):
            found |= {at * 8 + number for number in numbers(part)}
    finally:
        bitmap_bits._PIECE = step
    assert found == {unit << 9 >> wanted for unit in units}
