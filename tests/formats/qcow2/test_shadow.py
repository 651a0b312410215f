"""Shadow paging by itself: its ways agree, it takes only what is free, its tables grow (sheet 4, 5, 7)."""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from array import array
from pathlib import Path

import pytest

import qimg
from qimg.formats.qcow2 import shadow_counts, shadow_walk
from qimg.formats.qcow2.shadow_walk import Batch, Walker
from support import model
from support.build import assert_real_check_clean, build, io, real_content
from support.qcow2 import COMPRESSED, COPIED, OFFSET, Anatomy, open_image, patch, u16, u64
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KINDS = [name for name in model.KINDS if "data file" not in name and "1 bit" not in name]


def shared_tables(path: Path) -> list[int]:
    """Host offsets of the tables of the active state."""
    anatomy = Anatomy(path)
    count = anatomy.number(36, 4)
    words = [anatomy.number(anatomy.l1 + 8 * index) for index in range(count)]
    return [word & OFFSET for word in words if word & OFFSET]


def changes(path: Path) -> None:
    """One of each, with the same date every time."""
    if "2 bits" not in str(path):
        qimg.create_snapshot(path, "new", now_ns=10**18)
    if qimg.snapshots(path):
        first = qimg.snapshots(path)[0].name
        qimg.apply_snapshot(path, first)
        qimg.delete_snapshot(path, first)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "counts of 2 bits"])
def test_plain_python_and_numpy_leave_the_same_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.prepare(tmp_path, name)
    plain, vectored = tmp_path / "plain", tmp_path / "vectored"
    shutil.copy(path, plain)
    shutil.copy(path, vectored)
    monkeypatch.setattr(Walker, "_vectored", False)
    changes(plain)
    monkeypatch.setattr(Walker, "_vectored", True)
    changes(vectored)
    assert vectored.read_bytes() == plain.read_bytes()
    assert plain.read_bytes() != path.read_bytes()
    assert_real_check_clean(plain)


@pytest.mark.parametrize("name", ["clusters of 512, snapshots", "counts of 64 bits", "counts of 4 bits"])
def test_counts_that_leave_memory_come_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.prepare(tmp_path, name)
    content = real_content(path, format="qcow2")
    monkeypatch.setattr(shadow_counts, "CACHE_BYTES", 0)
    qimg.create_snapshot(path, "new")
    assert_real_check_clean(path)
    qimg.delete_snapshot(path, "new")
    assert_real_check_clean(path)
    assert real_content(path, format="qcow2") == content


# -- pieces of tables


def random_table(chance: random.Random, entries: int, size: int) -> list[int]:
    """Words of an L2 table: runs, runs that wrap to another kind, single ones, zeros, compressed ones."""
    words: list[int] = []
    while len(words) < entries:
        length = chance.choice([1, 1, 2, 3, 50, 200, 1000])
        host = chance.randrange(1, 1 << 30) * size
        kind = chance.choice(
            ["run", "run", "zeros", "same", "compressed", "backwards", "allocated zero", "none"]
        )
        copied = chance.choice([0, COPIED])
        for number in range(length):
            word = {
                "run": copied | host + number * size,
                "backwards": copied | host + (length - number) * size,
                "zeros": 1,
                "none": copied,
                "same": copied | host,
                "compressed": COMPRESSED | host + number * size,
                "allocated zero": copied | host + number * size | 1,
            }[kind]
            words.append(word)
    return words[:entries]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("few", [1, 16, 128])
def test_pieces_are_the_entries_that_have_clusters(
    seed: int, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told one by one, in order, each once."""
    monkeypatch.setattr(shadow_walk, "_FEW", few)
    chance = random.Random(seed)
    words = random_table(chance, chance.choice([1, 64, 8192]), 65536)
    expected = [(at, word) for at, word in enumerate(words) if word & (OFFSET | COMPRESSED)]
    path = build(tmp_path / "a.q", "A")
    with open_image(path) as image:
        walker = Walker(image, None)  # type: ignore[arg-type]
        found = [
            (index + number, word + number * 65536)
            for index, word, count in walker._pieces(array("Q", words))
            for number in range(count)
        ]
    assert found == expected


@pytest.mark.parametrize("extended", [False, True])
def test_clearing_copied_touches_nothing_else(extended: bool, tmp_path: Path) -> None:
    options = "extended_l2=on" if extended else ""
    path = build(tmp_path / "a.q", "A", options=options)
    chance = random.Random(3)
    raw = bytearray(chance.randbytes(65536))
    batch = Batch([0], [0], bytearray(raw))
    with open_image(path) as image:
        assert Walker(image, None).cleared(batch)  # type: ignore[arg-type]
        assert not Walker(image, None).cleared(batch)  # type: ignore[arg-type]
    step = 16 if extended else 8
    for at in range(0, len(raw), step):
        raw[at] &= 0x7F
    assert batch.raw == raw


# -- what is shared and what is copied


def test_tables_without_copied_bits_are_shared_where_they_are(tmp_path: Path) -> None:
    """So a second snapshot of the same state costs an L1 table and a table of snapshots."""
    path = build(tmp_path / "a.q", "AB-C" * 4)
    qimg.create_snapshot(path, "one")
    tables = shared_tables(path)
    qimg.create_snapshot(path, "two")
    assert shared_tables(path) == tables
    anatomy = Anatomy(path)
    for l1, _count in anatomy.l1_tables:
        assert anatomy.number(l1) == tables[0]
    assert_real_check_clean(path)


def test_repeating_create_and_delete_does_not_let_the_file_grow(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "AB-C" * 8, cluster=4096)
    sizes = []
    for _ in range(6):
        qimg.create_snapshot(path, "s")
        qimg.delete_snapshot(path, "s")
        sizes.append(path.stat().st_size)
    assert sizes[1:] == [sizes[1]] * 5
    assert_real_check_clean(path)


# -- no room


def test_the_refcount_table_grows_where_it_is_full(tmp_path: Path) -> None:
    """Of 512 bytes: 64 blocks of 64 counts describe 2 MiB."""
    path = build(tmp_path / "a.q", "", options="refcount_bits=64", cluster=512, size=4 << 20)
    written = 0
    while path.stat().st_size < (2 << 20) - 16384:
        io(path, [f"write -q -P 3 {written} 4096"])
        written += 4096
    before, size = Anatomy(path), path.stat().st_size
    assert before.number(56, 4) == 1
    content = real_content(path)
    qimg.create_snapshot(path, "s")
    after = Anatomy(path)
    assert after.number(56, 4) > 1
    assert path.stat().st_size > 2 << 20 > size
    assert_real_check_clean(path)
    assert real_content(path) == real_content(path, snapshot="s") == content


def test_a_file_of_all_free_space_is_used_before_it_grows(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "AB-C" * 16)
    io(path, ["discard 0 2M", "write -q -P 3 3M 64k"])
    size = path.stat().st_size
    qimg.create_snapshot(path, "s")
    assert path.stat().st_size == size
    assert_real_check_clean(path)


# -- counts that lie


def cluster_of(path: Path, what: str) -> int:
    """Number of a host cluster of the image."""
    anatomy = Anatomy(path)
    offset = {
        "data": anatomy.number(anatomy.l2) & OFFSET,
        "L2 table": anatomy.l2,
        "L1 table": anatomy.l1,
        "refcount table": anatomy.table,
        "refcount block": anatomy.blocks[0],
        "snapshot table": anatomy.number(64),
        "snapshot's L1 table": anatomy.l1_tables[-1][0],
    }[what]
    return offset // anatomy.cluster_size


def uncount(path: Path, cluster: int) -> None:
    """Make the count of a cluster 0 (16 bits wide)."""
    patch(path, path, [(Anatomy(path).blocks[0] + 2 * cluster, u16(0))])


@pytest.mark.parametrize("change", ["create", "apply", "delete"])
@pytest.mark.parametrize(
    "what",
    [
        "data",
        "L2 table",
        "L1 table",
        "refcount table",
        "refcount block",
        "snapshot table",
        "snapshot's L1 table",
    ],
)
def test_what_is_in_use_is_not_overwritten_although_it_counts_0(
    what: str, change: str, tmp_path: Path
) -> None:
    """Where the change touches it, it is refused and nothing changes; elsewhere the cluster stays."""
    path = build(tmp_path / "a.q", "AB-C" * 4)
    run_real(["snapshot", "-c", "s", path], tmp_path).ok()
    cluster = cluster_of(path, what)
    uncount(path, cluster)
    before = path.read_bytes()
    content, kept = real_content(path), before[cluster << 16 : cluster + 1 << 16]
    try:
        {
            "create": lambda: qimg.create_snapshot(path, "new"),
            "apply": lambda: qimg.apply_snapshot(path, "s"),
            "delete": lambda: qimg.delete_snapshot(path, "s"),
        }[change]()
    except qimg.QimgError as error:
        assert str(error).startswith(f"Could not {change} snapshot")
        assert path.read_bytes() == before
    else:
        assert path.read_bytes()[cluster << 16 :].startswith(kept)
    assert real_content(path) == content


def test_bitmaps_that_count_0_are_not_overwritten(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "AB-C" * 4)
    run_real(["bitmap", "--add", path, "b0"], tmp_path).ok()
    bitmaps = Anatomy(path).bitmaps
    assert bitmaps is not None
    uncount(path, Anatomy(path).number(bitmaps + 16) >> 16)
    qimg.create_snapshot(path, "s")
    shown = json.loads(run_real(["info", "--output=json", path], tmp_path).ok().out)
    assert [bitmap["name"] for bitmap in shown["format-specific"]["data"]["bitmaps"]] == ["b0"]


@pytest.mark.parametrize("vectored", [False, True])
@pytest.mark.parametrize("change", ["create", "delete"])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("l1", "L2 table offset 0x50200 unaligned (L1 index: 0x0)"),
        ("l2", "Cluster allocation offset 0x50200 unaligned (L2 offset: {l2:#x}, L2 index: 0x1)"),
        ("far", "The cluster at offset 0x100000000000 is in use, but its reference count is 0"),
    ],
)
def test_damaged_tables_are_refused_and_nothing_changes(
    where: str, words: str, change: str, vectored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Walker, "_vectored", vectored)
    path = build(tmp_path / "a.q", "AB-C" * 4)
    run_real(["snapshot", "-c", "s", path], tmp_path).ok()
    anatomy = Anatomy(path)
    wrong = u64(1 << 44 if where == "far" else COPIED | 0x50200)
    patch(path, path, [(anatomy.l1 if where == "l1" else anatomy.entry(1), wrong)])
    before = path.read_bytes()
    with pytest.raises(qimg.QimgError) as caught:
        if change == "create":
            qimg.create_snapshot(path, "new")
        else:
            qimg.delete_snapshot(path, "s")
    told = f"{caught.value} {getattr(caught.value, 'detail', '')}"
    assert words.format(l2=anatomy.l2) in told
    assert path.read_bytes() == before


@pytest.mark.parametrize("vectored", [False, True])
@pytest.mark.parametrize(("bits", "most"), [(1, 1), (2, 3), (4, 15)])
def test_no_count_passes_its_width(
    bits: int, most: int, vectored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real message, and nothing written."""
    monkeypatch.setattr(Walker, "_vectored", vectored)
    path = build(tmp_path / "a.q", "AB-C", options=f"refcount_bits={bits}")
    for number in range(most - 1):
        qimg.create_snapshot(path, f"s{number}")
    assert_real_check_clean(path)
    before = path.read_bytes()
    with pytest.raises(qimg.QimgError, match=r"^Could not create snapshot 'more': Invalid argument$"):
        qimg.create_snapshot(path, "more")
    assert path.read_bytes() == before


@pytest.mark.parametrize("vectored", [False, True])
def test_the_largest_count_of_64_bits_is_a_limit_too(
    vectored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Walker, "_vectored", vectored)
    path = build(tmp_path / "a.q", "AB-C", options="refcount_bits=64")
    anatomy = Anatomy(path)
    cluster = cluster_of(path, "data")
    for count, possible in ((2**64 - 2, True), (2**64 - 1, False)):
        patch(path, path, [(anatomy.blocks[0] + 8 * cluster, struct.pack(">Q", count))])
        copy = shutil.copy(path, tmp_path / "copy.q")
        if possible:
            qimg.create_snapshot(copy, "s")
            assert Anatomy(copy).number(Anatomy(copy).blocks[0] + 8 * cluster) == count + 1
        else:
            with pytest.raises(qimg.QimgError, match="Invalid argument"):
                qimg.create_snapshot(copy, "s")


def test_a_small_image_needs_no_numpy(tmp_path: Path) -> None:
    import subprocess

    path = build(tmp_path / "a.q", "AB-C" * 4)
    code = (
        "import sys, qimg\n"
        f"qimg.create_snapshot({str(path)!r}, 's'); qimg.apply_snapshot({str(path)!r}, 's')\n"
        f"qimg.delete_snapshot({str(path)!r}, 's')\n"
        "assert 'numpy' not in sys.modules, 'numpy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
