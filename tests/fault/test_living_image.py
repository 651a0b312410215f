"""A power cut or a failing disk at any moment while a qcow2 image is changed in place costs leaks at most.

The harness and its rules are those of `support.crash`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from support import crash, model
from support.build import build
from support.model import KINDS, Guest, change
from support.qcow2 import Anatomy, io, make, patch
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: What is done between two flushes, as kinds of `model.change`.
MIXED = "wwwzdp"


def writing(
    path: Path, seed: int, batches: int, kinds: str = MIXED
) -> tuple[Callable[[], None], list[bytes]]:
    """An operation of this many batches, each made durable; what the disk holds after each change in it."""
    first = crash.guest_content(path)
    contents: list[bytes] = []

    def run() -> None:
        contents.clear()
        chance = random.Random(seed)
        with Guest(path, first) as guest:
            for _ in range(batches):
                for _ in range(chance.choice([1, 4])):
                    change(guest, chance, kinds, step=512)
                    contents.append(bytes(guest.content))
                guest.flush()

    with crash.unchanged(path.parent, [path.name, *data_files(path.parent)]):
        run()
    return run, list(contents)


def data_files(folder: Path) -> list[str]:
    """The image's data file if it has one."""
    return [name for name in ("image.data",) if (folder / name).exists()]


@pytest.mark.parametrize("name", KINDS)
def test_a_power_cut_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    run, contents = writing(path, 5, 3)
    crash.assert_survives(
        tmp_path,
        ["image"],
        run,
        files=data_files(tmp_path),
        between=contents,
        after=contents[-1],
        limit=60,
        seed=len(name),
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_request_that_fails_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    run, contents = writing(path, 6, 2)
    crash.assert_survives_errors(
        tmp_path, ["image"], run, files=data_files(tmp_path), between=contents, again=True, limit=30
    )


@pytest.mark.parametrize("layout", ["A#B-", "####"])
def test_a_power_cut_while_space_that_is_there_is_written_to(layout: str, tmp_path: Path) -> None:
    """No count rises: overwritten data has to be durable all the same, and zero clusters that have space
    show it only when it holds the data."""
    path = build(tmp_path / "image", layout)
    for steps in (
        [(1000 // 512 * 512, 30000 // 512 * 512)],
        [(64 << 10, 64 << 10)],
        [(0, 128 << 10), (512, 512)],
    ):
        run, contents = growing(path, steps)
        crash.assert_survives(tmp_path, ["image"], run, between=contents, after=contents[-1], limit=40)


# -- structures that grow


def growing(path: Path, steps: list[tuple[int, int]]) -> tuple[Callable[[], None], list[bytes]]:
    """Writes of (start, length), each made durable."""
    first = crash.guest_content(path)
    contents = []
    disk = bytearray(first)
    for number, (start, length) in enumerate(steps):
        disk[start : start + length] = bytes([number + 100]) * length
        contents.append(bytes(disk))

    def run() -> None:
        with Guest(path, first) as guest:
            for number, (start, length) in enumerate(steps):
                guest.write(start, bytes([number + 100]) * length)
                guest.flush()

    return run, contents


GROWING = {
    "the refcount table moves": ("cluster_size=512,refcount_bits=64", 3 << 20, 1700 << 10),
    "blocks are made where the table grew": ("cluster_size=512,refcount_bits=64", 6 << 20, 3 << 20),
    "new blocks for new clusters": ("cluster_size=512,refcount_bits=64", 1 << 20, 0),
    "large blocks": ("cluster_size=4096,refcount_bits=64", 8 << 20, 1 << 20),
    "blocks of counts of 1 bit": ("cluster_size=512,refcount_bits=1", 6 << 20, 1900 << 10),
}


@pytest.mark.parametrize("steps", ["one large write", "some writes"])
@pytest.mark.parametrize("name", GROWING)
def test_a_power_cut_while_refcounts_get_more_room(name: str, steps: str, tmp_path: Path) -> None:
    options, size, filled = GROWING[name]
    path = make(tmp_path / "image", size, options)
    if filled:
        io(path, f"write -q -P 1 0 {filled}")
    count = 1 if steps == "one large write" else 6
    step = (size - filled) // count // 512 * 512
    run, contents = growing(path, [(filled + number * step, step) for number in range(count)])
    crash.assert_survives(tmp_path, ["image"], run, between=contents, after=contents[-1], limit=80)


def test_a_power_cut_while_gaps_between_blocks_are_filled(tmp_path: Path) -> None:
    path = make(tmp_path / "image", 8 << 20, "cluster_size=512,refcount_bits=64")
    io(path, "write -q -P 1 0 5M", "discard -q 1M 1M")
    steps = [(start, 30 << 10) for start in range(5 << 20, (5 << 20) + (600 << 10), 30 << 10)]
    steps += [(1 << 20, 700 << 10), (6 << 20, 1 << 20)]
    run, contents = growing(path, steps)
    crash.assert_survives(tmp_path, ["image"], run, between=contents, after=contents[-1], limit=120)


def test_a_power_cut_while_a_missing_block_finds_its_place_in_another_ones_range(tmp_path: Path) -> None:
    """All clusters of the missing block are wanted for data, so it lies in the first one behind them."""
    path = make(tmp_path / "image", 1 << 20, "cluster_size=512,refcount_bits=64,preallocation=falloc")
    io(path, "write -q -P 1 0 1M", "discard -q 256k 128k")
    anatomy = Anatomy(path)
    words = [anatomy.number(anatomy.table + 8 * index) for index in range(64)]
    blocks = words[: words.index(0)]
    counts = [anatomy.number(block + 8 * slot) for block in blocks for slot in range(64)]
    missing = next(
        number for number in range(1, len(counts) // 64) if not any(counts[64 * number : 64 * number + 65])
    )
    own = anatomy.number(anatomy.table + 8 * missing) // 512
    counts[own] = 0
    edits = [
        (anatomy.table + 8 * missing, bytes(8)),
        (anatomy.number(anatomy.table + 8 * (own // 64)) + 8 * (own % 64), bytes(8)),
    ]
    patch(path, path, edits)
    first = crash.guest_content(path)
    free_below = counts[: 64 * missing].count(0)
    assert 0 < free_below * 512 < 64 << 10
    with Guest(path, first) as guest:
        guest.write(256 << 10, b"b" * 512 * free_below)
    before = bytes(guest.content)
    run, contents = growing(path, [(320 << 10, 64 * 512)])
    crash.assert_survives(tmp_path, ["image"], run, between=[before], after=contents[-1], limit=120)
    place = Anatomy(path).number(anatomy.table + 8 * missing) // 512
    assert place == 64 * (missing + 1), "it is where the test wants it"


# -- changes of the whole: there or not there

WHOLE: dict[str, Callable[[Path], object]] = {
    "create a snapshot": lambda path: qimg.create_snapshot(path, "new"),
    "apply a snapshot": lambda path: qimg.apply_snapshot(path, "1"),
    "delete a snapshot": lambda path: qimg.delete_snapshot(path, "s0"),
    "grow": lambda path: qimg.resize(path, 3 << 20),
    "shrink": lambda path: qimg.resize(path, 150 << 10, shrink=True),
    "add a bitmap": lambda path: qimg.add_bitmap(path, "b"),
}
WITH_SNAPSHOTS = [
    "snapshots",
    "version 2, snapshots",
    "clusters of 512, snapshots",
    "counts of 4 bits",
    "counts of 64 bits",
    "lazy counts",
    "subclusters over a file",
    "over a short file",
]
#: Version 2 knows no bitmaps, and no size of a snapshot's own.
CASES = [
    (what, name)
    for what in WHOLE
    for name in WITH_SNAPSHOTS
    if "version 2" not in name or what not in ("grow", "shrink", "add a bitmap")
]


@pytest.mark.parametrize(("what", "name"), CASES)
def test_a_change_of_the_whole_happens_or_does_not(what: str, name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    crash.assert_survives(tmp_path, ["image"], lambda: WHOLE[what](path), atomic=True, limit=40)


@pytest.mark.parametrize(("what", "name"), CASES)
def test_a_change_of_the_whole_that_fails_can_be_tried_again(what: str, name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    # After a failure of the last barrier a second try finds everything done.
    again = what in ("apply a snapshot", "grow", "shrink")
    crash.assert_survives_errors(
        tmp_path, ["image"], lambda: WHOLE[what](path), atomic=True, again=again, limit=24
    )


@pytest.mark.parametrize("name", ["default", "snapshots", "clusters of 512, snapshots", "subclusters"])
def test_a_power_cut_while_bitmaps_record_a_write(name: str, tmp_path: Path) -> None:
    """After it a bitmap knows of the write, or says that it cannot be trusted, or nothing was written."""
    path = model.prepare(tmp_path, name)
    run_real(["bitmap", "--add", "-g", "4096", path, "b0"]).ok()
    run_real(["bitmap", "--add", "--disable", path, "b1"]).ok()
    before = crash.Contents.of(tmp_path, ["image"])
    content = bytes(before.images["image"])
    start, length = 70 << 10, 50 << 10

    def run() -> None:
        with Guest(path, content) as guest:
            guest.write(start, b"\xab" * length)

    recording = crash.record(tmp_path, ["image"], run)
    after = crash.Contents.of(tmp_path, ["image"])
    assert b"\xab" * length in after.images["image"]
    with crash.scratch(tmp_path) as place:
        judge = crash.Judge(place, ["image"], before, after)
        for state in recording.states(limit=80):
            judge.look(state.files, state.what, finished=state.durable)
            if crash.guest_content(place / "image") == content:
                continue
            for bitmap in qimg.bitmaps(place / "image"):
                if bitmap.name == "b0" and not bitmap.inconsistent:
                    bits = int.from_bytes(bitmap.bits, "little")
                    wanted = range(start // 4096, -(-(start + length) // 4096))
                    assert all(bits >> bit & 1 for bit in wanted), f"{state.what}: the bitmap does not know"
                assert bitmap.name != "b1" or not bitmap.inconsistent
    (b0, b1) = qimg.bitmaps(path)
    assert (b0.inconsistent, b0.enabled, b1.inconsistent, b1.enabled) == (False, True, False, False)
