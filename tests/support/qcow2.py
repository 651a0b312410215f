"""qcow2 images of the real programs, read and checked by the format layer alone, and damaged on purpose."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qimg.context import Context, Notice
from qimg.errors import StorageError
from qimg.extent import clip
from qimg.formats.qcow2.check import check
from qimg.formats.qcow2.format import Qcow2
from qimg.formats.qcow2.image import Qcow2Image
from qimg.formats.raw import Raw
from qimg.graph.disk import Disk, Layer
from qimg.jobs.map import disk_map
from qimg.storage.posix import PosixFile
from support import peers, secrets

Edit = tuple[int, bytes]

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00
HEADER_L1_SIZE, HEADER_L1, HEADER_TABLE, HEADER_TABLE_CLUSTERS = 36, 40, 48, 56
HEADER_SNAPSHOTS, HEADER_SNAPSHOT_OFFSET = 60, 64


def u16(value: int) -> bytes:
    """`value` as the format stores it."""
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    """`value` as the format stores it."""
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    """`value` as the format stores it."""
    return struct.pack(">Q", value)


# -- the real programs


def real(program: str, *words: str | Path, cwd: Path, fail: bool = False) -> str:
    """Run a real program in `cwd`; its output. With `fail` its exit code does not matter."""
    done = subprocess.run(
        [peers.need(program), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    assert fail or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(path: Path, size: int | str, options: str = "", *more: str) -> Path:
    """An image by the real ``create``."""
    chosen = ["-o", options] if options else []
    real("qemu-img", "create", "-q", "-f", "qcow2", *chosen, *more, path.name, str(size), cwd=path.parent)
    return path


def io(path: Path, *commands: str) -> None:
    """qemu-io commands on an image; one that is refused does not matter (compressed over data, ...)."""
    words = [word for command in commands for word in ("-c", command)]
    real("qemu-io", *words, *secrets.words(path), cwd=path.parent, fail=True)


def scribble(path: Path, size: int, seed: int, *, count: int = 12, cluster: int = 0) -> None:
    """Random writes, zeros and discards; compressed clusters too where their size `cluster` is given."""
    rng = random.Random(seed)
    commands = []
    for _ in range(count):
        offset = rng.randrange(size // 512) * 512
        length = min(size - offset, rng.choice((512, 4096, 65536, 200 << 10, 1 << 20)) * rng.randrange(1, 4))
        pattern = rng.randrange(1, 255)
        kind = rng.random()
        if kind < 0.2:
            commands.append(f"write -z {offset} {length}")
        elif kind < 0.3:
            commands.append(f"write -zu {offset} {length}")
        elif kind < 0.4:
            commands.append(f"discard {offset} {length}")
        elif kind < 0.65 and cluster:
            start = offset // cluster * cluster
            commands.append(f"write -c -P {pattern} {start} {min(cluster, size - start)}")
        else:
            commands.append(f"write -P {pattern} {offset} {length}")
    io(path, *commands)


def rich(
    path: Path,
    options: str = "",
    *,
    snapshots: bool = True,
    bitmaps: bool = True,
    compressed: bool = True,
    size: str = "4M",
) -> Path:
    """An image with a bit of everything: data, zeros with and without space, compressed clusters, two
    snapshots, two bitmaps."""
    make(path, size, options)
    commands = ["write -P 1 0 256k", "write -z 512k 64k", "write -P 3 600k 20k", "write -P 1 1M 64k"]
    commands.append("write -z 1M 64k")
    if compressed:
        commands += ["write -c -P 5 2M 64k", "write -c -P 6 2112k 64k", "write -c -P 6 2240k 64k"]
    io(path, *commands)
    if snapshots:
        real("qemu-img", "snapshot", "-c", "s1", path.name, cwd=path.parent)
        io(path, "write -P 9 0 64k", "write -P 9 3M 64k")
        real("qemu-img", "snapshot", "-c", "s2", path.name, cwd=path.parent)
        io(path, "write -P 9 128k 64k")
    if bitmaps:
        bitmap = ("qemu-img", "bitmap", "--add")
        real(*bitmap, "-g", "64k", "--enable", path.name, "b0", cwd=path.parent)
        io(path, "write -P 9 128k 64k")
        real(*bitmap, "-g", "512", "--disable", path.name, "b1", cwd=path.parent)
    return path


def real_map(path: Path) -> list[dict[str, Any]]:
    """Rows of the real ``map``."""
    rows = json.loads(real("qemu-img", "map", "--output=json", path.name, cwd=path.parent))
    for row in rows:
        row.pop("compressed", None)  # newer releases only
    return rows  # type: ignore[no-any-return]


def real_error(path: Path, *words: str) -> str:
    """What the real program prints to stderr, without its name and the image's."""
    done = subprocess.run(
        [peers.need("qemu-img"), *words, "-f", "qcow2", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    text = done.stderr.replace(f"qemu-img: Could not open '{path.name}': ", "")
    return text.replace("qemu-img: ", "").strip()


# -- ours


def open_image(path: Path, notices: list[Notice] | None = None, **how: Any) -> Qcow2Image:
    """The image alone, its data file attached if it names one (relative to the image's folder)."""
    sink: list[Notice] = [] if notices is None else notices
    file = PosixFile.open(str(path))
    try:
        image = Qcow2().open(file, context=Context(sink.append), **how)
    except BaseException:
        file.close()
        raise
    assert isinstance(image, Qcow2Image)
    if image.data_file is not None:
        image.attach_data_file(PosixFile.open(str(path.parent / image.data_file.name)))
    return image


def open_chain(path: Path) -> Disk:
    """The image over its backing files (qcow2 ones, or raw where recorded so)."""
    layers = []
    next_path: Path | None = path
    kind: str | None = "qcow2"
    while next_path is not None:
        if kind == "raw":
            image: Any = Raw().open(PosixFile.open(str(next_path)), context=Context())
        else:
            image = open_image(next_path)
        layers.append(Layer(image, next_path.name))
        backing = image.backing
        next_path = None if backing is None else path.parent / backing.name
        kind = None if backing is None else backing.format
    return Disk(layers)


def map_rows(disk: Disk) -> list[dict[str, Any]]:
    """Rows as ``map --output=json`` has them."""
    rows = []
    for entry in disk_map(disk):
        row: dict[str, Any] = {"start": entry.start, "length": entry.length, "depth": entry.depth}
        row |= {"present": entry.present, "zero": entry.zero, "data": entry.data}
        if entry.offset is not None:
            row["offset"] = entry.offset
        rows.append(row)
    return rows


def read_all(disk: Disk, step: int = 1 << 20) -> bytes:
    """The guest's bytes, read in pieces of at most `step`."""
    content = bytearray(disk.size)
    view = memoryview(content)
    for window in disk.windows(0, disk.size):
        for extent in window:
            for at in range(extent.start, extent.start + extent.length, step):
                for part in clip([extent], at, step):
                    disk.read_extent(part, view[part.start : part.start + part.length])
    return bytes(content)


# -- damage


def patch(source: Path, target: Path, edits: Iterable[Edit]) -> Path:
    """A copy with bytes replaced."""
    data = bytearray(source.read_bytes())
    for offset, new in edits:
        data[offset : offset + len(new)] = new
    target.write_bytes(data)
    return target


class Anatomy:
    """Where the parts of a small image are."""

    def __init__(self, path: Path) -> None:
        self.raw = raw = path.read_bytes()
        self.version = self.number(4, 4)
        self.cluster_bits = self.number(20, 4)
        self.cluster_size = 1 << self.cluster_bits
        self.extended = self.version == 3 and bool(self.number(72) & 16)
        self.entry_size = 16 if self.extended else 8
        self.entries = self.cluster_size // self.entry_size
        self.clusters = -(-len(raw) // self.cluster_size)
        self.l1 = self.number(HEADER_L1)
        self.table = self.number(HEADER_TABLE)
        self.width = 1 << (self.number(96, 4) if self.version == 3 else 4)
        self.snapshots: list[int] = []
        self.l1_tables = [(self.l1, self.number(HEADER_L1_SIZE, 4))]
        at = self.number(HEADER_SNAPSHOT_OFFSET)
        for _ in range(self.number(HEADER_SNAPSHOTS, 4)):
            at = (at + 7) & ~7
            self.snapshots.append(at)
            self.l1_tables.append((self.number(at), self.number(at + 8, 4)))
            at += 40 + self.number(at + 36, 4) + self.number(at + 12, 2) + self.number(at + 14, 2)
        words = [self.number(l1 + 8 * index) for l1, count in self.l1_tables for index in range(count)]
        self.l2_tables = [word & OFFSET for word in words if word & OFFSET]
        self.blocks = [self.number(self.table + 8 * index) for index in range(8)]
        self.blocks = [block for block in self.blocks if block]
        found = raw.find(bytes.fromhex("23852875"), 0, self.cluster_size) if self.version == 3 else -1
        #: Data of the bitmaps extension, None without one.
        self.bitmaps = found + 8 if found > 0 else None

    @property
    def l2(self) -> int:
        """The first table of the active state."""
        return self.l2_tables[0]

    def number(self, offset: int, length: int = 8) -> int:
        """The big-endian integer at `offset`."""
        return int.from_bytes(self.raw[offset : offset + length], "big")

    def entry(self, index: int, table: int | None = None) -> int:
        """Offset of an L2 entry."""
        return (self.l2 if table is None else table) + index * self.entry_size


# -- check

COUNTERS = (
    ("image-end-offset", "image_end_offset"),
    ("compressed-clusters", "compressed_clusters"),
    ("total-clusters", "total_clusters"),
    ("corruptions", "corruptions"),
    ("check-errors", "check_errors"),
    ("leaks", "leaks"),
    ("allocated-clusters", "allocated_clusters"),
    ("fragmented-clusters", "fragmented_clusters"),
)
#: Printed after the findings, or not by the format layer.
_NOT_FINDINGS = ("warning:", "Check failed\n")


def real_check(path: Path) -> tuple[list[str], dict[str, int] | None]:
    """The findings of the real ``check`` and its counters (None: it gave up)."""
    done = subprocess.run(
        [peers.need("qemu-img"), "check", "-f", "qcow2", "--output=json", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    # The hint of the bitmap warning has no newline of its own.
    hint = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
    lines = done.stderr.replace(hint, "").replace("qemu-img: ", "").splitlines()
    findings = [line for line in lines if not line.startswith("warning:") and line != "Check failed"]
    return findings, json.loads(done.stdout) if done.stdout.strip() else None


def our_check(path: Path, *, plain: bool | None = None) -> tuple[list[str], dict[str, int] | None]:
    """The same of ours; `plain` chooses the way (see `check`)."""
    findings: list[str] = []
    with open_image(path, for_check=True) as image:
        try:
            result = check(image, findings.append, plain=plain)
        except StorageError as error:
            findings.append(f"Check failed: {error.reason}")
            return findings, None
    return findings, {name: getattr(result, field) or 0 for name, field in COUNTERS}


def differences(path: Path, ways: Sequence[bool | None] = (True, False)) -> list[str]:
    """Where our check of an image differs from the real one, as lines for a failed test."""
    found: list[str] = []
    lines, numbers = real_check(path)
    for plain in ways:
        our_lines, our_numbers = our_check(path, plain=plain)
        for number in range(max(len(lines), len(our_lines))):
            theirs = lines[number] if number < len(lines) else None
            ours = our_lines[number] if number < len(our_lines) else None
            if theirs != ours:
                found.append(f"plain={plain} line {number}: real {theirs!r}, ours {ours!r}")
                break
        if (numbers is None) != (our_numbers is None):
            found.append(f"plain={plain}: real {numbers}, ours {our_numbers}")
        elif numbers is not None and our_numbers is not None:
            for name, _field in COUNTERS:
                if numbers.get(name, 0) != our_numbers[name]:
                    found.append(
                        f"plain={plain} {name}: real {numbers.get(name, 0)}, ours {our_numbers[name]}"
                    )
    return found


def opens_for_check(path: Path) -> bool:
    """Whether the real check gets past opening the image."""
    return "Could not open" not in _stderr(path, "check")


def _stderr(path: Path, *words: str) -> str:
    done = subprocess.run(
        [peers.need("qemu-img"), *words, "-f", "qcow2", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    return done.stderr


def truncate(path: Path, size: int) -> None:
    """Cut a file."""
    os.truncate(path, size)
