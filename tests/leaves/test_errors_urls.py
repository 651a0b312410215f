"""Messages never show the password of a URL."""

from __future__ import annotations

import pytest

from qimg.errors import OpenError, QimgError, hide_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:word@host/x", "http://user:***@host/x"),
        ("http://user:w:o@rd@host:80/x@y", "http://user:***@host:80/x@y"),
        ("ftp://user:@host", "ftp://user:***@host"),
        ("iscsi://user%word@host/iqn/0", "iscsi://user%***@host/iqn/0"),
        ("two: ssh://a:b@h/x, 's3://c:d@h/y'", "two: ssh://a:***@h/x, 's3://c:***@h/y'"),
        (
            'json:{"url": "http://a:b@h/x", "driver": "http"}',
            'json:{"url": "http://a:***@h/x", "driver": "http"}',
        ),
        ("http://user@host/x", "http://user@host/x"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("http://host:80 me@home", "http://host:80 me@home"),
        ("nbd:host:10809 a@b", "nbd:host:10809 a@b"),
        ("a plain file", "a plain file"),
    ],
)
def test_passwords_of_urls_are_hidden_and_nothing_else_is(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


def test_errors_keep_the_password_to_themselves() -> None:
    error = OpenError("http://user:word@host/x", QimgError("no ftp://a:b@h"))
    assert str(error) == "Could not open 'http://user:***@host/x': no ftp://a:***@h"
