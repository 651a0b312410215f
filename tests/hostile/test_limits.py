"""Every command lives within what callers allow it: 1 GiB of address space, and seconds (decisions 9).

OpenStack runs `info` and `convert` under RLIMIT_AS and takes anything on standard error for a failure.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from support.build import write_raw
from support.run import command, run_peer, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
#: What a process of ours may take: `memory` bytes resident, `seconds` of processor time (this machine is
#: slow, and others use it: the bounds are for what runs away).
MEMORY = 350 * MIB
SECONDS = 20.0
#: Seconds of processor time after which work on a hostile image is cut short.
CUT_SHORT = 3


class Cost(NamedTuple):
    """What a run showed and took: `memory` resident at most, in bytes, `seconds` of processor time."""

    code: int
    out: str
    err: str
    memory: int
    seconds: float


#: Starts a process and writes down its exit code, peak memory (KiB) and processor time. In between, because a
#: process that is forked from the tests counts their memory as its own.
SMALL_PARENT = """
import os, resource, sys
code = os.spawnv(os.P_WAIT, sys.argv[2], sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    print(code, used.ru_maxrss, used.ru_utime + used.ru_stime, file=file)
"""


def limited(words: list[str], folder: Path, *, address_space: int = GIB, cpu: int = 60) -> Cost:
    """Ours as a process with limits; the test fails if it hangs."""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    out, err, cost = folder / "stdout", folder / "stderr", folder / "cost"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", SMALL_PARENT, cost, *command(), *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=lower,
            check=True,
        )
    code, peak, seconds = cost.read_text().split()
    texts = [path.read_text("utf-8", "surrogateescape") for path in (out, err)]
    for path in (out, err, cost):
        path.unlink()
    return Cost(int(code), texts[0], texts[1], int(peak) * KIB, float(seconds))


def modest(cost: Cost, *, code: int = 0, memory: int = MEMORY, seconds: float = SECONDS) -> Cost:
    """Itself; fails the test unless the run ended with `code`, quietly if that is success, and was cheap."""
    assert cost.code == code, cost.err[-2000:]
    if code == 0:
        assert cost.err == ""
    assert "Traceback" not in cost.err
    assert "MemoryError" not in cost.err
    assert cost.memory < memory
    assert cost.seconds < seconds
    return cost


# -- ordinary work


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of some GiB that take some MiB: data at the beginning, in the middle and at the end."""
    folder = tmp_path_factory.mktemp("limits")
    with (folder / "big.raw").open("wb") as file:
        file.truncate(6 * GIB)
    write_raw(folder / "piece", "ABCD" * 32)
    data = (folder / "piece").read_bytes()
    with (folder / "big.raw").open("r+b") as file:
        for start in (0, 3 * GIB + 70001 // 512 * 512, 6 * GIB - len(data)):
            file.seek(start)
            file.write(data)
    for name, more in (
        ("big.q", []),
        ("packed.q", ["-c"]),
        ("zstd.q", ["-c", "-o", "compression_type=zstd,cluster_size=2M"]),
        ("small.q", ["-o", "cluster_size=512"]),
        ("ext.q", ["-o", "extended_l2=on"]),
    ):
        source = "piece" if name == "small.q" else "big.raw"
        run_real(["convert", "-f", "raw", "-O", "qcow2", *more, source, name], folder).ok()
    run_real(["create", "-q", "-f", "qcow2", "-b", "big.q", "-F", "qcow2", "ov.q"], folder).ok()
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write -q -P 1 1G 1M", "ov.q"], folder).ok()
    return folder


ORDINARY = [
    "info {}",
    "info --output=json {}",
    "info --backing-chain {}",
    "map {}",
    "map --output=json {}",
    "check {}",
    "check --output=json {}",
    "measure -O qcow2 {}",
    "compare {} {}",
    "compare -s {} {}",
    "compare -f qcow2 -F raw {} big.raw",
    "convert -O raw {} out",
    "convert -O qcow2 {} out",
    "convert -m 16 -W -O qcow2 {} out",
    "convert -c -O qcow2 {} out",
    "convert -c -m 16 -O qcow2 -o compression_type=zstd,cluster_size=2M {} out",
]


CASES = [(line, name) for line in ORDINARY for name in ("big.q", "packed.q")] + [
    (line, name) for line in ORDINARY[3::2] for name in ("zstd.q", "ov.q", "ext.q")
]


@pytest.mark.parametrize(("line", "name"), CASES)
def test_ordinary_work_fits_into_a_gibibyte_of_addresses(line: str, name: str, folder: Path) -> None:
    words = line.replace("{}", name).split()
    if words[0] == "map" and "--output=json" not in words and name in ("packed.q", "zstd.q"):
        modest(limited(words, folder), code=1)
        return
    different = name == "ov.q" and words[-1] == "big.raw"
    modest(limited(words, folder), code=1 if different else 0)
    (folder / "out").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "line",
    [
        "create -q -f qcow2 new 100T",
        "create -q -f qcow2 -o cluster_size=2M,preallocation=metadata new 1T",
        "create -q -f raw new 1T",
        "create -q -f qcow2 -o preallocation=metadata new 100G",
        "info big.raw",
        "map --output=json big.raw",
        "measure -O qcow2 -f raw big.raw",
        "measure --size 60T -O qcow2",
        "convert -f raw -O qcow2 -o preallocation=metadata big.raw out",
        "convert -f raw -O raw big.raw out",
        "convert -t none -T none -f raw -O raw big.raw out",
        "convert -f raw -O qcow2 -o cluster_size=512 piece out",
        "check small.q",
        "map --output=json small.q",
        "compare -s small.q small.q",
        "convert -m 16 -c -O qcow2 small.q out",
        "convert -C -f raw -O raw big.raw out",
        "convert big.q ov.q out",
        "--help",
        "--version",
    ],
)
def test_other_work_fits_too(line: str, folder: Path) -> None:
    modest(limited(line.split(), folder))
    for name in ("new", "out"):
        (folder / name).unlink(missing_ok=True)


def test_info_takes_little_time(folder: Path) -> None:
    """OpenStack gives it two seconds of processor time."""
    for name in ("big.q", "ov.q", "big.raw"):
        modest(limited(["info", "--output=json", name], folder, cpu=2), seconds=1.0, memory=64 * MIB)


def test_the_copy_is_right_even_if_no_thread_can_be_started(folder: Path) -> None:
    """So little address space that workers or buffers run out: an error, or the right copy."""
    for space in (80, 140, 200, 300):
        found = limited(
            ["convert", "-m", "16", "-O", "raw", "packed.q", "out"], folder, address_space=space * MIB
        )
        assert found.code >= 0, f"killed by a signal at {space} MiB"
        if found.code == 0:
            assert found.err == ""
            run_real(["compare", "-F", "raw", "packed.q", "out"], folder).ok()
        (folder / "out").unlink(missing_ok=True)


# -- images made to hurt


def header(
    size: int, l1_entries: int, *, cluster_bits: int = 16, l1: int = 0x30000, backing: bytes = b""
) -> bytearray:
    """A version 2 header whose refcount table is at cluster 1 and its block at cluster 2."""
    cluster = 1 << cluster_bits
    data = bytearray(
        struct.pack(
            ">4sIQIIQIIQQIIQ",
            b"QFI\xfb",
            2,
            72 + 8 if backing else 0,
            len(backing),
            cluster_bits,
            size,
            0,
            l1_entries,
            l1,
            cluster,
            1,
            0,
            0,
        )
    )
    return data + bytes(8) + backing


def write(path: Path, *parts: tuple[int, bytes]) -> None:
    """A sparse file with these bytes at these places."""
    with path.open("wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)


def one_table_everywhere(
    path: Path, size: int, entries: Callable[[int], int], cluster_bits: int = 16
) -> None:
    """An image whose L1 entries all name one L2 table, entry n of which is ``entries(n)``."""
    cluster = 1 << cluster_bits
    count = -(-size // (cluster // 8 * cluster))
    table = 3 * cluster + -(-count * 8 // cluster) * cluster
    write(
        path,
        (0, bytes(header(size, count, cluster_bits=cluster_bits, l1=3 * cluster))),
        (cluster, struct.pack(">Q", 2 * cluster)),
        (2 * cluster, struct.pack(">H", 1) * min(cluster // 2, 64)),
        (3 * cluster, struct.pack(">Q", table | 1 << 63) * count),
        (table, b"".join(struct.pack(">Q", entries(n)) for n in range(cluster // 8))),
        (table + 4 * cluster - 1, b"\0"),
    )


HOSTILE: dict[str, Callable[[Path], None]] = {
    # 256 GiB in which every second cluster is data: two million runs.
    "comb": lambda path: one_table_everywhere(path, 256 * GIB, lambda n: (n & 1) * (1 << 63 | 0x40000)),
    # 8 GiB of the smallest clusters, all of them runs of their own.
    "crumbs": lambda path: one_table_everywhere(
        path, GIB // 2, lambda n: (n & 1) * (1 << 63 | 0x1000), cluster_bits=9
    ),
    # Each cluster claims to be compressed data at the same place.
    "packed": lambda path: one_table_everywhere(path, 64 * GIB, lambda n: 1 << 62 | 0x40000),
    # As large as can be said.
    "vast": lambda path: write(
        path, (0, bytes(header((1 << 63) - 512, 4 * MIB, cluster_bits=21, l1=6 * MIB))), (64 * MIB, b"\0")
    ),
}


@pytest.fixture(scope="module", params=HOSTILE)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / f"{request.param}.q"
    HOSTILE[request.param](path)
    return path


@pytest.mark.parametrize(
    "line",
    [
        "info {}",
        "map --output=json -l PART {}",
        "map -l PART {}",
        "measure -O qcow2 {}",
        "compare {} {}",
        "check {}",
        "convert -O qcow2 {} out",
    ],
)
def test_a_hostile_image_costs_an_error_or_time_but_not_memory(line: str, hostile: Path) -> None:
    """Under the address space limit nothing fails for want of memory, and what is cut short by the limit on
    time has not grown until then."""
    part = "16M" if hostile.name == "crumbs.q" else "2G"
    words = line.replace("{}", hostile.name).replace("PART", part).split()
    found = limited(words, hostile.parent, cpu=CUT_SHORT)
    assert found.memory < MEMORY
    assert "Traceback" not in found.err
    assert "MemoryError" not in found.err
    assert "memory" not in found.err.lower()
    if line.startswith(("info", "map")):
        assert found.code in (0, 1), "killed: it took too long"
    (hostile.parent / "out").unlink(missing_ok=True)


def chain(folder: Path, length: int) -> None:
    """c0000.q ... each standing on the one before."""
    for number in range(length):
        backing = b"c%04d.q" % (number - 1) if number else b""
        data = header(MIB, 1, backing=backing)
        write(
            folder / f"c{number:04}.q",
            (0, bytes(data)),
            (0x10000, struct.pack(">Q", 0x20000)),
            (0x20000, struct.pack(">4H", 1, 1, 1, 1)),
            (0x3FFFF, b"\0"),
        )


@pytest.mark.parametrize("line", ["info --backing-chain", "map --output=json", "check", "measure -O qcow2"])
def test_a_long_chain_is_followed(line: str, tmp_path: Path) -> None:
    chain(tmp_path, 200)
    modest(limited([*line.split(), "c0199.q"], tmp_path))


@pytest.mark.parametrize("line", ["info --backing-chain", "map", "check", "convert -O raw"])
def test_a_chain_without_end_in_sight_is_an_error(line: str, tmp_path: Path) -> None:
    chain(tmp_path, 700)
    words = [*line.split(), "c0699.q", *(["out"] if line.startswith("convert") else [])]
    found = modest(limited(words, tmp_path), code=1)
    assert "more than 500 images" in found.err
    assert len(found.err.splitlines()) == 1


def test_a_chain_that_needs_more_files_than_may_be_open_is_an_error(tmp_path: Path) -> None:
    chain(tmp_path, 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        found = modest(limited(["map", "c0199.q"], tmp_path), code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in found.err
