"""Random disks, options and sizes: what qimg converts is sound and the same to the real program."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.build import io, real_content
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SECTOR = 512
QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

#: What may happen to a range of a disk. Capital letters: each write has its own byte.
OPERATIONS = ("write", "write", "zero", "compress", "unmapped zero")


@st.composite
def disks(draw: st.DrawFn) -> dict[str, Any]:
    """A disk in a format: size in sectors, creation options, writes (operation, first sector, sectors)."""
    format = draw(st.sampled_from(["raw", "qcow2", "qcow2"]))
    size = draw(st.integers(1, 2000))
    options: list[str] = []
    bits = 9
    if format == "qcow2":
        bits = draw(st.sampled_from([9, 10, 12, 14, 16, 16, 17, 21]))
        version = draw(st.sampled_from(["1.1", "1.1", "0.10"]))
        options += [f"cluster_size={1 << bits}", f"compat={version}"]
        if version == "1.1":
            options.append(f"extended_l2={draw(st.sampled_from(['on', 'off'])) if bits >= 14 else 'off'}")
            options.append(f"compression_type={draw(st.sampled_from(['zlib', 'zstd']))}")
            options.append(f"refcount_bits={draw(st.sampled_from([1, 8, 16, 64]))}")
    writes = []
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, min(size - first, 400)))
        writes.append((draw(st.sampled_from(OPERATIONS)), first, length))
    return {"format": format, "size": size, "options": options, "writes": writes, "cluster": 1 << bits}


def make(path: Path, disk: dict[str, Any], *backing: str) -> None:
    """Build a disk through the real programs."""
    words = ["create", "-q", "-f", disk["format"]]
    if disk["options"]:
        words += ["-o", ",".join(disk["options"])]
    run_real([*words, *backing, path, str(disk["size"] * SECTOR)], path.parent).ok()
    commands = []
    written: list[tuple[int, int]] = []  # what is there cannot be written compressed
    packed: list[tuple[int, int]] = []  # the real program's writes over small compressed clusters do damage
    cluster = disk["cluster"]
    for number, (operation, first, length) in enumerate(disk["writes"]):
        start, count = first * SECTOR, length * SECTOR
        low, high = start - start % cluster, -(-(start + count) // cluster) * cluster
        if not _apart(low, high, packed):
            continue
        if operation == "compress" and disk["format"] == "qcow2":
            high = low + cluster
            if high > disk["size"] * SECTOR or not _apart(low, high, written):
                continue
            commands.append(f"write -q -c -P {number + 1} {low} {cluster}")
            packed.append((low, high))
        elif operation == "zero" or (operation == "unmapped zero" and disk["format"] == "raw"):
            commands.append(f"write -q -z {start} {count}")
        elif operation == "unmapped zero":
            commands.append(f"write -q -z -u {start} {count}")
        else:
            commands.append(f"write -q -P {number + 1} {start} {count}")
        written.append((low, high))
    if commands:
        io(path, commands, format=disk["format"])


def _apart(start: int, end: int, ranges: list[tuple[int, int]]) -> bool:
    return all(end <= low or high <= start for low, high in ranges)


@st.composite
def targets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Format and words of a conversion."""
    format = draw(st.sampled_from(["raw", "qcow2", "qcow2", "qcow2"]))
    words = ["-O", format]
    if draw(st.integers(0, 3)) == 0:
        words += ["-S", draw(st.sampled_from(["0", "512", "1k", "8k", "64k", "1M"]))]
    elif draw(st.integers(0, 5)) == 0:
        words += ["-C"]
    if draw(st.integers(0, 7)) == 0:
        words += ["-t", draw(st.sampled_from(["none", "writeback", "directsync"]))]
    words += ["-m", draw(st.sampled_from(["1", "8", "16"]))]
    if draw(st.booleans()):
        words.append("-W")
    if format == "qcow2":
        words += draw(_qcow2_words(compress="-C" not in words))
    return format, words


@st.composite
def _qcow2_words(draw: st.DrawFn, *, compress: bool) -> list[str]:
    words = ["-c"] if compress and draw(st.integers(0, 2)) == 0 else []
    bits = draw(st.sampled_from([9, 11, 12, 15, 16, 16, 18, 21]))
    options = [f"cluster_size={1 << bits}"]
    if draw(st.integers(0, 3)) == 0:
        options.append("compat=0.10")
    else:
        options.append(f"refcount_bits={draw(st.sampled_from([1, 2, 4, 16, 32, 64]))}")
        options.append(f"compression_type={draw(st.sampled_from(['zlib', 'zstd']))}")
        if bits >= 14 and draw(st.booleans()):
            options.append("extended_l2=on")
        if draw(st.integers(0, 4)) == 0:
            options.append("lazy_refcounts=on")
        if not words and draw(st.integers(0, 4)) == 0:
            options.append("data_file=out.data")
    if not words and draw(st.integers(0, 4)) == 0:
        options.append(f"preallocation={draw(st.sampled_from(['metadata', 'falloc', 'full']))}")
    return [*words, "-o", ",".join(options)]


def judge(folder: Path, name: str, format: str, out: str, out_format: str) -> None:
    """The real program finds the same content, and no fault in the image."""
    if out_format == "qcow2":
        checked = run_real(["check", "-f", "qcow2", out], folder)
        assert checked.code == 0, checked.out + checked.err
    compared = run_real(["compare", "-f", format, "-F", out_format, name, out], folder)
    assert compared.code == 0, compared.out + compared.err


@given(disks(), targets())
@QUICK
def test_a_disk_is_the_same_afterwards(disk: dict[str, Any], target: tuple[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "in", disk)
        run_qimg_inprocess(["convert", "-f", disk["format"], *target[1], "in", "out"], folder).ok()
        judge(folder, "in", disk["format"], "out", target[0])
        assert (folder / "out").stat().st_size or target[0] == "raw"


@given(disks(), disks(), targets())
@QUICK
def test_a_chain_becomes_one_image(
    below: dict[str, Any], above: dict[str, Any], target: tuple[str, list[str]]
) -> None:
    above = _overlay(above)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "base", below)
        make(folder / "in", above, "-b", "base", "-F", below["format"])
        run_qimg_inprocess(["convert", *target[1], "in", "out"], folder).ok()
        judge(folder, "in", "qcow2", "out", target[0])


def _overlay(disk: dict[str, Any]) -> dict[str, Any]:
    """The same as qcow2, for only that has a backing file."""
    if disk["format"] == "qcow2":
        return disk
    return {**disk, "format": "qcow2", "cluster": 4096, "options": ["cluster_size=4096"]}


@given(disks(), disks(), _qcow2_words(compress=True))
@QUICK
def test_an_overlay_is_the_same_over_the_same_backing_file(
    below: dict[str, Any], above: dict[str, Any], words: list[str]
) -> None:
    above = _overlay(above)
    words = [_without(word, "preallocation") for word in words]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "base", below)
        make(folder / "in", above, "-b", "base", "-F", below["format"])
        run_qimg_inprocess(
            ["convert", "-O", "qcow2", "-B", "base", "-F", below["format"], *words, "in", "out"], folder
        ).ok()
        judge(folder, "in", "qcow2", "out", "qcow2")


def _without(options: str, name: str) -> str:
    return ",".join(option for option in options.split(",") if not option.startswith(name))


@given(disks(), disks(), disks(), _qcow2_words(compress=False))
@QUICK
def test_over_another_backing_file_it_is_what_the_real_program_makes_of_it(
    below: dict[str, Any], above: dict[str, Any], other: dict[str, Any], words: list[str]
) -> None:
    above = _overlay(above)
    words = [_without(word, "preallocation") for word in words]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "base", below)
        make(folder / "other", other)
        make(folder / "in", above, "-b", "base", "-F", below["format"])
        words = ["convert", "-O", "qcow2", "-B", "other", "-F", other["format"], *words, "in"]
        data = [word.replace("out.data", "real.data") for word in words]
        run_real([*data, "real"], folder).ok()
        run_qimg_inprocess([*words, "out"], folder).ok()
        run_real(["check", "-f", "qcow2", "out"], folder).ok()
        source, real, ours = (real_content(folder / name) for name in ("in", "real", "out"))
        for at in range(0, len(source), SECTOR):
            # The real program lets the other file show through at some ends of disks that nothing decides
            # and that read as zeros (difference 42).
            assert ours[at : at + SECTOR] in (real[at : at + SECTOR], source[at : at + SECTOR]), at


@given(st.lists(disks(), min_size=2, max_size=4), targets())
@QUICK
def test_several_disks_come_one_after_the_other(
    sources: list[dict[str, Any]], target: tuple[str, list[str]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together = b""
        for number, disk in enumerate(sources):
            make(folder / f"in{number}", disk)
            run_real(["convert", "-f", disk["format"], "-O", "raw", f"in{number}", "one"], folder).ok()
            together += (folder / "one").read_bytes()
        (folder / "all").write_bytes(together)
        names = [f"in{number}" for number in range(len(sources))]
        run_qimg_inprocess(["convert", *target[1], *names, "out"], folder).ok()
        judge(folder, "all", "raw", "out", target[0])


@given(disks(), st.integers(0, 3000), st.sampled_from([[], ["-S", "0"], ["-S", "64k"], ["-C"], ["-W"]]))
@QUICK
def test_an_existing_file_has_the_disk_at_its_start_and_its_old_end(
    disk: dict[str, Any], more: int, words: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "in", disk)
        run_real(["convert", "-f", disk["format"], "-O", "raw", "in", "expected"], folder).ok()
        expected = (folder / "expected").read_bytes()
        (folder / "out").write_bytes(b"\xee" * (len(expected) + more))
        run_qimg_inprocess(["convert", "-n", "-f", disk["format"], *words, "in", "out"], folder).ok()
        assert (folder / "out").read_bytes() == expected + b"\xee" * more
