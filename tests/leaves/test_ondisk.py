"""A structure is declared once; its bytes are those of the declaration."""

from __future__ import annotations

import struct
from typing import Annotated

import pytest

from qimg.ondisk import U8, U16, U32, U64, Struct


class Sample(Struct, order="<"):
    """Every kind of field."""

    a: U8
    b: U16
    c: U32
    d: U64
    e: Annotated[bytes, 5]


RAW = bytes.fromhex("01 0302 07060504 0f0e0d0c0b0a0908") + b"hello"


def test_the_size_is_the_sum_of_the_fields_without_padding() -> None:
    assert Sample.SIZE == 1 + 2 + 4 + 8 + 5
    assert [Sample.offset_of(name) for name in Sample.FIELDS] == [0, 1, 3, 7, 15]


def test_unpacking_reads_each_field_at_its_place() -> None:
    found = Sample.unpack(b"xx" + RAW, 2)
    assert (found.a, found.b, found.c, found.d, found.e) == (
        1,
        0x0203,
        0x04050607,
        0x08090A0B0C0D0E0F,
        b"hello",
    )


def test_packing_gives_the_bytes_back() -> None:
    assert Sample.unpack(RAW).pack() == RAW


def test_fields_not_given_are_zero() -> None:
    assert Sample(b=5).pack() == b"\0" + b"\5\0" + bytes(17)


def test_a_short_buffer_and_an_unknown_field_are_errors() -> None:
    with pytest.raises(struct.error):
        Sample.unpack(RAW[:-1])
    with pytest.raises(TypeError, match="nonsense"):
        Sample(nonsense=1)


def test_the_dump_names_every_field_with_its_offset() -> None:
    assert Sample.unpack(RAW).dump().splitlines()[1].split() == ["1", "b", "0x203"]
