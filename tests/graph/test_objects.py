"""``--object``: the same descriptions are taken, and refused with the same words, as by the real program."""

from __future__ import annotations

from pathlib import Path

import pytest

from qimg.errors import NotSupported, OptionError, QimgError
from qimg.graph.objects import add_object, help_lines, secret
from support.run import run_real

HERE = Path(__file__).parent
OBJECTS = ["", *(HERE / "objects.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image and files that hold secrets."""
    made = tmp_path_factory.mktemp("objects")
    (made / "a.raw").write_bytes(bytes(512))
    (made / "dir").mkdir()
    (made / "password").write_bytes(b"pw\n")
    (made / "base64").write_bytes(b"cHc=\n")
    (made / "not-base64").write_bytes(b"notb64!")
    return made


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("text", OBJECTS)
def test_a_description_is_as_good_as_with_the_real_program(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    real = run_real(["info", "--object", text, "a.raw"], folder)
    try:
        add_object(text, {})
        ours = ""
    except QimgError as error:
        ours = f"qemu-img: {error}\n" + (f"{error.hint}\n" if error.hint else "")
    assert ours == real.err


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "kind",
    [
        "secret",
        "tls-creds-x509",
        "tls-creds-psk",
        "tls-creds-anon",
        "authz-simple",
        "authz-list",
        "main-loop",
    ],
)
def test_help_lists_the_properties_of_a_type(kind: str, folder: Path) -> None:
    shown = run_real(["info", "--object", f"{kind},help"], folder).ok().lines
    assert help_lines(f"{kind},help") == shown


@pytest.mark.peer("qemu-img")
def test_help_lists_types_that_the_real_program_has_too(folder: Path) -> None:
    shown = run_real(["info", "--object", "help"], folder).ok().lines
    ours = help_lines("help")
    assert ours is not None
    assert ours[0] == shown[0]
    assert set(ours) <= set(shown)
    assert help_lines("secret,id=x,?") == help_lines("secret,help")
    assert help_lines("secret,id=x,help=on") is None


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("secret,id=s,data=a,,b", b"a,b"),
        ("secret,id=s,data=", b""),
        ("secret,id=s,file=password", b"pw\n"),
        ("secret,id=s,file=base64,format=base64", b"pw"),
        ("secret,id=s,data=x,format=raw,format=base64", b""),
        ('{"qom-type":"secret","id":"s","data":"x"}', b"x"),
        ("{'qom-type':'secret','id':'s','data':'cHc=','format':'base64'}", b"pw"),
    ],
)
def test_a_secret_holds_exactly_its_bytes(
    text: str, data: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    objects: dict[str, object] = {}
    add_object(text, objects)
    assert secret(objects, "s") == data


def test_an_id_is_given_once() -> None:
    objects: dict[str, object] = {}
    add_object("secret,id=s,data=x", objects)
    with pytest.raises(OptionError) as raised:
        add_object("secret,id=s,data=y", objects)
    assert str(raised.value) == "attempt to add duplicate property 's' to object (type 'container')"


def test_an_encrypted_secret_is_refused_by_name() -> None:
    objects: dict[str, object] = {}
    add_object("secret,id=master,data=x", objects)
    with pytest.raises(NotSupported, match="'keyid'"):
        add_object("secret,id=s,data=x,keyid=master,iv=x", objects)


def test_only_a_secret_has_bytes() -> None:
    objects: dict[str, object] = {}
    add_object("authz-simple,id=a,identity=x", objects)
    for name in ("a", "nosuch"):
        with pytest.raises(OptionError, match=f"No secret with id '{name}'"):
            secret(objects, name)
