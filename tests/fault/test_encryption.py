"""Encrypted images, changed at random, cut off and failed at any moment: the real program reads what a guest
wrote, and each passphrase that worked before and afterwards works in between."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.errors import QimgError
from support import crash, model, secrets
from support.model import Guest, Kind, change
from support.qcow2 import io
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

K = 1024
AES, LUKS = secrets.AES, secrets.LUKS
KINDS = {
    "aes": Kind(f"{AES},cluster_size=4096", 300 * K, snapshots=1),
    "aes, version 2": Kind(f"{AES},compat=0.10,cluster_size=512", 100 * K),
    "aes, subclusters over a file": Kind(
        f"{AES},extended_l2=on,cluster_size=16384", 300 * K, below=200 * K, snapshots=1
    ),
    "luks": Kind(f"{LUKS},cluster_size=4096", 300 * K, snapshots=1),
    "luks, version 2 over a file": Kind(f"{LUKS},compat=0.10", 500 * K, below=300 * K + 512),
    "luks, subclusters": Kind(f"{LUKS},extended_l2=on,cluster_size=16384", 300 * K, snapshots=1),
    "luks, essiv": Kind(f"{LUKS},cluster_size=4096,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv", 300 * K),
    "luks, preallocated": Kind(f"{LUKS},preallocation=metadata", 500 * K),
}
#: Kinds of `model.change`: no compression, which encrypted images do not have.
CHANGES = "wwwzdf"


def prepare(folder: Path, name: str) -> Path:
    """The image called ``image`` of this kind, filled by the real program."""
    kind = KINDS[name]
    chance = random.Random(name)
    options = dict(pair.split("=") for pair in kind.options.split(","))
    backing = {}
    if kind.below is not None:
        (folder / "below").write_bytes(model.mixed_stretches(kind.below, chance))
        backing = {"backing": "below", "backing_format": "raw"}
    path = folder / "image"
    context = secrets.context(warn=lambda _: None)
    qimg.create(path, format="qcow2", size=kind.size, options=options, context=context, **backing)  # type: ignore[arg-type]
    io(path, f"write -q -P 5 0 {kind.size // 1024 // 2}k")
    for number in range(kind.snapshots + 1):
        model.scribble(path, kind, chance)
        if number < kind.snapshots:
            qimg.create_snapshot(secrets.where(path), f"s{number}", context=context)
    return path


def writing(path: Path, seed: int, batches: int) -> tuple[Callable[[], None], list[bytes]]:
    """An operation of this many batches, each made durable; what the disk holds after each change in it."""
    first = crash.guest_content(path)
    contents: list[bytes] = []

    def run() -> None:
        contents.clear()
        chance = random.Random(seed)
        with Guest(path, first) as guest:
            for _ in range(batches):
                for _ in range(3):
                    change(guest, chance, "wwwzd", step=512)
                    contents.append(bytes(guest.content))
                guest.flush()

    with crash.unchanged(path.parent, [path.name]):
        run()
    return run, list(contents)


def assert_a_guest_can_write(path: Path, seed: int, count: int) -> None:
    """Random changes; then the image is sound and holds what the guest wrote, and snapshots what they did."""
    snapshots = {id: crash.guest_content(path, id) for id in crash.snapshot_ids(path)}
    chance = random.Random(seed)
    with Guest(path) as guest:
        for _ in range(count):
            change(guest, chance, CHANGES)
        assert guest.read() == bytes(guest.content)
    model.assert_holds(path, guest.content)
    assert {id: crash.guest_content(path, id) for id in snapshots} == snapshots


@pytest.mark.parametrize("name", KINDS)
def test_the_real_program_reads_what_a_guest_wrote(name: str, tmp_path: Path) -> None:
    assert_a_guest_can_write(prepare(tmp_path, name), 1, 20)


@pytest.mark.parametrize("name", ["luks, subclusters", "aes, subclusters over a file"])
def test_subclusters_that_move_to_another_place_are_encrypted_for_it(name: str, tmp_path: Path) -> None:
    path = prepare(tmp_path, name)
    io(path, "write -q -P 7 0 300k")
    qimg.create_snapshot(secrets.where(path), "late", context=secrets.context())
    with Guest(path) as guest:
        # Of each cluster, which the snapshot has too, one subcluster changes and the others move.
        for offset in range(512, guest.image.size, guest.image.cluster_size):
            guest.write(offset, b"new" * 100)
    model.assert_holds(path, guest.content)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1 << 16), count=st.integers(1, 12))
def test_any_sequence_of_writes_is_what_the_real_program_reads(name: str, seed: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_a_guest_can_write(prepare(Path(folder), name), seed, count)


@pytest.mark.parametrize("name", ["aes", "luks", "luks, subclusters"])
def test_a_power_cut_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    run, contents = writing(prepare(tmp_path, name), 5, 2)
    crash.assert_survives(tmp_path, ["image"], run, between=contents, after=contents[-1], limit=20)


def test_a_request_that_fails_while_a_guest_writes(tmp_path: Path) -> None:
    run, contents = writing(prepare(tmp_path, "luks"), 6, 1)
    crash.assert_survives_errors(tmp_path, ["image"], run, between=contents, again=True, limit=30)


# -- key slots

NEW = {"encrypt.state": "active", "encrypt.new-secret": "key1", "encrypt.iter-time": 0}
ERASE = {"encrypt.state": "inactive"}


def opens(path: Path, id: str) -> bool:
    """Whether the real program can read the image with this secret."""
    described = secrets.options(path.name, id=id)
    return run_real(["check", *secrets.WORDS, "--image-opts", described], path.parent).code == 0


@pytest.fixture
def slots(tmp_path: Path) -> Path:
    """A small image, one key slot."""
    path = tmp_path / "image"
    options = dict(pair.split("=") for pair in LUKS.split(","))
    options["encrypt.cipher-alg"] = "aes-128"
    qimg.create(path, format="qcow2", size=1 << 20, options=options, context=secrets.context())
    return path


def amend(path: Path, options: dict[str, object], *, key: int = 0, force: bool = False) -> None:
    where = secrets.where(path).replace(secrets.ID, f"key{key}")
    qimg.amend(where, options, force=force, context=secrets.context())


@pytest.mark.parametrize("name", ["add", "replace by force", "erase", "erase by passphrase"])
def test_after_a_power_cut_no_passphrase_is_lost(name: str, slots: Path) -> None:
    if name.startswith("erase"):
        amend(slots, NEW)
    cases: dict[str, tuple[Callable[[], None], set[str]]] = {
        # What is done, and the secrets one of which opens the image at every moment.
        "add": (lambda: amend(slots, NEW), {"key0"}),
        "replace by force": (
            lambda: amend(slots, {**NEW, "encrypt.keyslot": 0}, force=True),
            {"key0", "key1"},
        ),
        "erase": (lambda: amend(slots, {**ERASE, "encrypt.keyslot": 0}, key=1), {"key1"}),
        "erase by passphrase": (lambda: amend(slots, {**ERASE, "encrypt.old-secret": "key0"}), {"key1"}),
    }
    operation, keys = cases[name]
    recording = crash.record(slots.parent, [slots.name], operation)
    assert opens(slots, "key1")
    assert opens(slots, "key0") == (name == "add")
    looked_at = 0
    for state in recording.states(limit=12):
        slots.write_bytes(state.files[slots.name])
        assert any(opens(slots, key) for key in sorted(keys)), state.what
        looked_at += 1
    assert looked_at > 2


def test_a_slot_that_cannot_be_written_is_not_there(slots: Path) -> None:
    def change() -> None:
        amend(slots, NEW)

    crash.assert_survives_errors(slots.parent, [slots.name], change, atomic=True, again=True, limit=15)
    assert opens(slots, "key0")


def test_changes_that_are_refused_change_nothing(slots: Path) -> None:
    before = slots.read_bytes()
    for options in (
        {**ERASE, "encrypt.keyslot": 0, "lazy_refcounts": True},
        {**NEW, "encrypt.keyslot": 9, "size": 2 << 20},
        {**NEW, "compat": "0.10", "refcount_bits": 8},
        {**NEW, "encrypt.new-secret": "nosuch", "compat": "0.10"},
    ):
        with pytest.raises(QimgError):
            amend(slots, options)
        assert slots.read_bytes() == before
