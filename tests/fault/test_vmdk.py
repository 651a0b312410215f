"""Crashes and failing disks while vmdk images are changed: the old content stays whole (vmdk sheet 6)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from qimg.storage.fault import CHANGE, FaultStorage, Rule
from support import crash
from support.build import content, write_raw
from support.faults import opened_through
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

OLD = "AB-0C--A0-AA"
NEW = "-B0CC-DA-0EA"
Operation = Callable[[], object]


def guest(path: Path) -> bytes:
    """What the real program reads."""
    out = path.with_name("guest.raw")
    run_real(["convert", "-f", "vmdk", "-O", "raw", path, out]).ok()
    data = out.read_bytes()
    out.unlink()
    return data


def run_commands(folder: Path, *lines: list[str]) -> Operation:
    def operation() -> None:
        for words in lines:
            run_qimg_inprocess(words, folder).ok()

    return operation


def survives(folder: Path, image: str, names: list[str], operation: Operation, limit: int = 120) -> None:
    """After any crash during `operation` every sector of `image` holds what it held before or holds
    afterwards, and its tables are sound; what is reported as done is durable."""
    before = guest(folder / image)
    recording = crash.record(folder, names, operation)
    after = guest(folder / image)
    assert recording.events
    with crash.scratch(folder) as place:
        for state in recording.states(limit=limit):
            for name, data in state.files.items():
                (place / name).unlink(missing_ok=True)
                (place / name).write_bytes(data)
            found = guest(place / image)
            allowed = [after] if state.durable else [before, after]
            wrong = crash.difference(found, allowed)
            assert wrong is None, f"{state.what}: {wrong}"
            checked = run_real(["check", "-f", "vmdk", place / image])
            assert checked.code == 0, f"{state.what}: {checked.err}"


def survives_errors(folder: Path, image: str, names: list[str], operation: Operation) -> None:
    """The same where the disk fails once, at any change; repeated, the operation comes to its end."""
    files = {name: (folder / name).read_bytes() for name in names}
    before = guest(folder / image)
    operation()
    after = guest(folder / image)
    number = 0
    failed = True
    while failed:
        number += 1
        crash.restore(folder, files)
        faults: list[FaultStorage] = []

        def wrap(file: object, nth: int = number, found: list[FaultStorage] = faults) -> FaultStorage:
            found.append(FaultStorage(file, [Rule(CHANGE, nth)]))  # type: ignore[arg-type]
            return found[-1]

        with opened_through(wrap, *names):
            try:
                operation()
                failed = False
            except (AssertionError, QimgError):
                pass
        found = guest(folder / image)
        wrong = crash.difference(found, [before, after] if failed else [after])
        assert wrong is None, f"failure at change {number}: {wrong}"
        if failed:
            operation()
            assert guest(folder / image) == after, f"again after a failure at change {number}"
    assert number > 3


def make(folder: Path, options: str, layout: str = OLD) -> list[str]:
    """An image made by the real program; the names of its files."""
    write_raw(folder / "old.raw", layout)
    write_raw(folder / "new.raw", NEW)
    run_real(["convert", "-f", "raw", "-O", "vmdk", "-o", options, "old.raw", "d.vmdk"], folder).ok()
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("d"))


OVERWRITE = ["convert", "-n", "-f", "raw", "-O", "vmdk", "new.raw", "d.vmdk", "-t", "writeback"]
KINDS = (
    "subformat=monolithicSparse",
    "zeroed_grain=on",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_while_content_is_replaced_mixes_old_and_new_sectors_at_most(
    tmp_path: Path, kind: str
) -> None:
    names = make(tmp_path, kind)
    survives(tmp_path, "d.vmdk", names, run_commands(tmp_path, OVERWRITE))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]])
def test_a_failing_disk_while_content_is_replaced_mixes_old_and_new_at_most(
    tmp_path: Path, kind: str
) -> None:
    names = make(tmp_path, kind)
    survives_errors(tmp_path, "d.vmdk", names, run_commands(tmp_path, OVERWRITE))


def test_a_crash_while_a_delta_extent_gets_new_tables_costs_nothing(tmp_path: Path) -> None:
    import struct

    write_raw(tmp_path / "new.raw", "BB-0CC", cluster=1 << 20)
    header = struct.pack("<4s10I", b"COWD", 1, 3, 6 * 2048, 1, 4, 3, 5, 1, 1, 63)
    (tmp_path / "d-delta.vmdk").write_bytes(header.ljust(5 * 512, b"\0"))
    text = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="vmfsSparse"\n'
    (tmp_path / "d.vmdk").write_text(f'{text}RW 12288 VMFSSPARSE "d-delta.vmdk"\n')
    survives(tmp_path, "d.vmdk", ["d.vmdk", "d-delta.vmdk"], run_commands(tmp_path, OVERWRITE), limit=60)


@pytest.mark.parametrize(
    ("kind", "size"), [(KINDS[0], "3M"), (KINDS[0], "100M"), (KINDS[0], "5G"), (KINDS[2], "3M")]
)
def test_a_crash_while_a_disk_grows_leaves_the_old_or_the_new_size(
    tmp_path: Path, kind: str, size: str
) -> None:
    names = make(tmp_path, kind)
    before = content(OLD)
    recording = crash.record(tmp_path, names, run_commands(tmp_path, ["resize", "d.vmdk", size]))
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=60):
            for name, data in state.files.items():
                (place / name).unlink(missing_ok=True)
                (place / name).write_bytes(data)
            run_real(["check", "-f", "vmdk", place / "d.vmdk"]).ok()
            same = run_real(["compare", "-f", "vmdk", "-F", "raw", place / "d.vmdk", tmp_path / "old.raw"])
            assert same.code == 0, state.what
            length = qimg.info(place / "d.vmdk").virtual_size
            grown = qimg.info(tmp_path / "d.vmdk").virtual_size
            assert length in ((grown,) if state.durable else (len(before), grown)), state.what


def test_a_crash_while_a_disk_grows_over_a_longer_parent_shows_nothing_of_it(tmp_path: Path) -> None:
    write_raw(tmp_path / "b.raw", "A" * 40)
    run_real(["convert", "-f", "raw", "-O", "vmdk", "b.raw", "base.vmdk"], tmp_path).ok()
    words = ["create", "-f", "vmdk", "-o", "zeroed_grain=on", "-b", "base.vmdk", "-F", "vmdk"]
    run_real([*words, "d.vmdk", "100k"], tmp_path).ok()
    short = content("A" * 40)[: 100 * 1024]
    recording = crash.record(
        tmp_path, ["d.vmdk"], run_commands(tmp_path, ["resize", "d.vmdk", str(40 << 20)])
    )
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=60):
            (place / "d.vmdk").unlink()
            (place / "d.vmdk").write_bytes(state.files["d.vmdk"])
            found = guest(place / "d.vmdk")
            assert len(found) in (len(short), 40 << 20)
            assert found == short.ljust(len(found), b"\0"), state.what


def test_after_a_crash_of_a_commit_it_can_be_done_again(tmp_path: Path) -> None:
    write_raw(tmp_path / "old.raw", OLD)
    run_real(["convert", "-f", "raw", "-O", "vmdk", "old.raw", "base.vmdk"], tmp_path).ok()
    run_real(["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk"], tmp_path).ok()
    run_peer(
        "qemu-io", ["-c", "write -P 7 70k 100k", "-c", "write -P 8 600k 10k", "over.vmdk"], tmp_path
    ).ok()
    before, after = content(OLD), guest(tmp_path / "over.vmdk")
    recording = crash.record(
        tmp_path, ["base.vmdk", "over.vmdk"], run_commands(tmp_path, ["commit", "over.vmdk"])
    )
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=60):
            for name, data in state.files.items():
                (place / name).unlink(missing_ok=True)
                (place / name).write_bytes(data)
            wrong = crash.difference(guest(place / "base.vmdk"), [before, after])
            assert wrong is None, f"{state.what}: {wrong}"
            # Where the base has changed, the overlay does not pass for one of it until it is done again.
            shown = run_real(["compare", "-f", "vmdk", "-F", "vmdk", "over.vmdk", "over.vmdk"], place)
            if shown.code == 0:
                assert guest(place / "over.vmdk") == after, state.what
            else:
                assert not state.durable, state.what
            run_qimg_inprocess(["commit", "over.vmdk"], place).ok()
            assert guest(place / "base.vmdk") == guest(place / "over.vmdk") == after, state.what


@pytest.mark.parametrize(
    "kind", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized"]
)
def test_a_power_cut_during_a_conversion_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, kind: str
) -> None:
    write_raw(tmp_path / "a.raw", OLD * 3)
    words = [
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-t",
        "writeback",
        "-o",
        f"subformat={kind}",
        "a.raw",
        "d.vmdk",
    ]
    names = [path.name for path in _made(tmp_path, words)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    recording = crash.record(tmp_path, names, run_commands(tmp_path, words))
    whole = refused = 0
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=80):
            for name, data in state.files.items():
                (place / name).unlink(missing_ok=True)
                (place / name).write_bytes(data)
            same = run_real(["compare", "-f", "vmdk", "-F", "raw", "d.vmdk", "a.raw"], place)
            if same.code == 0:
                whole += 1
            else:
                assert "Could not open" in same.err, f"{state.what}: {same.out}{same.err}"
                assert not state.durable
                refused += 1
    assert whole and refused


def _made(folder: Path, words: list[str]) -> list[Path]:
    run_qimg_inprocess(words, folder).ok()
    return [path for path in folder.iterdir() if path.name.startswith("d")]
