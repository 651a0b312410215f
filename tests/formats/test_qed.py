"""qed beyond the conformance suite: repair, growing, tables of one cluster, measure."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

import qimg
from support.build import real_content, write_raw
from support.run import run_qimg_inprocess, run_real

MIB = 1 << 20
#: Where the second cluster lies, too.
SHARED = 7 << 16


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "options", [{}, {"cluster_size": 4096, "table_size": 2}, {"backing_file": "b", "backing_fmt": "raw"}]
)
def test_an_image_is_the_real_programs_byte_by_byte(options: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(MIB))
    words = ",".join(f"{name}={value}" for name, value in options.items())
    more = ["-o", words] if words else []
    run_real(["create", "-f", "qed", *more, "real", str(MIB)], tmp_path).ok()
    assert run_qimg_inprocess(["create", "-f", "qed", *more, "ours", str(MIB)], tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes()


def damaged(folder: Path, *, entry: int | None = None, leak: bool = False, dirty: bool = False) -> Path:
    """An image with its first table entry changed, a cluster that nobody has, and the bit of a crash."""
    source, path = write_raw(folder / "source.raw", "ABCD"), folder / "image"
    run_real(["convert", "-f", "raw", "-O", "qed", source, path]).ok()
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 65536)
    if entry is not None:
        data[table : table + 8] = struct.pack("<Q", entry)
    if leak:
        data += bytes(65536)
    if dirty:
        data[16] |= 2
    path.write_bytes(data)
    return path


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("fix", ["leaks", "all"])
@pytest.mark.parametrize(
    ("entry", "leak", "dirty"),
    [
        (None, False, False),
        (None, True, False),
        (None, False, True),
        (12345, False, True),
        (1 << 40, True, True),
        (0, False, True),
        (SHARED, False, True),
    ],
)
def test_check_repairs_what_the_real_program_repairs(
    entry: int | None, leak: bool, dirty: bool, fix: str, tmp_path: Path
) -> None:
    path = damaged(tmp_path, entry=entry, leak=leak, dirty=dirty)
    before = path.read_bytes()
    for words in ([], ["--output=json"]):
        path.write_bytes(before)
        real = run_real(["check", "-r", fix, *words, "image"], tmp_path)
        left = path.read_bytes()
        path.write_bytes(before)
        ours = run_qimg_inprocess(["check", "-r", fix, *words, "image"], tmp_path)
        if words:
            assert json.loads(ours.out) == json.loads(real.out)
        assert ours == real
        now = bytearray(path.read_bytes())
        if entry == SHARED:
            # What could not be repaired stays marked; the real program takes the mark away all the same.
            assert (now[16], left[16]) == (2, 0)
            now[16] = 0
        assert now == left


@pytest.mark.peer("qemu-img")
def test_an_image_that_needs_a_check_is_repaired_before_it_is_written_to(tmp_path: Path) -> None:
    path = damaged(tmp_path, entry=1 << 40, dirty=True)
    qimg.resize(path, 2 * MIB)
    assert path.read_bytes()[16] == 0
    assert run_real(["check", path]).code == 3  # the cluster that the entry led to is leaked
    expected = bytes(65536) + (tmp_path / "source.raw").read_bytes()[65536:]
    assert real_content(path, format="qed") == expected.ljust(2 * MIB, b"\0")


@pytest.mark.peer("qemu-img")
def test_growth_over_a_longer_backing_file_reads_as_zeros(tmp_path: Path) -> None:
    write_raw(tmp_path / "base.raw", "ABCDEFGH" * 4)
    run_real(["create", "-f", "qed", "-b", "base.raw", "-F", "raw", "image", "300K"], tmp_path).ok()
    path = tmp_path / "image"
    qimg.resize(path, MIB + 512)
    expected = (tmp_path / "base.raw").read_bytes()[: 300 << 10].ljust(MIB + 512, b"\0")
    assert real_content(path, format="qed") == expected
    qimg.resize(path, 3 * MIB)
    assert real_content(path, format="qed") == expected.ljust(3 * MIB, b"\0")
    run_real(["check", path]).ok()


def test_tables_of_one_cluster_can_be_read_again(tmp_path: Path) -> None:
    """The real program makes such images and refuses them."""
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 8), tmp_path / "image"
    options = {"table_size": 1, "cluster_size": 4096}
    qimg.convert(source, path, source_format="raw", format="qed", options=options)
    with qimg.open(path) as disk:
        assert disk.read(0, disk.size) == source.read_bytes()
    found = qimg.check(path)
    assert (found.corruptions, found.leaks) == (0, 0)


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096, "table_size": 2}])
def test_measure_predicts_the_file_that_convert_makes(options: dict[str, object], tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 8 + "-" * 64 + "D"), tmp_path / "image"
    found = qimg.measure(source, format="raw", output_format="qed", options=options)
    qimg.convert(source, path, source_format="raw", format="qed", options=options)
    assert path.stat().st_size == found.required
    qimg.convert(source, path, source_format="raw", format="qed", options=options, sparse_size=0)
    assert path.stat().st_size == found.fully_allocated


@pytest.mark.peer("qemu-img")
def test_a_long_backing_name_can_change_many_times(tmp_path: Path) -> None:
    write_raw(tmp_path / "base.raw", "AB-C")
    run_real(["create", "-f", "qed", "-b", "base.raw", "-F", "raw", "image"], tmp_path).ok()
    for times in (1, 1000, 1900, 10, 1850, 300):
        name = "./" * times + "base.raw"
        qimg.rebase(tmp_path / "image", name, backing_format="raw", unsafe=True)
        shown = json.loads(run_real(["info", "--output=json", "image"], tmp_path).ok().out)
        assert shown["backing-filename"] == name
        assert os.path.samefile(tmp_path / shown["full-backing-filename"], tmp_path / "base.raw")
        assert real_content(tmp_path / "image", format="qed") == (tmp_path / "base.raw").read_bytes()
