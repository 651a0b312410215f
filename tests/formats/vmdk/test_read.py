"""vmdk images that qemu-img did not make: of VMware, and by hand from the descriptions (vmdk sheet 3, 5)."""

from __future__ import annotations

import bz2
import struct
import zlib
from pathlib import Path

import pytest

import qimg
from qimg.errors import OpenError, QimgError
from support import release7
from support.build import content, real_content, write_raw
from support.run import run_qimg_inprocess, run_real

SECTOR = 512
SAMPLES = Path(__file__).resolve().parents[2] / "samples"
LAYOUT = "AB-0C--A"


def descriptor(
    *lines: str, kind: str = "vmfsSparse", cid: str = "1234abcd", parent: str = "ffffffff", more: str = ""
) -> bytes:
    extents = "\n".join(lines)
    words = f'CID={cid}\nparentCID={parent}\ncreateType="{kind}"'
    return f"# Disk DescriptorFile\nversion=1\n{words}\n{more}{extents}\n".encode()


def read(path: Path) -> bytes:
    with qimg.open(path, format="vmdk") as disk:
        return disk.read(0, disk.size)


def same_as_real(path: Path) -> None:
    """Content and map are those of the real program."""
    assert read(path) == real_content(path, format="vmdk")
    words = ["map", "--output=json", "-f", "vmdk", path.name]
    ours, real = run_qimg_inprocess(words, path.parent).ok(), run_real(words, path.parent).ok()
    assert release7.map_json(ours.out) == real.out


# -- VMware


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A stream of VMware's own tools, version 3, 16 GiB."""
    path = tmp_path / "version3.vmdk"
    path.write_bytes(bz2.decompress((SAMPLES / "iotest-version3.vmdk.bz2").read_bytes()))
    return path


@pytest.mark.peer("qemu-img")
def test_a_stream_of_vmware_reads_as_with_the_real_program(sample: Path, tmp_path: Path) -> None:
    run_real(["convert", "-O", "qcow2", sample, tmp_path / "copy.q"]).ok()
    assert qimg.compare(sample, tmp_path / "copy.q").verdict == "identical"
    qimg.convert(sample, tmp_path / "again.q", format="qcow2")
    assert run_real(["compare", sample, tmp_path / "again.q"]).ok().out == "Images are identical.\n"
    with qimg.open(sample) as disk:
        assert any(disk.read(0, 65536))
    for words in (["map", "--output=json"], ["check"], ["info"], ["info", "--output=json"]):
        real = run_real([*words, sample]).ok()
        ours = run_qimg_inprocess([*words, sample]).ok()
        shown = release7.info_human(release7.info_json(release7.map_json(ours.out)))
        assert shown == real.out


def test_a_stream_of_vmware_is_not_written_to(sample: Path, tmp_path: Path) -> None:
    before = sample.read_bytes()
    write_raw(tmp_path / "a.raw", LAYOUT)
    result = run_qimg_inprocess(
        ["convert", "-n", "-f", "raw", "-O", "vmdk", tmp_path / "a.raw", sample], tmp_path
    )
    assert result.code == 1
    assert sample.read_bytes() == before


# -- COWD


def cowd(layout: str, *, grain: int = 1, listed: int | None = None) -> bytes:
    """An ESX delta extent: a directory at sector 4, one grain table behind it, then the data."""
    data = content(layout)
    sectors = len(data) // SECTOR
    directory = bytearray(SECTOR)
    table_sector = 5
    struct.pack_into("<I", directory, 0, table_sector)
    at = table_sector + 32
    table = bytearray(4096 * 4)
    grains = b""
    for number, start in enumerate(range(0, len(data), grain * SECTOR)):
        part = data[start : start + grain * SECTOR]
        if any(part):
            struct.pack_into("<I", table, number * 4, at)
            grains += part
            at += grain
    tables = -(-sectors // (4096 * grain))
    header = struct.pack("<4s10I", b"COWD", 1, 3, sectors, grain, 4, listed or tables, at, 1, 1, 63)
    return header.ljust(4 * SECTOR, b"\0") + directory + table + grains


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("kind", ["VMFSSPARSE", "SPARSE"])
@pytest.mark.parametrize("grain", [1, 16])
def test_a_delta_extent_of_esx_reads_as_with_the_real_program(tmp_path: Path, kind: str, grain: int) -> None:
    (tmp_path / "d-delta.vmdk").write_bytes(cowd(LAYOUT, grain=grain))
    path = tmp_path / "d.vmdk"
    path.write_bytes(descriptor(f'RW {len(LAYOUT) * 128} {kind} "d-delta.vmdk"'))
    same_as_real(path)
    assert read(path) == content(LAYOUT)


@pytest.mark.peer("qemu-img")
def test_writing_into_a_delta_extent_adds_grain_tables(tmp_path: Path) -> None:
    """The real program would write over the header here."""
    layout = "A" * 20 + "-" * 44
    (tmp_path / "d-delta.vmdk").write_bytes(cowd(layout, listed=2))
    path = tmp_path / "d.vmdk"
    path.write_bytes(descriptor(f'RW {len(layout) * 128} VMFSSPARSE "d-delta.vmdk"'))
    new = "A" * 10 + "B" * 4 + "-" * 30 + "B" * 20
    write_raw(tmp_path / "new.raw", new)
    run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", "d.vmdk"], tmp_path).ok()
    same_as_real(path)
    assert read(path) == content(new)
    assert run_real(["check", path]).code == 0
    (free,) = struct.unpack_from("<I", (tmp_path / "d-delta.vmdk").read_bytes(), 28)
    assert free * SECTOR == (tmp_path / "d-delta.vmdk").stat().st_size


# -- seSparse

KINDS = {"A": 3, "0": 2, "u": 1, "-": 0}


def sesparse(layout: str, **changes: int) -> bytes:
    """An extent of grains of 4 KiB: `A` data, `0` zeros, `u` unmapped, `-` nothing. Grains are numbered from
    the back, so that an index of 60 bits shows whether its halves are put together rightly."""
    words = [0] * 64
    words[0:5] = [0xCAFEBABE, 0x0000000200000001, len(layout) * 8, 8, 64]
    words[10:12] = [1, 1]
    words[12:20] = [2, 1, 3, 1, 4, 1, 5, 64]
    words[20:26] = [69, 1, 70, 1, 72, 8 * len(layout)]
    for name, value in changes.items():
        words[int(name.removeprefix("word"))] = value
    volatile = [0] * 64
    volatile[0] = 0xCAFECAFE
    for name, value in changes.items():
        if name.startswith("volatile"):
            volatile[int(name.removeprefix("volatile"))] = value
    directory = [0] * 64
    directory[0] = 0x10000000_00000000
    table = [0] * 4096
    data = bytearray(4096 * len(layout))
    for number, letter in enumerate(layout):
        if letter != "A":
            table[number] = KINDS[letter] << 60
            continue
        index = len(layout) - 1 - number
        table[number] = 3 << 60 | (index & 0xFFF) << 48 | index >> 12
        data[index * 4096 : (index + 1) * 4096] = content("A" * len(layout), cluster=4096)[
            number * 4096 : (number + 1) * 4096
        ]
    image = struct.pack("<64Q", *words) + struct.pack("<64Q", *volatile) + bytes(2 * SECTOR)
    image += struct.pack("<64Q", *directory) + struct.pack("<4096Q", *table)
    return image.ljust(72 * SECTOR, b"\0") + data


def put_sesparse(folder: Path, **changes: int) -> Path:
    words = {name: value for name, value in changes.items() if not name.startswith("volatile")}
    extra = {name: value for name, value in changes.items() if name.startswith("volatile")}
    raw = bytearray(sesparse("AA0u-AAA-0Au", **words))
    for name, value in extra.items():
        struct.pack_into("<Q", raw, SECTOR + 8 * int(name.removeprefix("volatile")), value)
    (folder / "d-se.vmdk").write_bytes(raw)
    path = folder / "d.vmdk"
    path.write_bytes(descriptor('RW 96 SESPARSE "d-se.vmdk"', kind="seSparse"))
    return path


@pytest.mark.peer("qemu-img")
def test_a_space_efficient_extent_reads_as_with_the_real_program(tmp_path: Path) -> None:
    path = put_sesparse(tmp_path)
    same_as_real(path)
    words = ["info", "--output=json", "d.vmdk"]
    ours, real = run_qimg_inprocess(words, tmp_path).ok(), run_real(words, tmp_path).ok()
    assert release7.info_json(ours.out) == real.out


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "changes",
    [
        {"word0": 1},
        {"word1": 3},
        {"word3": 16},
        {"word4": 32},
        {"word5": 1},
        {"word6": 7},
        {"word40": 1},
        {"volatile0": 5},
        {"volatile3": 1},
        {"volatile9": 1},
    ],
)
def test_what_a_space_efficient_extent_must_not_have_is_refused_as_by_the_real_program(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    put_sesparse(tmp_path, **changes)
    ours, real = (run(["info", "d.vmdk"], tmp_path) for run in (run_qimg_inprocess, run_real))
    assert ours.code == real.code == 1
    # Where the real program lists words, its spacing is its own.
    assert ours.err.split(":")[2] == real.err.split(":")[2]


@pytest.mark.peer("qemu-img")
def test_a_space_efficient_extent_is_not_written_to(tmp_path: Path) -> None:
    path = put_sesparse(tmp_path)
    write_raw(tmp_path / "a.raw", "A", cluster=4096)
    before = (tmp_path / "d-se.vmdk").read_bytes()
    words = ["convert", "-n", "-f", "raw", "-O", "vmdk", "a.raw", path.name]
    ours, real = run_qimg_inprocess(words, tmp_path), run_real(words, tmp_path)
    assert (ours.code, ours.err) == (real.code, real.err)
    assert (tmp_path / "d-se.vmdk").read_bytes() == before


# -- descriptors


def flat(folder: Path, *lines: str, **more: str) -> Path:
    write_raw(folder / "a.raw", LAYOUT)
    path = folder / "d.vmdk"
    path.write_bytes(descriptor(*lines, **{"kind": "monolithicFlat", **more}))
    return path


def test_an_extent_behind_an_empty_line_counts_once(tmp_path: Path) -> None:
    """The real program counts it twice (sheet 3)."""
    assert read(flat(tmp_path, "", 'RW 1024 FLAT "a.raw" 0')) == content(LAYOUT)


def test_extents_that_may_only_be_read_are_read(tmp_path: Path) -> None:
    """The real program leaves them out, so that the disk shrinks (sheet 3)."""
    path = flat(tmp_path, 'RDONLY 512 FLAT "a.raw" 0', "RW 8 ZERO", 'RW 512 FLAT "a.raw" 512')
    whole = content(LAYOUT)
    assert read(path) == whole[: 512 * SECTOR] + bytes(8 * SECTOR) + whole[512 * SECTOR :]


def test_an_image_with_an_extent_that_may_only_be_read_is_not_written_to(tmp_path: Path) -> None:
    path = flat(tmp_path, 'RDONLY 1024 FLAT "a.raw" 0')
    write_raw(tmp_path / "b.raw", "B")
    words = ["convert", "-n", "-f", "raw", "-O", "vmdk", "b.raw", path.name]
    assert run_qimg_inprocess(words, tmp_path).code == 1
    assert read(path) == content(LAYOUT)


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (('NOACCESS 1024 FLAT "a.raw" 0',), {}, "Unsupported access"),
        (('RW 1024 PLAIN "a.raw"',), {}, "Unsupported extent type 'PLAIN'"),
        (("RW 1024 FLAT a.raw 0",), {}, "Invalid extent line"),
        (('RW x FLAT "a.raw" 0',), {}, "Invalid extent line"),
        (('RW 0 FLAT "a.raw" 0',), {}, "Invalid extent line"),
        (('RW 1024 FLAT "" 0',), {}, "Invalid extent line"),
        (('RW 1024 FLAT "a.raw 0',), {}, "Invalid extent line"),
        (('RW 99999999999999999 FLAT "a.raw" 0',), {}, "Invalid extent line"),
        (('RW 1024 FLAT "a.raw" 0',), {"cid": "xyz"}, "no valid CID"),
        (('RW 1024 FLAT "a.raw" 0',), {"parent": ""}, "no valid parentCID"),
        (('RW 1024 FLAT "a.raw" 0',), {"more": 'parentFileNameHint="open\n'}, "a quote is not closed"),
        (('RW 1024 FLAT "a.raw" 0',), {"kind": "x" * 200}, "too long"),
    ],
)
def test_a_descriptor_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, lines: tuple[str, ...], more: dict[str, str], message: str
) -> None:
    path = flat(tmp_path, *lines, **more)
    with pytest.raises(OpenError, match=message) as caught:
        qimg.open(path, format="vmdk")
    assert "\n" not in str(caught.value)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "name", ["nbd:localhost:10809", "json:{'driver':'null-co'}", "http://localhost/x", "fat:/tmp"]
)
def test_an_extent_is_never_opened_by_a_protocol(tmp_path: Path, name: str) -> None:
    flat(tmp_path, f'RW 1024 FLAT "{name}" 0')
    ours, real = (run(["info", "d.vmdk"], tmp_path) for run in (run_qimg_inprocess, run_real))
    assert ours == real
    assert "No such file or directory" in ours.err


@pytest.mark.peer("qemu-img")
def test_an_extent_may_have_an_absolute_name(tmp_path: Path) -> None:
    path = flat(tmp_path, f'RW 1024 FLAT "{tmp_path}/a.raw" 0')
    same_as_real(path)


def test_a_fifo_as_an_extent_is_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    path = flat(tmp_path, 'RW 1024 FLAT "pipe" 0')
    with pytest.raises(OpenError, match="regular file"):
        qimg.open(path, format="vmdk")


def test_the_gate_is_asked_for_every_extent(tmp_path: Path) -> None:
    from qimg.context import Context
    from qimg.errors import GateError
    from qimg.graph.gate import Inside
    from qimg.graph.open import ImageSpec, open_disk

    (tmp_path / "in").mkdir()
    write_raw(tmp_path / "a.raw", LAYOUT)
    path = tmp_path / "in" / "d.vmdk"
    path.write_bytes(descriptor('RW 1024 FLAT "../a.raw" 0', kind="monolithicFlat"))
    with pytest.raises(GateError):
        open_disk(ImageSpec(str(path)), context=Context(), gate=Inside(str(tmp_path / "in")))
    open_disk(ImageSpec(str(path)), context=Context(), gate=Inside(str(tmp_path))).close()


@pytest.mark.peer("qemu-img")
def test_a_sparse_file_without_capacity_may_describe_extents_as_esx_writes_it(tmp_path: Path) -> None:
    flat(tmp_path, 'RW 1024 FLAT "a.raw" 0')
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, 0, 128, 1, 20, 512, 0, 0, 128)
    text = descriptor('RW 1024 FLAT "a.raw" 0', kind="monolithicFlat")
    (tmp_path / "esx.vmdk").write_bytes(header.ljust(SECTOR, b"\0") + text.ljust(20 * SECTOR, b"\0"))
    same_as_real(tmp_path / "esx.vmdk")


def test_an_extent_without_capacity_cannot_lead_on_to_others(tmp_path: Path) -> None:
    """The real program opens files until it has no more descriptors."""
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, 0, 128, 1, 20, 512, 0, 0, 0)
    text = descriptor('RW 1024 SPARSE "d.vmdk"', kind="twoGbMaxExtentSparse")
    (tmp_path / "d.vmdk").write_bytes(header.ljust(SECTOR, b"\0") + text.ljust(20 * SECTOR, b"\0"))
    with pytest.raises(OpenError, match="without sectors"):
        qimg.open(tmp_path / "d.vmdk")


# -- compressed extents of other make


def stream(layout: str, *, marked: bool, level: int = 9) -> bytes:
    """A compressed extent with its tables in front."""
    data = content(layout)
    flags = 0x10001 | (0x20000 if marked else 0)
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 3, flags, len(data) // SECTOR, 128, 1, 20, 512, 0, 21, 128)
    header += b"\0\n \r\n\x01\0"
    table = [0] * 512
    body = b""
    for number in range(len(layout)):
        part = data[number * 65536 : (number + 1) * 65536]
        if any(part):
            table[number] = 128 + len(body) // SECTOR
            code = zlib.compress(part, level)
            body += struct.pack("<QI", number * 128, len(code)) + code if marked else code
            body += bytes(-len(body) % SECTOR)
    image = header.ljust(SECTOR, b"\0") + descriptor(kind="streamOptimized").ljust(20 * SECTOR, b"\0")
    image += struct.pack("<I", 22).ljust(SECTOR, b"\0") + struct.pack("<512I", *table)
    return image.ljust(128 * SECTOR, b"\0") + body


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_compressed_grains_with_and_without_markers_read_as_with_the_real_program(
    tmp_path: Path, marked: bool, level: int
) -> None:
    (tmp_path / "d.vmdk").write_bytes(stream(LAYOUT, marked=marked, level=level if marked else 9))
    same_as_real(tmp_path / "d.vmdk")
    assert read(tmp_path / "d.vmdk") == content(LAYOUT)


@pytest.mark.parametrize(
    ("offset", "raw"),
    [(8, b"\0\0\0\0"), (8, b"\xff\xff\xff\xff"), (12, b"\0\0"), (60, b"\xff" * 40)],
)
def test_a_damaged_grain_is_an_error_and_the_others_are_read(tmp_path: Path, offset: int, raw: bytes) -> None:
    path = tmp_path / "d.vmdk"
    whole = bytearray(stream(LAYOUT, marked=True))
    whole[128 * SECTOR + offset : 128 * SECTOR + offset + len(raw)] = raw
    path.write_bytes(whole)
    with qimg.open(path) as disk:
        with pytest.raises(QimgError):
            disk.read(0, 512)
        assert disk.read(65536, disk.size - 65536) == content(LAYOUT)[65536:]
