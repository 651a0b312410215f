"""vdi beyond the conformance suite: growing, the number of blocks in use, measure, other readers."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from qimg.formats.vdi import MAX_SIZE
from support.build import real_content, write_raw
from support.run import run_peer, run_real

MIB = 1 << 20


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [1, 513, 10 * MIB, (3 << 30) + 5])
def test_an_image_is_the_real_programs_byte_by_byte(size: int, static: bool, tmp_path: Path) -> None:
    """All but the two identifiers. The number of blocks in use, too."""
    options = ["-o", "static=on"] if static else []
    run_real(["create", "-f", "vdi", *options, tmp_path / "real", str(size)]).ok()
    qimg.create(tmp_path / "ours", format="vdi", size=size, options={"static": static})
    assert (tmp_path / "real").stat().st_size == (tmp_path / "ours").stat().st_size
    heads = []
    for name in ("real", "ours"):
        with (tmp_path / name).open("rb") as file:
            heads.append(bytearray(file.read(64 << 10)))
        heads[-1][392:424] = bytes(32)
    assert heads[0] == heads[1]


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_number_of_blocks_that_is_too_small_costs_no_block(tmp_path: Path) -> None:
    """The real program puts the next block where the header says, over one that is in use."""
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 8, size=4 * MIB), tmp_path / "image"
    run_real(["convert", "-f", "raw", "-O", "vdi", source, path]).ok()
    with path.open("r+b") as file:
        file.seek(388)
        file.write(struct.pack("<I", 1))
    other = write_raw(tmp_path / "other.raw", "-" * 33 + "Z", size=4 * MIB)
    qimg.create(tmp_path / "top", format="qcow2", backing=str(path), backing_format="vdi")
    run_peer("qemu-io", ["-c", f"write -s {other} 3M 1M", tmp_path / "top"])
    qimg.commit(tmp_path / "top", format="qcow2")
    assert real_content(path, format="vdi")[: 3 * MIB] == source.read_bytes()[: 3 * MIB]
    run_real(["check", "-f", "vdi", path]).ok()


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("static", ["", "static=on"])
def test_a_disk_grows_and_the_real_program_reads_and_writes_it(static: str, tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 24), tmp_path / "image"
    options = ["-o", static] if static else []
    run_real(["convert", "-f", "raw", "-O", "vdi", *options, source, path]).ok()
    for size in (7 * MIB, 130 * MIB, 131 * MIB + 512, 3 << 30, 513 << 30):
        if static and size > 4 << 30:
            continue
        qimg.resize(path, size)
        os.truncate(source, size)
        assert f"({size} bytes)" in run_real(["info", "-f", "vdi", path]).ok().out
        run_real(["check", "-f", "vdi", path]).ok()
        run_real(["compare", "-f", "vdi", "-F", "raw", path, source]).ok()
        for file, kind in ((path, "vdi"), (source, "raw")):
            run_peer("qemu-io", ["-f", kind, "-c", f"write -P 7 {size - 1024} 1k", file]).ok()
    run_real(["check", "-f", "vdi", path]).ok()
    run_real(["compare", "-f", "vdi", "-F", "raw", path, source]).ok()


def test_a_disk_does_not_grow_past_what_the_format_holds(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qimg.create(path, format="vdi", size=MIB)
    before = path.read_bytes()
    with pytest.raises(QimgError, match="max supported is 0x1fffff8000000"):
        qimg.resize(path, MAX_SIZE + 1)
    with pytest.raises(QimgError, match="Shrinking"):
        qimg.resize(path, 512, shrink=True)
    with pytest.raises(QimgError, match="preallocation"):
        qimg.resize(path, 2 * MIB, preallocation="full")
    assert path.read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"static": True}])
def test_measure_predicts_the_file_that_convert_makes(options: dict[str, object], tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 8 + "-" * 64 + "D"), tmp_path / "image"
    found = qimg.measure(source, format="raw", output_format="vdi", options=options)
    qimg.convert(source, path, source_format="raw", format="vdi", options=options)
    assert path.stat().st_size == found.required
    qimg.convert(source, path, source_format="raw", format="vdi", options=options, sparse_size=0)
    assert path.stat().st_size == found.fully_allocated


@pytest.mark.peer("7z")
def test_7z_reads_what_is_written(tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 24), tmp_path / "image.vdi"
    qimg.convert(source, path, source_format="raw", format="vdi")
    run_peer("7z", ["e", "-tVDI", f"-o{tmp_path / 'out'}", path]).ok()
    (found,) = (tmp_path / "out").iterdir()
    assert found.read_bytes() == source.read_bytes()


def test_the_same_input_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source = write_raw(tmp_path / "source.raw", "AB-C" * 24)
    for name in ("one", "two"):
        qimg.convert(source, tmp_path / name, source_format="raw", format="vdi")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
