"""A hostile qcow2 image costs an error, not memory and not minutes.

Each image is opened, listed, mapped and checked in a process of its own that may take 400 MiB of address
space and a few seconds.
"""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import qimg

SECONDS = 20
SPACE = 400 << 20

SCRIPT = """
import sys
from qimg.context import Context
from qimg.errors import QimgError
from qimg.formats.qcow2.format import Qcow2
from qimg.storage.posix import PosixFile

def attempt(what):
    try:
        return what()
    except QimgError as error:
        print(type(error).__name__, error)

for how in ({"for_info": True}, {}, {"for_check": True}):
    file = PosixFile.open(sys.argv[1])
    image = attempt(lambda: Qcow2().open(file, context=Context(lambda notice: None), **how))
    if image is None:
        continue
    attempt(image.snapshots)
    attempt(image.format_specific)
    if how:
        if "for_check" in how:
            lines = []
            attempt(lambda: image.check(lines.append))
            print(len(lines), "findings")
        continue
    attempt(image.bitmaps)
    for start in (0, image.size // 3 // 512 * 512, max(image.size - (1 << 34), 0)):
        attempt(lambda: len(image.extents(start, min(1 << 34, image.size - start))))
    buf = bytearray(min(image.size, 1 << 20))
    attempt(lambda: image.read_into(buf, 0))
    for snapshot in (attempt(image.snapshots) or ())[:9]:
        attempt(lambda: image.load_snapshot(id=snapshot.id, name=snapshot.name))
        attempt(lambda: image.extents(0, min(image.size, 1 << 34)))
print("done")
"""


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def survive(path: Path) -> str:
    """Open the image in every way; what it printed. Fails unless each ends in a value or a qimg error."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        preexec_fn=limit,
        env={**os.environ, "PYTHONPATH": str(Path(qimg.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS * 3,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")
    return done.stdout


def header(**fields: int) -> bytearray:
    """A version 3 header of a small, sound image with other values in some fields."""
    values = {
        "magic": 0x514649FB, "version": 3, "backing_offset": 0, "backing_size": 0, "cluster_bits": 16,
        "size": 1 << 20, "crypt": 0, "l1_size": 1, "l1": 0x30000, "table": 0x10000, "table_clusters": 1,
        "snapshots": 0, "snapshot_offset": 0, "incompatible": 0, "compatible": 0, "autoclear": 0,
        "order": 4, "length": 112,
    }  # fmt: skip
    values.update(fields)
    return bytearray(struct.pack(">IIQIIQIIQQIIQQQQII8x", *values.values()))


def image(path: Path, head: bytes, *parts: tuple[int, bytes], size: int = 0x80000) -> Path:
    """A sparse file with these bytes in it."""
    with path.open("wb") as file:
        file.truncate(size)
        file.write(head)
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
    return path


def u64s(*words: int) -> bytes:
    return struct.pack(f">{len(words)}Q", *words)


COPIED = 1 << 63
L1_LIMIT = 4 << 20


def test_a_long_l1_table_that_names_one_table_over_and_over(tmp_path: Path) -> None:
    """2 TiB of guest that share a few clusters: their counts overflow again and again."""
    head = header(l1_size=4096, size=2 << 40, l1=0x100000)
    tables = (0x100000, u64s(0x40000) * 4096)
    survive(image(tmp_path / "x", head, tables, (0x40000, u64s(COPIED | 0x50000) * 64)))


def test_the_largest_l1_table_of_a_short_file(tmp_path: Path) -> None:
    survive(image(tmp_path / "x", header(l1_size=L1_LIMIT, size=1 << 50, l1=1 << 40)))


def test_the_largest_size_there_can_be(tmp_path: Path) -> None:
    survive(
        image(
            tmp_path / "x",
            header(cluster_bits=21, l1_size=L1_LIMIT, size=1 << 61, l1=0x600000, table=0x200000),
        )
    )
    survive(image(tmp_path / "y", header(size=(1 << 64) - 1)))
    survive(image(tmp_path / "z", header(size=1 << 63, l1_size=0xFFFFFFFF)))


def test_the_largest_refcount_table(tmp_path: Path) -> None:
    head = header(table_clusters=128)
    table = u64s(*(0x200 * index for index in range(1 << 14)))
    survive(image(tmp_path / "x", head, (0x10000, table)))
    survive(image(tmp_path / "y", header(table_clusters=0xFFFFFFFF)))


def test_an_endless_file(tmp_path: Path) -> None:
    """8 EiB would not go; 8 TiB of nothing in clusters of 64 KiB are 2^27."""
    survive(image(tmp_path / "x", header(), size=8 << 40))


@pytest.mark.parametrize("extra", [0, 1024, 1025, 0xFFFFFFFF])
def test_as_many_snapshots_as_there_can_be(extra: int, tmp_path: Path) -> None:
    entry = struct.pack(">QIHHIIQII", 0x30000, 1, 0, 0, 0, 0, 0, 0, extra)
    entry += bytes(extra if extra < 2000 else 0)
    entry += bytes(-len(entry) % 8)
    for number in (5000, 65537, 0xFFFFFFFF):
        table = entry * min(number, 5000)
        survive(image(tmp_path / "x", header(snapshots=number, snapshot_offset=0x100000), (0x100000, table)))


def test_snapshots_with_the_longest_names_exceed_the_table(tmp_path: Path) -> None:
    entry = struct.pack(">QIHHIIQII", 0x30000, 1, 65535, 65535, 0, 0, 0, 0, 0) + bytes(131070) + bytes(2)
    path = image(tmp_path / "x", header(snapshots=65536, snapshot_offset=0x100000), (0x100000, entry * 520))
    assert "Snapshot table is too big" in survive(path)


@pytest.mark.parametrize(
    ("count", "size", "table_size", "granularity"),
    [(1, 32, 8192, 9), (65535, 67107840, 8192, 31), (1, 32, 0xFFFFFFFF, 31), (65536, 1 << 40, 1, 9)],
)
def test_bitmaps_of_any_claimed_size(
    count: int, size: int, table_size: int, granularity: int, tmp_path: Path
) -> None:
    head = header(autoclear=1) + struct.pack(">IIIIQQ", 0x23852875, 24, count, 0, size, 0x100000) + bytes(8)
    entry = struct.pack(">QIIBBHI8s", 0x40000, table_size, 2, 1, granularity, 2, 0, b"b0")
    survive(image(tmp_path / "x", head, (0x100000, entry * 100)))
    full = header(autoclear=1, size=1 << 40, l1_size=2048)
    full += struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, 32, 0x100000) + bytes(8)
    whole = struct.pack(">QIIBBHI8s", 0x200000, 512, 2, 1, 12, 2, 0, b"b0")  # 32 MiB of bits
    survive(image(tmp_path / "y", full, (0x100000, whole), (0x200000, u64s(1) * 512)))


def test_extensions_that_never_end(tmp_path: Path) -> None:
    survive(image(tmp_path / "x", header() + struct.pack(">II", 5, 0) * 8000))
    survive(image(tmp_path / "y", header() + struct.pack(">II", 5, 0xFFFFFFFF)))
    survive(image(tmp_path / "z", header(length=0xFFFFFFFF)))


@pytest.mark.parametrize("kind", [0, 1])
def test_compressed_bombs(kind: int, tmp_path: Path) -> None:
    """2 MiB that would grow to gigabytes; only one cluster's worth is ever made."""
    import zlib

    zstandard = pytest.importorskip("zstandard")
    if kind:
        bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 30))
        head = header(incompatible=8)
        head[104] = 1
    else:
        stream = zlib.compressobj(9, zlib.DEFLATED, -15)
        bomb = stream.compress(bytes(1 << 30)) + stream.flush()
    data = bomb[: 64 << 10]
    head = head if kind else header()
    word = 1 << 62 | 127 << 54 | 0x50000
    survive(
        image(
            tmp_path / "x",
            head,
            (0x30000, u64s(COPIED | 0x40000)),
            (0x40000, u64s(word) * 16),
            (0x50000, data),
        )
    )


def test_tables_that_refer_to_themselves(tmp_path: Path) -> None:
    survive(image(tmp_path / "x", header(l1=0x40000), (0x40000, u64s(COPIED | 0x40000) * 8192)))
    survive(image(tmp_path / "y", header(l1=0), size=0x1000))
    survive(image(tmp_path / "z", header(table=0, table_clusters=128)))


@pytest.mark.parametrize("seed", range(12))
def test_random_bytes_everywhere(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    head = header(
        version=rng.choice((2, 3)),
        cluster_bits=rng.choice((9, 12, 16, 21)),
        l1_size=rng.choice((1, 100, 4096)),
        l1=rng.randrange(4) << 21,
        table=rng.randrange(4) << 21,
        size=rng.choice((1 << 20, 512 << 10)),
        order=rng.randrange(7),
        snapshots=rng.choice((0, 1, 5)),
        snapshot_offset=rng.randrange(4) << 21,
        incompatible=rng.choice((0, 16, 2, 1)),
    )
    parts = [(rng.randrange(8) << 20, rng.randbytes(rng.choice((64, 4096, 65536)))) for _ in range(6)]
    survive(image(tmp_path / "x", bytes(head) + rng.randbytes(64), *parts, size=9 << 20))
