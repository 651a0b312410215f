"""Tables of words in a file: pages, staging, whole sectors."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.formats.tables import PAGE, WordTable, uniform
from qimg.graph.open import ImageSpec, open_disk
from qimg.storage.memory import MemoryStorage


def made(
    count: int, *, size: int, big: bool, offset: int = 1000
) -> tuple[MemoryStorage, WordTable, list[int]]:
    letter = (">" if big else "<") + ("I" if size == 4 else "Q")
    values = [number * 2654435761 % (1 << (8 * size)) for number in range(count)]
    raw = b"".join(struct.pack(letter, value) for value in values)
    file = MemoryStorage(b"x" * offset + raw)
    return file, WordTable(file, offset, count, size=size, big=big), values


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("size", [4, 8])
def test_words_are_read_across_pages(size: int, big: bool) -> None:
    count = 3 * PAGE // size + 5
    _file, table, values = made(count, size=size, big=big)
    edge = PAGE // size
    for first, last in ((0, count), (edge - 1, edge + 1), (2 * edge, 2 * edge), (count - 1, count)):
        assert list(table.words(first, last)) == values[first:last]


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("size", [4, 8])
def test_what_is_staged_is_seen_at_once_and_written_later(size: int, big: bool) -> None:
    count = 2 * PAGE // size
    file, table, values = made(count, size=size, big=big)
    before = bytes(file.read(0, file.size))
    new = array("Q", range(300))
    first = PAGE // size - 100
    table.put(first, new)
    assert list(table.words(first, first + 300)) == list(range(300))
    assert bytes(file.read(0, file.size)) == before
    assert table.staged == 2 * PAGE
    assert table.write()
    assert not table.staged
    assert not table.write()
    values[first : first + 300] = range(300)
    again = WordTable(file, 1000, count, size=size, big=big)
    assert list(again.words(0, count)) == values
    assert bytes(file.read(0, 1000)) == b"x" * 1000


def test_what_the_file_is_too_short_for_is_zero() -> None:
    table = WordTable(MemoryStorage(b"\1\0\0\0"), 0, 100, size=4, big=False)
    assert list(table.words(0, 100)) == [1] + [0] * 99


def test_a_long_table_leaves_memory_again() -> None:
    count = 32 << 20
    file = MemoryStorage(b"")
    file.resize(count * 4)
    table = WordTable(file, 0, count, size=4, big=False)
    for first in range(0, count, PAGE // 4):
        table.words(first, first + 1)
    assert len(table._pages) * PAGE <= 4 << 20


def test_words_are_uniform_when_none_differs() -> None:
    for typecode in "IQ":
        for words in ([7], [7, 7], [7] * 5000, [0] * 9):
            assert uniform(array(typecode, words))
        for words in ([7, 8], [7] * 5000 + [8], [8] + [7] * 5000, [1 << 8, 1], [0, 1, 0]):
            assert not uniform(array(typecode, words))


def test_words_in_a_hole_of_the_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with path.open("wb") as file:
        file.truncate(8 * PAGE)
        file.seek(4 * PAGE)
        file.write(b"\1" * 4096)
    with open_disk(ImageSpec(str(path), format="raw"), writable=True, context=Context()) as disk:
        table = WordTable(disk.top.file, 0, 8 * PAGE // 4, size=4, big=False)
        per_page = PAGE // 4
        assert table.hole(0, 8 * per_page) == 4 * per_page
        assert table.hole(0, 2 * per_page) == 2 * per_page
        assert table.hole(per_page, 3 * per_page) == 2 * per_page
        assert table.hole(4 * per_page, 8 * per_page) == 0
        assert table.hole(0, 7) == 0, "not worth a question"
        table.put(5, array("Q", [9]))
        assert table.hole(0, per_page) == 0, "what is staged is no hole"
        table.write()
        assert table.hole(0, per_page) == 0
        assert list(table.words(4, 7)) == [0, 9, 0]
