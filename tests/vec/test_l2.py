"""The two ways to decode mapping tables give the same extents, whatever the tables hold."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qimg.errors import CorruptImage
from qimg.extent import HOLE, Extent
from qimg.formats.qcow2 import mapping
from qimg.formats.qcow2.header import ParsedHeader
from qimg.formats.qcow2.mapping import Geometry, Mapping
from qimg.formats.qcow2.structs import (
    INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2,
    Header,
)
from qimg.storage.memory import MemoryStorage

COPIED = 1 << 63
COMPRESSED = 1 << 62
ALL = 0xFFFF_FFFF
L1 = 0x10000
TABLES = 0x100000


def geometry(bits: int, *, version: int = 3, extended: bool = False, data_file: bool = False) -> Geometry:
    features = INCOMPAT_EXTENDED_L2 * extended | INCOMPAT_DATA_FILE * data_file
    return Geometry(ParsedHeader(Header(cluster_bits=bits, version=version, incompatible_features=features)))


GEOMETRIES = {
    "512": geometry(9),
    "1024, version 2": geometry(10, version=2),
    "512, data file": geometry(9, data_file=True),
    "16384, extended": geometry(14, extended=True),
    "16384, extended, data file": geometry(14, extended=True, data_file=True),
}


@st.composite
def words(draw: st.DrawFn, geometry: Geometry, guest: int) -> list[int]:
    """The words of one L2 entry: mostly sound, sometimes damaged."""
    size = geometry.cluster_size
    place = guest if geometry.data_file else draw(st.integers(1, 6)) * size
    kinds = ["hole", "data", "next", "zero", "place", "compressed", "copied", "reserved"]
    kind = draw(st.sampled_from([*kinds, "odd"] if draw(st.integers(0, 9)) == 0 else kinds))
    word = {
        "hole": 0,
        "data": COPIED | place,
        "next": COPIED | (guest + size if not geometry.data_file else guest),
        "zero": 1,
        "place": COPIED | place | 1,
        "compressed": 0 if geometry.data_file else COMPRESSED | draw(st.integers(0, 1 << 40)),
        "copied": COPIED,
        "reserved": place | 0x3F << 56 | 0x1FE,
        "odd": draw(st.integers(0, (1 << 64) - 1)),
    }[kind]
    if not geometry.zero_clusters and kind in ("zero", "place"):
        word &= ~1
    if not geometry.extended:
        return [word]
    bits = draw(st.integers(0, ALL))
    zero = draw(st.integers(0, ALL)) & ~bits
    if not word & (0x00FF_FFFF_FFFF_FE00) and kind != "odd":
        bits = 0
    choice = draw(st.sampled_from([ALL, ALL << 32, 0, bits | zero << 32, bits, zero << 32]))
    if not word & 0x00FF_FFFF_FFFF_FE00 and kind != "odd":
        choice &= ALL << 32
    return [word, choice]


def full_table(draw: st.DrawFn, shape: Geometry, guest: int) -> bytes:
    """A table that is one long run, perhaps with one entry that is not like the others."""
    bits = draw(st.sampled_from([ALL, ALL << 32, 0, 1]))
    first = COPIED | (guest if shape.data_file else draw(st.integers(0, 3)) * shape.cluster_size)
    first |= draw(st.sampled_from([0, 0, 0, 2, 1 << 57]))
    table = []
    for number in range(shape.l2_entries):
        table.append(first + number * shape.cluster_size)
        if shape.extended:
            table.append(bits)
    if draw(st.booleans()):
        odd = draw(st.integers(0, len(table) - 1))
        table[odd] = draw(st.sampled_from([0, 1, table[odd] ^ 1 << draw(st.integers(0, 63))]))
    return b"".join(word.to_bytes(8, "big") for word in table)


@st.composite
def mappings(draw: st.DrawFn) -> tuple[Mapping, int, int]:
    """A mapping of a few tables, and a range of its guest bytes."""
    shape = GEOMETRIES[draw(st.sampled_from(sorted(GEOMETRIES)))]
    count = draw(st.integers(1, 5))
    entries = draw(st.integers(0, 12))  # of each table; the others repeat them or are zero
    file = MemoryStorage(size=TABLES)
    for index in range(count):
        offset = TABLES + index * shape.cluster_size
        kind = draw(st.integers(0, 5))
        if kind == 0:
            continue
        if kind == 1 and index and draw(st.booleans()):
            offset += 512 * draw(st.integers(0, 1))  # perhaps unaligned
        file.write((offset | COPIED).to_bytes(8, "big"), L1 + 8 * index)
        if kind == 2:
            file.write(full_table(draw, shape, index * shape.l1_span), offset)
            continue
        table: list[int] = []
        for number in range(entries):
            table += draw(words(shape, index * shape.l1_span + number * shape.cluster_size))
        data = b"".join(word.to_bytes(8, "big") for word in table)[: shape.cluster_size]
        where = 0
        if draw(st.booleans()) and not shape.data_file:
            where = (shape.cluster_size - len(data)) // shape.entry_size * shape.entry_size
        file.write(data, offset + where if where else offset)
    found = Mapping(file, shape, L1, draw(st.integers(0, count)))
    end = count * shape.l1_span
    start = draw(st.integers(0, end - 1))
    if draw(st.booleans()):
        start = start // shape.cluster_size * shape.cluster_size
    length = draw(st.sampled_from([1, 511, shape.cluster_size, shape.l1_span, end]))
    return found, start, min(length, end - start)


def plain(found: Mapping, start: int, length: int) -> list[Extent] | None:
    """The plain path's answer; None where it finds damage."""
    try:
        return found.plain_extents(start, length)
    except CorruptImage as error:
        assert error.guest is not None
        assert start // found.geometry.cluster_size <= error.guest // found.geometry.cluster_size
        return None


@settings(max_examples=400, deadline=None)
@given(mappings())
def test_both_ways_agree(sample: tuple[Mapping, int, int]) -> None:
    found, start, length = sample
    expected = plain(found, start, length)
    answer = found.vector_extents(start, length)
    if expected is not None:
        assert answer is None or answer == expected
    else:
        assert answer is None


@settings(max_examples=200, deadline=None)
@given(mappings())
def test_numpy_gives_up_on_damage_only(sample: tuple[Mapping, int, int]) -> None:
    """Damage outside the range may make it give up too: whole tables are looked at."""
    found, start, length = sample
    if found.vector_extents(start, length) is None:
        span = found.geometry.l1_span
        low = start // span * span
        end = -(-(start + length) // span) * span
        assert plain(found, low, end - low) is None


@settings(max_examples=200, deadline=None)
@given(mappings())
def test_extents_cover_the_range_in_order_and_joined(sample: tuple[Mapping, int, int]) -> None:
    found, start, length = sample
    for answer in (plain(found, start, length), found.vector_extents(start, length)):
        if answer is None:
            continue
        assert answer[0].start == start
        assert sum(extent.length for extent in answer) == length
        for one, two in pairwise(answer):
            assert one.start + one.length == two.start
            same = one.flags == two.flags and one.source is two.source
            follows = one.host is None or two.host is None or one.host + one.length == two.host
            assert not (same and follows and (one.host is None) == (two.host is None))


def test_a_big_request_goes_to_numpy_and_a_small_one_does_not() -> None:
    import sys

    shape = geometry(16)
    file = MemoryStorage(size=TABLES)
    tables = 1 + mapping.PLAIN_ENTRIES // shape.l2_entries
    for index in range(tables):
        file.write((TABLES + index * 65536).to_bytes(8, "big"), L1 + 8 * index)
    found = Mapping(file, shape, L1, tables)
    loaded = sys.modules.pop("numpy", None)
    try:
        assert not found._many(0, shape.l1_span)
        assert not found._many(0, 511 * 65536)
        assert found._many(0, tables * shape.l1_span)
        assert not Mapping(MemoryStorage(size=TABLES), shape, L1, tables)._many(0, tables * shape.l1_span)
    finally:
        if loaded is not None:
            sys.modules["numpy"] = loaded


def test_what_no_table_describes_is_one_hole() -> None:
    shape = geometry(16)
    found = Mapping(MemoryStorage(size=TABLES), shape, L1, 4 << 20)
    end = (4 << 20) * shape.l1_span
    assert found.extents(0, end) == [Extent(0, end, HOLE)]
    assert found.vector_extents(0, end) == [Extent(0, end, HOLE)]
