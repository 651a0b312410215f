"""A power cut or a failing disk at any moment leaves a vhdx image whole.

Its log replayed by the real program, it holds in every sector what was there before or what was written.

States come from `support.crash`; the judge is the real ``check -r all``, then what the real program reads.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from support import crash
from support.batches import batches, failures
from support.build import real_content, write_raw
from support.model import Guest
from support.run import run_peer, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 6 * MIB
KINDS = {
    "dynamic": "block_size=1M",
    "not present": "block_size=1M,block_state_zero=off",
    "fixed": "block_size=1M,subformat=fixed",
    "large log": "block_size=2M,log_size=2M",
}


def prepare(folder: Path, options: str) -> tuple[Path, bytes]:
    """An image of the real program, half full, and its content."""
    source = write_raw(folder / "source.raw", "AB-" * 3 + "-" * 40 + "CD", size=SIZE)
    path = folder / "image"
    run_real(["convert", "-f", "raw", "-O", "vhdx", "-o", options, source, path]).ok()
    return path, real_content(path, format="vhdx")


def repaired(path: Path) -> bytes:
    """What the real program reads of an image after it replayed the log. Fails unless the image is sound."""
    found = run_real(["check", "-r", "all", "-f", "vhdx", path])
    assert found.code == 0, found.out + found.err
    return real_content(path, format="vhdx")


def look(place: Path, content: bytes, allowed: list[bytes], what: str) -> None:
    """Judge one state, by the real program and by ours."""
    theirs, ours = place / "theirs", place / "ours"
    for path in (theirs, ours):
        path.write_bytes(content)
    found = repaired(theirs)
    wrong = crash.difference(found, allowed)
    assert wrong is None, f"{what}: {wrong}"
    waits = False
    try:
        qimg.check(ours, format="vhdx")
    except QimgError as error:
        waits = "contains a log that needs to be replayed" in str(error)
        assert waits, f"{what}: {error}"
        assert qimg.check(ours, format="vhdx", fix="all").corruptions_fixed == 1
    assert qimg.check(ours, format="vhdx").corruptions == 0
    with qimg.open(ours, format="vhdx") as disk:
        assert disk.read(0, disk.size) == found, f"{what}: we read something else"


@pytest.mark.parametrize("name", KINDS)
def test_a_power_cut_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    path, content = prepare(tmp_path, KINDS[name])
    run, contents = batches(path, "vhdx", content, 11)
    recording = crash.record(tmp_path, ["image"], run)
    assert real_content(path, format="vhdx") == contents[-1]
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=45, seed=2):
            allowed = contents[-1:] if state.durable else [content, *contents]
            look(place, state.files["image"], allowed, state.what)


def test_a_power_cut_while_the_disk_grows(tmp_path: Path) -> None:
    path, content = prepare(tmp_path, "block_size=1M")
    recording = crash.record(tmp_path, ["image"], lambda: qimg.resize(path, SIZE + 3 * MIB + 512))
    grown = content + bytes(3 * MIB + 512)
    assert real_content(path, format="vhdx") == grown
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=45, seed=3):
            found = [content, grown]
            look(place, state.files["image"], found[1:] if state.durable else found, state.what)


def test_a_power_cut_while_a_fixed_disk_grows(tmp_path: Path) -> None:
    path, content = prepare(tmp_path, "block_size=1M,subformat=fixed,block_state_zero=off")
    recording = crash.record(tmp_path, ["image"], lambda: qimg.resize(path, SIZE + 2 * MIB))
    grown = content + bytes(2 * MIB)
    assert real_content(path, format="vhdx") == grown
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=40, seed=4):
            found = [content, grown]
            look(place, state.files["image"], found[1:] if state.durable else found, state.what)


@pytest.mark.parametrize("name", ["dynamic", "fixed"])
def test_a_disk_that_fails_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    path, content = prepare(tmp_path, KINDS[name])
    run, contents = batches(path, "vhdx", content, 5)
    with crash.scratch(tmp_path) as place:
        for nth in failures(path, run):
            if nth % 3 == 1:
                look(place, path.read_bytes(), [content, *contents], f"change {nth} failed")
    assert nth > 20
    assert real_content(path, format="vhdx") == contents[-1]


def test_a_power_cut_while_the_table_moves_to_make_room(tmp_path: Path) -> None:
    """A table of 1 MiB describes 128 GiB in blocks of 1 MiB; the next block needs a longer one."""
    path = tmp_path / "image"
    run_real(["create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "127G"]).ok()
    places = [0, 5 << 30, (127 << 30) - 512]
    commands = [word for at in places for word in ("-c", f"write -q -P 7 {at} 512")]
    run_peer("qemu-io", ["-f", "vhdx", *commands, path]).ok()
    recording = crash.record(tmp_path, ["image"], lambda: qimg.resize(path, 140 << 30))
    table = [event for _name, event in recording.events if event.offset == 192 << 10]
    assert len(table) == 1, "the table moves by one write"
    with crash.scratch(tmp_path) as place:
        sizes = set()
        for state in recording.states(limit=40, seed=6):
            image = place / "state"
            image.write_bytes(state.files["image"])
            found = run_real(["check", "-r", "all", "-f", "vhdx", image])
            assert found.code == 0, state.what + found.out + found.err
            asked = [word for at in places for word in ("-c", f"read -P 7 {at} 512")]
            shown = run_peer("qemu-io", ["-r", "-f", "vhdx", *asked, image]).ok()
            assert "verification failed" not in shown.out, state.what
            info = qimg.info(image, format="vhdx")
            sizes.add(info.virtual_size >> 30)
            if state.durable:
                assert info.virtual_size == 140 << 30
        assert sizes == {127, 140}


def test_a_log_that_waits_is_shown_to_writers_and_applied_by_the_first_change(tmp_path: Path) -> None:
    """What it is to hold is what the real program makes of it."""
    path, _ = prepare(tmp_path, "block_size=1M")
    states = waiting_logs(tmp_path, path)
    assert len(states) > 1
    for number, raw in enumerate(states):
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"theirs{number}"
        for copy in (ours, theirs):
            copy.write_bytes(raw)
        expected = repaired(theirs)
        with pytest.raises(QimgError, match="opened read-only, but contains a log that needs to be replayed"):
            qimg.open(ours, format="vhdx")
        with Guest(ours, expected, format="vhdx") as guest:
            assert guest.read() == expected
            assert ours.read_bytes() == raw, "opening writes nothing"
            guest.write(5 * MIB, b"x" * 512)
        assert real_content(ours, format="vhdx") == bytes(guest.content)


def waiting_logs(folder: Path, path: Path) -> list[bytes]:
    """The image at each moment when an entry of the log is written and the table is not."""
    run, _contents = batches(path, "vhdx", real_content(path, format="vhdx"), 5)
    recording = crash.record(folder, ["image"], run)
    found = []
    for number, (_name, event) in enumerate(recording.events):
        if event.kind == "write" and event.data[:4] == b"loge":
            state = bytearray(recording.before["image"])
            for _other, done in recording.events[: number + 1]:
                crash._apply(state, crash._Piece("image", done), b"\0")
            found.append(bytes(state))
    return found
