"""CRC-32C (Castagnoli; RFC 3720, B.4): reflected, polynomial 0x82F63B78, all ones at both ends.

Structures on disk are a few bytes and then zeros up to 4 or 64 KiB, so zeros at the end are not gone through
but multiplied in.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Bytes

_POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF
#: x**0 in reflected order: the most significant bit is the lowest power.
_ONE = 1 << 31
_table: list[int] = []


def _make_table() -> list[int]:
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        _table.append(value)
    return _table


def crc32c(data: Bytes) -> int:
    """The checksum of `data`."""
    raw = bytes(data)
    used = raw.rstrip(b"\0")
    table = _table or _make_table()
    crc = _ONES
    for byte in used:
        crc = table[crc & 0xFF ^ byte] ^ crc >> 8
    zeros = len(raw) - len(used)
    if zeros:
        crc = _product(_power(8 * zeros), crc)
    return crc ^ _ONES


def _product(first: int, second: int) -> int:
    """Two polynomials multiplied, modulo the polynomial."""
    product = 0
    while first:
        if first & _ONE:
            product ^= second
        first = first << 1 & _ONES
        second = second >> 1 ^ (_POLYNOMIAL if second & 1 else 0)
    return product


def _power(exponent: int) -> int:
    """X to the power of `exponent`, modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(square, result)
        square = _product(square, square)
        exponent >>= 1
    return result
