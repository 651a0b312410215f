"""``--object``: the same descriptions are taken, and refused with the same words, as by the real program."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from qimg.errors import OptionError, QimgError
from qimg.graph.objects import add_object, help_lines, secret
from support.run import run_both, run_qimg_inprocess, run_real

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
        "pr-manager-helper",
        "secret_keyring",
        "thread-context",
        "authz-list-file",
        "throttle-group",
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
    assert ours == shown
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
        # As the real program opens LUKS images that it made with such a secret.
        ("secret,id=s,data=cHc=cHc=,format=base64", b"pwpw"),
        ("secret,id=s,data=cH=w,format=base64", b"p0"),
        ("secret,id=s,data=c===cHc=,format=base64", b"ppw"),
        ("secret,id=s,data=cHcw,format=base64", b"pw0"),
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


MASTER = "secret,id=m,format=base64,data=a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s="  # 32 times k
IV = "aWlpaWlpaWlpaWlpaWlpaQ=="  # 16 times i


@pytest.mark.parametrize(
    ("wrapped", "data"),
    [
        # openssl enc -aes-256-cbc -K 6b6b... -iv 6969... -base64
        ("jW4Tw2g8uH+9oCDKMlX2Ww==", b"wrapped secret"),
        ("Rx5kzFEEgumDBeMJG3j9vU8soT1Btfzmh7yfnEsaLxk=", b"0123456789abcdef"),
        ("", b""),
    ],
)
def test_a_secret_wrapped_by_another_one_is_unwrapped(wrapped: str, data: bytes) -> None:
    objects: dict[str, object] = {}
    add_object(MASTER, objects)
    add_object(f"secret,id=s,data={wrapped},format=base64,keyid=m,iv={IV}", objects)
    assert secret(objects, "s") == data


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "rest",
    [
        *("data=x,keyid=m", "data=x,keyid=m,iv=x", "data=x,keyid=m,iv=cHc=", "data=x,keyid=m,iv=!!"),
        *(f"data=x,keyid=m,iv={IV}", f"data=x,iv={IV}", f"data=,keyid=m,iv={IV}", "data=x,keyid=nosuch"),
        *("data=x,keyid=short", "data=x,keyid=", "data=x,keyid=other", "data=!!!,format=base64,keyid=m"),
        *(f"data=!!!,format=base64,keyid=m,iv={IV}", f"data=cHc=,format=base64,keyid=m,iv={IV}"),
        # What these decrypt to ends in a byte that the real program's message shows.
        *(f"data={letter * 16},keyid=m,iv={IV}" for letter in "abcdefgh"),
        *(f"data={letter * 32},keyid=m,iv={IV}" for letter in "abcdefgh"),
    ],
)
def test_a_wrapped_secret_is_refused_with_the_words_of_the_real_program(rest: str, folder: Path) -> None:
    others = [MASTER, "secret,id=short,data=abc", "authz-simple,id=other,identity=x"]
    words = [word for text in (*others, f"secret,id=s,{rest}") for word in ("--object", text)]
    both = run_both(["info", *words, "a.raw"], folder, folder)
    assert (both.ours.code, both.ours.err) == (both.real.code, both.real.err)


def test_a_key_of_the_kernel_is_a_secret() -> None:
    call = ctypes.CDLL(None, use_errno=True).syscall
    user_keyring, add_key = -4, {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    serial = call(add_key, b"user", b"qimg-test", b"cHc=", 4, user_keyring)
    if serial < 0:
        # Where nobody may keep keys the secret is refused, with the kernel's reason.
        with pytest.raises(QimgError, match="Unable to read serial key"):
            add_object("secret_keyring,id=k,serial=1", {})
        return
    objects: dict[str, object] = {}
    add_object(f"secret_keyring,id=k,serial={serial}", objects)
    add_object(f"secret_keyring,id=b,serial={serial},format=base64", objects)
    assert (secret(objects, "k"), secret(objects, "b")) == (b"cHc=", b"pw")


def test_nothing_that_shows_an_object_shows_the_secret() -> None:
    objects: dict[str, object] = {}
    made = add_object("secret,id=s,data=hunter2", objects)
    assert "hunter2" not in repr(made) + repr(objects) + repr(made.properties)


@pytest.mark.parametrize(
    "words",
    [
        "--object {secret} --object {secret}",
        "--object {secret},file=password",
        "--object {secret},format=nosuch",
        "--object {secret},bogus=1",
        "--object {secret},keyid=nosuch,iv=x",
        "--object {master} --object {secret},keyid=m,iv={iv}",
        "--object {secret}!!,format=base64",
        "--object {secret} --object secret,id=t,data=x,keyid=s",
        '--object {{"qom-type":"secret","id":"s","data":"hunter2","bogus":1}}',
        '--object {{"qom-type":"secret","id":"s","data":["hunter2"]}}',
        "--object {secret} --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=nosuch",
        "--object {secret} --image-opts driver=luks,key-secret=s,file.filename=a.raw",
    ],
)
def test_no_message_and_no_trace_shows_a_secret(words: str, folder: Path) -> None:
    said = words.format(secret="secret,id=s,data=hunter2", master=MASTER, iv=IV).split()
    name = [] if "--image-opts" in said else ["a.raw"]
    result = run_qimg_inprocess(["-T", "qimg*", "map", *said, *name], folder)
    assert result.code == 1
    assert result.err.count("\n") > 1, "the trace, and why"
    assert "hunter2" not in result.out + result.err


def test_an_object_that_cannot_be_made_is_not_there() -> None:
    objects: dict[str, object] = {}
    with pytest.raises(OptionError):
        add_object("secret,id=s", objects)
    add_object("secret,id=s,data=x", objects)
    assert secret(objects, "s") == b"x"


def test_only_a_secret_has_bytes() -> None:
    objects: dict[str, object] = {}
    add_object("authz-simple,id=a,identity=x", objects)
    with pytest.raises(OptionError, match="Object with id 'a' is not a secret"):
        secret(objects, "a")
    with pytest.raises(OptionError, match="No secret with id 'nosuch'"):
        secret(objects, "nosuch")
