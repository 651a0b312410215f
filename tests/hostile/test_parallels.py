"""Damaged and hostile parallels images: each row of sections 10 and 11 of the parallels sheet costs a clear
error, nothing else; and whatever else is changed, in bounded time and memory."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.context import Context
from qimg.errors import CorruptImage, OpenError, QimgError
from support.bounds import bounded
from support.run import run_qimg_inprocess, run_real

MIB = 1 << 20
CLUSTER = 64 << 10
SECONDS = 20
SPACE = 256 << 20
EXTENSION, BITMAP = 0xAB234CEF23DCEA87, 0x20385FAE252CB34A


def image(**changes: object) -> bytearray:
    """4 MiB, clusters of 64 KiB, four of them in the file; `changes` of the header's fields and `bat`."""
    fields: dict[str, object] = {
        "magic": b"WithouFreSpacExt",
        "version": 2,
        "heads": 16,
        "cylinders": 8,
        "tracks": 128,
        "entries": 64,
        "sectors": 8192,
        "in_use": 0,
        "data": 128,
        "flags": 0,
        "ext": 0,
    }
    bat = {0: 1, 1: 2, 5: 3, 63: 4}
    bat.update(changes.pop("bat", {}))  # type: ignore[call-overload]
    fields.update(changes)
    raw = bytearray(struct.pack("<16s5IQ3IQ", *fields.values()).ljust(CLUSTER, b"\0"))
    for number, value in bat.items():
        struct.pack_into("<I", raw, 64 + 4 * number, value)
    for letter in b"ABCD":
        raw += bytes([letter]) * CLUSTER
    return raw


def feature(magic: int, data: bytes, *, flags: int = 0, size: int | None = None) -> bytes:
    return struct.pack("<QQII", magic, flags, len(data) if size is None else size, 0) + data.ljust(
        -(-len(data) // 8) * 8, b"\0"
    )


def bitmap(*l1: int, size: int = 8192, granularity: int = 16, count: int | None = None) -> bytes:
    number = len(l1) if count is None else count
    return struct.pack("<Q16sII", size, bytes(range(16)), granularity, number) + struct.pack(
        f"<{len(l1)}Q", *l1
    )


def extended(*features: bytes, magic: int = EXTENSION, spoil: bool = False) -> bytearray:
    """An image with a format extension behind its clusters, and a cluster of bits."""
    raw = image(ext=5 * 128)
    rest = b"".join(features).ljust(CLUSTER - 24, b"\0")
    raw += struct.pack("<Q", magic) + hashlib.md5(rest).digest() + rest
    if spoil:
        raw[-1] ^= 1
    return raw + b"\x0f\x01".ljust(CLUSTER, b"\0")


GOOD = feature(BITMAP, bitmap(6 * 128))

#: Defect -> (image, the message).
ROWS: dict[str, tuple[bytearray, str]] = {
    "magic": (image(magic=b"WithouFreSpacExT"), "Image not in Parallels format"),
    "version": (image(version=3), "Image not in Parallels format"),
    "no tracks": (image(tracks=0), "Invalid image: Zero sectors per track"),
    "many tracks": (image(tracks=4186128), "Invalid image: Too big cluster"),
    "endless tracks": (image(tracks=0xFFFFFFFF), "Invalid image: Too big cluster"),
    "many entries": (image(entries=(1 << 29)), "Catalog too large"),
    "endless entries": (image(entries=0xFFFFFFFF), "Catalog too large"),
    "far extension": (image(ext=1 << 54), "Invalid image: Too big offset"),
    "extension magic": (
        extended(GOOD, magic=7),
        "Wrong parallels Format Extension magic: 0x7, expected: 0xab234cef23dcea87",
    ),
    "checksum": (
        extended(GOOD, spoil=True),
        "Wrong checksum in Format Extension header. Format extension is corrupted.",
    ),
    "feature flags": (
        extended(feature(BITMAP, bitmap(0), flags=2)),
        "Flags for extension feature are unsupported",
    ),
    "unknown feature": (extended(feature(0x1234, b"")), "Unknown feature: 0x1234"),
    "bitmap of another disk": (
        extended(feature(BITMAP, bitmap(0, size=8191))),
        "Bitmap size (in sectors) 8191 differs from disk size in sectors 8192",
    ),
    "feature too long": (
        extended(feature(BITMAP, bitmap(0), size=CLUSTER)),
        "Feature data_size exceedes Format Extension cluster",
    ),
    "table too long": (
        extended(feature(BITMAP, bitmap(0, count=2))),
        "Bitmaps feature corrupted: l1 table exceeds extension data_size",
    ),
    "table of another length": (
        extended(feature(BITMAP, bitmap(0, 0))),
        "Bitmap table size 2 does not correspond to bitmap size and cluster size. Expected 1",
    ),
    "feature too short": (extended(feature(BITMAP, b"1234")), "Bitmaps feature corrupted"),
    "no granularity": (extended(feature(BITMAP, bitmap(0, granularity=0))), "granularity"),
    "odd granularity": (extended(feature(BITMAP, bitmap(0, granularity=24))), "granularity"),
}
#: What the real program at hand (7.2) opens, words in its own way, or aborts at.
OURS = ("feature too short", "no granularity", "odd granularity", "far extension")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ROWS)
def test_a_defect_is_told_as_the_real_program_tells_it(name: str, tmp_path: Path) -> None:
    raw, message = ROWS[name]
    (tmp_path / "a.hds").write_bytes(raw)
    line = ["info", "-f", "parallels", "a.hds"]
    found = run_qimg_inprocess(line, tmp_path)
    assert (found.code, found.out) == (1, "")
    assert message in found.err
    assert len(found.lines) == 0
    assert found.err.count("\n") == 1
    real = run_real(line, tmp_path)
    if name not in OURS:
        assert real == found


@pytest.mark.parametrize("name", ROWS)
def test_an_error_names_the_field(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.hds").write_bytes(ROWS[name][0])
    with pytest.raises(OpenError) as caught:
        qimg.open(tmp_path / "a.hds", format="parallels")
    cause = caught.value.__cause__ or caught.value
    assert getattr(cause, "field", None), repr(cause)


@pytest.mark.peer("qemu-img")
def test_an_endless_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.hds").write_bytes(image(sectors=1 << 60))
    found = run_qimg_inprocess(["info", "a.hds"], tmp_path)
    assert found.code == 1
    assert "File too large" in found.err


def test_a_cluster_in_the_header_is_an_error_where_it_is_read(tmp_path: Path) -> None:
    raw = image(tracks=1, entries=512, sectors=512, data=5, bat={0: 5, 1: 2})
    (tmp_path / "a.hds").write_bytes(raw)
    with qimg.open(tmp_path / "a.hds") as disk:
        assert len(disk.read(0, 512)) == 512
        with pytest.raises(CorruptImage, match="inside the header"):
            disk.read(512, 512)
    found = run_qimg_inprocess(["check", "a.hds"], tmp_path)
    assert found.code == 2
    assert "ERROR cluster 1 is inside the header\n" in found.err


# -- format extensions


def test_bitmaps_are_read_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a.hds").write_bytes(extended(GOOD, feature(BITMAP, bitmap(1))))
    assert "itmap" not in run_qimg_inprocess(["info", "a.hds"], tmp_path).ok().out
    with qimg.open(tmp_path / "a.hds") as disk:
        first, second = disk._disk.top.bitmaps()
    assert first.name == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert (first.granularity, first.bits) == (8192, b"\x0f\x01".ljust(64, b"\0"))
    assert second.bits == b"\xff" * 64


def test_a_format_extension_is_never_cut_off_or_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(extended(GOOD))
    before = path.read_bytes()
    for line in ("check a.hds", "check -r leaks a.hds", "check -r all a.hds"):
        found = run_qimg_inprocess(line.split(), tmp_path)
        assert (found.code, "leaked" in found.out) == (0, False)
    for line in ("bench -w -c 1 a.hds", "resize a.hds 8M"):
        found = run_qimg_inprocess(line.split(), tmp_path)
        assert found.code == 1
        assert "warning: Format Extension ignored in RW mode" in found.err
        assert "format extension is not supported" in found.err
    assert path.read_bytes() == before
    path.write_bytes(before + bytes(CLUSTER))
    assert run_qimg_inprocess(["check", "-r", "leaks", "a.hds"], tmp_path).code == 0
    assert path.read_bytes() == before


def test_a_repair_puts_copies_behind_the_format_extension(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    raw = extended(GOOD)
    struct.pack_into("<I", raw, 64 + 8, 1)
    path.write_bytes(raw)
    assert run_qimg_inprocess(["check", "-r", "all", "a.hds"], tmp_path).code == 0
    after = path.read_bytes()
    assert after[5 * CLUSTER : 7 * CLUSTER] == raw[5 * CLUSTER : 7 * CLUSTER]
    with qimg.open(path) as disk:
        assert disk.read(2 * CLUSTER, CLUSTER) == b"A" * CLUSTER


# -- bounded time and memory

BIG = {
    "a table of 2 GiB": image(entries=(1 << 29) - 1, sectors=1 << 40, data=1 << 22),
    "clusters of 2 GiB": image(tracks=4186127, bat={0: 1}),
    "clusters of 2 GiB used twice": image(tracks=4186127, bat={0: 1, 1: 1}),
    "an extension of 2 GiB": image(tracks=4186127, ext=128, sectors=1 << 32),
    "an extension far away": image(ext=(1 << 54) - 1),
    "data far away": image(data=0xFFFFFFFF),
    "version 1": image(magic=b"WithoutFreeSpace", bat={number: 129 + number for number in range(64)}),
    "version 1 without offset": image(magic=b"WithoutFreeSpace", data=0),
}

READ = """
import resource, sys
import qimg
from qimg.context import Context
from qimg.errors import QimgError
resource.setrlimit(resource.RLIMIT_DATA, (%d, %d))
context = Context(warn=lambda notice: None)
def attempt(work):
    try:
        work()
    except QimgError as error:
        assert "\\n" not in str(error)
def read():
    with qimg.open(sys.argv[1], format="parallels", context=context) as disk:
        disk.read(0, min(disk.size, 1 << 20))
        for number, _ in enumerate(disk.extents(0, min(disk.size, 1 << 40))):
            if number > 1000:
                break
attempt(read)
attempt(lambda: qimg.check(sys.argv[1], format="parallels", context=context))
attempt(lambda: qimg.resize(sys.argv[1], 64 << 20, format="parallels", context=context))
"""


@pytest.mark.parametrize("name", BIG)
def test_what_an_image_claims_costs_neither_time_nor_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(BIG[name])
    os.truncate(path, 8 << 30)
    begun = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", READ % (SPACE, SPACE), str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS * 3,
    )
    assert found.returncode == 0, found.stderr
    assert time.monotonic() - begun < 2 * SECONDS


# -- mutations

FIELDS = [
    (16, 4),
    (20, 4),
    (28, 4),
    (32, 4),
    (36, 8),
    (44, 4),
    (48, 4),
    (56, 8),
    (64, 4),
    (68, 4),
    (84, 4),
    (316, 4),
]
WILD = [
    0,
    1,
    2,
    3,
    4,
    5,
    63,
    64,
    127,
    128,
    129,
    0x746F6E59,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 33,
    1 << 54,
    (1 << 64) - 1,
]
MUTATION = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(FIELDS), st.sampled_from(WILD) | st.integers(0, 1 << 20)),
    st.tuples(st.just("flip"), st.integers(0, 7 * CLUSTER - 1), st.integers(1, 255)),
    st.tuples(st.just("flip"), st.integers(0, 340), st.integers(1, 255)),
    st.tuples(st.just("flip"), st.integers(5 * CLUSTER, 5 * CLUSTER + 100), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 7 * CLUSTER), st.just(0)),
    st.tuples(st.just("magic"), st.just(0), st.just(0)),
)


def mutated(mutations: list[tuple[str, object, int]], *, with_extension: bool) -> bytes:
    raw = extended(GOOD) if with_extension else image()
    for kind, where, value in mutations:
        if kind == "cut":
            assert isinstance(where, int)
            del raw[where:]
        elif kind == "magic":
            raw[:16] = b"WithoutFreeSpace"[: len(raw)]
        elif kind == "flip":
            assert isinstance(where, int)
            if where < len(raw):
                raw[where] ^= value
        else:
            assert isinstance(where, tuple)
            offset, size = where
            if offset + size <= len(raw):
                raw[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(raw)


@settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), with_extension=st.booleans())
def test_whatever_is_changed_ends_in_a_result_or_an_error_of_ours(
    mutations: list[tuple[str, object, int]], with_extension: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.hds"
    path.write_bytes(mutated(mutations, with_extension=with_extension))
    context = Context(warn=lambda notice: None)

    def read() -> None:
        with qimg.open(path, format="parallels", context=context) as disk:
            disk.read(0, min(disk.size, MIB))
            for number, _ in enumerate(disk.extents(0, 1 << 40)):
                if number > 1000:
                    break

    for work in (
        read,
        lambda: qimg.check(path, format="parallels", context=context),
        lambda: qimg.check(path, format="parallels", fix="leaks", context=context),
        lambda: qimg.bench(path, format="parallels", count=3, write=True, step=MIB, context=context),
        lambda: qimg.check(path, format="parallels", fix="all", context=context),
    ):
        with bounded(seconds=SECONDS):
            try:
                work()
            except QimgError as error:
                assert "\n" not in str(error)
    assert path.stat().st_blocks * 512 <= 64 * MIB
