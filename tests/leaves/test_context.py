"""Passphrases are fetched by the ids of secret objects (luks sheet 8)."""

from __future__ import annotations

import pytest

from qimg.context import Context
from qimg.errors import OptionError
from qimg.graph.objects import add_object


@pytest.fixture
def context(tmp_path) -> Context:
    made = Context()
    for name, data in (("latin", b"caf\xe9"), ("nul", b"a\0b"), ("utf8", "café".encode()), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        add_object(f"secret,id={name},file={tmp_path / name}", made.objects)
    add_object("throttle-group,id=group", made.objects)
    return made


@pytest.mark.parametrize(("id", "wanted"), [("utf8", "café".encode()), ("empty", b"")])
def test_a_secret_is_given_byte_for_byte(context: Context, id: str, wanted: bytes) -> None:
    assert context.secret(id) == wanted


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("nosuch", "No secret with id 'nosuch'"),
        ("group", "Object with id 'group' is not a secret"),
        ("latin", "Data from secret latin is not valid UTF-8"),
        ("nul", "Data from secret nul is not valid UTF-8"),
    ],
)
def test_what_is_no_passphrase_is_refused_in_the_real_programs_words(
    context: Context, id: str, message: str
) -> None:
    with pytest.raises(OptionError) as raised:
        context.secret(id)
    assert str(raised.value) == message
