"""Named options of formats and storages: one list parses ``-o``, prints ``-o help`` and validates."""

from __future__ import annotations

from qimg.errors import OptionError
from qimg.units import UINT64_MAX, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Value = str | int | bool

STR = "str"
NUM = "num"
SIZE = "size"
BOOL = "bool (on/off)"

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
)


class Option:
    """One option: its `name`, its `type` (STR, NUM, SIZE, BOOL), its `default` (None: not set) and a
    `help` text of one line."""

    __slots__ = ("default", "help", "name", "type")

    def __init__(self, name: str, type: str, default: Value | None, help: str) -> None:
        self.name = name
        self.type = type
        self.default = default
        self.help = help

    def parse(self, text: str) -> Value:
        """`text` as a value of the option's type. Raises OptionError."""
        if self.type == SIZE:
            return parse_size_option(self.name, text)
        if self.type == NUM:
            return _parse_number(self.name, text)
        if self.type == BOOL:
            return parse_bool(self.name, text)
        return text


def parse_size_option(name: str, text: str) -> int:
    """A size of an ``-o`` value: 0 .. 2**64 - 1. Raises OptionError (sheet 4b)."""
    try:
        value = parse_size(text)
    except ValueError:
        raise OptionError(
            f"Parameter '{name}' expects a non-negative number below 2^64", option=name, hint=_SIZE_HINT
        ) from None
    if not 0 <= value <= UINT64_MAX:
        raise OptionError(f"Value '{text}' is out of range for parameter '{name}'", option=name)
    return value


def _parse_number(name: str, text: str) -> int:
    """A C integer: decimal, octal after 0 or hex after 0x, of at most 64 bits. Raises OptionError."""
    digits = text.lstrip(" \t\n\v\f\r")
    sign = digits[:1] if digits[:1] in ("+", "-") else ""
    digits = digits.removeprefix(sign).lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
    known = "0123456789abcdef"[:base]
    body = digits.removeprefix("0x") if base == 16 else digits
    if not body or body.strip(known):
        raise OptionError(f"Parameter '{name}' expects a number", option=name)
    value = int(body, base)
    if value > UINT64_MAX:
        raise OptionError(f"Value '{text}' is too large for parameter '{name}'", option=name)
    return -value if sign == "-" else value


def parse_bool(name: str, text: str) -> bool:
    """on/yes/true/y or off/no/false/n. Raises OptionError."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise OptionError(f"Parameter '{name}' expects 'on' or 'off'", option=name)


def split_pairs(text: str) -> list[tuple[str, str | None]]:
    """``a=1,b,c=x,,y`` -> [("a", "1"), ("b", None), ("c", "x,y")]; in a value a doubled comma is one.

    None as a value: the element had no ``=``; it ends at the first comma, doubled or not. A comma at the very
    end adds no element.
    """
    pairs: list[tuple[str, str | None]] = []
    rest = text
    while rest:
        comma, equals = rest.find(","), rest.find("=")
        if equals < 0 or 0 <= comma < equals:
            name, _, rest = rest.partition(",")
            pairs.append((name, None))
            continue
        end = equals + 1
        while (end := rest.find(",", end)) >= 0 and rest.startswith(",,", end):
            end += 2
        if end < 0:
            end = len(rest)
        pairs.append((rest[:equals], rest[equals + 1 : end].replace(",,", ",")))
        rest = rest[end + 1 :]
    return pairs


def find(options: Iterable[Option], name: str) -> Option:
    """The option called `name`. Raises OptionError with the words of the real program."""
    for option in options:
        if option.name == name:
            return option
    raise OptionError(f"Invalid parameter '{name}'", option=name)


def parse_values(options: tuple[Option, ...], pairs: Iterable[tuple[str, str]]) -> dict[str, Value]:
    """Typed values of `pairs`; later duplicates override. Raises OptionError. Defaults are not filled in."""
    values: dict[str, Value] = {}
    for name, text in pairs:
        values[name] = find(options, name).parse(text)
    return values
