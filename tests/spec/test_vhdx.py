"""vhdx through every command, beside the real program (vhdx sheet; the sheets of the commands)."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

import bz2
import hashlib
import json
import os
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from spec.differential import Difference, assert_same, cases
from support import peers
from support.build import real_content, write_raw
from support.run import run_peer, run_qimg_inprocess, run_real
from support.vhdx import Vhdx, crc32c, data_descriptor, log_entry

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
LAYOUT = "AB-0C--A0-AAAA--BC-0"
SAMPLE = Path(__file__).parents[1] / "samples" / "iotest-dynamic-1G.vhdx.bz2"
SAMPLE_SHA256 = "d3d112d8dab7fd360609f7d5a7b769904b7a2a7d7b6b8c535f65a23293c05478"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds, made by the real program or by hand. Nobody changes them."""
    folder = tmp_path_factory.mktemp("vhdx")
    write_raw(folder / "a.raw", LAYOUT)
    for name, options in (
        ("a.vhdx", "block_size=1M"),
        ("off.vhdx", "block_state_zero=off"),
        ("fixed.vhdx", "subformat=fixed,block_size=1M"),
        ("full.vhdx", "subformat=fixed,block_state_zero=off,log_size=3M"),
    ):
        run_real(["convert", "-f", "raw", "-O", "vhdx", "-o", options, "a.raw", name], folder).ok()
    run_real(["create", "-q", "-f", "vhdx", "empty.vhdx", "3G"], folder).ok()
    run_real(["create", "-q", "-f", "vhdx", "none.vhdx", "0"], folder).ok()
    run_real(["create", "-q", "-f", "vhdx", "-o", "block_size=256M", "big.vhdx", "64T"], folder).ok()
    run_real(["create", "-q", "-f", "qcow2", "-b", "a.vhdx", "-F", "vhdx", "over.qcow2"], folder).ok()
    run_peer("qemu-io", ["-c", "write -P 9 64k 64k", "over.qcow2"], folder).ok()
    log = log_entry(
        data_descriptor(2 * MIB, struct.pack("<Q", 4 * MIB | 6).ljust(4096, b"\0"), 5),
        sequence=5, flushed=5 * MIB, last=5 * MIB,
    )  # fmt: skip
    image = Vhdx()
    image.block(2, 4 * MIB, b"data" * 1000)
    image.header["log"] = "11111111-2222-3333-4444-555555555555"
    image.log = log
    image.write(folder / "dirty.vhdx")
    for name, words in (
        ("past.vhdx", {5: 1 << 32 | 6}),
        ("two.vhdx", {5: 1 << 32 | 6, 6: 1 << 33 | 6}),
        ("overflow.vhdx", {5: 0x7FFFFFFFFFF00006}),
        ("log.vhdx", {5: MIB | 6}),
        ("tables.vhdx", {5: 2 * MIB | 6, 6: 3 * MIB | 6}),
    ):
        image = Vhdx()
        image.bat.update(words)
        image.write(folder / name)
    return folder


READING = cases(
    """
info a.vhdx
info -f vhdx a.vhdx
info --output=json a.vhdx
info off.vhdx
info fixed.vhdx
info --output=json full.vhdx
info empty.vhdx
info none.vhdx
info big.vhdx
info --backing-chain over.qcow2
info --backing-chain --output=json over.qcow2
info -f vhdx a.raw
info dirty.vhdx
info -U dirty.vhdx
info --output=json dirty.vhdx
map dirty.vhdx
check dirty.vhdx
check --output=json dirty.vhdx
compare dirty.vhdx a.raw
check a.vhdx
check -q a.vhdx
check --output=json a.vhdx
check -r all a.vhdx
check -r leaks --output=json a.vhdx
check fixed.vhdx
check full.vhdx
check empty.vhdx
check none.vhdx
check big.vhdx
check past.vhdx
check --output=json past.vhdx
check -r all past.vhdx
check two.vhdx
check overflow.vhdx
check log.vhdx
check tables.vhdx
compare a.vhdx a.raw
compare a.vhdx fixed.vhdx
compare -s a.vhdx a.raw
compare off.vhdx full.vhdx
compare over.qcow2 a.vhdx
compare -F vhdx a.raw a.vhdx
snapshot -l a.vhdx
snapshot -a x a.vhdx
snapshot -d x a.vhdx
amend -f vhdx -o help
amend -f vhdx -o block_size=2M a.vhdx
convert -c -O vhdx a.raw c.vhdx
convert -O vhdx -B a.raw -F raw a.raw c.vhdx
measure -f vhdx -O raw a.vhdx
measure -f vhdx -O qcow2 a.vhdx
create -f vhdx -b a.raw -F raw c.vhdx
create -f vhdx -o backing_file=a.raw c.vhdx
create -f vhdx c.vhdx
create -f vhdx c.vhdx 10M
create -f vhdx -o log_size=3000000 c.vhdx 10M
create -f vhdx -o block_size=100k c.vhdx 10M
create -f vhdx -o block_size=512M c.vhdx 10M
create -f vhdx -o subformat=fixed,block_state_zero=off c.vhdx 10M
create -f vhdx -o block_state_zero=on,subformat=dynamic c.vhdx 10000
create -f vhdx d.vhdx 65T
create -f vhdx d.vhdx 64T
create -f vhdx -o size=3M d.vhdx
create -f vhdx -o block_size=3M d.vhdx 10M
create -f vhdx -o block_size=x d.vhdx 10M
create -f vhdx -o log_size=0 d.vhdx 10M
create -f vhdx -o log_size=4095M d.vhdx 10M
create -f vhdx -o log_size=4096M d.vhdx 10M
create -f vhdx -o subformat=bogus d.vhdx 10M
create -f vhdx -o subformat=FIXED d.vhdx 10M
create -f vhdx -o block_state_zero=maybe d.vhdx 10M
create -f vhdx -o block_size=3M,log_size=0 d.vhdx 65T
create -f vhdx -o bogus=1 d.vhdx 10M
rebase -u -b "" a.vhdx
rebase -f vhdx -u -b a.raw -F raw a.vhdx
commit a.vhdx
resize --shrink a.vhdx 512k
"""
)

DIFFERENT = {
    "compare -s a.vhdx a.raw": Difference(
        "real block status", out="Strict mode: Offset 131072 block status mismatch!\n"
    ),
    "measure -f vhdx -O qcow2 a.vhdx": Difference(
        "real block status", out="required size: 983040\nfully allocated size: 1638400\n"
    ),
    "resize --shrink a.vhdx 512k": Difference(
        "vhdx disks grow", err="qemu-img: Shrinking images is currently not supported\n"
    ),
    "info -f vhdx a.raw": Difference(
        "errors name what is wrong", err="qemu-img: Could not open 'a.raw': not a VHDX file\n"
    ),
}


@pytest.mark.parametrize("line", READING)
def test_both_programs_say_the_same(line: str, images: Path) -> None:
    assert_same(line, images, DIFFERENT)


def test_the_formatting_line_and_the_help_know_the_same_options(tmp_path: Path) -> None:
    words = ["create", "-f", "vhdx", "-o", "help"]
    names = [line.split("=")[0].strip() for line in run_real(words).ok().lines if "=<" in line]
    ours = [line.split("=")[0].strip() for line in run_qimg_inprocess(words).ok().lines if "=<" in line]
    assert ours == names


# -- new images


def parsed(path: Path) -> dict[str, object]:
    """What a new image of either program says of itself, without GUIDs, numbers that are random, and padding."""
    with path.open("rb") as file:
        raw = file.read(80 * MIB)
    found: dict[str, object] = {"signature": raw[:8], "length": path.stat().st_size}
    heads = []
    for at in (65536, 131072):
        signature, crc, sequence = struct.unpack_from("<4sIQ", raw, at)
        assert signature == b"head"
        assert crc == crc32c(raw[at : at + 4] + bytes(4) + raw[at + 8 : at + 4096])
        heads.append(sequence)
        found[f"header {at}"] = raw[at + 48 : at + 80]
    assert heads[1] == heads[0] + 1
    assert raw[196608:262144] == raw[262144:327680]
    signature, crc, count = struct.unpack_from("<4sII", raw, 196608)
    assert crc == crc32c(raw[196608:196612] + bytes(4) + raw[196616:262144])
    regions = {}
    for number in range(count):
        entry = raw[196624 + 32 * number : 196656 + 32 * number]
        offset, length, _flags = struct.unpack("<QII", entry[16:])
        regions[uuid.UUID(bytes_le=entry[:16])] = (offset, length)
    found["regions"] = signature, regions
    bat, meta = regions.values()
    found["bat"] = raw[bat[0] : bat[0] + bat[1]]
    items = {}
    for number in range(struct.unpack_from("<H", raw, meta[0] + 10)[0]):
        entry = raw[meta[0] + 32 + 32 * number :][:32]
        offset, length, flags = struct.unpack("<III", entry[16:28])
        value = raw[meta[0] + offset : meta[0] + offset + length]
        items[uuid.UUID(bytes_le=entry[:16])] = offset, length, flags, value if length != 16 else None
    found["items"] = items
    return found


SIZES = ("0", "512", "10000", "60M", "1G", "1073742336", "10G", "100G", "101G", "2T", "33T", "64T")
DYNAMIC = ("", "block_size=1M", "block_size=256M,log_size=5M", "block_state_zero=off")
FIXED = "subformat=fixed,block_state_zero=off"


@pytest.mark.parametrize(
    ("size", "options"),
    [(size, options) for options in DYNAMIC for size in SIZES] + [(size, FIXED) for size in SIZES[:-3]],
)
def test_new_images_are_laid_out_as_the_real_program_lays_them_out(
    size: str, options: str, tmp_path: Path
) -> None:
    if options == "block_size=1M" and size in ("33T", "64T"):
        size = "9T"  # the real program writes the table word by word
    words = ["create", "-q", "-f", "vhdx", *(["-o", options] if options else [])]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run_qimg_inprocess([*words, ours, size]).ok()
    real = run_real([*words, theirs, size])
    if "256M" in options and size == "0":
        assert "Failed to write the BAT" in real.err  # it fails at a table of 2 GiB for nothing
        assert qimg.info(ours).virtual_size == 0
        return
    real.ok()
    assert run_real(["check", "-f", "vhdx", ours]).code == 0
    assert parsed(ours) == parsed(theirs)


def test_a_fixed_image_has_all_its_blocks(tmp_path: Path) -> None:
    """The real program lays them out and then, by default, records them as zeros without a place."""
    run_qimg_inprocess(
        ["create", "-q", "-f", "vhdx", "-o", "subformat=fixed", "x.vhdx", "60M"], tmp_path
    ).ok()
    raw = (tmp_path / "x.vhdx").read_bytes()
    assert len(raw) == 68 * MIB
    assert struct.unpack_from("<9Q", raw, 2 * MIB) == (*(8 * MIB * number | 6 for number in range(1, 9)), 0)
    assert run_real(["check", "-f", "vhdx", "x.vhdx"], tmp_path).code == 0
    run_peer("qemu-io", ["-f", "vhdx", "-c", "write -P 3 59M 1M", "x.vhdx"], tmp_path).ok()
    assert os.path.getsize(tmp_path / "x.vhdx") == 68 * MIB
    with qimg.open(tmp_path / "x.vhdx", format="vhdx") as disk:
        assert disk.read(58 * MIB, 2 * MIB) == bytes(MIB) + b"\3" * MIB


def test_with_a_date_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.raw", LAYOUT)
    made = []
    for name, date in (("a", "1700000000"), ("b", "1700000000"), ("c", "1700000001")):
        words = ["convert", "-f", "raw", "-O", "vhdx", "a.raw", name]
        run_qimg_inprocess(words, tmp_path, env={"SOURCE_DATE_EPOCH": date}).ok()
        made.append((tmp_path / name).read_bytes())
        words = ["bench", "-w", "-f", "vhdx", "-c", "3", "-S", "9M", "-o", "0", "-s", "512", name]
        run_qimg_inprocess(words, tmp_path, env={"SOURCE_DATE_EPOCH": date})
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[2]
    assert made[1] == made[3]
    assert made[0] != made[4]
    guids = {made[0][at + 16 : at + 48] for at in (65536, 131072)}
    assert len(guids) == 1


@pytest.mark.parametrize("options", ["", "block_size=1M", "subformat=fixed", "log_size=7M"])
def test_measure_tells_the_length_of_what_convert_makes(options: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "a.raw", "A-----0-" * 20 + "-" * 100, size=18 * MIB + 512)
    words = ["-O", "vhdx", *(["-o", options] if options else [])]
    shown = run_qimg_inprocess(["measure", "--output=json", *words, "-f", "raw", "a.raw"], tmp_path).ok()
    found = json.loads(shown.out)
    run_qimg_inprocess(["convert", "-f", "raw", *words, "a.raw", "sparse.vhdx"], tmp_path).ok()
    assert os.path.getsize(tmp_path / "sparse.vhdx") == found["required"]
    run_real(["convert", "-f", "raw", *words, "a.raw", "theirs.vhdx"], tmp_path).ok()
    if "fixed" not in options:  # whose blocks the real program lays out, and then adds new ones
        assert os.path.getsize(tmp_path / "theirs.vhdx") == found["required"]
    run_qimg_inprocess(["convert", "-S", "0", "-f", "raw", *words, "a.raw", "full.vhdx"], tmp_path).ok()
    assert os.path.getsize(tmp_path / "full.vhdx") == found["fully-allocated"]


# -- images of others, and others that read ours


def test_an_image_of_hyper_v_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sample.vhdx"
    path.write_bytes(bz2.decompress(SAMPLE.read_bytes()))
    digest = hashlib.sha256()
    with qimg.open(path) as disk:
        assert disk.format == "vhdx"
        for at in range(0, disk.size, 16 * MIB):
            digest.update(disk.read(at, 16 * MIB))
    assert digest.hexdigest() == SAMPLE_SHA256
    assert qimg.check(path).corruptions == 0
    rows = [(row.start, row.length, row.offset) for row in qimg.map(path) if row.data]
    assert rows == [(0, 96 * MIB, 4 * MIB)]
    run_qimg_inprocess(["resize", "sample.vhdx", "+1G"], tmp_path).ok()
    assert run_real(["check", "sample.vhdx"], tmp_path).code == 0
    run_qimg_inprocess(
        ["bench", "-w", "-f", "vhdx", "-c", "40", "-S", "50M", "-s", "512", "--pattern=7", "sample.vhdx"],
        tmp_path,
    ).ok()
    assert run_real(["check", "sample.vhdx"], tmp_path).code == 0
    shown = run_peer(
        "qemu-io",
        ["-r", "-f", "vhdx", "-c", "read -P 7 1950M 512", "-c", "read -P 7 50M 512", "sample.vhdx"],
        tmp_path,
    )
    assert "failed" not in shown.ok().out


@pytest.mark.peer("7zz", "vhdiinfo")
@pytest.mark.parametrize("options", ["", "block_size=1M,log_size=2M", "subformat=fixed"])
def test_other_projects_read_what_we_write(options: str, tmp_path: Path) -> None:
    source = write_raw(tmp_path / "a.raw", LAYOUT * 30, size=len(LAYOUT) * 30 * 65536)
    words = ["convert", "-f", "raw", "-O", "vhdx", *(["-o", options] if options else []), "a.raw", "a.vhdx"]
    run_qimg_inprocess(words, tmp_path).ok()
    run_qimg_inprocess(["resize", "a.vhdx", "50M"], tmp_path).ok()
    run_peer("7zz", ["e", "-y", "a.vhdx"], tmp_path).ok()
    (image,) = (name for name in os.listdir(tmp_path) if name not in ("a.raw", "a.vhdx"))
    assert (tmp_path / image).read_bytes() == source.read_bytes().ljust(50 * MIB, b"\0")
    shown = run_peer("vhdiinfo", ["a.vhdx"], tmp_path).ok().out
    assert "VHDX (version 2)" in shown
    assert "(52428800 bytes)" in shown
    assert ("Fixed" if "fixed" in options else "Dynamic") in shown


# -- resize, in-place writes


@pytest.mark.parametrize(
    "options", ["block_size=1M", "block_size=2M,block_state_zero=off", "subformat=fixed", "block_size=256M"]
)
@pytest.mark.parametrize("steps", [["6M"], ["+512", "+1M"], ["5G", "9G"]])
def test_a_disk_grows_and_reads_as_zeros_behind_its_old_end(
    options: str, steps: list[str], tmp_path: Path
) -> None:
    if "fixed" in options and steps == ["5G", "9G"]:
        steps = ["50M", "90M"]
    source = write_raw(tmp_path / "a.raw", LAYOUT + "AB", size=len(LAYOUT) * 65536 + 700)
    content = source.read_bytes()
    run_real(["convert", "-f", "raw", "-O", "vhdx", "-o", options, "a.raw", "a.vhdx"], tmp_path).ok()
    for step in steps:
        run_qimg_inprocess(["resize", "-q", "a.vhdx", step], tmp_path).ok()
        assert run_real(["check", "a.vhdx"], tmp_path).code == 0
    size = qimg.info(tmp_path / "a.vhdx").virtual_size
    os.truncate(source, size)
    if size < 1 << 30:
        assert run_real(["compare", "a.vhdx", "-f", "vhdx", "-F", "raw", "a.raw"], tmp_path).code == 0
    at = size - 65536
    run_peer(
        "qemu-io",
        ["-f", "vhdx", "-c", f"read -P 0 {at} 64k", "-c", f"write -P 4 {at} 64k", "a.vhdx"],
        tmp_path,
    ).ok()
    assert run_real(["check", "a.vhdx"], tmp_path).code == 0
    with qimg.open(tmp_path / "a.vhdx") as disk:
        assert disk.read(0, len(content)) == content
        assert disk.read(at, 65536) == b"\4" * 65536


def test_bytes_behind_the_old_end_do_not_come_to_light(tmp_path: Path) -> None:
    image = Vhdx(size=2 * MIB + 512)
    image.block(2, 4 * MIB, b"seen" * 128 + b"never" * 1000)
    path = image.write(tmp_path / "x.vhdx")
    qimg.resize(path, 3 * MIB)
    assert real_content(path, format="vhdx")[2 * MIB :] == (b"seen" * 128).ljust(MIB, b"\0")


def test_resize_refuses_what_it_cannot_do(images: Path, tmp_path: Path) -> None:
    (tmp_path / "a.vhdx").write_bytes((images / "a.vhdx").read_bytes())
    before = (tmp_path / "a.vhdx").read_bytes()
    for words, message in (
        (["--shrink", "a.vhdx", "1M"], "Shrinking images is currently not supported"),
        (["a.vhdx", "65T"], "Image size too large; max of 64TB"),
        (["--preallocation=full", "a.vhdx", "9M"], "Unsupported preallocation mode: full"),
    ):
        found = run_qimg_inprocess(["resize", *words], tmp_path)
        assert found.code == 1
        assert message in found.err
    assert (tmp_path / "a.vhdx").read_bytes() == before


def test_a_new_block_lies_on_nothing_else(tmp_path: Path) -> None:
    """Also where the file ends inside its last block, as fixed images of the real program do."""
    write_raw(tmp_path / "a.raw", "A" * 76, size=4 * MIB + 3 * 4096 * 16)
    options = "subformat=fixed,block_size=2M,block_state_zero=off"
    run_real(["convert", "-f", "raw", "-O", "vhdx", "-o", options, "a.raw", "a.vhdx"], tmp_path).ok()
    run_qimg_inprocess(["resize", "-q", "a.vhdx", "9M"], tmp_path).ok()
    lines: list[str] = []
    assert qimg.check(tmp_path / "a.vhdx", report=lines.append).corruptions == 0, lines
    run_peer("qemu-io", ["-f", "vhdx", "-c", "write -P 5 4M 5M", "a.vhdx"], tmp_path).ok()
    expected = (tmp_path / "a.raw").read_bytes()[: 4 * MIB] + b"\5" * (5 * MIB)
    with qimg.open(tmp_path / "a.vhdx") as disk:
        assert disk.read(0, 9 * MIB) == expected


@pytest.mark.parametrize("options", ["block_size=1M", "block_state_zero=off", "subformat=fixed"])
def test_an_existing_image_is_written_over(options: str, tmp_path: Path) -> None:
    source = write_raw(tmp_path / "a.raw", "-C0" * 20 + LAYOUT, size=80 * 65536)
    write_raw(tmp_path / "old.raw", LAYOUT * 4)
    run_real(["convert", "-f", "raw", "-O", "vhdx", "-o", options, "old.raw", "a.vhdx"], tmp_path).ok()
    guids = (tmp_path / "a.vhdx").read_bytes()[65552:65584]
    run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "vhdx", "a.raw", "a.vhdx"], tmp_path).ok()
    assert real_content(tmp_path / "a.vhdx", format="vhdx") == source.read_bytes()
    assert run_real(["check", "a.vhdx"], tmp_path).code == 0
    raw = (tmp_path / "a.vhdx").read_bytes()
    assert raw[65552:65584] == raw[131088:131120], "both headers are up to date"
    assert raw[65552:65568] != guids[:16], "the file was written to"
    assert raw[65568:65584] != guids[16:], "the data was changed"


def test_commit_and_rebase_over_a_vhdx_base(images: Path, tmp_path: Path) -> None:
    for name in ("a.vhdx", "over.qcow2"):
        (tmp_path / name).write_bytes((images / name).read_bytes())
    expected = real_content(tmp_path / "over.qcow2")
    run_qimg_inprocess(["commit", "-q", "over.qcow2"], tmp_path).ok()
    assert real_content(tmp_path / "a.vhdx", format="vhdx") == expected
    assert run_real(["check", "a.vhdx"], tmp_path).code == 0


# -- differencing images


def chain(folder: Path) -> bytes:
    """``child.vhdx`` over ``base.vhdx``, by the specification; what a guest reads of it."""
    base = Vhdx(size=10 * MIB)
    for block, place, letter in ((0, 4, b"P"), (3, 5, b"Q"), (5, 6, b"S")):
        base.block(block, place * MIB, letter * MIB)
    base.write(folder / "base.vhdx")
    keys = {
        "parent_linkage": "{da7ada7a-0001-0002-0003-040506070809}",
        "relative_path": ".\\base.vhdx",
        "absolute_win32_path": "C:\\images\\base.vhdx",
    }
    child = Vhdx(size=10 * MIB, parent=keys)
    child.header["data"] = "DA7ADA7A-0001-0002-0003-04050607080A"
    child.block(1, 4 * MIB, b"a" * MIB)
    child.block(3, 5 * MIB, b"b" * MIB, state=7)
    child.bat[6] = 2
    here = (0, 1, 2, 5, 100, 1000, *range(1024, 1100), 2047)
    bits = bytearray(MIB)
    for number in here:
        bits[(3 * 2048 + number) // 8] |= 1 << number % 8
    child.block(4096, 6 * MIB, bytes(bits))
    child.write(folder / "child.vhdx")
    found = bytearray(10 * MIB)
    for block, letter in ((0, b"P"), (1, b"a"), (3, b"Q"), (5, b"S")):
        found[block * MIB : (block + 1) * MIB] = letter * MIB
    for number in here:
        found[3 * MIB + 512 * number :][:0] = b""
        found[3 * MIB + 512 * number : 3 * MIB + 512 * (number + 1)] = b"b" * 512
    return bytes(found)


def test_a_differencing_image_is_read_with_its_parent(tmp_path: Path) -> None:
    expected = chain(tmp_path)
    with qimg.open(tmp_path / "child.vhdx") as disk:
        assert disk.read(0, disk.size) == expected
        assert disk.read(3 * MIB + 300, 1000) == expected[3 * MIB + 300 :][:1000]
    run_qimg_inprocess(["convert", "-O", "raw", "child.vhdx", "got.raw"], tmp_path).ok()
    assert (tmp_path / "got.raw").read_bytes() == expected
    assert qimg.check(tmp_path / "child.vhdx").corruptions == 0
    shown = run_qimg_inprocess(["info", "--output=json", "child.vhdx"], tmp_path).ok()
    assert json.loads(shown.out)["backing-filename"] == "base.vhdx"
    depths = {row.depth for row in qimg.map(tmp_path / "child.vhdx")}
    assert depths == {0, 1}


@pytest.mark.peer("vhdiinfo")
def test_another_project_reads_the_differencing_image_the_same_way(tmp_path: Path) -> None:
    expected = chain(tmp_path)
    script = (
        "import pyvhdi; p = pyvhdi.file(); p.open('base.vhdx'); f = pyvhdi.file(); f.open('child.vhdx');"
        "f.set_parent(p); open('theirs.raw', 'wb').write(f.read_buffer(10 << 20))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if "No module named 'pyvhdi'" in done.stderr and not peers.required():
        pytest.skip(f"{peers.SKIP_PREFIX}python3-libvhdi")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "theirs.raw").read_bytes() == expected


def test_a_parent_that_has_changed_is_not_read(tmp_path: Path) -> None:
    chain(tmp_path)
    run_peer("qemu-io", ["-f", "vhdx", "-c", "write -P 1 9M 512", "base.vhdx"], tmp_path).ok()
    found = run_qimg_inprocess(["convert", "-O", "raw", "child.vhdx", "got.raw"], tmp_path)
    assert found.code == 1
    with qimg.open(tmp_path / "child.vhdx") as disk:
        assert disk.read(MIB, 512) == b"a" * 512
        with pytest.raises(
            QimgError, match=r"base.vhdx' was changed since '.*child.vhdx' was made on top of it"
        ):
            disk.read(0, 512)


def test_a_differencing_image_is_not_written_to(tmp_path: Path) -> None:
    chain(tmp_path)
    before = (tmp_path / "child.vhdx").read_bytes()
    write_raw(tmp_path / "a.raw", "A" * 160)
    for words in (
        ["resize", "child.vhdx", "20M"],
        ["convert", "-n", "-f", "raw", "-O", "vhdx", "a.raw", "child.vhdx"],
        ["bench", "-w", "-f", "vhdx", "-c", "1", "child.vhdx"],
        ["commit", "child.vhdx"],
        ["rebase", "-u", "-b", "", "child.vhdx"],
    ):
        found = run_qimg_inprocess(words, tmp_path)
        assert found.code == 1, words
        assert found.err.count("\n") == 1, found.err
    assert (tmp_path / "child.vhdx").read_bytes() == before


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"relative_path": "..\\sub\\base.vhdx"}, "../sub/base.vhdx"),
        ({"relative_path": ".\\.\\base.vhdx"}, "base.vhdx"),
        ({"relative_path": "nbd://host/x"}, "./nbd://host/x"),
        ({"relative_path": "json:{}"}, "./json:{}"),
        ({"absolute_win32_path": "C:\\images\\base.vhdx"}, "base.vhdx"),
        ({"volume_path": "\\\\?\\Volume{1}\\images\\base.vhdx"}, "base.vhdx"),
    ],
)
def test_what_names_the_parent_is_always_a_plain_file(
    keys: dict[str, str], name: str, tmp_path: Path
) -> None:
    image = Vhdx(parent={"parent_linkage": "{da7ada7a-0001-0002-0003-040506070809}", **keys})
    shown = run_qimg_inprocess(["info", "--output=json", image.write(tmp_path / "x.vhdx")]).ok()
    assert json.loads(shown.out)["backing-filename"] == name
