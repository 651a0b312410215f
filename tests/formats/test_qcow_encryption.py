"""qcow with its AES encryption: what a guest writes is what the real program reads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qimg
from qimg.errors import NotSupported, OpenError, OptionError
from support import secrets
from support.build import write_raw
from support.model import Guest, change, mixed_stretches
from support.run import run_peer, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

CONTEXT = secrets.context(warn=lambda _: None)
OPTIONS = dict(pair.split("=") for pair in secrets.AES.split(","))
SIZE = 200 << 10


def real_content(path: Path) -> bytes:
    """What the real program reads."""
    target = path.with_name("content")
    run_real(["convert", *secrets.words(path, "qcow"), "-O", "raw", target]).ok()
    return target.read_bytes()


def prepare(folder: Path, *, over: bool) -> Path:
    """An image, over a backing file or not, with some data by the real program."""
    path = folder / "image"
    backing = {}
    if over:
        (folder / "below").write_bytes(mixed_stretches(SIZE // 2, random.Random(3)))
        backing = {"backing": str(folder / "below"), "backing_format": "raw"}
    qimg.create(path, format="qcow", size=SIZE, options=OPTIONS, context=CONTEXT, **backing)  # type: ignore[arg-type]
    words = ["-c", "write -q -P 7 5000 3000", "-c", "write -q -P 8 100k 30k", *secrets.words(path, "qcow")]
    run_peer("qemu-io", words).ok()
    return path


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_real_program_reads_what_a_guest_wrote(over: bool, seed: int, tmp_path: Path) -> None:
    path = prepare(tmp_path, over=over)
    before = real_content(path)
    assert before[5000:8000] == b"\7" * 3000
    chance = random.Random(seed)
    with Guest(path, before, format="qcow") as guest:
        for _ in range(12):
            change(guest, chance, "wwwzf")
        assert guest.read() == bytes(guest.content)
    assert real_content(path) == bytes(guest.content)


def test_a_commit_empties_an_encrypted_overlay(tmp_path: Path) -> None:
    path = prepare(tmp_path, over=True)
    expected = real_content(path)
    qimg.commit(secrets.where(path, "qcow"), context=CONTEXT)
    assert (tmp_path / "below").read_bytes() == expected[: (tmp_path / "below").stat().st_size]
    assert real_content(path) == expected


def test_a_file_with_a_past_holds_encrypted_zeros_where_nothing_was_written(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "source", "A--B", cluster=1000)
    path = tmp_path / "image"
    path.write_bytes(b"\xee" * 600000)
    qimg.convert(source, path, format="qcow", options=OPTIONS, context=CONTEXT)
    assert real_content(path)[: source.stat().st_size] == source.read_bytes()


def test_data_is_not_compressed(tmp_path: Path) -> None:
    path = prepare(tmp_path, over=False)
    with Guest(path, real_content(path), format="qcow") as guest:
        assert not guest.image.can_compress


def test_the_key_is_the_beginning_of_the_passphrase(tmp_path: Path) -> None:
    # Only 16 bytes of it count, so these two are one key.
    path = tmp_path / "image"
    source = write_raw(tmp_path / "source", "AB")
    long = secrets.context(warn=lambda _: None)
    from qimg.graph.objects import add_object

    add_object("secret,id=long,data=0123456789abcdefghij", long.objects)
    add_object("secret,id=short,data=0123456789abcdef", long.objects)
    options = {"encrypt.format": "aes", "encrypt.key-secret": "long"}
    qimg.convert(source, path, format="qcow", options=options, context=long)
    words = ["--object", "secret,id=key0,data=0123456789abcdef", "--image-opts"]
    both = [secrets.options(path, "qcow"), f"driver=raw,file.filename={source}"]
    run_real(["compare", *words, *both]).ok()
    with qimg.open(secrets.where(path, "qcow").replace("key0", "short"), context=long) as disk:
        assert disk.read(0, disk.size) == source.read_bytes()


def test_without_a_key_only_info_works(tmp_path: Path) -> None:
    path = prepare(tmp_path, over=False)
    assert qimg.info(path).encrypted
    with pytest.raises(OpenError, match="is required for cipher"):
        qimg.open(path)
    with pytest.raises(OptionError, match="is required for cipher"):
        qimg.create(tmp_path / "x", format="qcow", size=512, options={"encryption": True}, context=CONTEXT)
    with pytest.raises(NotSupported):
        qimg.check(secrets.where(path, "qcow"), context=CONTEXT)
