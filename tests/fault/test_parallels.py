"""A power cut or a failing disk at any moment of a change in place leaves a parallels image that holds in
every sector what was there before or what was written.

States come from `support.crash`. The judge is the real ``check -r all`` (an image that was in use says so,
and what was not cut off yet is a leak), then what the real program reads.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from support import crash
from support.batches import batches, failures
from support.build import io, real_content, write_raw
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB
CLUSTERS = ("64k", "1M", "1536")


def prepare(folder: Path, cluster: str) -> tuple[Path, bytes]:
    """An image of the real program, half full, and its content."""
    source = write_raw(folder / "source.raw", "AB-" * 3 + "-" * 25 + "CD", size=SIZE)
    path = folder / "image"
    options = ["-f", "raw", "-O", "parallels", "-o", f"cluster_size={cluster}"]
    run_real(["convert", *options, source, path]).ok()
    return path, real_content(path, format="parallels")


def look(place: Path, content: bytes, allowed: list[bytes], what: str, *, finished: bool = False) -> None:
    """Judge one state, by the real program and by ours."""
    theirs, ours = place / "theirs", place / "ours"
    for path in (theirs, ours):
        path.write_bytes(content)
    before = run_real(["check", "-f", "parallels", theirs])
    wrong = before.err.replace("ERROR image was not closed correctly\n", "")
    assert wrong == "" or wrong.startswith("ERROR space leaked"), f"{what}: {wrong}"
    assert "not closed" not in before.err or not finished, what
    mine = qimg.check(ours, format="parallels")
    assert mine.corruptions == before.err.count("not closed"), what
    found = real_content(theirs, format="parallels")
    difference = crash.difference(found, allowed)
    assert difference is None, f"{what}: {difference}"
    with qimg.open(ours, format="parallels") as disk:
        assert disk.read(0, disk.size) == found, f"{what}: we read something else"
    assert run_real(["check", "-r", "all", "-f", "parallels", theirs]).code == 0, what
    assert real_content(theirs, format="parallels") == found, what


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_power_cut_while_a_guest_writes(cluster: str, tmp_path: Path) -> None:
    path, content = prepare(tmp_path, cluster)
    run, contents = batches(path, "parallels", content, 11, count=4, zeros=0.35)
    recording = crash.record(tmp_path, ["image"], run)
    assert real_content(path, format="parallels") == contents[-1]
    assert run_real(["check", path]).code == 0
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=25, seed=2):
            allowed = contents[-1:] if state.durable else [content, *contents]
            look(place, state.files["image"], allowed, state.what, finished=state.durable)


@pytest.mark.parametrize(
    ("cluster", "size"), [("1M", 9 * MIB), ("64k", 3 << 30), ("1536", 12 * MIB), ("512", 40 * MIB)]
)
def test_a_power_cut_while_the_disk_grows(cluster: str, size: int, tmp_path: Path) -> None:
    """In all but the first case the table outgrows its room, and clusters move."""
    path = tmp_path / "image"
    run_real(["create", "-q", "-f", "parallels", "-o", f"cluster_size={cluster}", path, str(SIZE - 512)]).ok()
    io(path, ["write -P 7 0 100k", f"write -P 8 {SIZE - 70 * KIB} {69 * KIB}"], format="parallels")
    content = real_content(path, format="parallels")
    first = path.stat().st_size
    recording = crash.record(tmp_path, ["image"], lambda: qimg.resize(path, size))
    assert path.stat().st_size >= first
    run_real(["check", path]).ok()
    sizes = set()
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=20, seed=3):
            image = place / "state"
            image.write_bytes(state.files["image"])
            found = run_real(["check", "-r", "all", "-f", "parallels", image])
            assert found.code == 0, state.what + found.out + found.err
            repairs = [line for line in found.err.splitlines() if "not closed" not in line]
            assert all("space leaked" in line for line in repairs), state.what + found.err
            with qimg.open(image, format="parallels") as disk:
                sizes.add(disk.size)
                assert disk.read(0, len(content)) == content, state.what
                assert not any(disk.read(len(content), min(disk.size, 16 * MIB) - len(content))), state.what
            reads = ["read -P 7 0 100k", f"read -P 8 {SIZE - 70 * KIB} {69 * KIB}", "read -P 0 100k 1M"]
            assert "failed" not in io(image, reads, format="parallels", options=["-r"]), state.what
            if state.durable:
                assert qimg.info(image).virtual_size == size
    assert sizes == {len(content), size}


@pytest.mark.parametrize("how", ["twice", "outside"])
def test_a_power_cut_while_an_image_is_repaired(how: str, tmp_path: Path) -> None:
    path, _content = prepare(tmp_path, "64k")
    raw = bytearray(path.read_bytes())
    entries = {"twice": (1, 3), "outside": (777,)}[how]
    for number, value in enumerate(entries, 10):
        raw[64 + 4 * number : 68 + 4 * number] = value.to_bytes(4, "little")
    path.write_bytes(raw)
    with qimg.open(path) as disk:
        before = disk.read(0, disk.size)
    recording = crash.record(tmp_path, ["image"], lambda: qimg.check(path, fix="all"))
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=20, seed=4):
            image = place / "state"
            image.write_bytes(state.files["image"])
            with qimg.open(image, format="parallels") as disk:
                assert disk.read(0, disk.size) == before, state.what
            if state.durable:
                assert run_real(["check", image]).code == 0
            qimg.check(image, format="parallels", fix="all")
            assert run_real(["check", image]).code == 0
            assert real_content(image, format="parallels") == before


@pytest.mark.parametrize("cluster", ["64k", "24k"])
def test_a_disk_that_fails_while_a_guest_writes(cluster: str, tmp_path: Path) -> None:
    path, content = prepare(tmp_path, cluster)
    run, contents = batches(path, "parallels", content, 5, count=4, zeros=0.35)
    with crash.scratch(tmp_path) as place:
        for nth in failures(path, run, step=3):
            if nth % 2:
                look(place, path.read_bytes(), [content, *contents], f"change {nth} failed")
    assert nth > 20
    assert real_content(path, format="parallels") == contents[-1]


def test_a_failing_disk_while_the_disk_grows(tmp_path: Path) -> None:
    path = tmp_path / "image"
    run_real(["create", "-q", "-f", "parallels", "-o", "cluster_size=512", path, str(SIZE)]).ok()
    io(path, ["write -P 7 0 20k"], format="parallels")
    content = real_content(path, format="parallels")
    for nth in failures(path, lambda: qimg.resize(path, 5 * MIB), step=3):
        checked = run_real(["check", "-f", "parallels", path])
        assert "outside" not in checked.err, f"change {nth} failed"
        found = real_content(path, format="parallels")
        assert found[:SIZE] == content
        assert not any(found[SIZE:])
        qimg.resize(path, 5 * MIB, context=Context(warn=lambda notice: None))
        run_real(["check", "-f", "parallels", path]).ok()
        assert real_content(path, format="parallels") == content + bytes(2 * MIB)
    assert nth > 30
