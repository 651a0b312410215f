"""Damaged LUKS headers: each row of section 5 of the luks sheet costs the error of the real program."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.errors import OpenError, QimgError
from support import luks
from support.luks import SECRETS, opts, patch
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img")

Change = Callable[[Path], None]


def field(name: str, value: int | bytes, slot: int | None = None) -> Change:
    return lambda path: patch(path, name, value, slot)


def cut(length: int) -> Change:
    return lambda path: os.truncate(path, length)


CHANGES: dict[str, Change] = {
    "magic": field("magic", b"LUKX\xba\xbe"),
    "version": field("version", 3),
    "cipher name without end": field("cipher_name", b"a" * 32),
    "cipher mode without end": field("cipher_mode", b"a" * 32),
    "hash without end": field("hash_spec", b"a" * 32),
    "payload 0": field("payload_sector", 0),
    "payload 7": field("payload_sector", 7),
    "payload 8": field("payload_sector", 8),
    "payload inside slot 7": field("payload_sector", 4030),
    "digest iterations 0": field("digest_iterations", 0),
    "stripes": field("stripes", 3999, 0),
    "stripes of an unused slot": field("stripes", 1, 5),
    "state": field("state", 0x1234, 3),
    "iterations 0": field("iterations", 0, 0),
    "iterations 0 of an unused slot": field("iterations", 0, 4),
    "slot inside the header": field("material_sector", 7, 7),
    "slot at 0, and over another": field("material_sector", 0, 0),
    "slot inside the payload": field("material_sector", 4000, 7),
    "slot far away": field("material_sector", 0xFFFFFFFF, 2),
    "slots over one another": field("material_sector", 512, 0),
    "slots partly over one another": field("material_sector", 1000, 1),
    "key length": field("key_bytes", 63),
    "key length 0": field("key_bytes", 0),
    "key length 32": field("key_bytes", 32),
    "key length 2 GiB": field("key_bytes", 1 << 31),
    "key length 4 GiB": field("key_bytes", 0xFFFFFFFF),
    "mode without a generator": field("cipher_mode", b"xts"),
    "mode": field("cipher_mode", b"foo-plain64"),
    "generator": field("cipher_mode", b"xts-foo"),
    "generator that is empty": field("cipher_mode", b"xts-"),
    "generator without hash": field("cipher_mode", b"xts-essiv"),
    "generator with an unknown hash": field("cipher_mode", b"xts-essiv:foo"),
    "generator with a hash that it ignores": field("cipher_mode", b"xts-plain64:sha1"),
    "hash": field("hash_spec", b"foo"),
    "hash that is empty": field("hash_spec", b""),
    "cipher": field("cipher_name", b"foo"),
    "cipher with other key lengths": field("cipher_name", b"cast5"),
    "upper case": field("cipher_name", b"AES"),
    "no slot in use": field("state", 0xDEAD, 0),
    "salt": field("salt", b"x" * 32, 0),
    "digest": field("digest", b"x" * 20),
    "digest salt": field("digest_salt", b"x" * 32),
    "iterations": field("iterations", 1001, 0),
    "nothing": lambda path: None,
    "no payload": cut(luks.PAYLOAD),
    "a byte of the header's tail is missing": cut(luks.PAYLOAD - 1),
    "payload past the end": cut(luks.PAYLOAD - 512),
    "material cut off": cut(5000),
    "header cut off": cut(100),
    "header cut off in the slots": cut(300),
    "empty": cut(0),
}

#: The real program's sums wrap at 32 bits here, so it takes what is far outside for something inside.
WRAPS = {
    "slot far away": "Keyslot 2 is overlapping with the encrypted payload",
    "key length 2 GiB": "Keyslot 0 is overlapping with the encrypted payload",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return luks.make(tmp_path_factory.mktemp("luks") / "a.luks", 4096)


@pytest.fixture
def image(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "a.luks"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_header_is_refused_as_by_the_real_program(name: str, image: Path) -> None:
    CHANGES[name](image)
    before = image.read_bytes()
    for words in (
        ["info", "--image-opts", opts("a.luks", None)],
        ["convert", *SECRETS, "--image-opts", opts("a.luks"), "-O", "raw", "plain"],
    ):
        ours = run_qimg_inprocess(words, image.parent)
        expected = run_real(words, image.parent)
        if name in WRAPS:
            assert ours.err.endswith(f": {WRAPS[name]}\n")
            assert ours != expected
        else:
            assert (ours.code, ours.err) == (expected.code, expected.err)
        assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "slot", "said"), [("iterations", 0, "Keyslot 0"), ("digest_iterations", None, "Master key")]
)
def test_iterations_that_would_take_minutes_are_refused_at_once(
    image: Path, field: str, slot: int | None, said: str
) -> None:
    patch(image, field, 0xFFFFFFFF, slot)
    begin = time.monotonic()
    with pytest.raises(OpenError, match=f"{said} iteration count 4294967295 is larger than 268435456"):
        qimg.open(luks.name(image), context=luks.context())
    assert time.monotonic() - begin < 5
    assert qimg.info(image).format_specific is not None  # needs no key


def test_a_detached_header_bounds_the_key_by_the_cipher(image: Path, tmp_path: Path) -> None:
    """No payload bounds the slots there, so a huge key would be read at once."""
    patch(image, "payload_sector", 0)
    patch(image, "key_bytes", 0x7FFFFFFE)
    for number in range(8):
        patch(image, "material_sector", 8 + number * 0x10000000, number)
    (tmp_path / "data").write_bytes(bytes(4096))
    where = opts("data", None, **{"header.filename": "a.luks"})
    shown = run_qimg_inprocess(["info", "--image-opts", where], tmp_path)
    assert shown.code == 1
    assert "are overlapping in the header" in shown.err or "not supported" in shown.err


def test_any_byte_of_the_header_may_be_wrong(image: Path) -> None:
    whole = image.read_bytes()[:592]
    with image.open("r+b", buffering=0) as file:
        for place in range(len(whole)):
            os.pwrite(file.fileno(), bytes([whole[place] ^ 0xFF]), place)
            try:
                qimg.info(image, format="luks")
            except QimgError as error:
                assert "\n" not in str(error)
            os.pwrite(file.fileno(), whole[place : place + 1], place)


@pytest.mark.parametrize("family", ["serpent", "twofish"])
def test_a_cipher_that_is_missing_is_named_and_info_still_works(image: Path, family: str) -> None:
    patch(image, "cipher_name", family.encode())
    shown = run_qimg_inprocess(["info", "a.luks"], image.parent).ok()
    assert f"cipher alg: {family}-256" in shown.out
    words = ["convert", *SECRETS, "--image-opts", opts("a.luks"), "-O", "raw", "plain"]
    ours = run_qimg_inprocess(words, image.parent)
    assert ours.code == 1
    assert ours.err.endswith(f"Algorithm '{family}-256' not supported\n")
    assert not (image.parent / "plain").exists()
