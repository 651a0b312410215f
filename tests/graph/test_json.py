"""The JSON reader of descriptions: values, single quotes, limits. Error texts: ``test_descriptions.py``."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qimg.errors import LocationError
from qimg.graph.jsonopts import MAX_DEPTH, dump, parse
from qimg.graph.location import flatten

_SCALARS = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text()
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(_VALUES)
def test_what_the_standard_library_writes_is_read_back(value: object) -> None:
    assert parse(json.dumps(value)) == value


@given(_VALUES)
def test_what_we_write_the_standard_library_reads_back(value: object) -> None:
    assert json.loads(dump(value)) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a':'b'}", {"a": "b"}),
        ("{'a':'it\\'s \"b\"'}", {"a": 'it\'s "b"'}),
        (' {"a" : 1 ,\t"b":\r\n[true, null] } ', {"a": 1, "b": [True, None]}),
        ('"\\u0041\\u00e9\\ud83d\\ude00"', "A\u00e9\U0001f600"),
        ("18446744073709551615", (1 << 64) - 1),
        ("18446744073709551616", float(1 << 64)),
        ("-9223372036854775809", -float(1 << 63)),
        ("1.5e3", 1500.0),
        ("-0", 0),
    ],
)
def test_a_value_is_read(text: str, value: object) -> None:
    assert parse(text) == value


def test_nesting_is_read_up_to_the_limit_and_refused_beyond() -> None:
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(LocationError, match="JSON nesting depth limit exceeded"):
        parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_bytes_that_are_no_text_are_stray() -> None:
    with pytest.raises(LocationError, match="JSON parse error, stray"):
        parse(os.fsdecode(b'{"a":"\xff"}'))


def test_a_name_shows_ascii_only() -> None:
    assert dump({"a": '\u00e9"\n'}) == '{"a": "\\u00E9\\"\\n"}'


@pytest.mark.parametrize(
    ("nested", "flat"),
    [
        ({"file": {"driver": "file", "filename": "x"}}, {"file.driver": "file", "file.filename": "x"}),
        ({"children": [{"driver": "a"}, "b"]}, {"children.0.driver": "a", "children.1": "b"}),
        ({"file": {"filename": "in"}, "file.filename": "dotted"}, {"file.filename": "in"}),
        ({"file.filename": "dotted", "file": {"filename": "in"}}, {"file.filename": "in"}),
        ({"a": {}, "b": []}, {"a": {}, "b": []}),
    ],
)
def test_nested_options_become_dotted_ones_and_win_over_them(
    nested: dict[str, object], flat: dict[str, object]
) -> None:
    assert flatten(nested) == flat  # type: ignore[arg-type]
