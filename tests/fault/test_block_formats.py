"""A power cut or a failing disk at any moment of a change in place leaves vdi, qed, qcow and vpc images that
hold in every sector what was there before or what was written; so the real program reads them.

What a check may find of such an image: leaked clusters of qed; a vdi header that counts more blocks than
there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from support import crash
from support.batches import batches, failures
from support.build import real_content, write_raw
from support.model import Guest
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 6 * MIB
#: Name -> format, ``-o``, and whether the image lies over a backing file.
KINDS = {
    "vdi": ("vdi", "", False),
    "static vdi": ("vdi", "static=on", False),
    "qed": ("qed", "", False),
    "qed of small clusters": ("qed", "cluster_size=4k,table_size=2", False),
    "qed overlay": ("qed", "", True),
    "qcow": ("qcow", "", False),
    "qcow overlay": ("qcow", "", True),
    "compressed qcow": ("qcow", "compressed", False),
    "vpc": ("vpc", "force_size=on", False),
    "fixed vpc": ("vpc", "force_size=on,subformat=fixed", False),
}


def prepare(folder: Path, kind: str) -> tuple[Path, str, bytes]:
    """An image of the real program, half full, its format and its content."""
    format, options, over = KINDS[kind]
    source = write_raw(folder / "source.raw", "AB-" * 3 + "-" * 40 + "CD", size=SIZE)
    path = folder / "image"
    if over:
        run_real(["create", "-q", "-f", format, "-b", source, "-F", "raw", path]).ok()
        return path, format, source.read_bytes()
    if options == "compressed":
        run_real(
            ["convert", "-c", "-f", "raw", "-O", format, source, path]
        )  # fails without a word at its end
    else:
        more = ["-o", options] if options else []
        run_real(["convert", "-f", "raw", "-O", format, *more, source, path]).ok()
    return path, format, real_content(path, format=format)


def look(path: Path, format: str, allowed: list[bytes], what: str) -> None:
    """Judge one state, by the real program and by ours."""
    found = real_content(path, format=format)
    wrong = crash.difference(found, allowed)
    assert wrong is None, f"{what}: {wrong}"
    with qimg.open(path, format=format) as disk:
        assert disk.read(0, disk.size) == found, f"{what}: we read something else"
    checked = run_real(["check", "-f", format, path])
    if format == "vdi":
        lines = checked.err.splitlines()
        assert all("allocated blocks mismatch" in line for line in lines), f"{what}: {checked.err}"
        for line in lines:
            counted, said = (int(word.strip(",")) for word in line.split() if word.strip(",").isdigit())
            assert said > counted, f"{what}: the next block would overwrite one"
        return
    allowed_codes = (0, 3) if format == "qed" else (63,)
    assert checked.code in allowed_codes, f"{what}: {checked.out}{checked.err}"


def survives(
    folder: Path,
    format: str,
    operation: Callable[[], object],
    allowed: list[bytes],
    *,
    seed: int,
    limit: int = 45,
) -> None:
    """After each power cut, every sector is as in one of `allowed`; at the end, as in the last."""
    recording = crash.record(folder, ["image"], operation)
    assert real_content(folder / "image", format=format) == allowed[-1]
    with crash.scratch(folder) as place:
        for state in recording.states(limit=limit, seed=seed):
            path = place / "image"
            path.unlink(missing_ok=True)
            path.write_bytes(state.files["image"])
            look(path, format, allowed[-1:] if state.durable else allowed, state.what)


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_while_a_guest_writes(kind: str, tmp_path: Path) -> None:
    path, format, content = prepare(tmp_path, kind)
    run, contents = batches(path, format, content, 11)
    survives(tmp_path, format, run, [content, *contents], seed=2)


@pytest.mark.parametrize("kind", ["vdi", "static vdi", "qed", "vpc", "fixed vpc"])
@pytest.mark.parametrize("more", [512, 3 * MIB + 512, 20 * MIB])
def test_a_power_cut_while_the_disk_grows(kind: str, more: int, tmp_path: Path) -> None:
    path, format, content = prepare(tmp_path, kind)
    grown = content + bytes(more)
    survives(
        tmp_path,
        format,
        lambda: qimg.resize(path, SIZE + more, format=format),
        [content, grown],
        seed=3,
        limit=30,
    )


def test_a_power_cut_while_the_map_of_a_vdi_moves_into_the_place_of_blocks(tmp_path: Path) -> None:
    """The map has room for 128 blocks; a disk of 129 needs more."""
    path = tmp_path / "image"
    source = write_raw(tmp_path / "source.raw", "AB-" + "-" * 13 + "C" * 16 + "D", size=128 * MIB)
    run_real(["convert", "-f", "raw", "-O", "vdi", source, path]).ok()
    before = path.read_bytes()
    recording = crash.record(tmp_path, ["image"], lambda: qimg.resize(path, 129 * MIB + 512))
    assert qimg.check(path, format="vdi").corruptions == 0
    run_real(["check", "-f", "vdi", path]).ok()
    head = source.read_bytes()[: 4 * MIB]
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=60, seed=4):
            (place / "image").unlink(missing_ok=True)
            (place / "image").write_bytes(state.files["image"])
            with qimg.open(place / "image") as disk:
                assert disk.size in ((129 * MIB + 512,) if state.durable else (128 * MIB, 129 * MIB + 512))
                assert disk.read(0, 4 * MIB) == head, state.what
                assert not any(disk.read(4 * MIB, disk.size - 4 * MIB)), state.what
            compared = run_real(["compare", "-f", "vdi", "-F", "raw", place / "image", source])
            assert compared.code == 0, state.what
    assert path.read_bytes() != before


@pytest.mark.parametrize("kind", ["vdi", "qed", "qed overlay", "qcow", "vpc"])
def test_a_disk_that_fails_while_a_guest_writes(kind: str, tmp_path: Path) -> None:
    path, format, content = prepare(tmp_path, kind)
    run, contents = batches(path, format, content, 5)
    for nth in failures(path, run):
        if nth % 2 == 1:
            look(path, format, [content, *contents], f"change {nth} failed")
    assert nth > 8
    assert real_content(path, format=format) == contents[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_while_other_content_is_converted_into_it(kind: str, tmp_path: Path) -> None:
    path, format, content = prepare(tmp_path, kind)
    other = write_raw(tmp_path / "other.raw", "-XY-Z" * 5 + "0" * 20, size=SIZE)
    survives(
        tmp_path,
        format,
        lambda: qimg.convert(
            other, path, source_format="raw", format=format, create=False, cache="writeback"
        ),
        [content, bytes(SIZE), other.read_bytes()],
        seed=5,
        limit=25,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_while_an_overlay_is_committed_into_it(kind: str, tmp_path: Path) -> None:
    path, format, content = prepare(tmp_path, kind)
    top = tmp_path / "top"
    run_real(["create", "-q", "-f", "qcow2", "-b", path, "-F", format, top]).ok()
    committed = bytearray(content)
    with Guest(top, content) as guest:
        for number, offset in enumerate((0, 3 * 65536, 2 * MIB, 5 * MIB)):
            data = bytes([0x31 + number]) * 131072
            guest.write(offset, data)
            committed[offset : offset + len(data)] = data
    survives(
        tmp_path,
        format,
        lambda: qimg.commit(top, format="qcow2"),
        [content, bytes(committed)],
        seed=6,
        limit=25,
    )


@pytest.mark.parametrize("length", [10, 400, 600, 3000])
def test_a_power_cut_while_the_backing_file_of_a_qed_changes(length: int, tmp_path: Path) -> None:
    path, _format, content = prepare(tmp_path, "qed overlay")
    folder = "./" * (length // 2)
    for step in range(2):
        old = path.read_bytes()
        name = f"{folder}source.raw" if step == 0 else f"{folder}././source.raw"
        recording = crash.record(
            tmp_path, ["image"], lambda name=name: qimg.rebase(path, name, backing_format="raw", unsafe=True)
        )
        assert qimg.info(path).backing_filename == name
        with crash.scratch(tmp_path) as place:
            for state in recording.states(limit=30, seed=7):
                (place / "image").unlink(missing_ok=True)
                (place / "image").write_bytes(state.files["image"])
                assert real_content(place / "image", format="qed") == content, state.what
        assert path.read_bytes() != old
