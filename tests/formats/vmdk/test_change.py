"""Changing existing vmdk images: by convert -n, commit and resize (vmdk sheet 6, 7, 8)."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.errors import QimgError
from qimg.graph.open import ImageSpec, open_disk
from support.build import content, real_content, write_raw
from support.holders import qemu_io_holding
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
SECTOR = 512
OLD = "AB-0C--A0-AA"
NEW = "-B0CC-DA-0EA"
KINDS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")


def make(folder: Path, options: str, layout: str = OLD, name: str = "d.vmdk") -> Path:
    write_raw(folder / "old.raw", layout)
    words = ["convert", "-f", "raw", "-O", "vmdk", "-o", options, "old.raw", name]
    run_real(words, folder).ok()
    return folder / name


def cid(path: Path) -> int:
    found = re.search(rb"(?m)^CID=([0-9a-f]+)\r?$", path.read_bytes()[: 21 * SECTOR])
    assert found is not None
    return int(found[1], 16)


def sound(path: Path) -> None:
    run_real(["check", "-f", "vmdk", path]).ok()
    ours = qimg.check(path, format="vmdk")
    assert (ours.corruptions, ours.leaks) == (0, 0)


@pytest.mark.parametrize("kind", [*(f"subformat={kind}" for kind in KINDS), "zeroed_grain=on"])
def test_an_existing_image_takes_other_content(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind)
    before = cid(path)
    write_raw(tmp_path / "new.raw", NEW)
    run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", path.name], tmp_path).ok()
    assert real_content(path, format="vmdk") == content(NEW)
    sound(path)
    assert cid(path) != before, "overlays must not take it for what they were made for"


def test_reading_leaves_the_content_id_alone(tmp_path: Path) -> None:
    path = make(tmp_path, "subformat=monolithicSparse")
    before = path.read_bytes()
    for words in (["convert", "-O", "raw", path, tmp_path / "x"], ["check", path], ["map", path]):
        run_qimg_inprocess(words).ok()
    assert path.read_bytes() == before


def test_a_content_id_of_few_digits_stays_as_long(tmp_path: Path) -> None:
    """So that the change is one write inside of a sector."""
    path = make(tmp_path, "subformat=monolithicFlat")
    text = re.sub(rb"(?m)^CID=.*$", b"CID=7f \r", path.read_bytes())
    path.write_bytes(text)
    write_raw(tmp_path / "new.raw", NEW)
    run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", path.name], tmp_path).ok()
    found = path.read_bytes()
    assert re.sub(rb"(?m)^CID=[0-9a-f]{2} \r$", b"CID=7f \r", found) == text
    assert found != text


def test_a_stream_with_its_tables_in_front_takes_more_grains(tmp_path: Path) -> None:
    run_real(["create", "-f", "vmdk", "-o", "subformat=streamOptimized", "s.vmdk", "768k"], tmp_path).ok()
    path = tmp_path / "s.vmdk"
    write_raw(tmp_path / "a.raw", OLD)
    run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vmdk", "a.raw", "s.vmdk"], tmp_path).ok()
    assert real_content(path, format="vmdk") == content(OLD)
    sound(path)


def test_a_grain_of_a_stream_is_written_once(tmp_path: Path) -> None:
    path = make(tmp_path, "subformat=streamOptimized")
    write_raw(tmp_path / "new.raw", NEW)
    result = run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", path.name], tmp_path)
    assert (result.code, "Input/output error" in result.err) == (1, True)


# -- chains


def overlay(folder: Path) -> tuple[Path, bytes]:
    """base.vmdk, over.vmdk on it, and what over.vmdk shows."""
    make(folder, "subformat=monolithicSparse", name="base.vmdk")
    run_real(["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk"], folder).ok()
    run_peer("qemu-io", ["-c", "write -P 7 70k 100k", "-c", "write -P 8 600k 10k", "over.vmdk"], folder).ok()
    return folder / "over.vmdk", real_content(folder / "over.vmdk", format="vmdk")


def test_a_partly_written_grain_of_an_overlay_keeps_the_rest_of_the_parent(tmp_path: Path) -> None:
    path, whole = overlay(tmp_path)
    patch = bytearray(whole)
    patch[200 * 1024 : 201 * 1024] = b"x" * 1024
    (tmp_path / "new.raw").write_bytes(patch)
    words = ["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", path.name]
    run_qimg_inprocess(words, tmp_path).ok()
    assert real_content(path, format="vmdk") == bytes(patch)


def test_an_overlay_whose_parent_was_changed_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path, whole = overlay(tmp_path)
    run_peer("qemu-io", ["-c", "write -P 9 0 4k", "base.vmdk"], tmp_path).ok()
    with qimg.open(path) as disk:
        assert disk.read(65536, 65536) == whole[65536 : 2 * 65536]
        with pytest.raises(QimgError, match="was changed since"):
            disk.read(0, 512)
    for more in ((), ("-C",)):
        words = ["convert", *more, "-O", "raw", "over.vmdk", "x.raw"]
        ours, real = run_qimg_inprocess(words, tmp_path), run_real(words, tmp_path)
        why = "'base.vmdk' was changed since 'over.vmdk' was made on top of it\n"
        assert (ours.code, ours.err) == (real.code, real.err + why)
    assert run_qimg_inprocess(["info", "over.vmdk"], tmp_path).code == 0


def test_a_convert_onto_a_parent_records_its_content_id(tmp_path: Path) -> None:
    make(tmp_path, "subformat=monolithicSparse", name="base.vmdk")
    write_raw(tmp_path / "new.raw", NEW)
    words = ["convert", "-f", "raw", "-O", "vmdk", "-B", "base.vmdk", "-F", "vmdk", "new.raw", "over.vmdk"]
    run_qimg_inprocess(words, tmp_path).ok()
    assert real_content(tmp_path / "over.vmdk", format="vmdk") == content(NEW)


def test_a_stream_over_a_parent_says_its_zeros(tmp_path: Path) -> None:
    make(tmp_path, "subformat=monolithicSparse", name="base.vmdk")
    write_raw(tmp_path / "new.raw", NEW)
    for more in ("", ",zeroed_grain=on"):
        words = ["convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat=streamOptimized{more}"]
        words += ["-B", "base.vmdk", "-F", "vmdk", "new.raw", "over.vmdk"]
        run_qimg_inprocess(words, tmp_path).ok()
        assert real_content(tmp_path / "over.vmdk", format="vmdk") == content(NEW)


def test_a_commit_leaves_an_overlay_that_still_fits_its_parent(tmp_path: Path) -> None:
    """With the real program, what shows through cannot be read afterwards."""
    path, whole = overlay(tmp_path)
    before = cid(tmp_path / "base.vmdk")
    run_qimg_inprocess(["commit", "over.vmdk"], tmp_path).ok()
    assert cid(tmp_path / "base.vmdk") != before
    assert real_content(tmp_path / "base.vmdk", format="vmdk") == whole
    assert real_content(path, format="vmdk") == whole
    sound(path)
    sound(tmp_path / "base.vmdk")


# -- resize

FROM = (768 * 1024, 100 * 1024, 32 * MIB, 33 * MIB)
TO = (2 * MIB, 32 * MIB, 32 * MIB + 512, 200 * MIB, 5 << 30)


@pytest.mark.parametrize(
    ("old", "size"), [*((old, size) for old in FROM for size in TO), pytest.param(FROM[0], 3 << 40)]
)
def test_a_disk_grows_and_the_new_part_reads_as_zeros(tmp_path: Path, old: int, size: int) -> None:
    if size <= old:
        size += 40 * MIB
    layout = ("AB-C" * 200)[: -(-old // 65536)]
    write_raw(tmp_path / "a.raw", layout, size=old)
    run_real(["convert", "-f", "raw", "-O", "vmdk", "a.raw", "d.vmdk"], tmp_path).ok()
    path = tmp_path / "d.vmdk"
    run_qimg_inprocess(["resize", "d.vmdk", str(size)], tmp_path).ok()
    assert f"({size} bytes)" in run_real(["info", path]).ok().out
    assert f"RW {size // SECTOR} SPARSE".encode() in path.read_bytes()[: 21 * SECTOR]
    assert run_real(["compare", "-f", "raw", "-F", "vmdk", "a.raw", "d.vmdk"], tmp_path).code == 0
    sound(path)
    # The real program writes into the new part, and we read it.
    end = size - 512
    run_peer("qemu-io", ["-c", f"write -P 7 {old} 512", "-c", f"write -P 9 {end} 512", path]).ok()
    with qimg.open(path) as disk:
        assert disk.read(old, 512) == (b"\x09" if old == end else b"\x07") * 512
        assert disk.read(end, 512) == b"\x09" * 512
        assert disk.read(0, old) == (tmp_path / "a.raw").read_bytes()
    sound(path)


def test_what_lies_behind_the_end_in_the_last_grain_does_not_come_up(tmp_path: Path) -> None:
    """Bytes there belong to nobody, but another program may have left some."""
    write_raw(tmp_path / "a.raw", "A", size=10 * 512)
    run_real(["convert", "-f", "raw", "-O", "vmdk", "a.raw", "d.vmdk"], tmp_path).ok()
    path = tmp_path / "d.vmdk"
    raw = bytearray(path.read_bytes())
    raw[-65536 + 10 * 512 :] = b"x" * (65536 - 10 * 512)
    path.write_bytes(raw)
    run_qimg_inprocess(["resize", "d.vmdk", "1M"], tmp_path).ok()
    whole = (tmp_path / "a.raw").read_bytes().ljust(MIB, b"\0")
    assert real_content(path, format="vmdk") == whole


def test_an_overlay_grows_over_a_longer_parent_with_zeros(tmp_path: Path) -> None:
    make(tmp_path, "subformat=monolithicSparse", layout="A" * 40, name="base.vmdk")
    words = [
        "create",
        "-f",
        "vmdk",
        "-o",
        "zeroed_grain=on",
        "-b",
        "base.vmdk",
        "-F",
        "vmdk",
        "o.vmdk",
        "100k",
    ]
    run_real(words, tmp_path).ok()
    run_qimg_inprocess(["resize", "o.vmdk", "3M"], tmp_path).ok()
    whole = content("A" * 40)[: 100 * 1024].ljust(3 * MIB, b"\0")
    assert real_content(tmp_path / "o.vmdk", format="vmdk") == whole


def test_an_overlay_that_cannot_say_zeros_does_not_grow_over_a_longer_parent(tmp_path: Path) -> None:
    make(tmp_path, "subformat=monolithicSparse", layout="A" * 40, name="base.vmdk")
    run_real(["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "o.vmdk", "100k"], tmp_path).ok()
    before = (tmp_path / "o.vmdk").read_bytes()
    assert run_qimg_inprocess(["resize", "o.vmdk", "3M"], tmp_path).code == 1
    assert (tmp_path / "o.vmdk").read_bytes() == before


@pytest.mark.parametrize("size", ["786944", "3M", "5G"])
def test_a_flat_disk_grows_and_the_new_part_reads_as_zeros(tmp_path: Path, size: str) -> None:
    path = make(tmp_path, "subformat=monolithicFlat")
    run_qimg_inprocess(["resize", "d.vmdk", size], tmp_path).ok()
    length = (tmp_path / "d-flat.vmdk").stat().st_size
    shown = run_real(["info", path]).ok().out
    assert f"({length} bytes)" in shown
    assert f"virtual size: {length}\n" in shown
    same = run_real(["compare", "-f", "raw", "-F", "vmdk", "old.raw", "d.vmdk"], tmp_path)
    assert (same.code, "Images are identical" in same.out) == (0, True)
    assert f'ddb.geometry.cylinders = "{length // (63 * 16 * SECTOR)}"' in path.read_text()


def test_a_flat_disk_does_not_grow_over_what_its_file_holds_behind_the_end(tmp_path: Path) -> None:
    path = make(tmp_path, "subformat=monolithicFlat")
    flat = tmp_path / "d-flat.vmdk"
    with flat.open("ab") as file:
        file.truncate(file.tell() + MIB)  # what a growth that was cut off leaves
    run_qimg_inprocess(["resize", "d.vmdk", "2M"], tmp_path).ok()
    assert flat.stat().st_size == 2 * MIB
    with flat.open("ab") as file:
        file.write(b"x")
    before = path.read_text()
    found = run_qimg_inprocess(["resize", "d.vmdk", "3M"], tmp_path)
    assert (found.code, "bytes behind the extent" in found.err) == (1, True)
    assert (path.read_text(), flat.stat().st_size) == (before, 2 * MIB + 1)


@pytest.mark.parametrize("kind", [*KINDS[2:], "streamOptimized"])
def test_other_kinds_do_not_grow_as_with_the_real_program(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, f"subformat={kind}")
    before = path.read_bytes()
    ours, real = (run(["resize", "d.vmdk", "10M"], tmp_path) for run in (run_qimg_inprocess, run_real))
    assert (ours.code, ours.err) == (real.code, real.err)
    assert path.read_bytes() == before


# -- check: what the real program does not see


def damaged(folder: Path, change: object) -> list[str]:
    path = make(folder, "subformat=monolithicSparse", layout="ABCD")
    raw = bytearray(path.read_bytes())
    redundant, directory = struct.unpack_from("<QQ", raw, 48)
    (table,) = struct.unpack_from("<I", raw, directory * SECTOR)
    change(raw, redundant * SECTOR, directory * SECTOR, table * SECTOR)  # type: ignore[operator]
    path.write_bytes(raw)
    found: list[str] = []
    result = qimg.check(path, format="vmdk", report=found.append)
    assert result.corruptions == len(found)
    assert run_qimg_inprocess(["check", path]).code == 2
    return found


def _shared(raw: bytearray, _redundant: int, _directory: int, table: int) -> None:
    raw[table + 4 : table + 8] = raw[table : table + 4]


def _partly(raw: bytearray, _redundant: int, _directory: int, table: int) -> None:
    (word,) = struct.unpack_from("<I", raw, table)
    struct.pack_into("<I", raw, table + 4, word + 5)


def _metadata(raw: bytearray, _redundant: int, _directory: int, table: int) -> None:
    struct.pack_into("<I", raw, table, 1)


def _far(raw: bytearray, redundant: int, directory: int, _table: int) -> None:
    struct.pack_into("<I", raw, directory, 1 << 30)


def _copy(raw: bytearray, redundant: int, _directory: int, _table: int) -> None:
    (copy,) = struct.unpack_from("<I", raw, redundant)
    struct.pack_into("<I", raw, copy * SECTOR + 100, 7)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (_shared, "two grains lie over one another"),
        (_partly, "two grains lie over one another"),
        (_metadata, "cluster offset for sector 0 lies in the metadata"),
        (_far, "grain table 0 lies behind the end of the file"),
        (_copy, "grain table 0 differs from its second copy"),
    ],
)
def test_check_finds_what_the_real_program_does_not_look_for(
    tmp_path: Path, change: object, finding: str
) -> None:
    found = damaged(tmp_path, change)
    assert any(finding in text for text in found), found


def test_nothing_is_written_through_an_entry_that_leads_into_the_metadata(tmp_path: Path) -> None:
    damaged(tmp_path, _metadata)
    path = tmp_path / "d.vmdk"
    before = path.read_bytes()
    write_raw(tmp_path / "new.raw", "E")
    run = run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", "d.vmdk"], tmp_path)
    assert run.code == 1
    after = path.read_bytes()
    assert after[:512] == before[:512]
    assert after[21 * SECTOR :] == before[21 * SECTOR :]


def test_new_grains_do_not_land_where_the_grains_of_a_cut_file_were(tmp_path: Path) -> None:
    path = make(tmp_path, "subformat=monolithicSparse", layout="ABCD-")
    raw = path.read_bytes()
    path.write_bytes(raw[: -2 * 65536])
    (tmp_path / "new.raw").write_bytes(bytes(4 * 65536) + b"e" * 65536)
    words = ["convert", "-n", "--target-is-zero", "-f", "raw", "-O", "vmdk", "new.raw", "d.vmdk"]
    run_qimg_inprocess(words, tmp_path).ok()
    whole = content("AB") + bytes(2 * 65536) + b"e" * 65536
    with qimg.open(path) as disk:
        assert disk.read(0, disk.size) == whole


def test_an_image_that_is_in_use_is_locked_with_all_its_files(tmp_path: Path) -> None:
    make(tmp_path, "subformat=monolithicFlat")
    write_raw(tmp_path / "new.raw", NEW)
    with qemu_io_holding(tmp_path / "d.vmdk", format="vmdk"):
        for name in ("d.vmdk", "d-flat.vmdk"):
            words = ["convert", "-f", "raw", "-O", "raw", "new.raw", name]
            ours, real = run_qimg_inprocess(words, tmp_path), run_real(words, tmp_path)
            assert (ours.code, ours.err) == (real.code, real.err)
    ours_holds = ImageSpec(str(tmp_path / "d.vmdk"))
    with open_disk(ours_holds, writable=True, context=Context()):
        for name in ("d.vmdk", "d-flat.vmdk"):
            real = run_real(["convert", "-f", "raw", "-O", "raw", "new.raw", name], tmp_path)
            assert 'Failed to get "write" lock' in real.err
    assert real_content(tmp_path / "d.vmdk", format="vmdk") == content(OLD)
