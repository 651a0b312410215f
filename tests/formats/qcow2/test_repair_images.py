"""check -r repairs what the real program repairs, to the same end, and tells the same in the same order.

Each image is damaged in one place; two copies are repaired, one by each program. Exit code, output and
findings have to be the same, the real check has to think the same of both results, and guests have to see
the same. Where qimg differs on purpose, `DIFFERENCES` says how.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from formats.qcow2.test_check_images import KINDS, SMALL, Vandal, edits
from qimg.formats.qcow2 import check as check_module
from qimg.formats.qcow2 import counts
from support import qcow2
from support.qcow2 import Anatomy, Edit, u32, u64
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: No image has both snapshots and bitmaps: there the real check -r loses all snapshots, see below.
IMAGES = {name: (options, {**what, "bitmaps": False}) for name, (options, what) in KINDS.items()}
IMAGES["plain"] = ("", {"snapshots": False, "bitmaps": False, "compressed": False})
IMAGES["bitmaps"] = ("", {"snapshots": False})
#: Images on which every kind of damage is tried; the others get what their variety is about.
WHOLE = ("plain", "v3")
VARIETY = re.compile(
    r"L1 (not copied|zero|to the refcount table)|L2 (zero unaligned|twice|far|not copied|to metadata)"
    r"|compressed (copied|at 0)|refcounts: (none|all|reserved|second block is|behind|negative)"
    r"|header: (no table|one snapshot)|snapshot: (no extra|L1 empty|entry far)|subclusters|bitmaps: "
)
#: The real program says this on its way out and goes on; nobody can do anything about it.
NOISE = re.compile(r"qcow2_free_clusters failed: .*\n")
#: To this line the real program puts no end.
HINT = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."

# How qimg differs: it finishes where the real program runs into its own guard against overwriting tables.
FINISHES = "a refcount table entry that leads astray does not keep the repair from its end"
# The real program frees what the old snapshot table took although the counts cannot tell that it is shared.
KEEPS_HEADER = "a cluster whose references cannot be counted keeps its count"
# The tables to repair are each other's tables: what is found next depends on what was written first.
TANGLED = "tables lie over each other"
# When the real program marks an image as corrupt during a repair it forgets its snapshots.
KEEPS_SNAPSHOTS = "marking an image as corrupt leaves its snapshots alone"
DIFFERENCES = {
    ("*", "refcounts: reserved", "all"): FINISHES,
    ("*", "refcounts: unaligned", "all"): FINISHES,
    ("data file", "refcounts: second block unaligned", "all"): FINISHES,
    ("extended data file", "refcounts: second block unaligned", "all"): FINISHES,
    ("1 bit", "header: one snapshot", "all"): KEEPS_HEADER,
    ("1 bit", "header: three snapshots", "all"): KEEPS_HEADER,
    ("1 bit", "header: L1 elsewhere", "leaks"): TANGLED,
    ("*", "snapshot: little extra data", "all"): KEEPS_SNAPSHOTS,
    ("data file", "L1 to the refcount table", "all"): TANGLED,
    ("extended data file", "L1 to the refcount table", "all"): TANGLED,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (options, what) in IMAGES.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        found[name] = qcow2.rich(folder / "a.qcow2", options, **what)
    for name, (options, size, cluster) in SMALL.items():
        path = tmp_path_factory.mktemp("small") / "a.qcow2"
        found[name] = qcow2.make(path, size, options)
        qcow2.scribble(path, size, 7, cluster=cluster)
        if "1 bit" not in name:
            qcow2.real("qemu-img", "snapshot", "-c", "a", path.name, cwd=path.parent)
            qcow2.scribble(path, size, 8, count=4, cluster=cluster)
    return found


class Pair(NamedTuple):
    """The same damaged image in two folders, and what each program showed when it repaired its own."""

    real_path: Path
    our_path: Path
    real: Result
    ours: Result


def repair_both(source: Path, folder: Path, change: list[Edit], *words: str, size: int | None = None) -> Pair:
    """Damage two copies of `source` and repair each with the program that it is for."""
    results, paths = [], []
    for name, run in (("real", run_real), ("ours", run_qimg_inprocess)):
        place = folder / name
        place.mkdir(exist_ok=True)
        path = qcow2.patch(source, place / "t.qcow2", change)
        if size is not None:
            qcow2.truncate(path, size)
        data = source.parent / "data.bin"
        if data.exists() and not (place / data.name).exists():
            os.link(data, place / data.name)
        results.append(run(["check", "-f", "qcow2", *words, path.name], place))
        paths.append(path)
    real, ours = results
    err = NOISE.sub("", real.err).replace(HINT, f"{HINT}\n")
    return Pair(*paths, real._replace(err=err), ours)


def real_verdict(path: Path) -> tuple[int, str]:
    """Exit code and summary of the real check."""
    found = run_real(["check", "-f", "qcow2", path.name], path.parent)
    return found.code, found.out


def differences(pair: Pair, *, bitmaps: bool = False) -> list[str]:
    """Where the two repairs differ, as lines for a failed test. Whenever the real program has had an image
    open, it writes the `bitmaps` anew, also into what is damaged, so that only what they say compares."""
    found = []
    for field in ("code", "out"):
        real, ours = getattr(pair.real, field), getattr(pair.ours, field)
        if real != ours:
            found.append(f"{field}: real {real!r}, ours {ours!r}")
    lines = pair.real.err.splitlines(), pair.ours.err.splitlines()
    for number in range(max(map(len, lines))):
        real, ours = (part[number] if number < len(part) else None for part in lines)
        if real != ours:
            found.append(f"line {number}: real {real!r}, ours {ours!r}")
            break
    if bitmaps:
        return found
    real, ours = real_verdict(pair.real_path), real_verdict(pair.our_path)
    if real != ours:
        found.append(f"afterwards: real {real}, ours {ours}")
    same = run_real(["compare", "-f", "qcow2", "-F", "qcow2", pair.real_path, pair.our_path])
    if same.code == 1:
        found.append(f"guests see: {same.out}")
    return found


def is_known(kind: str, name: str, fix: str) -> bool:
    return ("*", name, fix) in DIFFERENCES or (kind, name, fix) in DIFFERENCES


def tried(kind: str, source: Path) -> Iterator[tuple[str, list[Edit]]]:
    for name, change in edits(kind, Anatomy(source)).items():
        # Tables of 65537 entries have a test of their own, and so do files that grow to a terabyte.
        if kind == "bitmaps" and not name.startswith(("bitmaps", "L1", "L2", "compressed")):
            continue
        if "6553" not in name and "outside" not in name and (kind in WHOLE or VARIETY.search(name)):
            yield name, change


@pytest.mark.parametrize("kind", IMAGES)
def test_damage_is_repaired_as_the_real_program_repairs_it(
    kind: str, images: dict[str, Path], tmp_path: Path
) -> None:
    wrong = {}
    for name, change in tried(kind, images[kind]):
        for fix in ("leaks", "all"):
            pair = repair_both(images[kind], tmp_path, change, "-r", fix)
            if "Could not open" in pair.real.err and pair.real == pair.ours:
                break
            found = differences(pair, bitmaps=kind == "bitmaps")
            if bool(found) != is_known(kind, name, fix):
                wrong[name, fix] = found or ["no difference any more: take it from the list"]
    assert wrong == {}


@pytest.mark.parametrize("name", ["refcounts: reserved", "refcounts: unaligned"])
@pytest.mark.parametrize("kind", ["plain", "v3", "v2", "extended", "1 bit", "64 bits", "data file"])
def test_a_refcount_table_that_leads_astray_is_repaired(
    kind: str, name: str, images: dict[str, Path], tmp_path: Path
) -> None:
    """Where the real program gives up."""
    change = edits(kind, Anatomy(images[kind]))[name]
    pair = repair_both(images[kind], tmp_path, change, "-r", "all")
    assert pair.real.code == 1
    assert pair.ours.code == 0
    assert real_verdict(pair.our_path)[0] == 0
    assert run_real(["compare", images[kind], pair.our_path], images[kind].parent).code == 0


@pytest.mark.parametrize("kind", ["plain", "v3", "32 bits"])
def test_a_file_grows_to_hold_a_refcount_block_that_is_outside(
    kind: str, images: dict[str, Path], tmp_path: Path
) -> None:
    a = Anatomy(images[kind])
    for change in ([(a.table, u64(1 << 38))], [(a.table + 8, u64(1 << 38))]):
        pair = repair_both(images[kind], tmp_path, change, "-r", "all")
        assert (pair.ours, real_verdict(pair.our_path)) == (pair.real, real_verdict(pair.real_path))


@pytest.mark.parametrize("words", [["leaks", "--output=json"], ["all", "--output=json"], ["all", "-q"]])
def test_the_repair_is_told_as_the_words_ask_for(
    words: list[str], images: dict[str, Path], tmp_path: Path
) -> None:
    a = Anatomy(images["v3"])
    table = edits("v3", a)
    for name in ("L1 zero", "L2 twice", "refcounts: none", "refcounts: negative", "header: one snapshot"):
        pair = repair_both(images["v3"], tmp_path, table[name], "-r", *words)
        assert differences(pair) == [], name


BITS = {"dirty": 1, "corrupt": 2, "both": 3}


@pytest.mark.parametrize("fix", ["leaks", "all"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("damage", [None, "L2 not copied", "L2 twice", "L2 reserved", "refcounts: none"])
def test_the_bits_of_the_header_are_cleared_when_they_have_no_reason_left(
    bits: str, damage: str | None, fix: str, images: dict[str, Path], tmp_path: Path
) -> None:
    """But the real program clears the dirty bit even where it could not repair the counts."""
    change = [(72, u64(BITS[bits])), (88, u64(0x30))]
    change += edits("plain", Anatomy(images["plain"]))[damage] if damage else []
    pair = repair_both(images["plain"], tmp_path, change, "-r", fix)
    assert differences(pair) == []
    real, ours = (path.read_bytes()[72:96] for path in pair[:2])
    counts_are_right = pair.ours.code == 0 or (damage == "L2 reserved" and fix == "all")
    left = 0 if counts_are_right else BITS[bits] & 1
    assert ours == bytes([*real[:7], real[7] | left, *real[8:]])


def test_snapshots_survive_the_repair_of_an_image_with_bitmaps(tmp_path: Path) -> None:
    """The real program (7.2) drops all snapshots of such an image, sound or not, and frees their clusters."""
    source = qcow2.rich(tmp_path / "a.qcow2")
    pair = repair_both(source, tmp_path, [], "-r", "leaks")
    listed = [run_real(["snapshot", "-l", path]).out for path in (source, *pair[:2])]
    assert listed[0].count("\n") == 4
    assert listed[1] == ""
    assert listed[2] == listed[0]
    assert pair.ours.out.startswith("No errors were found on the image.\n")
    assert pair.our_path.read_bytes() == source.read_bytes()


def test_bitmaps_that_nobody_kept_up_are_dropped(images: dict[str, Path], tmp_path: Path) -> None:
    pair = repair_both(images["bitmaps"], tmp_path, [(88, u64(0))], "-r", "leaks")
    assert pair.ours == pair.real
    assert differences(pair) == []
    shown = run_real(["info", "--output=json", pair.our_path])
    assert shown.err == ""
    assert '"bitmaps"' not in shown.out


# -- snapshot tables


def entry(*, id: bytes = b"", name: bytes = b"", extra: bytes = b"", claimed: int | None = None) -> bytes:
    """A snapshot table entry of an empty snapshot; `claimed` is the size of the extra data that it states."""
    stated = len(extra) if claimed is None else claimed
    head = u64(0) + u32(0) + qcow2.u16(len(id)) + qcow2.u16(len(name)) + u32(1) + u32(2) + u64(3) + u32(77)
    raw = head + u32(stated) + extra + id + name
    return raw + bytes(-len(raw) % 8)


KNOWN = u64(5) + u64(1 << 20) + u64(9)
HUGE = entry(extra=bytes(24), id=b"1" * 65535, name=b"n" * 65535)
TABLES = {
    "short": [entry(extra=bytes(8), id=b"1", name=b"abc")],
    "none": [entry(id=b"1", name=b"abc"), entry(id=b"2", name=b"abc")],
    "no instruction count": [entry(extra=KNOWN[:16], id=b"1"), entry(extra=KNOWN[:8], id=b"2")],
    "unknown fields": [
        entry(extra=KNOWN + b"zyxwvu", id=b"1", name=b"abc"),
        entry(extra=bytes(8), name=b"q"),
    ],
    "too long": [entry(extra=KNOWN + b"x" * 1006, id=b"1", name=b"abc")],
    "too long and short": [entry(extra=KNOWN + b"x" * 1006, id=b"1"), entry(extra=bytes(8), name=b"q")],
    "too many": [entry(extra=bytes(24))] * 65538,
    "too big": [HUGE] * 530,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in TABLES for options in ("", "compat=0.10") if name != "too many"),
        pytest.param("too many", "", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_snapshot_table_is_repaired(name: str, options: str, tmp_path: Path) -> None:
    """Byte for byte as the real program writes it, where it lies in the same place."""
    source = qcow2.make(tmp_path / "a.qcow2", "1M", options)
    qcow2.io(source, "write -P 1 0 128k")
    table = b"".join(TABLES[name])
    with source.open("r+b") as file:
        at = -(-file.seek(0, os.SEEK_END) // 65536) * 65536
        file.seek(at)
        file.write(table)
        file.seek(60)
        file.write(u32(len(TABLES[name])) + u64(at))
    for fix in ("leaks", "all"):
        pair = repair_both(source, tmp_path, [], "-r", fix)
        assert differences(pair) == []
    real, ours = (path.read_bytes() for path in pair[:2])
    assert ours[60:72] == real[60:72]
    at = int.from_bytes(ours[64:72], "big")
    assert ours[at : at + 4096] == real[at : at + 4096]


# -- the placing of new structures

LAYOUTS = {
    "full": ["write 0 600k"],
    "gaps": ["write 0 600k", "discard 5k 3k", "discard 200k 9k", "discard 400k 6k"],
    "a wide gap": ["write 0 900k", "discard 20k 700k"],
    "a long table": ["write 0 9M", "discard 100k 300k", "discard 8M 5k"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_structures_lie_where_the_real_program_puts_them(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qcow2.make(tmp_path / "a.qcow2", "9M", "cluster_size=512")
    qcow2.io(source, *LAYOUTS[layout])
    a = Anatomy(source)
    for lost in (
        (a.table, bytes(512)),
        (a.table, u64(0)),
        (a.table + 8, u64(0)),
        (a.table + 24, u64(0x5001)),
    ):
        for plain in (1 << 18, -1):
            monkeypatch.setattr(check_module, "PLAIN_CLUSTERS", plain)
            pair = repair_both(source, tmp_path, [lost], "-r", "all")
            assert pair.ours == pair.real
            assert pair.our_path.read_bytes() == pair.real_path.read_bytes()


@pytest.mark.parametrize("clusters", range(250, 262))
def test_structures_that_describe_themselves_find_their_place(clusters: int, tmp_path: Path) -> None:
    """Around the end of what one refcount block describes."""
    source = qcow2.make(tmp_path / "a.qcow2", "9M", "cluster_size=512")
    qcow2.io(source, f"write 0 {(clusters - 9) * 512}")
    pair = repair_both(source, tmp_path, [(Anatomy(source).table, u64(0))], "-r", "all")
    assert pair.ours.code == pair.real.code == 0
    assert real_verdict(pair.our_path)[0] == 0
    assert run_real(["compare", source, pair.our_path]).code == 0


def test_what_lies_behind_the_end_of_the_file_is_not_overwritten(
    images: dict[str, Path], tmp_path: Path
) -> None:
    """The real program puts a refcount block where a guest cluster is, and leaves the image broken."""
    a = Anatomy(images["plain"])
    end = a.clusters * a.cluster_size
    change = [
        (a.entry(0), u64(qcow2.COPIED | end)),
        (a.table, u64(0)),
        # Nothing is free below.
        (a.entry(9), u64(qcow2.COPIED | 5 * a.cluster_size)),
        (a.entry(10), u64(qcow2.COPIED | 2 * a.cluster_size)),
    ]
    pair = repair_both(images["plain"], tmp_path, change, "-r", "all")
    assert pair.real.code != 0
    assert pair.ours.code == 0
    assert real_verdict(pair.our_path)[0] == 0
    seen = run_real(["convert", "-O", "raw", pair.our_path, tmp_path / "raw"])
    assert seen.code == 0
    assert (tmp_path / "raw").read_bytes()[: a.cluster_size] == bytes(a.cluster_size)


# -- two ways, and parts


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_repaired_as_the_real_program_repairs_it(
    seed: int, bulk: bool, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or better: what the real program repaired is repaired, and no image is left worse."""
    if bulk:
        monkeypatch.setattr(check_module, "PLAIN_CLUSTERS", -1)
    rng = random.Random(seed + 7000)
    vandals = [Vandal(path, rng) for name, path in images.items() if name != "bitmaps"]
    same = 0
    for number in range(30):
        vandal = rng.choice(vandals)
        change = [edit for edit in (vandal.edit() for _ in range(rng.choice((1, 1, 2)))) if edit]
        fix = rng.choice(("leaks", "all", "all"))
        pair = repair_both(vandal.path, tmp_path, change, "-r", fix)
        if "Could not open" in pair.real.err and pair.real == pair.ours:
            continue
        found = differences(pair)
        same += not found
        if found:
            real, ours = real_verdict(pair.real_path)[0], real_verdict(pair.our_path)[0]
            assert rank(ours) <= rank(real), (number, vandal.path, change, fix, found)
    assert same >= 20


def rank(code: int) -> int:
    """How bad an exit code of check is."""
    return (0, 3, 2, 1).index(code)


class Parts:
    """Instead of `counts.partitions`: partitions of one refcount block each."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.most = 0

    def __call__(self, clusters: int, width: int) -> Iterator[counts.VectorCounts]:
        walked, copied = counts.Spans(), counts.Spans()
        starts = range(0, clusters, self.step)
        self.most = max(self.most, len(starts))
        for start in starts:
            walked.rewind()
            copied.rewind()
            yield counts.VectorCounts(start, min(start + self.step, clusters), width, walked, copied)


@pytest.mark.parametrize("fix", ["leaks", "all"])
def test_several_partitions_are_repaired_as_one_is(
    fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qcow2.make(tmp_path / "a.qcow2", "1M", "cluster_size=512,refcount_bits=64")
    qcow2.io(source, "write -P 1 0 200k", "write -c -P 2 300k 512", "write -z 0 64k", "write -P 3 500k 64k")
    a = Anatomy(source)
    second = a.l2_tables[1]
    damages = {
        "none": [],
        "counts": [(a.blocks[0] + 103, b"\5"), (a.blocks[-1] + 7, b"\7"), (a.blocks[3] + 7, b"\3")],
        "twice": [(a.entry(1, second), u64(a.number(a.entry(2, second))))],
        "copied": [(a.entry(1, second), u64(a.number(a.entry(2, second)) & ~qcow2.COPIED))],
        "far": [(a.entry(0), u64(qcow2.COPIED | 1 << 40))],
        "no block": [(a.table + 16, u64(0))],
        "no blocks": [(a.table, bytes(512))],
        "no table": [(qcow2.HEADER_TABLE_CLUSTERS, u32(0))],
        "no first L2 table": [(a.l1, u64(0))],
        "block outside": [(a.table + 16, u64(len(a.raw) + 40000 & ~511))],
    }
    parts = Parts(64)
    monkeypatch.setattr(counts, "partitions", parts)
    monkeypatch.setattr(check_module, "PLAIN_CLUSTERS", -1)
    for name, change in damages.items():
        pair = repair_both(source, tmp_path, change, "-r", fix)
        assert parts.most > 8
        assert (pair.ours.code, pair.ours.out) == (pair.real.code, pair.real.out), name
        assert sorted(set(pair.ours.err.splitlines())) == sorted(set(pair.real.err.splitlines())), name
        if pair.real.code != 1:
            assert real_verdict(pair.our_path) == real_verdict(pair.real_path), name
            same = run_real(["compare", pair.real_path, pair.our_path])
            assert same.code == 0, name


def test_repairing_a_sound_image_writes_nothing(images: dict[str, Path], tmp_path: Path) -> None:
    for source in images.values():
        for fix in ("leaks", "all"):
            before = source.read_bytes()
            path = qcow2.patch(source, tmp_path / "t.qcow2", [])
            if (source.parent / "data.bin").exists() and not (tmp_path / "data.bin").exists():
                os.link(source.parent / "data.bin", tmp_path / "data.bin")
            assert run_qimg_inprocess(["check", "-q", "-r", fix, path.name], tmp_path) == (0, "", "")
            assert path.read_bytes() == before


def test_space_of_leaked_clusters_is_given_back(tmp_path: Path) -> None:
    source = qcow2.make(tmp_path / "a.qcow2", "64M")
    qcow2.io(source, "write -P 1 0 8M")
    pair = repair_both(source, tmp_path, [(Anatomy(source).l1, u64(0))], "-r", "leaks")
    assert pair.ours == pair.real
    used = [path.stat().st_blocks * 512 for path in pair[:2]]
    assert used[0] < 1 << 20
    assert used[1] < 1 << 20
