"""Sizes in bytes as people write and read them (command-line sheet, section 4)."""

from __future__ import annotations

_EXPONENTS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_HEX = "0123456789abcdefABCDEF"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
INT64_MAX = (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1


def round_up(value: int, unit: int) -> int:
    """`value`, or the next multiple of `unit` above it."""
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    """`value`, or the next multiple of `unit` below it."""
    return value - value % unit


def _split(text: str) -> tuple[str, str, str]:
    """Leading digits, fraction digits (with the dot, or empty) and the rest."""
    end = 0
    while end < len(text) and "0" <= text[end] <= "9":
        end += 1
    whole, rest = text[:end], text[end:]
    if not rest.startswith("."):
        return whole, "", rest
    end = 1
    while end < len(rest) and "0" <= rest[end] <= "9":
        end += 1
    return whole, rest[:end], rest[end:]


def parse_size(text: str) -> int:
    """The number of bytes that `text` names; plain negative numbers are let through for range checks.

    ``[blanks] [+|-] digits [. digits] [b|k|m|g|t|p|e]`` or ``0x`` hex digits; powers of 1024.
    Raises ValueError.
    """
    body = text.lstrip(" \t\n\v\f\r")
    sign = 1
    if body[:1] in ("+", "-"):
        sign = -1 if body[0] == "-" else 1
        body = body[1:]
    if body[:2] in ("0x", "0X"):
        if len(body) == 2 or any(letter not in _HEX for letter in body[2:]):
            raise ValueError(f"not a size: {text!r}")
        return sign * int(body, 16)
    whole, fraction, suffix = _split(body)
    if (not whole and len(fraction) < 2) or len(suffix) > 1 or (sign < 0 and (fraction or suffix)):
        raise ValueError(f"not a size: {text!r}")
    exponent = 0
    if suffix:
        if suffix.lower() not in _EXPONENTS:
            raise ValueError(f"not a size: {text!r}")
        exponent = _EXPONENTS[suffix.lower()]
    value = int(whole or "0") << (10 * exponent)
    digits = fraction[1:]
    if digits.strip("0"):
        if exponent == 0:
            raise ValueError(f"not a size: {text!r}")
        scale = 10 ** len(digits)
        value += (2 * (int(digits) << (10 * exponent)) + scale) // (2 * scale)
    return sign * value


def human_size(value: int) -> str:
    """``1.5 KiB``: three significant digits, the next unit from 1000 on (sheet 4c)."""
    number = float(value)
    for unit in _UNITS:
        if number < 1000 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{number:.3g} {unit}"
