"""Tables of one word a block: runs of words by hand and by numpy, two levels, order of writes."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from qimg.extent import COMPRESSED, HOLE, MAPPED, ZERO
from qimg.formats.blocks import BlockCode
from qimg.vec.blocks import runs

BLOCK = 1 << 16
FLAG = 1 << 63
PLAIN = BlockCode(BLOCK, unit=1, special={0: HOLE, 1: ZERO}, compressed=FLAG)
NUMBERED = BlockCode(1 << 20, unit=1 << 20, base=1024, special={0xFFFFFFFF: ZERO, 0xFFFFFFFE: ZERO})
APART = BlockCode(BLOCK, unit=512, base=512, special={0xFFFFFFFF: ZERO}, stride=BLOCK + 512)

words64 = st.lists(
    st.one_of(
        st.sampled_from([0, 1, FLAG, FLAG | 5, BLOCK, 2 * BLOCK, 3 * BLOCK, (1 << 64) - 1]),
        st.integers(0, 8).map(lambda number: number * BLOCK),
        st.integers(0, (1 << 64) - 1),
    ),
    max_size=60,
)
words32 = st.lists(
    st.one_of(st.integers(0, 6), st.sampled_from([0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD])), max_size=60
)


@given(words64, st.integers(1, 9))
def test_numpy_finds_the_runs_of_long_words_that_a_loop_finds(words: list[int], times: int) -> None:
    table = array("Q", words * times)
    assert runs(table, PLAIN.special, PLAIN.compressed, PLAIN.step) == PLAIN.plain_starts(table)


@given(words32, st.integers(1, 9))
def test_numpy_finds_the_runs_of_short_words_that_a_loop_finds(words: list[int], times: int) -> None:
    table = array("I", words * times)
    for code in (NUMBERED, APART):
        assert runs(table, code.special, code.compressed, code.step) == code.plain_starts(table)


def test_words_are_runs_of_one_kind() -> None:
    words = array("Q", [0, 0, 1, 1, BLOCK, 2 * BLOCK, 4 * BLOCK, FLAG | 7, FLAG | 9, 0])
    assert list(PLAIN.runs(words)) == [
        (0, 2, HOLE, None),
        (2, 4, ZERO, None),
        (4, 6, MAPPED, BLOCK),
        (6, 7, MAPPED, 4 * BLOCK),
        (7, 9, COMPRESSED, None),
        (9, 10, HOLE, None),
    ]


def test_words_of_blocks_that_something_parts_do_not_continue_each_other() -> None:
    words = APART.words(4096 + 512, 3, "I")
    assert list(words) == [8, 8 + 129, 8 + 258]
    assert [run[:2] for run in APART.runs(words)] == [(0, 1), (1, 2), (2, 3)]


def test_a_word_and_its_place_are_each_others_inverse() -> None:
    for code in (PLAIN, NUMBERED, APART):
        host = code.host(100)
        assert code.word(host) == 100
