"""vmdk through every command, beside the real program (vmdk sheet; the sheets of the commands)."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

import os
import re
import shlex
import struct
from pathlib import Path

import pytest

from spec.differential import Difference, as_release_7, assert_same, cases
from support.build import write_raw
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
KINDS = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)
LAYOUT = "AB-0C--A0-AAAA--BC-0"

DESCRIPTOR = """\
# Disk DescriptorFile
version=1
CID=1234abcd
parentCID=ffffffff
createType="{kind}"
{lines}
"""


def write_descriptor(path: Path, *lines: str, kind: str = "monolithicFlat") -> None:
    path.write_text(DESCRIPTOR.format(kind=kind, lines="\n".join(lines)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds, made by the real program. Nobody changes them."""
    folder = tmp_path_factory.mktemp("vmdk")
    write_raw(folder / "a.raw", LAYOUT)
    for kind in KINDS:
        run_real(
            ["convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", "a.raw", f"{kind}.vmdk"], folder
        ).ok()
    run_real(
        ["convert", "-f", "raw", "-O", "vmdk", "-o", "zeroed_grain=on", "a.raw", "zeroed.vmdk"], folder
    ).ok()
    io = ["-f", "vmdk", "-c", "write -z 64k 128k", "zeroed.vmdk"]
    run_peer("qemu-io", io, folder).ok()
    run_real(["create", "-f", "vmdk", "base.vmdk", "3M"], folder).ok()
    run_peer("qemu-io", ["-c", "write -P 1 0 1M", "base.vmdk"], folder).ok()
    run_real(["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk"], folder).ok()
    run_peer("qemu-io", ["-c", "write -P 2 64k 4k", "over.vmdk"], folder).ok()
    run_real(["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "longer.vmdk", "5M"], folder).ok()
    (folder / "sub").mkdir()
    run_real(["create", "-f", "vmdk", "-b", "../base.vmdk", "-F", "vmdk", "sub/deep.vmdk"], folder).ok()
    run_real(
        ["convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", "a.raw", "sub/flat.vmdk"], folder
    ).ok()
    run_real(["create", "-f", "vmdk", "moved.vmdk", "3M"], folder).ok()
    run_real(["create", "-f", "vmdk", "-b", "moved.vmdk", "-F", "vmdk", "lost.vmdk"], folder).ok()
    run_peer("qemu-io", ["-c", "write -P 3 64k 64k", "lost.vmdk"], folder).ok()
    run_peer("qemu-io", ["-c", "write -P 3 128k 64k", "moved.vmdk"], folder).ok()
    write_descriptor(
        folder / "mixed.vmdk",
        'RW 2560 FLAT "a.raw" 128',
        'RW 2560 SPARSE "base.vmdk"',
        'RW 100 FLAT "a.raw" 3',
    )
    write_descriptor(folder / "short.vmdk", 'RW 204800 FLAT "a.raw" 0')
    write_descriptor(folder / "vmfs.vmdk", 'RW 2048 VMFS "a.raw"', kind="vmfs")
    write_descriptor(folder / "gone.vmdk", 'RW 2048 FLAT "nothere" 0')
    write_descriptor(folder / "custom.vmdk", 'RW 2048 FLAT "a.raw" 0', kind="custom")
    write_descriptor(folder / "text-mono.vmdk", 'RW 2048 SPARSE "base.vmdk"', kind="monolithicSparse")
    write_descriptor(folder / "nooffset.vmdk", 'RW 2048 FLAT "a.raw"')
    write_descriptor(folder / "minus.vmdk", 'RW 2048 FLAT "a.raw" -1')
    write_descriptor(folder / "vmfsoffset.vmdk", 'RW 2048 VMFS "a.raw" 0')
    write_descriptor(folder / "sparseoffset.vmdk", 'RW 2048 SPARSE "base.vmdk" 0')
    write_descriptor(folder / "junk.vmdk", 'RW 2048 FLAT "a.raw" 0 more')
    write_descriptor(folder / "nosparse.vmdk", 'RW 2048 SPARSE "a.raw"', kind="twoGbMaxExtentSparse")
    crlf = (folder / "vmfs.vmdk").read_bytes().replace(b"\n", b"\r\n")
    (folder / "crlf.vmdk").write_bytes(crlf)
    (folder / "tiny.vmdk").write_bytes(b"abc")
    (folder / "text.vmdk").write_bytes(b"hello\n" * 100)
    _damage(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return folder


def patched(folder: Path, name: str, *patches: tuple[int, bytes], source: str = "base.vmdk") -> None:
    data = bytearray((folder / source).read_bytes())
    for offset, raw in patches:
        data[offset : offset + len(raw)] = raw
    (folder / name).write_bytes(data)


def _damage(folder: Path) -> None:
    def q(value: int) -> bytes:
        return struct.pack("<Q", value)

    def i(value: int) -> bytes:
        return struct.pack("<I", value)

    patched(folder, "version4.vmdk", (4, i(4)))
    patched(folder, "version0.vmdk", (4, i(0)))
    patched(folder, "version3.vmdk", (4, i(3)))
    patched(folder, "gtes1024.vmdk", (44, i(1024)))
    patched(folder, "gtes0.vmdk", (44, i(0)))
    patched(folder, "grain0.vmdk", (20, q(0)))
    patched(folder, "grainbig.vmdk", (20, q(0x200001)))
    patched(folder, "dirbig.vmdk", (12, q((32 << 20) * 65536 + 1)))
    patched(folder, "newline.vmdk", (73, b"abcd"))
    patched(folder, "compression.vmdk", (77, b"\x07\0"))
    patched(folder, "atend.vmdk", (56, b"\xff" * 8))
    patched(folder, "nocid.vmdk", (512, bytes(10240)))
    data = (folder / "base.vmdk").read_bytes()
    (folder / "cut.vmdk").write_bytes(data[:40000])
    (directory,) = struct.unpack_from("<Q", data, 56)
    (table,) = struct.unpack_from("<I", data, directory * 512)
    patched(folder, "beyond.vmdk", (table * 512 + 4 * 20, i(1 << 20)))
    patched(folder, "dirhole.vmdk", (directory * 512, i(0)))
    patched(folder, "dirfar.vmdk", (directory * 512, i(1 << 30)))
    # A grain of 96 sectors, and tables of 7 entries: neither a power of two.
    patched(folder, "odd.vmdk", (20, q(96)), (44, i(7)))


READING = """
info {}
info --output=json {}
map {}
map --output=json {}
check {}
check --output=json {}
snapshot -l {}
measure -O qcow2 {}
measure -O raw --output=json {}
compare {} a.raw
compare -s {} a.raw
"""
SOUND = (
    *(f"{kind}.vmdk" for kind in KINDS),
    "zeroed.vmdk", "base.vmdk", "over.vmdk", "longer.vmdk", "sub/deep.vmdk", "sub/flat.vmdk", "mixed.vmdk", "short.vmdk",
    "vmfs.vmdk", "crlf.vmdk", "junk.vmdk", "version0.vmdk", "newline.vmdk", "compression.vmdk", "dirhole.vmdk", "odd.vmdk",
)  # fmt: skip


@pytest.mark.parametrize("line", [line.format(name) for name in SOUND for line in cases(READING)])
def test_commands_that_read_say_what_the_real_program_says(images: Path, line: str) -> None:
    assert_same(line, images)


REFUSED = """
info version4.vmdk
info gtes1024.vmdk
info gtes0.vmdk
info grain0.vmdk
info grainbig.vmdk
info dirbig.vmdk
info atend.vmdk
info cut.vmdk
info gone.vmdk
info custom.vmdk
info text-mono.vmdk
info nooffset.vmdk
info minus.vmdk
info vmfsoffset.vmdk
info sparseoffset.vmdk
info nosparse.vmdk
info -f vmdk text.vmdk
check beyond.vmdk
check --output=json beyond.vmdk
map --output=json beyond.vmdk
map --output=json lost.vmdk
info --backing-chain lost.vmdk
check lost.vmdk
convert -O raw lost.vmdk lost.raw
compare lost.vmdk base.vmdk
info --backing-chain over.vmdk
info --backing-chain --output=json sub/deep.vmdk
amend -o size=8M base.vmdk
check -f vmdk version3.vmdk
create -f vmdk -o help
create -f vmdk new.vmdk
create -f vmdk -o subformat=foo new.vmdk 1M
create -f vmdk -o adapter_type=foo new.vmdk 1M
create -f vmdk -o compat6,hwversion=7 new.vmdk 1M
create -f vmdk -o subformat=monolithicFlat,zeroed_grain=on new.vmdk 1M
create -f vmdk -o subformat=monolithicFlat -b base.vmdk -F vmdk new.vmdk
create -f vmdk -b a.raw -F raw new.vmdk
create -f vmdk -u -b nothere -F vmdk new.vmdk 1M
create -f vmdk -o cluster_size=4k new.vmdk 1M
convert -c -O vmdk -o subformat=monolithicFlat a.raw new.vmdk
convert -O vmdk -o subformat=foo a.raw new.vmdk
convert -O vmdk -B a.raw -F raw a.raw new.vmdk
create -f vmdk made.vmdk 10M
create -f vmdk -o subformat=monolithicFlat made.vmdk 10M
create -f vmdk -o subformat=twoGbMaxExtentSparse,adapter_type=lsilogic,toolsversion=9,compat6 made.vmdk 3G
create -f vmdk -o subformat=twoGbMaxExtentFlat,hwversion=11,nocow=off made.vmdk 4G
create -f vmdk -o subformat=streamOptimized made 1G
create -f vmdk -o zeroed_grain=on -b base.vmdk -F vmdk made.vmdk
create -f vmdk -b base.vmdk -F vmdk made.vmdk 64M
create -f vmdk made.vmdk 513
"""


#: Where ours tells the reason of an error too (difference 129).
REASONED = {
    "convert -O raw lost.vmdk lost.raw": Difference(
        "the reason of an error",
        err="qemu-img: error while reading at byte 131072: Invalid argument\n"
        "'moved.vmdk' was changed since 'lost.vmdk' was made on top of it\n",
    ),
    "convert -n -O vmdk a.raw streamOptimized.vmdk": Difference(
        "the reason of an error",
        err="qemu-img: error while writing at byte 0: Input/output error\n"
        "Could not write to allocated cluster for streamOptimized\n",
    ),
}


@pytest.mark.parametrize("line", cases(REFUSED))
def test_messages_and_exit_codes_are_those_of_the_real_program(
    images: Path, tmp_path: Path, line: str
) -> None:
    if line.endswith("help"):
        real, ours = run_real(line.split(), images), run_qimg_inprocess(line.split(), images)
        names = re.compile(r"(?m)^  (\S+=<[^>]*>)")
        assert (ours.code, names.findall(ours.out)) == (0, names.findall(real.out))
        return
    for path in images.rglob("*"):
        if path.is_file() and not line.startswith(("info", "map", "check", "amend")):
            target = tmp_path / path.relative_to(images)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes()) if path.stat().st_size < 8 * MIB else os.link(path, target)
    assert_same(line, images if line.startswith(("info", "map", "check", "amend")) else tmp_path, REASONED)


CHANGING = """
check -r all base.vmdk
check -r leaks monolithicFlat.vmdk
snapshot -a x base.vmdk
snapshot -d x base.vmdk
rebase -b zeroed.vmdk -F vmdk over.vmdk
rebase -u -b zeroed.vmdk -F vmdk over.vmdk
rebase -u -b '' over.vmdk
resize twoGbMaxExtentSparse.vmdk 20M
resize streamOptimized.vmdk 20M
amend -o compat6 base.vmdk
dd if=a.raw of=made.vmdk -O vmdk bs=1M
commit over.vmdk
commit -d over.vmdk
convert -l snap -O raw base.vmdk made.raw
convert -U -O raw monolithicFlat.vmdk made.raw
convert -O vmdk -o preallocation=full a.raw made.vmdk
convert -c -O vmdk a.raw made.vmdk
convert -t none -T none -O vmdk -o subformat=streamOptimized a.raw made.vmdk
convert -n -O vmdk a.raw streamOptimized.vmdk
map json:{"driver":"vmdk","file":{"driver":"file","filename":"monolithicFlat.vmdk"}}
map --image-opts driver=vmdk,file.filename=monolithicFlat.vmdk,extents.0.locking=off
map --image-opts driver=vmdk,file.filename=monolithicFlat.vmdk,extents.1.locking=off
map --image-opts driver=vmdk,file.filename=monolithicFlat.vmdk,extents.0.driver=null-co
"""
#: Messages of the real program in front of the common ones.
CHATTY = {"convert -n -O vmdk a.raw streamOptimized.vmdk": "Could not write to allocated cluster"}


def two_copies(images: Path, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "real", tmp_path / "ours"]
    for folder in folders:
        for path in images.rglob("*"):
            if path.is_file() and path.stat().st_size < 8 * MIB:
                target = folder / path.relative_to(images)
                target.parent.mkdir(exist_ok=True, parents=True)
                target.write_bytes(path.read_bytes())
    return folders


@pytest.mark.parametrize("line", cases(CHANGING))
def test_commands_that_change_images_say_what_the_real_program_says(
    images: Path, tmp_path: Path, line: str
) -> None:
    words = shlex.split(line) if "json:" not in line else line.split()
    first, second = two_copies(images, tmp_path)
    real, ours = run_real(words, first), as_release_7(line, run_qimg_inprocess(words, second))
    if line in CHATTY:
        lines = [text for text in real.err.splitlines(keepends=True) if CHATTY[line] not in text]
        real = real._replace(err="".join(lines))
    if line in REASONED:
        real = real._replace(err=REASONED[line].err)
    assert ours == real
    for name in ("made.vmdk", "over.vmdk", "base.vmdk", "monolithicFlat.vmdk"):
        if (first / name).exists() and not (name == "over.vmdk" and "commit" in line):
            same = run_real(["compare", first / name, second / name])
            assert same.code == 0, f"{name}: {same.out}{same.err}"


@pytest.mark.parametrize(
    "name", ["over.vmdk", "base.vmdk", "zeroed.vmdk", "mixed.vmdk", *(f"{kind}.vmdk" for kind in KINDS[:-1])]
)
def test_blocks_written_anywhere_give_what_the_real_program_gives(
    images: Path, tmp_path: Path, name: str
) -> None:
    first, second = two_copies(images, tmp_path)
    if name == "mixed.vmdk":
        for folder in (first, second):
            write_descriptor(folder / name, 'RW 2560 FLAT "a.raw" 0', 'RW 2560 SPARSE "base.vmdk"')
    for words in (
        "bench -w -c 30 -d 1 -s 3k -S 17k -o 5k --pattern=7",
        "bench -w -c 9 -d 4 -s 128k -S 192k --pattern=9",
        "bench -w -c 7 -d 1 -s 512 -S 65536 -o 65024 --pattern=11",
    ):
        run_real([*words.split(), "-f", "vmdk", name], first).ok()
        run_qimg_inprocess([*words.split(), "-f", "vmdk", name], second).ok()
    same = run_real(["compare", "-f", "vmdk", "-F", "vmdk", first / name, second / name])
    assert same.code == 0, same.out + same.err
    run_real(["check", "-f", "vmdk", second / name]).ok()
    run_qimg_inprocess(["check", "-f", "vmdk", second / name]).ok()
