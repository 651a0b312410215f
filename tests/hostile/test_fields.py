"""Fields that only show when an image is written to, checked or read at one place, and those that need a file
of their own: each costs an error that names what is wrong, and nothing is changed."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.errors import FormatError, QimgError
from support import udif
from support.build import write_raw
from support.run import run_qimg_inprocess, run_real
from support.vhdx import MIB, NO_GUID, Vhdx

SECTOR = 512
TEXT = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="{}"\n{}\n'


def refused(action: Callable[[], object], message: str, field: str | None = None) -> None:
    """It fails with one line, at the bottom of which is `message`, about `field`."""
    with pytest.raises(QimgError) as found:
        action()
    assert "\n" not in str(found.value)
    cause: BaseException = found.value
    while cause.__cause__ is not None and not isinstance(cause, FormatError):
        cause = cause.__cause__
    assert message in str(cause)
    if field is not None:
        assert isinstance(cause, FormatError)
        assert cause.field == field


def write(path: Path, format: str, offset: int = 0) -> None:
    context = Context(warn=lambda notice: None)
    qimg.bench(path, count=1, size=512, offset=offset, write=True, format=format, context=context)


def read(path: Path, format: str, offset: int = 0) -> bytes:
    with qimg.open(path, format=format) as disk:
        return disk.read(offset, 512)


def made(path: Path, format: str, size: str, *patches: tuple[int, bytes], options: str = "") -> Path:
    """An empty image of the real program, with other bytes at some places."""
    more = ["-o", options] if options else []
    run_real(["create", "-q", "-f", format, *more, path, size]).ok()
    with path.open("r+b") as file:
        for offset, raw in patches:
            file.seek(offset)
            file.write(raw)
    return path


# -- vdi


@pytest.mark.peer("qemu-img")
def test_a_vdi_block_far_away_is_no_end_to_write_behind(tmp_path: Path) -> None:
    path = made(tmp_path / "x", "vdi", "3M", (516, struct.pack("<I", 0xFFFFFFF0)))
    before = path.read_bytes()
    refused(lambda: write(path, "vdi"), "Block index 4294967280 in the block map is too large", "map")
    assert path.read_bytes() == before


@pytest.mark.peer("qemu-img")
def test_a_check_of_a_vdi_gives_up_after_too_many_errors(tmp_path: Path) -> None:
    words = struct.pack("<I", 0xFFFFFF00) * 200_000
    path = made(tmp_path / "x", "vdi", "200000M", (512, words))
    lines: list[str] = []
    refused(lambda: qimg.check(path, format="vdi", report=lines.append), "too many errors in the block map")
    assert len(lines) < 200_000


# -- qed, qcow


def test_a_qed_header_larger_than_any(tmp_path: Path) -> None:
    path = tmp_path / "x"
    cluster = 64 << 20
    with path.open("wb") as file:
        file.write(struct.pack("<4sIII4QQII", b"QED\0", cluster, 2, 64, 0, 0, 0, 64 * cluster, MIB, 0, 0))
        file.truncate(66 * cluster)
    refused(lambda: qimg.info(path, format="qed"), "QED header size is too large", "header.header_size")


@pytest.mark.peer("qemu-img")
def test_a_qed_that_asks_for_a_check_and_cannot_be_mended_is_not_written_to(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "a.raw", "AB")
    path = tmp_path / "x"
    run_real(["convert", "-f", "raw", "-O", "qed", source, path]).ok()
    raw = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", raw, 65536)
    raw[table + 8 : table + 16] = raw[table : table + 8]
    raw[16] |= 2
    path.write_bytes(raw)
    refused(lambda: write(path, "qed"), "Image corrupted")
    assert path.read_bytes() == raw


@pytest.mark.peer("qemu-img")
def test_a_backing_name_longer_than_the_header_of_a_qed_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "x", "qed", "1M", options="cluster_size=4k,table_size=2")
    before = path.read_bytes()
    name = "./" * 2020 + "x"
    refused(lambda: qimg.rebase(path, name, backing_format="raw", unsafe=True), "No space left in the file")
    assert path.read_bytes() == before


@pytest.mark.peer("qemu-img")
def test_an_l1_table_of_qcow_beyond_63_bits(tmp_path: Path) -> None:
    path = made(tmp_path / "x", "qcow", "1M", (40, b"\x80" + bytes(7)))
    refused(lambda: qimg.info(path, format="qcow"), "Input/output error")


# -- vpc


@pytest.mark.peer("qemu-img")
def test_a_table_of_vpc_behind_the_end_of_the_file(tmp_path: Path) -> None:
    path = made(tmp_path / "x", "vpc", "5M", (528, struct.pack(">Q", MIB)))
    refused(lambda: qimg.info(path, format="vpc"), "reaches past the end", "dynamic header.bat_offset")


@pytest.mark.peer("qemu-img")
def test_a_way_to_find_the_size_of_a_vpc_that_there_is_not(tmp_path: Path) -> None:
    made(tmp_path / "x", "vpc", "5M")
    words = ["info", "--image-opts", "driver=vpc,file.filename=x,force_size_calc=foo"]
    real, ours = run_real(words, tmp_path), run_qimg_inprocess(words, tmp_path)
    assert ours == real
    assert "Invalid size calculation mode: 'foo'" in ours.err


# -- vhdx


def test_a_vhdx_without_a_log_is_read_only(tmp_path: Path) -> None:
    image = Vhdx()
    image.header["log_length"] = 0
    path = image.write(tmp_path / "x")
    assert read(path, "vhdx") == bytes(512)
    refused(lambda: write(path, "vhdx"), "has no log")


def test_a_differencing_vhdx_is_read_only_and_names_its_parent(tmp_path: Path) -> None:
    Vhdx().write(tmp_path / "parent.vhdx")
    linkage = "{" + NO_GUID + "}"
    image = Vhdx(parent={"parent_linkage": linkage, "relative_path": ".\\parent.vhdx"})
    image.block(3, 4 * MIB, b"x", state=7)
    path = image.write(tmp_path / "x")
    refused(lambda: write(path, "vhdx"), "Writing to differencing VHDX images is not supported")
    refused(lambda: read(path, "vhdx", 3 * MIB), "partially present, but there is no sector bitmap", "bat")
    nameless = Vhdx(parent={"parent_linkage": linkage}).write(tmp_path / "y")
    refused(lambda: qimg.info(nameless, format="vhdx"), "does not name its parent", "parent locator")


# -- parallels


def parallels(path: Path, *, entries: int, sectors: int, ext: int = 0, behind: bytes = b"") -> Path:
    """Clusters of 64 KiB, none in use."""
    words = (2, 16, 8, 128, entries, sectors, 0, 128, 0, ext)
    head = struct.pack("<16s5IQ3IQ", b"WithouFreSpacExt", *words)
    path.write_bytes(head.ljust(65536, b"\0") + behind)
    return path


def test_a_parallels_table_shorter_than_its_disk_is_not_written_behind(tmp_path: Path) -> None:
    path = parallels(tmp_path / "x", entries=2, sectors=1024)
    before = path.read_bytes()
    assert read(path, "parallels", 256 << 10) == bytes(512)
    refused(lambda: write(path, "parallels", 256 << 10), "no entries for the end of the disk")
    assert len(path.read_bytes()) == len(before)


def test_bitmaps_of_parallels_larger_than_any(tmp_path: Path) -> None:
    count = -(-(1 << 31) // 8 // 65536)
    bitmap = struct.pack("<Q16sII", 1 << 31, bytes(16), 1, count) + bytes(8 * count)
    feature = struct.pack("<QQII", 0x20385FAE252CB34A, 0, len(bitmap), 0) + bitmap
    rest = feature.ljust(65536 - 24, b"\0")
    behind = struct.pack("<Q", 0xAB234CEF23DCEA87) + hashlib.md5(rest).digest() + rest
    path = parallels(tmp_path / "x", entries=16, sectors=1 << 31, ext=128, behind=behind)
    refused(lambda: qimg.info(path, format="parallels"), "Bitmaps of 268435456 bytes are too large")


# -- dmg


@pytest.mark.parametrize("count", [0, 1 << 31])
def test_a_resource_of_a_dmg_that_leaves_its_fork(count: int, tmp_path: Path) -> None:
    fork = bytearray(udif.resource_fork([b"x" * 300]))
    (at,) = struct.unpack_from(">I", fork, 0)
    struct.pack_into(">I", fork, at, count)
    path = tmp_path / "x"
    path.write_bytes(bytes(fork) + udif.trailer(fork_length=len(fork), sectors=8))
    refused(lambda: qimg.info(path, format="dmg"), f"a resource of {count} bytes", "fork.length")


# -- vmdk


def test_a_vmdk_shorter_than_a_magic(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    refused(lambda: qimg.info(tmp_path / "x", format="vmdk"), "File is too small, not a valid image")


@pytest.mark.peer("qemu-img")
def test_a_vmdk_of_version_3_that_is_no_stream_is_read_only(tmp_path: Path) -> None:
    path = made(tmp_path / "x", "vmdk", "1M", (4, b"\3"))
    assert read(path, "vmdk") == bytes(512)
    refused(lambda: write(path, "vmdk"), "VMDK version 3 must be read only", "header.version")


def test_extents_larger_together_than_any_disk(tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(b"")
    line = f'RW {(1 << 53) - 1} FLAT "y" 0\n'
    (tmp_path / "x").write_text(TEXT.format("monolithicFlat", line * 2))
    refused(lambda: qimg.info(tmp_path / "x", format="vmdk"), "larger than any disk")


@pytest.mark.parametrize(("grain", "message"), [(0, "L1 entry size is invalid"), (0x200001, "Invalid gran")])
def test_a_grain_of_a_delta_extent_of_no_sense(grain: int, message: str, tmp_path: Path) -> None:
    head = struct.pack("<4s10I", b"COWD", 1, 3, 2048, grain, 4, 1, 64, 1, 1, 63)
    (tmp_path / "y").write_bytes(head.ljust(32768, b"\0"))
    (tmp_path / "x").write_text(TEXT.format("vmfsSparse", 'RW 2048 VMFSSPARSE "y"'))
    refused(lambda: qimg.info(tmp_path / "x", format="vmdk"), message, "header.grain_size")


def test_a_delta_extent_whose_directory_is_too_short_is_not_written_behind(tmp_path: Path) -> None:
    head = struct.pack("<4s10I", b"COWD", 1, 3, 8192, 1, 4, 1, 64, 1, 1, 63)
    (tmp_path / "y").write_bytes(head.ljust(32768, b"\0"))
    (tmp_path / "x").write_text(TEXT.format("vmfsSparse", 'RW 8192 VMFSSPARSE "y"'))
    assert read(tmp_path / "x", "vmdk", 3 * MIB) == bytes(512)
    refused(lambda: write(tmp_path / "x", "vmdk", 3 * MIB), "grain directory is too short for the disk")


def sesparse(path: Path, *, listed: int = 1, directory: int = 0x10000000_00000000, grain: int = 0) -> Path:
    """A space-efficient extent of 64 KiB: one directory word and the first word of its table."""
    words = [0] * 64
    words[0:5] = [0xCAFEBABE, 0x0000000200000001, 128, 8, 64]
    words[10:12] = [1, 1]
    words[16:20] = [4, listed, 5, 64]
    words[24:26] = [72, 128]
    raw = bytearray(struct.pack("<64Q", *words).ljust(200 * SECTOR, b"\0"))
    struct.pack_into("<Q", raw, SECTOR, 0xCAFECAFE)
    struct.pack_into("<Q", raw, 4 * SECTOR, directory)
    struct.pack_into("<Q", raw, 5 * SECTOR, grain)
    path.with_name("y").write_bytes(raw)
    path.write_text(TEXT.format("seSparse", 'RW 128 SESPARSE "y"'))
    return path


def test_tables_of_a_space_efficient_extent_of_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert read(sesparse(path), "vmdk") == bytes(512)
    refused(
        lambda: qimg.info(sesparse(path, listed=0), format="vmdk"),
        "L1 size too small",
        "header.directory_size",
    )
    refused(lambda: read(sesparse(path, directory=7 << 60), "vmdk"), "grain directory entry 0 is 0x7000")
    refused(lambda: read(sesparse(path, grain=9 << 60), "vmdk"), "grain table entry 0 is 0x9000")


# -- images whose last possible place is taken


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("format", "patch", "length", "message"),
    [
        ("vdi", (512, struct.pack("<I", 536870783)), None, "The image has no more room for blocks"),
        (
            "vpc",
            (1536, struct.pack(">I", 0xFFFFFFFF - 4098)),
            2 << 40,
            "The image has no more room for blocks",
        ),
        ("vmdk", (665 * SECTOR, struct.pack("<I", 0xFFFFFFFF)), None, "File too large"),
    ],
)
def test_there_is_no_place_behind_the_last_one(
    format: str, patch: tuple[int, bytes], length: int | None, message: str, tmp_path: Path
) -> None:
    path = made(tmp_path / "x", format, "5G", patch)
    if length is not None:
        os.truncate(path, length)
    tables = path.read_bytes()[:16384] if length is None else b""
    refused(lambda: write(path, format, 4 << 30), message)
    assert length is not None or path.read_bytes()[2048:16384] == tables[2048:], "nothing but a CID changed"
