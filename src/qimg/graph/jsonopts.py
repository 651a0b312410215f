"""The JSON of image descriptions: standard JSON plus single-quoted strings, with the reference's error texts.

Not Python's `json`: that costs a slow import, knows no single quotes and words its errors differently.
Deep nesting is bounded and read without recursion, since the text may come from an image's header.
"""

from __future__ import annotations

from qimg.errors import LocationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    Json: TypeAlias = "str | int | float | bool | dict[str, Json] | list[Json] | None"
    Container: TypeAlias = "dict[str, Json] | list[Json]"

#: Objects and arrays inside one another; the reference program's limit.
MAX_DEPTH = 1024

_BLANKS = " \t\r\n"
_DIGITS = "0123456789"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_HEX = _DIGITS + "abcdefABCDEF"
_KEYWORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
_ESCAPES = {
    '"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
}  # fmt: skip

# Kinds of tokens; punctuation is its own kind.
_STRING = "string"
_NUMBER = "number"
_KEYWORD = "keyword"
_END = "end"


def parse(text: str) -> Json:
    """The one JSON value in `text`. Raises LocationError with the reference program's words."""
    lexer = _Lexer(text)
    if lexer.at_end():
        raise LocationError("Expecting a JSON value")
    value = _Builder(lexer.message()).build()
    if not lexer.at_end():
        raise LocationError("Expecting at most one JSON value")
    return value


class _Lexer:
    """Cuts text into (kind, text) tokens, a whole value at a time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def at_end(self) -> bool:
        """Whether only blanks are left."""
        text, position = self._text, self._position
        while position < len(text) and text[position] in _BLANKS:
            position += 1
        self._position = position
        return position == len(text)

    def message(self) -> list[tuple[str, str]]:
        """The tokens of one value: up to where all brackets are closed or one too many is, or to the end."""
        tokens: list[tuple[str, str]] = []
        braces = brackets = 0
        while not self.at_end():
            kind, text = self._token()
            tokens.append((kind, text))
            braces += (kind == "{") - (kind == "}")
            brackets += (kind == "[") - (kind == "]")
            if braces + brackets > MAX_DEPTH:
                raise LocationError("JSON nesting depth limit exceeded")
            if braces < 0 or brackets < 0 or (braces == 0 and brackets == 0):
                break
        return tokens

    def _token(self) -> tuple[str, str]:
        start = self._position
        letter = self._text[start]
        if letter in "{}[],:":
            self._position += 1
            return letter, letter
        if letter in "\"'":
            return _STRING, self._string(letter)
        if letter == "-" or letter in _DIGITS:
            return _NUMBER, self._number()
        if letter in _LETTERS:
            return _KEYWORD, self._span(_LETTERS)
        raise self._stray(start)

    def _stray(self, start: int) -> LocationError:
        return _error(f"stray '{self._text[start : self._position + 1]}'")

    def _span(self, letters: str) -> str:
        start = self._position
        while self._position < len(self._text) and self._text[self._position] in letters:
            self._position += 1
        return self._text[start : self._position]

    def _string(self, quote: str) -> str:
        """The raw text of a string, quotes included; escapes are looked at later."""
        start = self._position
        self._position += 1
        while self._position < len(self._text):
            letter = self._text[self._position]
            # Bytes that are not UTF-8 arrive as lone surrogates (os.fsdecode).
            if letter < " " or "\ud800" <= letter <= "\udfff":
                raise self._stray(start)
            self._position += 2 if letter == "\\" else 1
            if letter == quote:
                return self._text[start : self._position]
        self._position = len(self._text)
        raise self._stray(start)

    def _number(self) -> str:
        """``-? (0 | [1-9] digits) [. digits] [e [+-] digits]``."""
        start = self._position
        self._take("-")
        if self._take("0"):
            if self._peek() in _DIGITS:
                raise self._stray(start)
        else:
            self._digits(start)
        if self._take("."):
            self._digits(start)
        if self._take("eE"):
            self._take("+-")
            self._digits(start)
        return self._text[start : self._position]

    def _peek(self) -> str:
        """The next letter; past the end one that is in no set of letters here."""
        return self._text[self._position] if self._position < len(self._text) else "\0"

    def _take(self, letters: str) -> bool:
        if self._peek() in letters:
            self._position += 1
            return True
        return False

    def _digits(self, start: int) -> None:
        if not self._span(_DIGITS):
            raise self._stray(start)


class _Builder:
    """Makes a value of the tokens of one message."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._next = 0
        # The containers that are open, each with the key that waits for its value (None in a list).
        self._open: list[tuple[Container, str | None]] = []

    def build(self) -> Json:
        """The value. Raises LocationError."""
        while True:
            value: Json
            kind, text = self._take()
            if kind == "{" and self._peek() != "}":
                self._open.append(({}, self._key({})))
                continue
            if kind == "[" and self._peek() != "]":
                self._open.append(([], None))
                continue
            if kind in "{[":
                self._take()
                value = {} if kind == "{" else []
            else:
                value = _scalar(kind, text)
            while self._open:
                container, closed = self._attach(value)
                if not closed:
                    break
                value = container
            else:
                return value

    def _peek(self) -> str:
        return self._tokens[self._next][0] if self._next < len(self._tokens) else _END

    def _take(self) -> tuple[str, str]:
        if self._next >= len(self._tokens):
            raise _error("premature EOI")
        self._next += 1
        return self._tokens[self._next - 1]

    def _attach(self, value: Json) -> tuple[Container, bool]:
        """Put a finished value into the innermost open container; whether that is closed now."""
        container, key = self._open.pop()
        if isinstance(container, dict):
            assert key is not None
            container[key] = value
            end, what = "}", "dict"
        else:
            container.append(value)
            end, what = "]", "list"
        kind, _ = self._take()
        if kind == end:
            return container, True
        if kind != ",":
            raise _error(f"expected separator in {what}")
        next_key = self._key(container) if isinstance(container, dict) else None
        self._open.append((container, next_key))
        return container, False

    def _key(self, container: Mapping[str, Json]) -> str:
        kind, text = self._take()
        if kind in "{[":
            raise _error("key is not a string in object")
        key = _scalar(kind, text)
        if not isinstance(key, str):
            raise _error("key is not a string in object")
        if self._take()[0] != ":":
            raise _error("missing : in object pair")
        if key in container:
            raise _error("duplicate key")
        return key


def _scalar(kind: str, text: str) -> Json:
    if kind == _STRING:
        return _unquote(text)
    if kind == _NUMBER:
        return _number(text)
    if kind == _KEYWORD:
        if text in _KEYWORDS:
            return _KEYWORDS[text]
        raise _error(f"invalid keyword '{text}'")
    raise _error("expecting value")


def _number(text: str) -> int | float:
    """Integers that fit 64 bits stay exact, everything else becomes a float."""
    if "." not in text and "e" not in text and "E" not in text and len(text) <= 20:
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return float(text)


def _unquote(text: str) -> str:
    """The string that a token (with its quotes) means."""
    parts: list[str] = []
    position = 1
    end = len(text) - 1
    while position < end:
        backslash = text.find("\\", position, end)
        if backslash < 0:
            parts.append(text[position:end])
            break
        parts.append(text[position:backslash])
        letter = text[backslash + 1]
        position = backslash + 2
        if letter == "u":
            decoded, position = _code_point(text, backslash)
            parts.append(decoded)
        elif letter in _ESCAPES:
            parts.append(_ESCAPES[letter])
        else:
            raise _error("invalid escape sequence in string")
    return "".join(parts)


def _code_point(text: str, backslash: int) -> tuple[str, int]:
    """The character written ``\\uXXXX`` (or as a pair of surrogates) and the position after it."""
    shown = text[backslash : backslash + 6]
    first = _code_unit(text, backslash)
    position = backslash + 6
    if 0xD800 <= first < 0xDC00:
        second = _code_unit(text, position) if text.startswith("\\u", position) else -1
        if 0xDC00 <= second < 0xE000:
            return chr(0x10000 + (first - 0xD800 << 10) + (second - 0xDC00)), position + 6
    if first < 0 or 0xD800 <= first < 0xE000:
        raise _error(f"{shown} is not a valid Unicode character")
    return chr(first), position


def _code_unit(text: str, backslash: int) -> int:
    digits = text[backslash + 2 : backslash + 6]
    if len(digits) < 4 or any(letter not in _HEX for letter in digits):
        return -1
    return int(digits, 16)


def _error(what: str) -> LocationError:
    return LocationError(f"JSON parse error, {what}")


def dump(value: Json) -> str:
    """`value` as JSON in the spacing that image names use: ``{"driver": "raw", "size": 512}``."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(key)}: {dump(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(dump(member) for member in value) + "]"
    if isinstance(value, str):
        return _quote(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return plain(value)


def plain(value: float) -> str:
    """A number as options show it: ``1024.0`` is ``1024``."""
    return str(value) if isinstance(value, int) else f"{value:.17g}"


def _quote(text: str) -> str:
    """`text` as a JSON string in ASCII; what is not a character shows as U+FFFD."""
    shown = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
    parts = []
    for letter in text:
        code = ord(letter)
        if letter in shown:
            parts.append(shown[letter])
        elif 0xD800 <= code < 0xE000:
            parts.append("\\uFFFD")
        elif code > 0xFFFF:
            code -= 0x10000
            parts.append(f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}")
        elif code < 0x20 or code >= 0x7F:
            parts.append(f"\\u{code:04X}")
        else:
            parts.append(letter)
    return '"' + "".join(parts) + '"'
