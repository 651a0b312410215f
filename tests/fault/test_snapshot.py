"""A crash or a failing disk while snapshots change leaves the image before or the image afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.formats.qcow2 import alloc, shadow_counts, shadow_walk
from support import crash, model
from support.build import real_content
from support.qcow2 import Anatomy
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: Kinds of `support.model` that can have snapshots, each with what only it has.
KINDS = (
    "version 2, snapshots",
    "clusters of 512, snapshots",
    "clusters of 2 MiB",
    "counts of 1 bit, compressed",
    "counts of 4 bits",
    "counts of 64 bits",
    "subclusters over a file",
    "preallocated, snapshots",
    "over a long file",
)
CHANGES = ("create", "apply", "delete", "width")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts leave memory early and tables come a few at a time, so that crashes find much half written."""
    monkeypatch.setattr(alloc, "BATCH", 4096)
    monkeypatch.setattr(shadow_counts, "CACHE_BYTES", 0)
    monkeypatch.setattr(shadow_walk, "BATCH", 2048)


def prepared(folder: Path, kind: str, change: str) -> tuple[Callable[[], None], bytes]:
    """The change of an image of this kind that the real program made, and what it holds afterwards."""
    path = model.prepare(folder, kind)
    if change in ("apply", "delete") and not crash.snapshot_ids(path):
        qimg.create_snapshot(path, "s0")
    content = real_content(path, format="qcow2")
    if change == "create":
        return lambda: qimg.create_snapshot(path, "new"), content
    if change == "apply":
        return lambda: qimg.apply_snapshot(path, "s0"), real_content(path, format="qcow2", snapshot="s0")
    if change == "delete":
        return lambda: qimg.delete_snapshot(path, "s0"), content
    bits = 8 if Anatomy(path).width != 8 else 32
    return lambda: qimg.amend(path, {"refcount_bits": bits}), content


def can(kind: str, change: str) -> bool:
    """Whether the change is possible: counts of 1 bit share nothing, version 2 has but one width."""
    if "1 bit" in kind:
        return change == "width"
    return change != "width" or "version 2" not in kind


CASES = [(kind, change) for kind in KINDS for change in CHANGES if can(kind, change)]


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_a_power_cut_leaves_the_old_state_or_the_new_one(kind: str, change: str, tmp_path: Path) -> None:
    operation, after = prepared(tmp_path, kind, change)
    crash.assert_survives(
        tmp_path, ["image"], operation, after=after, atomic=True, limit=60, seed=len(kind + change)
    )


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_a_failing_disk_leaves_the_old_state_or_the_new_one(kind: str, change: str, tmp_path: Path) -> None:
    operation, _after = prepared(tmp_path, kind, change)
    # What failed at the last barrier may have been done: a second try meets another image then.
    crash.assert_survives_errors(
        tmp_path, ["image"], operation, atomic=True, limit=40, seed=len(kind + change)
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_leaves_no_leak_either(change: str, tmp_path: Path) -> None:
    """New metadata is not counted before the switch, old is not afterwards."""
    operation, _after = prepared(tmp_path, "subclusters, snapshots", change)
    recording = crash.record(tmp_path, ["image"], operation)
    looked_at = 0
    for state in recording.states(limit=60):
        (tmp_path / "state").write_bytes(state.files["image"])
        checked = run_real(["check", "-f", "qcow2", "state"], tmp_path)
        assert checked.code == 0, f"{state.what}: {checked.out}{checked.err}"
        looked_at += 1
    assert looked_at >= 5


@pytest.mark.parametrize("change", CHANGES)
def test_one_write_of_one_sector_switches(change: str, tmp_path: Path) -> None:
    """Before it only free clusters are written to; between two barriers there is nothing else."""
    operation, _after = prepared(tmp_path, "clusters of 512, snapshots", change)
    before = (tmp_path / "image").read_bytes()
    free = free_clusters(tmp_path / "image")
    events = [event for _name, event in crash.record(tmp_path, ["image"], operation).events]
    switch = next(number for number, event in enumerate(events) if event.kind == "write" and not event.offset)
    assert events[switch].length == 512
    assert [events[switch - 1].kind, events[switch + 1].kind] == ["flush", "flush"]
    for event in events[: switch - 1]:
        assert event.kind == "write"
        clusters = range(event.offset // 512, -(-(event.offset + event.length) // 512))
        assert all(cluster in free or cluster * 512 >= len(before) for cluster in clusters)
    if change != "width":  # of which `amend` tells the rest of the header afterwards
        assert {event.kind for event in events[switch + 2 :]} <= {"discard"}


def free_clusters(path: Path) -> set[int]:
    """Clusters of a sound image, whose clusters have 512 bytes and counts 16 bits, that count 0."""
    anatomy = Anatomy(path)
    found = set()
    for index, block in enumerate(anatomy.blocks):
        for slot in range(256):
            if anatomy.number(block + 2 * slot, 2) == 0:
                found.add(index * 256 + slot)
    return found


def test_a_full_disk_gets_its_space_back(tmp_path: Path) -> None:
    """The file is as long as before when the new metadata found no room."""
    import errno

    from qimg.storage.fault import WRITE, FaultStorage, Rule
    from support.faults import opened_through

    path = model.prepare(tmp_path, "clusters of 4096")
    size = path.stat().st_size
    rule = Rule(WRITE, 3, errno.ENOSPC)
    words = r"^Could not create snapshot 'new': No space left on device$"
    wrapped = opened_through(lambda file: FaultStorage(file, [rule]), "image")
    with wrapped, pytest.raises(qimg.QimgError, match=words):
        qimg.create_snapshot(path, "new")
    assert path.stat().st_size == size
    assert run_real(["check", "-f", "qcow2", "image"], tmp_path).code == 0
