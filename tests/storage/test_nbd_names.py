"""Names of NBD exports: what they mean, and that what is shown means the same."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qimg.errors import LocationError, NotSupported, OptionError, QimgError
from qimg.storage import address
from qimg.storage.address import Address, inet, unix
from qimg.storage.nbd import names

_letters = string.ascii_letters + string.digits + "/:?#%@ [].,=&;é-"
_texts = st.text(_letters, min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, database=None)
@given(host=_texts, port=st.integers(1, 65535), path=_texts, export=_texts | st.just(""), tls=st.booleans())
def test_a_name_that_is_shown_means_the_export_that_it_is_shown_for(
    host: str, port: int, path: str, export: str, tls: bool
) -> None:
    for place in (inet(host, str(port)), unix(path)):
        name = names.shown(place, export, tls=tls)
        if name is None:
            continue
        values = names.parse(name)
        assert address.from_options(values, "server.") == place
        assert values.get("export", "") == export
        assert bool(values.get("tls", False)) == tls


@pytest.mark.parametrize(
    ("name", "place", "export"),
    [
        ("nbd:h:1", inet("h", "1"), ""),
        ("nbd:[::1]:1:exportname=a:b", inet("::1", "1"), "a:b"),
        ("nbd:unix:/a:b:exportname=c", unix("/a:b"), "c"),
        ("nbd://h", inet("h", "10809"), ""),
        ("nbd://h:5/a/b%20c", inet("h", "5"), "a/b c"),
        ("nbd+tcp://user@[fe80::1]:5/", inet("fe80::1", "5"), ""),
        ("nbd+unix:///a?socket=/b%3Fc", unix("/b?c"), "a"),
        ("nbds://h/a", inet("h", "10809"), "a"),
        ("nbds+unix:///a?socket=s&tls-hostname=h", unix("s"), "a"),
    ],
)
def test_every_form_of_a_name_is_understood(name: str, place: Address, export: str) -> None:
    values = names.parse(name)
    assert address.from_options(values, "server.") == place
    assert values.get("export", "") == export


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(["nbd:", "nbd://", "nbd+unix://", "nbds://"]), st.text(_letters, max_size=20))
def test_any_text_is_a_name_or_is_refused(prefix: str, text: str) -> None:
    try:
        names.parse(prefix + text)
    except LocationError:
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"server.type": "fd", "server.str": "3"}, "passed file descriptor"),
        ({"server.type": "vsock", "server.cid": "x", "server.port": "1"}, "expect numbers"),
        ({"server.type": "inet", "server.host": "h"}, "Parameter 'port' is missing"),
        (
            {"server.type": "inet", "server.host": "h", "server.port": "1", "server.ipv4": "x"},
            "expects 'on' or 'off'",
        ),
    ],
)
def test_an_address_that_cannot_be_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises((OptionError, NotSupported), match=message):
        address.from_options(dict(values), "server.")


def test_an_address_of_the_wrong_family_is_not_used() -> None:
    place = address.from_options(
        {"server.type": "inet", "server.host": "127.0.0.1", "server.port": "1", "server.ipv6": "on"},
        "server.",
    )
    assert place is not None
    with pytest.raises(QimgError, match="address resolution failed for"):
        place.connect(1)


def test_the_name_of_a_socket_is_bounded() -> None:
    with pytest.raises(QimgError, match="is too long") as caught:
        unix("x" * 200).connect(1)
    assert caught.value.hint == "Path must be less than 108 bytes"
