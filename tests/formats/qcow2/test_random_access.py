"""Writing into qcow2 images that the real program made: any place, any kind of image.

What a guest does goes through `support.model.Guest`; the real program judges: the check is clean (no leaks
either), the content is that of a bytearray, internal snapshots hold what they held.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qimg.errors import CorruptImage, QimgError
from qimg.formats.qcow2 import live_refcounts, live_tables
from support import crash, model
from support.build import build, content, io
from support.model import KINDS, Guest, assert_holds, change
from support.qcow2 import Anatomy, make, patch, u32, u64
from support.run import run_peer, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KINDS)
def test_any_changes_leave_a_clean_image_of_the_right_content(name: str, seed: int, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name, seed)
    before = crash.Contents.of(tmp_path, ["image"])
    chance = random.Random(seed)
    with Guest(path) as guest:
        for _ in range(20):
            change(guest, chance, "wwwwzdpf" if seed else "wwwwzdp")
            assert guest.read() == guest.content, "staged changes show at once"
    assert_holds(path, guest.content)
    after = crash.Contents.of(tmp_path, ["image"])
    assert after.snapshots == before.snapshots
    assert guest.notices == []


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.cluster <= 16384])
def test_tables_that_leave_memory_come_back_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_tables, "_CACHE", 2000)
    monkeypatch.setattr(live_refcounts, "_CACHE", 1000)
    path = model.prepare(tmp_path, name, 9)
    chance = random.Random(9)
    with Guest(path) as guest:
        for _ in range(40):
            change(guest, chance, "wwwwzdpf")
            assert guest.read() == guest.content
    assert_holds(path, guest.content)


# -- where new clusters come from


def file_size(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize(
    "name", ["default", "clusters of 512", "counts of 1 bit", "version 2", "subclusters"]
)
def test_space_that_was_given_back_is_used_again(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    size = KINDS[name].size
    with Guest(path) as guest:
        guest.write(0, b"a" * size)
    full = file_size(path)
    with Guest(path) as guest:
        for letter in b"bcd":
            guest.discard(0, size)
            guest.flush()
            guest.write(0, bytes([letter]) * size)
            guest.flush()
    assert file_size(path) == full
    assert_holds(path, b"d" * size)


def test_free_clusters_between_used_ones_are_taken_first(tmp_path: Path) -> None:
    path = build(tmp_path / "image", "ABCDEFGH--------")
    io(path, ["discard -q 64k 64k", "discard -q 256k 128k"])
    before = file_size(path)
    with Guest(path) as guest:
        guest.write(512 << 10, b"n" * (192 << 10))
    assert file_size(path) == before
    assert_holds(path, guest.content)


def test_a_shared_cluster_is_not_given_back_while_a_snapshot_has_it(tmp_path: Path) -> None:
    path = build(tmp_path / "image", "ABcD")
    run_real(["snapshot", "-c", "s", path]).ok()
    with Guest(path) as guest:
        guest.discard(0, 256 << 10)
        guest.flush()
        guest.write(0, b"n" * (256 << 10))
    assert crash.guest_content(path, "1") == content("ABcD")
    assert_holds(path, b"n" * (256 << 10))
    run_real(["snapshot", "-d", "s", path]).ok()
    assert_holds(path, b"n" * (256 << 10))


TABLES_THAT_GROW = {
    # A table of one cluster leads to 64 blocks.
    "counts of 64 bits": ("cluster_size=512,refcount_bits=64", 5 << 20),
    "counts of 16 bits": ("cluster_size=512", 10 << 20),
    "counts of 64 bits, clusters of 1024": ("cluster_size=1024,refcount_bits=64", 20 << 20),
}


@pytest.mark.parametrize("name", TABLES_THAT_GROW)
@pytest.mark.parametrize("filled", [0.0, 0.2, 0.35])
def test_a_refcount_table_that_is_full_finds_a_larger_place(name: str, filled: float, tmp_path: Path) -> None:
    options, size = TABLES_THAT_GROW[name]
    path = make(tmp_path / "image", size, options)
    if filled:
        io(path, [f"write -q -P 1 0 {int(size * filled) // 512 * 512}"])
    table = Anatomy(path).table
    with Guest(path) as guest:
        step = size // 8
        for start in range(0, size, step):
            guest.write(start, bytes([start // step + 2]) * step)
            if start % (2 * step):
                guest.flush()
    assert Anatomy(path).table != table, "it moved"
    assert_holds(path, guest.content)
    # The real program can go on with it.
    io(path, ["write -q -P 99 1000 70000"])
    guest.content[1000:71000] = bytes([99]) * 70000
    assert_holds(path, guest.content)


def test_blocks_that_are_missing_in_the_middle_are_made(tmp_path: Path) -> None:
    """The real program leaves a gap without blocks where its table had to grow (section 13)."""
    path = make(tmp_path / "image", 12 << 20, "cluster_size=512,refcount_bits=64")
    io(path, ["write -q -P 1 0 6M"])
    anatomy = Anatomy(path)
    words = [anatomy.number(anatomy.table + 8 * index) for index in range(400)]
    used = max(index for index, word in enumerate(words) if word)
    assert 0 in words[:used], "there is such a gap"
    with Guest(path) as guest:
        for start in range(6 << 20, 12 << 20, 700 << 9):
            guest.write(start, b"m" * min(700 << 9, (12 << 20) - start))
            guest.flush()
    assert_holds(path, guest.content)


# -- what is left alone


@pytest.mark.parametrize("name", KINDS)
def test_opening_and_flushing_changes_nothing(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    before = path.read_bytes()
    with Guest(path) as guest:
        assert guest.read() == guest.content
        guest.flush()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", KINDS)
def test_the_real_program_goes_on_where_ours_stopped(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    chance = random.Random(name)
    content = None
    for turn in range(3):
        with Guest(path, content) as guest:
            for _ in range(6):
                change(guest, chance, "wwwzd")
        assert_holds(path, guest.content)
        offset = chance.randrange(KINDS[name].size - 70000) // 512 * 512
        io(path, [f"write -q -P {turn + 1} {offset} 69632"])
        guest.content[offset : offset + 69632] = bytes([turn + 1]) * 69632
        content = bytes(guest.content)
        assert_holds(path, content)


def test_a_raw_data_file_alone_is_the_disk(tmp_path: Path) -> None:
    path = model.prepare(tmp_path, "raw data file")
    chance = random.Random(3)
    with Guest(path) as guest:
        for _ in range(30):
            change(guest, chance, "wwwzdf")
    data = (tmp_path / "image.data").read_bytes()
    assert data[: len(guest.content)] == guest.content
    # The real program makes it a whole number of clusters long.
    assert not any(data[len(guest.content) :])


def test_extensions_that_nobody_knows_survive(tmp_path: Path) -> None:
    path = build(tmp_path / "image", "A-")
    raw = bytearray(path.read_bytes())
    end = raw.index(u32(0x6803F857), 104)
    end += 8 + int.from_bytes(raw[end + 4 : end + 8], "big")
    raw[end : end + 24] = u32(0x12345678) + u32(11) + b"hello world".ljust(16, b"\0")
    path.write_bytes(raw)
    with Guest(path) as guest:
        guest.write(70000, b"x" * 1000)
    assert raw[:1024] == path.read_bytes()[:1024]
    assert_holds(path, guest.content)


def test_unknown_autoclear_bits_are_cleared_by_the_first_change_only(tmp_path: Path) -> None:
    path = build(tmp_path / "image", "A-")
    patched = bytearray(path.read_bytes())
    patched[88:96] = u64(1 << 40)
    path.write_bytes(patched)
    with Guest(path):
        pass
    assert path.read_bytes()[88:96] == u64(1 << 40)
    with Guest(path) as guest:
        guest.write(70000, b"x")
    assert path.read_bytes()[88:96] == u64(0)
    assert_holds(path, guest.content)


# -- counts that were postponed


def test_an_image_that_was_left_dirty_is_sound_after_a_write(tmp_path: Path) -> None:
    path = build(tmp_path / "image", "A---", options="lazy_refcounts=on")
    left = run_peer(
        "qemu-io", ["-f", "qcow2", "-c", "write -P 7 64k 64k", "-c", "flush", "-c", "abort", path]
    )
    assert left.code < 0
    assert path.read_bytes()[79] & 1, "it is dirty"
    assert run_real(["check", path]).code == 2, "and its counts are wrong"
    with Guest(path, content("A") + b"\7" * 65536 + bytes(131072)) as guest:
        guest.write(131072, b"x" * 65536)
    assert not path.read_bytes()[79] & 1
    assert_holds(path, guest.content)


# -- damage: counts that say that a table is free


class Damage(NamedTuple):
    """Clusters whose count is 0 though they hold tables, or an entry that leads to one; and who they are."""

    name: str
    offset: Callable[[Anatomy], int]


FREE_TABLES = [
    Damage("qcow2_header", lambda anatomy: 0),
    Damage("active L1 table", lambda anatomy: anatomy.l1),
    Damage("active L2 table", lambda anatomy: anatomy.l2),
    Damage("refcount table", lambda anatomy: anatomy.table),
    Damage("refcount block", lambda anatomy: anatomy.blocks[0]),
    Damage("snapshot table", lambda anatomy: anatomy.number(64)),
    Damage("inactive L1 table", lambda anatomy: anatomy.l1_tables[1][0]),
]
MARKING = (
    "qcow2: Marking image as corrupt: Preventing invalid write on metadata (overlaps with {});"
    " further corruption events will be suppressed"
)


def corrupt(path: Path) -> bool:
    return bool(path.read_bytes()[79] & 2)


@pytest.fixture
def valuable(tmp_path: Path) -> Path:
    path = build(tmp_path / "image", "AB--" + "-" * 12)
    run_real(["snapshot", "-c", "s", path]).ok()
    io(path, ["write -q -P 3 0 64k"])
    return path


@pytest.mark.parametrize("damage", FREE_TABLES, ids=lambda damage: damage.name)
def test_a_table_that_counts_as_free_is_not_written_over(damage: Damage, valuable: Path) -> None:
    anatomy = Anatomy(valuable)
    place = damage.offset(anatomy)
    broken = patch(
        valuable, valuable.with_name("broken"), [(anatomy.blocks[0] + 2 * (place // 65536), bytes(2))]
    )
    theirs = patch(broken, valuable.with_name("theirs"), [])
    expected = MARKING.format(damage.name)
    shown = run_peer("qemu-io", ["-f", "qcow2", "-c", "write -P 9 512k 64k", theirs])
    assert expected in shown.err

    guest = Guest(broken, b"")
    with pytest.raises(CorruptImage, match=r"Preventing invalid write on metadata \(overlaps with"):
        guest.write(512 << 10, b"n" * 65536)
    assert [str(notice.text) for notice in guest.notices] == [expected]
    with pytest.raises(QimgError):
        guest.write(256 << 10, b"n" * 65536)
    guest.image.abandon()
    guest.close()
    assert corrupt(broken)
    assert corrupt(theirs)
    for table in {entry.offset(anatomy) for entry in FREE_TABLES if entry.name != "refcount block"} - {0}:
        assert broken.read_bytes()[table : table + 65536] == anatomy.raw[table : table + 65536].ljust(
            len(broken.read_bytes()[table : table + 65536]), b"\0"
        )
    # What was there can still be read by everybody, and repaired.
    assert crash.guest_content(broken) == crash.guest_content(valuable)
    run_real(["check", "-r", "all", broken])
    assert_holds(broken, crash.guest_content(valuable))


# An entry without an offset leads nowhere, so not to the header.
@pytest.mark.parametrize("damage", FREE_TABLES[1:], ids=lambda damage: damage.name)
def test_an_entry_that_leads_to_a_table_is_not_written_through(damage: Damage, valuable: Path) -> None:
    anatomy = Anatomy(valuable)
    place = damage.offset(anatomy)
    broken = patch(valuable, valuable.with_name("broken"), [(anatomy.entry(4), u64(place | 1 << 63))])
    theirs = patch(broken, valuable.with_name("theirs"), [])
    shown = run_peer("qemu-io", ["-f", "qcow2", "-c", "write -P 9 256k 64k", theirs])
    expected = MARKING.format(damage.name)
    assert expected in shown.err
    before = broken.read_bytes()
    guest = Guest(broken, b"")
    with pytest.raises(CorruptImage, match=r"Preventing invalid write on metadata"):
        guest.write(256 << 10, b"n" * 65536)
    guest.close()
    assert [str(notice.text) for notice in guest.notices] == [expected]
    assert corrupt(broken)
    assert broken.read_bytes()[80:] == before[80:]


def test_a_corrupt_image_is_not_opened_for_changes(valuable: Path) -> None:
    broken = patch(valuable, valuable.with_name("broken"), [(79, b"\2")])
    with pytest.raises(QimgError, match="Image is corrupt; cannot be opened read/write"):
        Guest(broken, b"")
