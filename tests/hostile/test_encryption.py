"""Damaged encrypted images: one clear line, the real program's, and nothing written."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from support import secrets
from support.model import Guest
from support.run import run_both, run_qimg_inprocess

pytestmark = pytest.mark.peer("qemu-img")

CLUSTER = 4096
#: Where the key slots begin in a LUKS header, and bytes of one.
SLOTS, SLOT = 208, 48


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with data, slots 0 and 1 in use."""
    path = tmp_path_factory.mktemp("hostile") / "a.q"
    options = dict(pair.split("=") for pair in secrets.LUKS.split(","))
    options |= {"cluster_size": str(CLUSTER), "encrypt.cipher-alg": "aes-128"}
    context = secrets.context()
    source = path.with_name("source")
    source.write_bytes(b"\5" * 65536)
    qimg.convert(source, path, source_format="raw", format="qcow2", options=options, context=context)
    new = {"encrypt.state": "active", "encrypt.new-secret": "key1", "encrypt.iter-time": 0}
    qimg.amend(secrets.where(path), new, context=context)
    return path


def pointer(content: bytes) -> int:
    """Where in the file the data of the crypto header extension lies."""
    at = content.index(u32(0x0537BE77) + u32(16)) + 8
    assert at < CLUSTER
    return at


def header(content: bytes) -> int:
    """Where in the file the LUKS header lies."""
    found: int = struct.unpack_from(">Q", content, pointer(content))[0]
    return found


#: What is done to the LUKS header: offset in it, new bytes.
LUKS_DAMAGE: dict[str, tuple[int, bytes]] = {
    "magic": (0, b"LUKX"),
    "version": (6, b"\0\2"),
    "cipher name without an end": (8, b"a" * 32),
    "cipher mode without an end": (40, b"x" * 32),
    "hash without an end": (72, b"s" * 32),
    "unknown cipher": (8, b"foo\0"),
    "unknown mode": (40, b"foo-plain64\0"),
    "mode without generator": (40, b"xts\0"),
    "unknown generator": (40, b"xts-foo\0"),
    "essiv without a hash": (40, b"cbc-essiv\0"),
    "unknown hash": (72, b"foo\0"),
    "payload in the header": (104, u32(7)),
    "key length": (108, u32(31)),
    "key length 0": (108, u32(0)),
    "key length beyond everything": (108, u32(0xFFFFFFFF)),
    "digest": (112, b"\0\0\0\0"),
    "digest iterations 0": (164, u32(0)),
    "state": (SLOTS, u32(1)),
    "state of a slot in no use": (SLOTS + 5 * SLOT, u32(1)),
    "iterations 0": (SLOTS + 4, u32(0)),
    "material in the header": (SLOTS + 40, u32(7)),
    "material behind the payload": (SLOTS + 40, u32(1 << 30)),
    "material of another slot": (SLOTS + 40, u32(8 + 256)),
    "stripes": (SLOTS + 44, u32(3999)),
    "no slot in use": (SLOTS, u32(0xDEAD) + bytes(4) + bytes(40) + u32(0xDEAD)),
}


def damaged(image: Path, folder: Path, edits: dict[int, bytes]) -> None:
    """A copy called a.q with other bytes at these offsets."""
    content = bytearray(image.read_bytes())
    for offset, new in edits.items():
        content[offset : offset + len(new)] = new
    (folder / "a.q").write_bytes(content)


#: A command that needs the key.
CHECK = ["check", *secrets.WORDS, "--image-opts", secrets.options("a.q")]


@pytest.mark.parametrize("name", LUKS_DAMAGE)
def test_damage_of_the_luks_header_is_named_as_by_the_real_program(
    name: str, image: Path, tmp_path: Path
) -> None:
    offset, new = LUKS_DAMAGE[name]
    damaged(image, tmp_path, {header(image.read_bytes()) + offset: new})
    for words in (CHECK, ["info", "a.q"]):
        both = run_both(words, tmp_path, tmp_path)
        assert (both.ours.code, both.ours.err) == (both.real.code, both.real.err)
        assert both.ours.code == 1 or words != CHECK


POINTER_DAMAGE: dict[str, tuple[int, bytes]] = {
    "not aligned": (0, struct.pack(">Q", 4 * CLUSTER + 512)),
    "behind the end of the file": (0, struct.pack(">Q", 1 << 40)),
    "elsewhere": (0, struct.pack(">Q", 2 * CLUSTER)),
    "area too short for the header": (8, struct.pack(">Q", 591)),
    "area too short for the slots": (8, struct.pack(">Q", 4096)),
    "length of the extension": (-4, u32(8)),
}


@pytest.mark.parametrize("name", POINTER_DAMAGE)
def test_a_wrong_pointer_to_the_luks_header_is_named_as_by_the_real_program(
    name: str, image: Path, tmp_path: Path
) -> None:
    offset, new = POINTER_DAMAGE[name]
    damaged(image, tmp_path, {pointer(image.read_bytes()) + offset: new})
    both = run_both(CHECK, tmp_path, tmp_path)
    assert (both.ours.code, both.ours.err) == (both.real.code, both.real.err)
    assert both.ours.code == 1


def test_luks_without_a_header_is_refused(image: Path, tmp_path: Path) -> None:
    # The real program's info crashes.
    damaged(image, tmp_path, {pointer(image.read_bytes()) - 8: u32(0x12345678)})
    for words in (["info", "a.q"], CHECK):
        result = run_qimg_inprocess(words, tmp_path)
        assert result.code == 1
        assert result.err.endswith("Missing CRYPTO header for crypt method 2\n")


@pytest.mark.parametrize("method", [1, 3])
def test_another_method_in_the_header_is_refused_as_by_the_real_program(
    method: int, image: Path, tmp_path: Path
) -> None:
    damaged(image, tmp_path, {32: u32(method)})
    both = run_both(["info", "a.q"], tmp_path, tmp_path)
    assert (both.ours.code, both.ours.err) == (both.real.code, both.real.err)
    assert both.ours.code == 1


def test_iterations_that_would_take_hours_are_refused(image: Path, tmp_path: Path) -> None:
    at = header(image.read_bytes())
    damaged(image, tmp_path, {at + SLOTS + 4: u32(0xFFFFFFFF)})
    result = run_qimg_inprocess(CHECK, tmp_path)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "iteration count 4294967295" in result.err


def test_a_truncated_image_reads_as_the_real_program_reads_it(image: Path, tmp_path: Path) -> None:
    shutil.copy(image, tmp_path / "a.q")
    with (tmp_path / "a.q").open("r+b") as file:
        file.truncate(image.stat().st_size - 3 * CLUSTER - 700)
    words = ["convert", *secrets.WORDS, "-O", "raw", "--image-opts", secrets.options("a.q")]
    both = run_both([*words, "real.raw"], tmp_path, tmp_path)
    ours = run_qimg_inprocess([*words, "ours.raw"], tmp_path)
    assert (ours.code, ours.err) == (both.real.code, both.real.err)
    if both.real.code == 0:
        assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "real.raw").read_bytes()


def test_nothing_is_written_into_the_luks_header_whatever_the_counts_say(image: Path, tmp_path: Path) -> None:
    content = bytearray(image.read_bytes())
    at = header(bytes(content))
    (table,) = struct.unpack_from(">Q", content, 48)
    (block,) = struct.unpack_from(">Q", content, table)
    struct.pack_into(">100H", content, block + 2 * (at // CLUSTER), *[0] * 100)
    path = tmp_path / "a.q"
    path.write_bytes(content)
    with pytest.raises(QimgError, match="overlaps with LUKS header"), Guest(path, bytes(65536)) as guest:
        guest.image.discard(0, 65536)
        guest.flush()
        guest.write(0, b"x" * 65536)
        guest.write(0, b"y" * 65536)
    assert path.read_bytes()[at : at + 4096] == content[at : at + 4096]
