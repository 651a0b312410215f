"""vdi, qed, qcow and vpc through every command, beside the real program (their sheets; those of the commands)."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from spec.differential import Difference, assert_same, cases
from support.build import write_raw
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
LAYOUT = "AB-0C--A0-AAAA--BC-0" * 4
#: Name -> format and ``-o`` of images that hold `LAYOUT`.
KINDS = {
    "dynamic.vdi": ("vdi", ""),
    "static.vdi": ("vdi", "static=on"),
    "plain.qed": ("qed", ""),
    "small.qed": ("qed", "cluster_size=4k,table_size=2"),
    "large.qed": ("qed", "cluster_size=1M,table_size=16"),
    "plain.qcow": ("qcow", ""),
    "dynamic.vpc": ("vpc", "force_size=on"),
    "chs.vpc": ("vpc", ""),
    "fixed.vpc": ("vpc", "subformat=fixed,force_size=on"),
    "chsfixed.vpc": ("vpc", "subformat=fixed"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds, made by the real program. Nobody changes them."""
    folder = tmp_path_factory.mktemp("blocks")
    write_raw(folder / "a.raw", LAYOUT)
    for name, (kind, options) in KINDS.items():
        more = ["-o", options] if options else []
        run_real(["convert", "-f", "raw", "-O", kind, *more, "a.raw", name], folder).ok()
    # The real program compresses well and then fails without a word.
    run_real(["convert", "-c", "-f", "raw", "-O", "qcow", "a.raw", "compressed.qcow"], folder)
    for kind in ("qed", "qcow"):
        base, over = f"base.{kind}", f"over.{kind}"
        run_real(["create", "-f", kind, base, "3M"], folder).ok()
        _write(folder, base, "write -P 1 0 1M", "write -P 9 2M 64k")
        run_real(["create", "-f", kind, "-b", base, "-F", kind, over], folder).ok()
        _write(folder, over, "write -P 2 64k 4k", "write -P 3 1234432 512")
        run_real(["create", "-f", kind, "-b", base, "-F", kind, f"longer.{kind}", "5M"], folder).ok()
        _write(folder, f"longer.{kind}", "write -P 4 4M 1M")
        run_real(["create", "-f", kind, "-b", "a.raw", "-F", "raw", f"onraw.{kind}"], folder).ok()
        _write(folder, f"onraw.{kind}", "write -P 5 300k 70k")
        run_real(["create", "-f", "qcow2", "-b", over, "-F", kind, f"on{kind}.qcow2"], folder).ok()
        _write(folder, f"on{kind}.qcow2", "write -P 6 2M 100k")
        run_real(
            ["create", "-f", kind, "-b", "big.qcow2", "-F", "qcow2", "-u", f"lost.{kind}", "1M"], folder
        ).ok()
    run_real(["create", "-f", "qed", "-b", "base.qed", "-F", "qed", "zeros.qed"], folder).ok()
    _write(folder, "zeros.qed", "write -z 0 256k")
    for kind in ("vdi", "vpc"):
        run_real(
            ["create", "-f", "qcow2", "-b", f"dynamic.{kind}", "-F", kind, f"on{kind}.qcow2"], folder
        ).ok()
        _write(folder, f"on{kind}.qcow2", "write -P 7 1M 100k")
    _damage(folder)
    (folder / "text").write_bytes(b"hello, this is no image\n" * 100)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return folder


def _write(folder: Path, name: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    run_peer("qemu-io", [*words, name], folder).ok()


def patched(folder: Path, name: str, source: str, *patches: tuple[int, bytes]) -> None:
    data = bytearray((folder / source).read_bytes())
    for offset, raw in patches:
        data[offset : offset + len(raw)] = raw
    (folder / name).write_bytes(data)


def _i(value: int) -> bytes:
    return struct.pack("<I", value)


def _q(value: int) -> bytes:
    return struct.pack("<Q", value)


def _damage(folder: Path) -> None:
    _damage_vdi(folder)
    _damage_qed(folder)
    _damage_qcow(folder)
    _damage_vpc(folder)


def _damage_vdi(folder: Path) -> None:
    def vdi(name: str, *patches: tuple[int, bytes]) -> None:
        patched(folder, f"{name}.vdi", "dynamic.vdi", *patches)

    vdi("hugesize", (368, _q(1 << 52)))
    vdi("signature", (64, _i(1)))
    vdi("version", (68, _i(0x10000)))
    vdi("mapoffset", (340, _i(0x201)))
    vdi("dataoffset", (344, _i(0x401)))
    vdi("sector", (360, _i(4096)))
    vdi("block", (376, _i(2 << 20)))
    vdi("room", (384, _i(3)))
    vdi("link", (424, b"\1"))
    vdi("parent", (440, b"\1"))
    vdi("many", (384, _i(536870785)))
    vdi("oddsize", (368, _q(5 * MIB - 100)))
    vdi("headersize", (72, _i(0x190)))
    vdi("beyond", (512, _i(4)))
    vdi("twice", (512, _i(1)))
    vdi("toolarge", (512, _i(100)))
    vdi("counter", (388, _i(1)))
    vdi("discarded", (516, _i(0xFFFFFFFE)))
    vdi("all", (512, _i(7) * 2), (520, _i(0)), (388, _i(77)))
    data = (folder / "dynamic.vdi").read_bytes()
    (folder / "cutdata.vdi").write_bytes(data[: 2 * MIB])


def _damage_qed(folder: Path) -> None:
    def qed(name: str, *patches: tuple[int, bytes], source: str = "plain.qed") -> None:
        patched(folder, f"{name}.qed", source, *patches)

    qed("features", (16, _q(8)))
    qed("cluster", (4, _i(65537)))
    qed("table", (8, _i(3)))
    qed("size", (48, _q(5 * MIB + 1)))
    qed("sizebig", (48, _q((1 << 46) + 512)))
    qed("l1", (40, _q(65537)))
    qed("l1far", (40, _q(1 << 40)))
    qed("name", (60, _i(1 << 20)), source="over.qed")
    qed("namelong", (60, _i(4096)), source="over.qed")
    qed("compat", (24, _q(1)))
    qed("dirty", (16, _q(2)))
    data = (folder / "plain.qed").read_bytes()
    (l2,) = struct.unpack_from("<Q", data, 65536)
    entries = struct.unpack_from("<80Q", data, l2)
    used = [number for number, entry in enumerate(entries) if entry > 1]
    first, second = used[0], used[1]
    qed("badl2", (65536, _q(12345)))
    qed("farl2", (65536, _q(1 << 40)))
    qed("badentry", (l2 + 8 * first, _q(12345)))
    qed("farentry", (l2 + 8 * first, _q(1 << 40)))
    qed("twice", (l2 + 8 * first, _q(entries[second])))
    qed("leak", (l2 + 8 * first, _q(0)))
    qed("zeroentry", (l2 + 8 * first, _q(1)))
    qed("l2twice", (65536 + 8, _q(l2)))
    qed("mess", (l2 + 8 * first, _q(777)), (l2 + 8 * second, _q(0)), (16, _q(2)))
    (folder / "tail.qed").write_bytes(data + bytes(70000))


def _damage_qcow(folder: Path) -> None:
    def qcow(name: str, *patches: tuple[int, bytes], source: str = "plain.qcow") -> None:
        patched(folder, f"{name}.qcow", source, *patches)

    qcow("version", (4, b"\0\0\0\x04"))
    qcow("version2", (4, b"\0\0\0\x02"))
    qcow("size", (24, struct.pack(">Q", 1)))
    qcow("size300", (24, struct.pack(">Q", 300)))
    qcow("sizebig", (24, struct.pack(">Q", 1 << 62)))
    qcow("sizeover", (24, b"\xff" * 8))
    qcow("cluster", (32, b"\x11"))
    qcow("cluster8", (32, b"\x08"))
    qcow("l2bits", (33, b"\x0e"))
    qcow("l2bits5", (33, b"\x05"))
    qcow("crypt", (36, b"\0\0\0\x02"))
    qcow("name", (16, b"\0\1\0\0"), source="over.qcow")
    qcow("l1flag", (48, b"\x80"))
    qcow("l1far", (48, struct.pack(">Q", 1 << 40)))
    qcow("l1table", (40, struct.pack(">Q", 1 << 40)))
    data = (folder / "plain.qcow").read_bytes()
    (l2,) = struct.unpack_from(">Q", data, 48)
    qcow("odd", (l2, struct.pack(">Q", 12345)))
    qcow("far", (l2, struct.pack(">Q", 1 << 40)))
    data = (folder / "compressed.qcow").read_bytes()
    (l2,) = struct.unpack_from(">Q", data, 48)
    (entry,) = struct.unpack_from(">Q", data, l2)
    qcow("nolength", (l2, struct.pack(">Q", entry & ((1 << 51) - 1) | 1 << 63)), source="compressed.qcow")
    qcow("garbage", (entry & ((1 << 51) - 1), b"\xff" * 10), source="compressed.qcow")


def _seal(data: bytearray, at: int, length: int, field: int) -> None:
    data[at + field : at + field + 4] = bytes(4)
    data[at + field : at + field + 4] = struct.pack(">I", ~sum(data[at : at + length]) & 0xFFFFFFFF)


def _damage_vpc(folder: Path) -> None:
    def vpc(name: str, *patches: tuple[int, bytes], seal: bool = True) -> None:
        data = bytearray((folder / "dynamic.vpc").read_bytes())
        for offset, raw in patches:
            data[offset : offset + len(raw)] = raw
        if seal:
            _seal(data, 0, 512, 64)
            _seal(data, 512, 1024, 36)
            data[-512:] = data[:512]
        (folder / f"{name}.vpc").write_bytes(data)

    def n(value: int) -> bytes:
        return struct.pack(">I", value)

    vpc("magic", (512, b"x"))
    vpc("block", (544, n(3 << 20)))
    vpc("block256", (544, n(256)))
    vpc("pages", (540, n(1)))
    vpc("entries", (540, n(0x20000000)))
    vpc("features", (8, n(77)), (12, n(3)), (84, b"\1"))
    vpc("toolarge", (48, struct.pack(">Q", 0xFF000001 * 512)))
    for creator in ("vpc ", "qemu", "qem2", "win ", "tap\0", "CTXS", "d2v "):
        vpc("by" + creator.strip().strip("\0"), (28, creator.encode()), (56, bytes([0, 17, 4, 17])))
    data = bytearray((folder / "dynamic.vpc").read_bytes())
    (folder / "cut.vpc").write_bytes(data[: 3 * MIB])
    (folder / "notail.vpc").write_bytes(data[:-512])
    (folder / "short.vpc").write_bytes(data[:100])
    fixed = bytearray((folder / "fixed.vpc").read_bytes())
    (folder / "fixed511.vpc").write_bytes(fixed[:-1])
    fixed[-448] ^= 1
    (folder / "fixedsum.vpc").write_bytes(fixed)


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
    "dynamic.vdi", "static.vdi", "oddsize.vdi", "headersize.vdi", "discarded.vdi", "cutdata.vdi",
    "plain.qed", "small.qed", "large.qed", "base.qed", "over.qed", "longer.qed", "onraw.qed", "zeros.qed", "compat.qed", "dirty.qed",
    "tail.qed", "zeroentry.qed",
    "plain.qcow", "compressed.qcow", "base.qcow", "over.qcow", "longer.qcow", "onraw.qcow", "size300.qcow",
    "dynamic.vpc", "chs.vpc", "features.vpc", "notail.vpc",
    *(f"by{creator}.vpc" for creator in ("vpc", "qemu", "qem2", "win", "tap", "CTXS", "d2v")),
    "onqed.qcow2", "onqcow.qcow2", "onvdi.qcow2", "onvpc.qcow2",
)  # fmt: skip
FIXED = ("fixed.vpc", "chsfixed.vpc", "fixed511.vpc")
FIXED_READING = """
info -f vpc {}
info --output=json -f vpc {}
map -f vpc {}
map --output=json -f vpc {}
check -f vpc {}
info {}
measure -f vpc -O qcow2 {}
compare -f vpc {} a.raw
"""


@pytest.mark.parametrize(
    "line",
    [line.format(name) for name in SOUND for line in cases(READING)]
    + [line.format(name) for name in FIXED for line in cases(FIXED_READING)],
)
def test_commands_that_read_say_what_the_real_program_says(images: Path, line: str) -> None:
    assert_same(line, images, DIFFERENT)


REFUSED = "\n".join(
    [
        *(f"info -f vdi {name}.vdi" for name in (
            "hugesize", "signature", "version", "mapoffset", "dataoffset", "sector", "block", "room", "link", "parent", "many",
        )),
        *(f"{command} {name}.vdi" for name in ("beyond", "twice", "toolarge", "counter", "all")
          for command in ("check", "check --output=json", "map", "compare -s dynamic.vdi")),
        *(f"info {name}.qed" for name in (
            "features", "cluster", "table", "size", "sizebig", "l1", "l1far", "name", "namelong",
        )),
        *(f"{command} {name}.qed" for name in (
            "badl2", "farl2", "badentry", "farentry", "twice", "leak", "l2twice", "mess",
        ) for command in ("check", "check --output=json", "map", "convert -O raw")),
        *(f"info -f qcow {name}.qcow" for name in (
            "version", "version2", "size", "sizebig", "sizeover", "cluster", "cluster8", "l2bits", "l2bits5", "crypt", "name",
        )),
        *(f"{command} {name}.qcow" for name in ("l1flag", "l1far", "l1table", "odd", "far", "nolength", "garbage")
          for command in ("info", "map", "convert -O raw", "compare -s plain.qcow")),
        *(f"info {name}.vpc" for name in (
            "magic", "block", "block256", "pages", "entries", "toolarge", "cut", "short",
        )),
        "info -f vpc fixedsum.vpc",
        *(f"info -f {kind} text" for kind in ("vdi", "qed", "qcow", "vpc")),
        *(f"info --backing-chain {name}" for name in ("over.qed", "longer.qcow", "onqed.qcow2", "lost.qed", "lost.qcow")),
        *(f"{command} dynamic.{kind}" for kind in ("vdi", "vpc")
          for command in ("amend -o size=8M", "commit", "rebase -u -b ''", "snapshot -c a", "bitmap --add")),
        "check -r all dynamic.vpc",
        *(f"{command} plain.{kind}" for kind in ("qed", "qcow")
          for command in ("amend -o size=8M", "commit", "rebase -u -b nothing -F raw", "snapshot -c a", "resize --shrink")),
        "check -r all plain.qcow",
        "resize plain.qcow 8M",
        "resize plain.qed 8000001",
        "resize plain.qed 65T",
        "resize --preallocation=full plain.qed 8M",
        "resize --shrink plain.qed 1M",
        "resize compat.qed 8M",
        "rebase -u -b '' compat.qed",
        "rebase -u -b '' over.qcow",
        *(f"create -f {kind} -o help" for kind in ("vdi", "qed", "qcow", "vpc")),
        *(f"create -f {kind} {words}" for kind in ("vdi", "qed", "qcow", "vpc") for words in (
            "new", "new 0", "new 1", "new 513", "new 1M", "new 10M", "new 2T",
            "-o cluster_size=4k new 1M", "-o bogus=1 new 1M", "-b a.raw -F raw new", "-b a.raw -F raw new 8M",
            "-o backing_fmt=raw new 1M", "-o backing_fmt=foo -b a.raw new 1M", "-u -b nothere -F raw new 1M",
            "-o size=2M new", "-o preallocation=metadata new 1M", "-o preallocation=full new 1M", "-o nocow=on new 1M",
        )),
        *(f"create -f {kind} new {size}" for kind in ("vdi", "qed", "vpc") for size in ("511T", "600T", "70T", "7E")),
        "create -f qcow new 7E",
        "create -f vdi -b a.raw new 8M",
        "create -f vdi -o static=on new 10M",
        "create -f vdi -o static=foo new 10M",
        "create -f vdi new 0x1fffff8000000",
        "create -f vdi new 0x1fffff8000001",
        *(f"create -f qed -o cluster_size={size} new 1M" for size in (512, 2048, "4k", 5000, "2M", "64M", "128M", 0)),
        *(f"create -f qed -o table_size={size} new 1M" for size in (0, 1, 2, 3, 16, 32)),
        "create -f qed -o cluster_size=4k,table_size=2 new 4G",
        "create -f qed -o cluster_size=4k,table_size=2 new 4097M",
        "create -f qed new 64T",
        "create -f qcow -o encrypt.format=luks new 1M",
    "create -f qcow -o encryption=on new 1M",
        "create -f vpc -o subformat=fixed new 1M",
        "create -f vpc -o subformat=bogus new 1M",
        "create -f vpc -o force_size=on new 1000001",
        "create -f vpc -o force_size=on,subformat=fixed new 1000001",
        "create -f vpc -o force_size=on new 2040G",
        "create -f vpc new 2040G",
        "create -f vpc new 2041G",
        *(f"convert -c -O {kind} a.raw new" for kind in ("vdi", "qed", "vpc")),
        *(f"convert -O {kind} -B a.raw -F raw a.raw new" for kind in ("vdi", "vpc")),
        *(f"measure -O {kind} --size 10M" for kind in ("vdi", "qed", "qcow", "vpc")),
    ]
)  # fmt: skip


def _measured(required: int, fully: int) -> Difference:
    sizes = f"required size: {required}\nfully allocated size: {fully}\n"
    return Difference("every format that can be written can be measured", 0, sizes, "")


EARLY = Difference(
    "damage is told when the table is read, before the data is",
    1,
    "Offset          Length          Mapped to       File\n",
    "qemu-img: Could not read file metadata: Input/output error\n",
)
DIFFERENT: dict[str, Difference] = {
    "measure -O vdi --size 10M": _measured(1024, 10486784),
    "measure -O qed --size 10M": _measured(327680, 11075584),
    "measure -O qcow --size 10M": _measured(4096, 10510336),
    "measure -O vpc --size 10M": _measured(2560, 12588544),
    "map odd.qcow": EARLY,
    "convert -O raw odd.qcow new": Difference(
        EARLY.reason, err="qemu-img: error while reading block status at offset 0: Input/output error\n"
    ),
    "compare -s plain.qcow odd.qcow": Difference(
        EARLY.reason, 3, "", "qemu-img: Sector allocation test failed for odd.qcow\n"
    ),
    "info toolarge.vpc": Difference(
        "once is enough", err="qemu-img: Could not open 'toolarge.vpc': File too large\n"
    ),
    "create -f qcow new 7E": Difference(
        "no image that cannot be opened",
        1,
        err="qemu-img: new: The image size is too large for file format 'qcow'\n",
    ),
    "create -f qed -o cluster_size=64M new 1M": Difference("limits do not overflow", 0, err=""),
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
    for path in images.iterdir():
        os.link(path, tmp_path / path.name)
    if line.startswith("convert -O raw") or (line.startswith("convert") and not line.endswith("new")):
        line += " new"
    for word in line.split():
        if (images / word).is_file():
            (tmp_path / word).unlink()
            (tmp_path / word).write_bytes((images / word).read_bytes())
    assert_same(line, tmp_path, DIFFERENT)
