"""vpc beyond the conformance suite: geometry, differencing images, growing, foreign images, other readers."""

from __future__ import annotations

import bz2
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from qimg.formats.vpc.format import Vpc
from qimg.formats.vpc.structs import fitting_geometry, geometry
from support.build import content, pattern, write_raw
from support.run import run_peer, run_qimg_inprocess, run_real

MIB = 1 << 20
SAMPLES = Path(__file__).parent.parent / "samples"

#: The sheet's table: size asked for, size of the disk, cylinders, heads, sectors a track.
GEOMETRIES = [
    (1, 34816, (1, 4, 17)),
    (MIB, 1079296, (31, 4, 17)),
    (10 * MIB, 10514432, (302, 4, 17)),
    (100 * MIB, 104865792, (1004, 12, 17)),
    (504 * MIB, 528482304, (1024, 16, 63)),
    (1 << 30, 1073995776, (2081, 16, 63)),
    (8 << 30, 8590417920, (16645, 16, 63)),
    (32 << 30, 34361303040, (16449, 16, 255)),
    (127 << 30, 136365219840, (65279, 16, 255)),
    (128 << 30, 128 << 30, (65535, 16, 255)),
    (2040 << 30, 2040 << 30, (65535, 16, 255)),
]


@pytest.mark.parametrize(("asked", "size", "expected"), GEOMETRIES)
def test_a_disk_gets_the_smallest_geometry_that_holds_it(
    asked: int, size: int, expected: tuple[int, int, int]
) -> None:
    assert fitting_geometry(-(-asked // 512)) == expected
    footer = Vpc()._footer(asked, {})
    assert footer.current_size == size


def test_geometry_never_makes_a_disk_larger_than_its_sectors() -> None:
    for sectors in [*range(1, 5000, 7), *range(1 << 20, 1 << 29, 3333333)]:
        cylinders, heads, track = geometry(sectors)
        assert cylinders * heads * track <= sectors


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("size", [1, 513, 3 * MIB + 7, 504 * MIB, (1 << 30) + 1, 131 << 30])
def test_an_image_is_the_real_programs_byte_by_byte(size: int, tmp_path: Path) -> None:
    """All but the time and the identifier, and the sums over them."""
    run_real(["create", "-f", "vpc", tmp_path / "real", str(size)]).ok()
    qimg.create(tmp_path / "ours", format="vpc", size=size)
    real, ours = (bytearray((tmp_path / name).read_bytes()) for name in ("real", "ours"))
    for data in (real, ours):
        for base in (0, len(data) - 512):
            data[base + 24 : base + 28] = bytes(4)
            data[base + 64 : base + 84] = bytes(20)
    assert ours == real


# -- differencing images, made by hand


def seal(structure: bytearray, field: int) -> bytes:
    structure[field : field + 4] = bytes(4)
    structure[field : field + 4] = struct.pack(">I", ~sum(structure) & 0xFFFFFFFF)
    return bytes(structure)


def differencing(
    path: Path,
    parent: Path,
    sectors: dict[int, bytes],
    *,
    name: str = "parent.vpc",
    locator: str | None = "W2ru",
    uuid: bytes | None = None,
) -> None:
    """A child of the dynamic image `parent` which holds `sectors`: number -> 512 bytes."""
    whole = parent.read_bytes()
    footer, header = bytearray(whole[:512]), bytearray(whole[512:1536])
    footer[60:64] = struct.pack(">I", 4)
    (entries,) = struct.unpack_from(">I", header, 28)
    header[40:56] = footer[68:84] if uuid is None else uuid
    footer[68:84] = b"child's own uuid"
    text = name.encode("utf-16-be")
    header[64 : 64 + len(text)] = text
    table_end = 1536 + -(-4 * entries // 512) * 512
    place = f".\\{name}".encode("utf-16-le")
    if locator is not None:
        header[576:600] = struct.pack(">4sIIIQ", locator.encode(), 512, len(place), 0, table_end)
    bat, blocks = [0xFFFFFFFF] * entries, b""
    for block in sorted({number // 4096 for number in sectors}):
        bat[block] = (table_end + 512 + len(blocks)) // 512
        bitmap, data = bytearray(512), bytearray(2 * MIB)
        for number, sector in sectors.items():
            if number // 4096 == block:
                at = number % 4096
                bitmap[at >> 3] |= 0x80 >> at % 8
                data[at * 512 : at * 512 + 512] = sector
        blocks += bitmap + data
    table = struct.pack(f">{entries}I", *bat).ljust(table_end - 1536, b"\xff")
    head, last = seal(header, 36), seal(footer, 64)
    path.write_bytes(last + head + table + place.ljust(512, b"\0") + blocks + last)


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, dict[int, bytes], bytes]:
    """A parent by the real program, and what a child over it holds and reads."""
    source = write_raw(tmp_path / "source.raw", "AB-C" * 24)
    more = ["-o", "force_size=on"]
    run_real(["convert", "-f", "raw", "-O", "vpc", *more, source, tmp_path / "parent.vpc"]).ok()
    numbers = [0, 1, 7, 8, 9, 100, *range(256, 1300), 4095, 4096, 4097, 12287]
    sectors = {number: pattern("Z", number * 512, 512) for number in numbers}
    expected = bytearray(content("AB-C" * 24))
    for number, sector in sectors.items():
        expected[number * 512 : number * 512 + 512] = sector
    return tmp_path, sectors, bytes(expected)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("locator", ["W2ru", "W2ku", None])
def test_a_differencing_image_is_read_with_its_parent(
    family: tuple[Path, dict[int, bytes], bytes], locator: str | None
) -> None:
    folder, sectors, expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors, locator=locator)
    with qimg.open(folder / "child.vpc") as disk:
        assert disk.read(0, disk.size) == expected
        assert disk.read(255 * 512, 1024) == expected[255 * 512 : 257 * 512]
    with pytest.raises(QimgError, match="not supported"):
        qimg.convert(
            folder / "source.raw", folder / "child.vpc", source_format="raw", format="vpc", create=False
        )


@pytest.mark.peer("qemu-img", "qemu-io")
def test_nothing_changes_a_differencing_image(family: tuple[Path, dict[int, bytes], bytes]) -> None:
    folder, sectors, _expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors)
    before = (folder / "child.vpc").read_bytes()
    run_real(["create", "-q", "-f", "qcow2", "-b", "child.vpc", "-F", "vpc", "-u", "top", "8M"], folder).ok()
    for place in (0, 2 * MIB, 6 * MIB - 512):
        run_peer("qemu-io", ["-c", f"write -P 5 {place} 512", folder / "top"], folder)
    for line in (
        "commit top",
        "resize -f vpc child.vpc +1M",
        "bench -w -c 1 -f vpc child.vpc",
        "convert -n -f raw -O vpc source.raw child.vpc",
    ):
        found = run_qimg_inprocess(line.split(), folder)
        assert found.code == 1, line
        assert "not supported" in found.err, line
        assert (folder / "child.vpc").read_bytes() == before, line


@pytest.mark.peer("qemu-img", "vhdiinfo")
def test_libvhdi_reads_the_same_of_a_differencing_image(
    family: tuple[Path, dict[int, bytes], bytes],
) -> None:
    folder, sectors, _expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors)
    shown = run_peer("vhdiinfo", [folder / "child.vpc"], folder).ok().out
    assert re.search(r"Disk type\s*: Differential", shown)
    assert re.search(r"Parent filename\s*: parent.vpc", shown)


@pytest.mark.peer("qemu-img")
def test_another_images_content_is_not_taken_for_the_parents(
    family: tuple[Path, dict[int, bytes], bytes],
) -> None:
    folder, sectors, _expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors, uuid=b"some other image")
    with qimg.open(folder / "child.vpc") as disk:
        assert disk.read(0, 512) == sectors[0]
        with pytest.raises(QimgError):
            disk.read(2 * 512, 512)


@pytest.mark.peer("qemu-img")
def test_a_differencing_image_without_its_parent_is_an_error(
    family: tuple[Path, dict[int, bytes], bytes],
) -> None:
    folder, sectors, _expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors)
    (folder / "parent.vpc").unlink()
    with pytest.raises(QimgError, match=r"parent\.vpc"):
        qimg.open(folder / "child.vpc")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("name", "locator", "tried"),
    [
        ("C:\\machines\\parent.vpc", "W2ku", None),
        ("C:\\machines\\parent.vpc", None, None),
        ("nbd://127.0.0.1:1/x", "W2ru", "./nbd://127.0.0.1:1/x"),
        ("json:{}", None, "./json:{}"),
    ],
)
def test_a_parent_is_a_plain_file_beside_the_child_whatever_it_is_called(
    family: tuple[Path, dict[int, bytes], bytes], name: str, locator: str | None, tried: str | None
) -> None:
    folder, sectors, expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors, name=name, locator=locator)
    assert qimg.info(folder / "child.vpc").backing_filename == (tried or "parent.vpc")
    if tried is None:
        with qimg.open(folder / "child.vpc") as disk:
            assert disk.read(0, disk.size) == expected
        return
    with pytest.raises(QimgError, match="No such file or directory"):
        qimg.open(folder / "child.vpc")


@pytest.mark.peer("qemu-img")
def test_a_differencing_image_that_names_no_parent_is_refused(
    family: tuple[Path, dict[int, bytes], bytes],
) -> None:
    folder, sectors, _expected = family
    differencing(folder / "child.vpc", folder / "parent.vpc", sectors, name="", locator=None)
    with pytest.raises(QimgError, match="does not name its parent"):
        qimg.info(folder / "child.vpc")


# -- growing


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", [{}, {"force_size": "on"}, {"subformat": "fixed", "force_size": "on"}])
def test_a_disk_grows_and_the_real_program_reads_it(options: dict[str, object], tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 24), tmp_path / "image"
    qimg.convert(source, path, source_format="raw", format="vpc", options=options)
    for size in (7 * MIB, 300 * MIB, 3 << 30):
        qimg.resize(path, size, format="vpc")
        assert f"({size} bytes)" in run_real(["info", "-f", "vpc", path]).ok().out
        os.truncate(source, size)
        run_real(["compare", "-f", "vpc", "-F", "raw", path, source]).ok()
    with pytest.raises(QimgError, match="Shrinking"):
        qimg.resize(path, MIB, format="vpc", shrink=True)


# -- other programs


@pytest.mark.peer("qemu-img")
def test_an_image_of_virtual_pc_is_read_as_the_real_program_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    with bz2.open(SAMPLES / "virtualpc-dynamic.vhd.bz2") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    assert qimg.info(path).virtual_size == 136363130880
    qimg.convert(path, tmp_path / "copy.qcow2", format="qcow2")
    run_real(["compare", "-f", "vpc", "-F", "qcow2", path, tmp_path / "copy.qcow2"]).ok()


@pytest.mark.peer("vhdiinfo", "7z")
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_other_readers_take_what_is_written(subformat: str, tmp_path: Path) -> None:
    source, path = write_raw(tmp_path / "source.raw", "AB-C" * 24), tmp_path / "image.vhd"
    options: dict[str, object] = {"subformat": subformat, "force_size": "on"}
    qimg.convert(source, path, source_format="raw", format="vpc", options=options)
    shown = run_peer("vhdiinfo", [path]).ok().out
    assert re.search(r"Media size\s*: .*\(6291456 bytes\)", shown), shown
    assert re.search(rf"Disk type\s*: {subformat}", shown, re.IGNORECASE), shown
    run_peer("7z", ["e", "-tVHD", f"-o{tmp_path / 'out'}", path]).ok()
    (found,) = (tmp_path / "out").iterdir()
    assert found.read_bytes() == source.read_bytes()


def test_the_same_input_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source = write_raw(tmp_path / "source.raw", "AB-C" * 24)
    for name in ("one", "two"):
        qimg.convert(source, tmp_path / name, source_format="raw", format="vpc")
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    assert struct.unpack_from(">I", data, 24) == (1700000000 - 946684800,)
