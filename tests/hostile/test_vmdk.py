"""A hostile vmdk image costs an error, not memory and not minutes (vmdk sheet 4.1, 10)."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.context import Context
from qimg.errors import QimgError
from support.bounds import bounded
from support.build import write_raw
from support.run import run_real

SECTOR = 512
SECONDS = 20
#: The tests' own interpreter and libraries take about a third of it.
SPACE = 400 << 20
KINDS = {
    "sparse": "subformat=monolithicSparse",
    "zeroed": "zeroed_grain=on",
    "flat": "subformat=monolithicFlat",
    "split": "subformat=twoGbMaxExtentSparse",
    "stream": "subformat=streamOptimized",
}
FIELDS = {
    "version": (4, 4),
    "flags": (8, 4),
    "capacity": (12, 8),
    "grain_size": (20, 8),
    "descriptor_offset": (28, 8),
    "descriptor_size": (36, 8),
    "table_entries": (44, 4),
    "redundant_offset": (48, 8),
    "directory_offset": (56, 8),
    "overhead": (64, 8),
    "compression": (77, 2),
}

SCRIPT = """
import sys
import qimg
from qimg.context import Context
from qimg.errors import QimgError

context = Context(warn=lambda notice: None)

def attempt(what):
    try:
        return what()
    except QimgError as error:
        assert "\\n" not in str(error)
        print(type(error).__name__, error)

def look(path):
    attempt(lambda: qimg.info(path, format="vmdk", context=context))
    attempt(lambda: qimg.check(path, format="vmdk", context=context))
    disk = attempt(lambda: qimg.open(path, format="vmdk", context=context))
    if disk is None:
        return
    with disk:
        for start in (0, disk.size // 2, max(0, disk.size - 65536)):
            attempt(lambda: disk.read(start, 65536))
        def some():
            for number, _ in enumerate(disk.extents(0, min(disk.size, 1 << 40))):
                if number > 20000:
                    break
        attempt(some)

for path in sys.argv[1:]:
    look(path)
print("done")
"""


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def survive(*paths: Path) -> str:
    """Look at images in a process of little memory and time; fails unless each ends in a value or an error of
    ours."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)],
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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each kind, by the real program."""
    folder = tmp_path_factory.mktemp("hostile")
    write_raw(folder / "a.raw", "AB-0C--A")
    for name, options in KINDS.items():
        run_real(["convert", "-f", "raw", "-O", "vmdk", "-o", options, "a.raw", f"{name}.vmdk"], folder).ok()
    return folder


def header(**values: int) -> bytes:
    """A sector of a sparse header, sound but for `values`."""
    raw = bytearray(SECTOR)
    sound = {
        "version": 1,
        "flags": 3,
        "capacity": 1024,
        "grain_size": 128,
        "descriptor_offset": 1,
        "descriptor_size": 20,
        "table_entries": 512,
        "redundant_offset": 21,
        "directory_offset": 26,
        "overhead": 128,
        "compression": 0,
    }
    raw[:4] = b"KDMV"
    raw[73:77] = b"\n \r\n"
    for name, value in (sound | values).items():
        offset, size = FIELDS[name]
        raw[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(raw)


TEXT = b'# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'


def sparse(path: Path, *parts: tuple[int, bytes], **values: int) -> Path:
    """A sparse image of 64 KiB with this header and these bytes at these sectors."""
    with path.open("wb") as file:
        file.truncate(65536)
        file.write(header(**values) + TEXT)
        for sector, raw in parts:
            file.seek(sector * SECTOR)
            file.write(raw)
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 4}, "Unsupported VMDK version 4"),
        ({"version": 0xFFFFFFFF}, "Unsupported VMDK version"),
        ({"table_entries": 513}, "L2 table size too big"),
        ({"table_entries": 0xFFFFFFFF}, "L2 table size too big"),
        ({"table_entries": 0}, "L1 entry size is invalid"),
        ({"grain_size": 0}, "L1 entry size is invalid"),
        ({"grain_size": 0x200001}, "Invalid granularity"),
        ({"grain_size": (1 << 64) - 1}, "Invalid granularity"),
        ({"grain_size": 1 << 32, "table_entries": 512}, "Invalid granularity"),
        ({"capacity": (32 << 20) * 65536 + 1}, "L1 size too big"),
        ({"capacity": 1 << 50}, "L1 size too big"),
        ({"capacity": (1 << 64) - 1}, "capacity is beyond any file"),
        ({"capacity": 32 << 20, "grain_size": 1, "table_entries": 1}, None),
        ({"capacity": (32 << 20) + 1, "grain_size": 1, "table_entries": 1}, "L1 size too big"),
        ({"directory_offset": (1 << 64) - 2}, "directory_offset is beyond any file"),
        ({"directory_offset": (1 << 64) - 1}, "Invalid footer"),
        ({"redundant_offset": 1 << 63}, "redundant_offset is beyond any file"),
        ({"redundant_offset": 1 << 63, "flags": 1}, None),
        ({"overhead": (1 << 64) - 1}, "overhead is beyond any file"),
        ({"overhead": 129}, "File truncated, expecting at least 66048 bytes"),
        ({"descriptor_offset": 1 << 60}, "behind the end of the file"),
        ({"capacity": 0, "descriptor_offset": (1 << 64) - 1}, "behind the end of the file"),
        ({"descriptor_size": (1 << 64) - 1}, None),
        ({"directory_offset": 1 << 53}, None),
        ({"grain_size": 0x200000}, None),
        ({"grain_size": 3, "table_entries": 5}, None),
    ],
)
def test_every_field_of_the_header_is_bounded_before_it_is_used(
    tmp_path: Path, values: dict[str, int], message: str | None
) -> None:
    path = sparse(tmp_path / "d.vmdk", **values)
    if message is None:
        qimg.open(path).close()
    else:
        with pytest.raises(QimgError, match=message):
            qimg.open(path)
    survive(path)


def test_a_descriptor_without_end_costs_a_mebibyte(tmp_path: Path) -> None:
    path = tmp_path / "d.vmdk"
    line = b'RW 1 FLAT "x" 0\n'
    path.write_bytes(TEXT + line * (200 << 20 >> 4))
    assert "OpenError" in survive(path)


def test_thousands_of_extents_are_opened_or_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 512)
    path = tmp_path / "d.vmdk"
    path.write_bytes(TEXT + b'RW 1 FLAT "x" 0\n' * 60000)
    survive(path)


def test_an_image_that_names_itself_as_its_extent_is_no_endless_story(tmp_path: Path) -> None:
    for kind, name in (("FLAT", "d"), ("SPARSE", "e"), ("VMFSSPARSE", "f"), ("SESPARSE", "g")):
        path = tmp_path / f"{name}.vmdk"
        offset = b" 0" if kind == "FLAT" else b""
        path.write_bytes(TEXT + f'RW 8 {kind} "{name}.vmdk"'.encode() + offset + b"\n")
        survive(path)


def test_a_chain_of_parents_that_comes_round_is_an_error(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "a")):
        raw = bytearray(sparse(tmp_path / f"{name}.vmdk").read_bytes())
        text = TEXT + f'parentFileNameHint="{parent}.vmdk"\n'.encode()
        raw[SECTOR : SECTOR + len(text)] = text
        (tmp_path / f"{name}.vmdk").write_bytes(raw)
    assert "infinite loop" in survive(tmp_path / "a.vmdk")


def test_one_grain_table_for_a_whole_directory_is_bounded(tmp_path: Path) -> None:
    """Four million directory entries that lead to the same grain table full of the same grain."""
    entries = 4 << 20
    table = 128 + entries // 128
    path = sparse(
        tmp_path / "d.vmdk",
        (128, struct.pack("<I", table) * entries),
        (table, struct.pack("<512I", *[128] * 512)),
        capacity=entries * 65536,
        directory_offset=128,
        flags=1,
    )
    survive(path)


def test_a_directory_of_all_different_tables_is_bounded(tmp_path: Path) -> None:
    entries = 1 << 17
    words = struct.pack(f"<{entries}I", *(256 + 3 * number for number in range(entries)))
    path = sparse(tmp_path / "d.vmdk", (128, words), capacity=entries * 65536, directory_offset=128, flags=1)
    os.truncate(path, 1 << 30)
    survive(path)


@pytest.mark.parametrize("size", [0, 1, 131072, 131073, 0xFFFFFFFF])
def test_a_marker_of_any_size_costs_two_grains(tmp_path: Path, size: int) -> None:
    import zlib

    bomb = zlib.compress(bytes(64 << 20), 9)
    path = sparse(
        tmp_path / "d.vmdk",
        (26, struct.pack("<I", 27)),
        (27, struct.pack("<I", 128)),
        (128, struct.pack("<QI", 0, size) + bomb),
        compression=1,
        version=3,
        flags=0x30001,
    )
    assert ("CorruptImage" in survive(path)) == (size != 131072)


def test_a_bomb_gives_a_grain(tmp_path: Path) -> None:
    import zlib

    bomb = zlib.compress(bytes(64 << 20), 9)
    path = sparse(
        tmp_path / "d.vmdk",
        (26, struct.pack("<I", 27)),
        (27, struct.pack("<I", 128)),
        (128, struct.pack("<QI", 0, len(bomb)) + bomb),
        compression=1,
        version=3,
        flags=0x30001,
    )
    survive(path)
    with qimg.open(path) as disk:
        assert disk.read(0, 65536) == bytes(65536)


# -- mutations


def mutate(chance: random.Random, data: bytes, interesting: int) -> bytes:
    """Some bytes or words changed, mostly in the first `interesting` bytes; sometimes cut or made longer."""
    raw = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        reach = min(len(raw), interesting) if chance.random() < 0.8 else len(raw)
        at = chance.randrange(reach)
        way = chance.randrange(4)
        if way == 0:
            raw[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            raw[at] = chance.randrange(256)
        elif way == 2:
            word = chance.choice((0, 1, 127, 128, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)))
            raw[at : at + 4] = word.to_bytes(4, "little")
        else:
            word = chance.choice((0, 1, (1 << 63) - 1, (1 << 64) - 1, 1 << chance.randrange(64)))
            raw[at : at + 8] = word.to_bytes(8, "little")
    if chance.random() < 0.2:
        del raw[chance.randrange(len(raw)) :]
    elif chance.random() < 0.1:
        raw += bytes(chance.randrange(1, 5) * 65536)
    return bytes(raw)


def look(path: Path) -> None:
    """All that reads, and a little that writes; raises what is not a QimgError."""
    context = Context(warn=lambda notice: None)
    for what in (
        lambda: qimg.info(path, format="vmdk", context=context),
        lambda: qimg.check(path, format="vmdk", context=context),
        lambda: _read(path, context),
        lambda: qimg.convert(
            path.with_name("b.raw"),
            path,
            source_format="raw",
            format="vmdk",
            create=False,
            context=context,
        ),
        lambda: qimg.resize(path, 64 << 20, format="vmdk", context=context),
        lambda: _read(path, context),
    ):
        try:
            what()
        except QimgError as error:
            assert "\n" not in str(error)


def _read(path: Path, context: Context) -> None:
    with qimg.open(path, format="vmdk", context=context) as disk:
        disk.read(0, min(disk.size, 1 << 20))
        for number, _ in enumerate(disk.extents(0, min(disk.size, 1 << 30))):
            if number > 5000:
                break


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
def test_changed_images_end_in_a_result_or_an_error_of_ours(images: Path, tmp_path: Path, kind: str) -> None:
    whole = (images / f"{kind}.vmdk").read_bytes()
    for other in images.iterdir():
        if other.name.startswith(f"{kind}-"):
            (tmp_path / other.name).write_bytes(other.read_bytes())
    path = tmp_path / f"{kind}.vmdk"
    write_raw(tmp_path / "b.raw", "BA")

    @settings(
        max_examples=80,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.integers(0, 1 << 32))
    def run(seed: int) -> None:
        path.write_bytes(mutate(random.Random(seed), whole, 16384))
        with bounded(seconds=SECONDS):
            look(path)
        for other in images.iterdir():
            if other.name.startswith(f"{kind}-"):
                (tmp_path / other.name).write_bytes(other.read_bytes())

    run()


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("kind", ["split"])
def test_changed_extents_end_in_a_result_or_an_error_of_ours(images: Path, tmp_path: Path, kind: str) -> None:
    extent = images / f"{kind}-s001.vmdk"
    whole = extent.read_bytes()
    (tmp_path / f"{kind}.vmdk").write_bytes((images / f"{kind}.vmdk").read_bytes())
    write_raw(tmp_path / "b.raw", "BA")
    for seed in range(150):
        (tmp_path / extent.name).write_bytes(mutate(random.Random(seed), whole, 16384))
        with bounded(seconds=SECONDS):
            look(tmp_path / f"{kind}.vmdk")


@pytest.mark.peer("qemu-img")
def test_changed_images_take_little_memory_and_time(images: Path, tmp_path: Path) -> None:
    paths = []
    for kind in ("sparse", "zeroed", "stream"):
        whole = (images / f"{kind}.vmdk").read_bytes()
        for seed in range(40):
            paths.append(tmp_path / f"{kind}{seed}.vmdk")
            paths[-1].write_bytes(mutate(random.Random(seed + 1000), whole, 400))
    survive(*paths)
