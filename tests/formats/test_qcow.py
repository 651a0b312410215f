"""qcow beyond the conformance suite: emptying, compression, limits, measure, other readers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from support.build import content, pattern, real_content, write_raw
from support.run import run_peer, run_qimg_inprocess, run_real

MIB = 1 << 20


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "words", ["ours 1", "ours 1M", "ours 5000M", "-b b -F raw ours", "-b b -F raw ours 9M"]
)
def test_an_image_is_the_real_programs_byte_by_byte(words: str, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(MIB))
    assert run_qimg_inprocess(["create", "-f", "qcow", *words.split()], tmp_path).code == 0
    run_real(["create", "-f", "qcow", *words.replace("ours", "real").split()], tmp_path).ok()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes()


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_commit_empties_the_overlay(tmp_path: Path) -> None:
    write_raw(tmp_path / "base.raw", "A" * 16)
    run_real(["create", "-f", "qcow", "-b", "base.raw", "-F", "raw", "image"], tmp_path).ok()
    run_peer("qemu-io", ["-c", "write -P 7 64k 70k", "image"], tmp_path).ok()
    expected = real_content(tmp_path / "image", format="qcow")
    qimg.commit(tmp_path / "image")
    assert (tmp_path / "image").stat().st_size == 64
    assert (tmp_path / "base.raw").read_bytes() == expected
    assert real_content(tmp_path / "image", format="qcow") == expected
    run_peer("qemu-io", ["-c", "write -P 9 64k 70k", "image"], tmp_path).ok()
    with qimg.open(tmp_path / "image") as disk:
        assert disk.read(65536, 71680) == b"\t" * 71680


@pytest.mark.peer("qemu-img", "qemu-io")
def test_compressed_clusters_are_overwritten_elsewhere(tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "ABCD"), tmp_path / "image"
    qimg.convert(source, path, source_format="raw", format="qcow", compress=True)
    run_real(["create", "-f", "qcow2", "-b", path, "-F", "qcow", tmp_path / "top"]).ok()
    run_peer("qemu-io", ["-c", "write -P 7 5000 3000", tmp_path / "top"]).ok()
    expected = bytearray(source.read_bytes())
    expected[5000:8000] = b"\7" * 3000
    qimg.commit(tmp_path / "top")
    assert real_content(path, format="qcow") == expected


def test_convert_compresses_and_says_that_it_did(tmp_path: Path) -> None:
    """The real program writes the image and fails without a word."""
    source, path = write_raw(tmp_path / "source.raw", "AB-C"), tmp_path / "image"
    words = ["convert", "-c", "-f", "raw", "-O", "qcow", source, path]
    assert run_qimg_inprocess([str(word) for word in words]).code == 0
    assert path.stat().st_size < source.stat().st_size / 2


def test_what_could_not_be_opened_again_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(QimgError, match="too large"):
        qimg.create(tmp_path / "new", format="qcow", size=512 << 40)
    words = ["create", "-f", "qcow", "-u", "-b", "x" * 1024, "-F", "raw", "new", "1M"]
    refused = run_qimg_inprocess(words, tmp_path)
    assert (refused.code, refused.err) == (1, "qemu-img: new: Backing file name too long\n")
    assert not (tmp_path / "new").exists()


def test_measure_predicts_the_file_that_convert_makes(tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 8 + "-" * 64 + "D"), tmp_path / "image"
    found = qimg.measure(source, format="raw", output_format="qcow")
    qimg.convert(source, path, source_format="raw", format="qcow")
    assert path.stat().st_size == found.required
    qimg.convert(source, path, source_format="raw", format="qcow", sparse_size=0)
    assert path.stat().st_size == found.fully_allocated


@pytest.mark.peer("qcowinfo", "7z")
def test_other_readers_take_what_is_written(tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 24), tmp_path / "image.qcow"
    qimg.convert(source, path, source_format="raw", format="qcow")
    shown = run_peer("qcowinfo", [path]).ok().out
    assert re.search(r"Format version\s*: 1", shown), shown
    assert re.search(r"Media size\s*: .*\(6291456 bytes\)", shown), shown
    run_peer("7z", ["e", "-tQCOW", f"-o{tmp_path / 'out'}", path]).ok()
    (found,) = (tmp_path / "out").iterdir()
    assert found.read_bytes() == source.read_bytes()


def test_reading_across_compressed_and_plain_clusters(tmp_path: Path) -> None:
    """Random bytes do not shrink and are stored as they are, between compressed clusters."""
    import random

    noise = random.Random(1).randbytes(65536)
    raw = content("AB") + noise + pattern("C", 0, 65536)
    (tmp_path / "source.raw").write_bytes(raw)
    qimg.convert(
        tmp_path / "source.raw", tmp_path / "image", source_format="raw", format="qcow", compress=True
    )
    with qimg.open(tmp_path / "image") as disk:
        for start, length in ((0, len(raw)), (131000, 70000), (4095, 2), (196607, 2)):
            assert disk.read(start, length) == raw[start : start + length]
