"""CRC-32C: the values of RFC 3720 (B.4), and zeros at the end, which are not gone through."""

from __future__ import annotations

import random

import pytest

from qimg.ondisk.crc32c import crc32c
from support.vhdx import crc32c as by_definition


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_the_values_of_the_standard(data: bytes, value: int) -> None:
    assert crc32c(data) == value


@pytest.mark.parametrize("zeros", [0, 1, 2, 7, 8, 255, 4016, 65536])
def test_zeros_at_the_end_count(zeros: int) -> None:
    data = random.Random(zeros).randbytes(80) + bytes(zeros)
    assert crc32c(data) == by_definition(data)
    assert crc32c(memoryview(bytearray(data))) == by_definition(data)
