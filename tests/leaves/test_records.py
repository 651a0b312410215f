"""Records behave as the named tuples that their types say they are."""

from __future__ import annotations

import pytest

from qimg.records import record


@pytest.mark.parametrize("name", ["new", "cls", "self", "tuple", "values", "name"])
def test_a_field_may_have_any_name(name: str) -> None:
    made = record("Made", (name, "other"), (7,))
    one = made(1)
    assert (getattr(one, name), one.other) == (1, 7)
    assert one._replace(**{name: 2} if name != "self" else {"other": 2})[0 if name != "self" else 1] == 2


def test_fields_are_read_by_name_and_by_place() -> None:
    pair = record("Pair", ("first", "second"))
    assert tuple(pair(1, second=2)) == (1, 2)
    assert repr(pair(1, 2)) == "Pair(first=1, second=2)"
    with pytest.raises(ValueError, match="has no field third"):
        pair(1, 2)._replace(third=3)
    with pytest.raises(TypeError):
        pair(1)
