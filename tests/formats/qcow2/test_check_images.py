"""check finds what the real program finds, in its order and words, and counts the same.

Every image is checked twice: entry by entry, and in bulk by numpy.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from qimg.errors import StorageError
from qimg.formats.qcow2 import counts
from qimg.formats.qcow2.check import Checker
from support import qcow2
from support.qcow2 import COMPRESSED, COPIED, Anatomy, Edit, u16, u32, u64

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KINDS: dict[str, tuple[str, dict[str, bool]]] = {
    "v3": ("", {}),
    "v2": ("compat=0.10", {"bitmaps": False}),
    "extended": ("extended_l2=on", {}),
    "1 bit": ("refcount_bits=1", {"snapshots": False}),
    "2 bits": ("refcount_bits=2", {"snapshots": False, "bitmaps": False}),
    "4 bits": ("refcount_bits=4", {}),
    "8 bits": ("refcount_bits=8", {"bitmaps": False}),
    "32 bits": ("refcount_bits=32", {}),
    "64 bits": ("refcount_bits=64", {}),
    "zstd": ("compression_type=zstd", {}),
    "preallocated": ("preallocation=metadata", {"compressed": False}),
    "data file": ("data_file=data.bin", {"snapshots": False, "compressed": False}),
    "extended data file": (
        "data_file=data.bin,extended_l2=on",
        {"snapshots": False, "compressed": False, "bitmaps": False},
    ),
}
#: (options, size, cluster size for compressed writes)
SMALL = {
    "512": ("cluster_size=512", 300 << 10, 512),
    "512, 1 bit": ("cluster_size=512,refcount_bits=1", 200 << 10, 0),
    "512, v2": ("cluster_size=512,compat=0.10", 200 << 10, 512),
    "4096, 8 bits": ("cluster_size=4k,refcount_bits=8", 40 << 20, 4096),
    "2 MiB": ("cluster_size=2M", 40 << 20, 2 << 20),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (options, what) in KINDS.items():
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


@pytest.mark.parametrize("kind", [*KINDS, *SMALL])
def test_a_sound_image_has_the_real_figures(kind: str, images: dict[str, Path]) -> None:
    assert qcow2.differences(images[kind], ways=(True, False, None)) == []


def edits(kind: str, anatomy: Anatomy) -> dict[str, list[Edit]]:
    """Damage by name: every structure, every field, every way in which it can be wrong."""
    a = anatomy
    l2, first = a.entry(0), a.number(a.entry(0))
    far, end = 1 << 40, a.clusters * a.cluster_size
    table = a.l2_tables[0]
    all_of_it: dict[str, list[Edit]] = {
        "L1 unaligned": [(a.l1, u64(COPIED | table + 0x200))],
        "L1 far": [(a.l1, u64(COPIED | far))],
        "L1 behind the end": [(a.l1, u64(COPIED | end))],
        "L1 not copied": [(a.l1, u64(table))],
        "L1 reserved": [(a.l1, u64(COPIED | table | 1 << 57 | 1))],
        "L1 to the refcount table": [(a.l1, u64(COPIED | a.table))],
        "L1 zero": [(a.l1, u64(0))],
        "L2 reserved": [(l2, u64(first | 1 << 57 | 2))],
        "L2 unaligned": [(l2, u64(first | 0x200))],
        "L2 zero unaligned": [(l2, u64(first | 0x201))],
        "L2 far": [(l2, u64(COPIED | far))],
        "L2 far zero": [(l2, u64(COPIED | far | 1))],
        "L2 behind the end": [(l2, u64(COPIED | end))],
        "L2 twice": [(l2, u64(a.number(a.entry(1))))],
        "L2 to metadata": [(l2, u64(COPIED | a.table))],
        "L2 copied only": [(l2, u64(COPIED))],
        "L2 reserved only": [(l2, u64(2))],
        "L2 not copied": [(l2, u64(first & ~COPIED))],
        "L2 zero bit": [(l2, u64(first | 1))],
        "compressed far": [(l2, u64(COMPRESSED | far))],
        "compressed at 0": [(l2, u64(COMPRESSED))],
        "compressed over the end": [(l2, u64(COMPRESSED | len(a.raw) - 10 | 0xFF << 54))],
        "compressed copied": [(l2, u64(COPIED | COMPRESSED | 0x50000))],
        "refcounts: none": [(a.table, u64(0))],
        "refcounts: reserved": [(a.table, u64(a.blocks[0] | 1))],
        "refcounts: unaligned": [(a.table, u64(a.blocks[0] | 0x200))],
        "refcounts: outside": [(a.table, u64(far))],
        "refcounts: behind the end": [(a.table, u64(end))],
        "refcounts: beyond every file": [(a.table, u64(0x7FFF_FFFF_FFFF_0000))],
        "refcounts: negative": [(a.table, u64(1 << 63))],
        "refcounts: second block is the first": [(a.table + 8, u64(a.blocks[0]))],
        "refcounts: second block is data": [(a.table + 8, u64(0x50000))],
        "refcounts: second block outside": [(a.table + 8, u64(far))],
        "refcounts: second block unaligned": [(a.table + 8, u64(0x50200))],
        "refcounts: all zero": [(a.blocks[0], bytes(a.cluster_size))],
        "refcounts: all ones": [(a.blocks[0], b"\xff" * a.cluster_size)],
        "refcounts: past the end": [(a.blocks[0] + 400 * a.width // 8, b"\7\7\7\7\7\7\7\7")],
        "header: no table": [(qcow2.HEADER_TABLE_CLUSTERS, u32(0))],
        "header: two table clusters": [(qcow2.HEADER_TABLE_CLUSTERS, u32(2))],
        "header: table far": [(qcow2.HEADER_TABLE, u64(far))],
        "header: L1 elsewhere": [(qcow2.HEADER_L1, u64(a.table))],
        "header: L1 far": [(qcow2.HEADER_L1, u64(far))],
        "header: L1 longer": [(qcow2.HEADER_L1_SIZE, u32(40))],
        "header: one snapshot": [(qcow2.HEADER_SNAPSHOTS, u32(1))],
        "header: no snapshots": [(qcow2.HEADER_SNAPSHOTS, u32(0))],
        "header: three snapshots": [(qcow2.HEADER_SNAPSHOTS, u32(3))],
        "header: 65537 snapshots": [(qcow2.HEADER_SNAPSHOTS, u32(65537))],
        "header: 65539 snapshots": [(qcow2.HEADER_SNAPSHOTS, u32(65539))],
        "header: snapshots far": [(qcow2.HEADER_SNAPSHOT_OFFSET, u64(far))],
        "header: snapshots unaligned": [(qcow2.HEADER_SNAPSHOT_OFFSET, u64(8))],
    }
    if a.extended:
        all_of_it |= extended_edits(a)
    if a.snapshots:
        all_of_it |= snapshot_edits(a)
    if a.bitmaps is not None:
        all_of_it |= bitmap_edits(a)
    return all_of_it


def extended_edits(a: Anatomy) -> dict[str, list[Edit]]:
    all_bits = 0xFFFF_FFFF
    word = a.number(a.entry(0))
    words = {
        "both": (word, 1 << 32 | 1),
        "both, reserved, unaligned": (word | 0x202, 1 << 32 | 1),
        "zero, unaligned": (word | 0x200, all_bits << 32),
        "nothing, unaligned": (word | 0x200, 0),
        "bit 0": (word | 1, all_bits),
        "allocated nowhere": (0, 1),
        "both nowhere": (0, 1 << 32 | 1),
        "zero nowhere": (0, all_bits << 32),
        "allocated nowhere, copied": (COPIED, 1),
        "compressed": (COMPRESSED | 0xB0000, 1),
        "compressed, copied": (COPIED | COMPRESSED | 0xB0000, 1),
        "far": (COPIED | 1 << 40, 1 << 32 | 1),
        "nothing, not copied": (word & ~COPIED, 0),
    }
    return {f"subclusters: {name}": [(a.entry(0), u64(x) + u64(y))] for name, (x, y) in words.items()}


def snapshot_edits(a: Anatomy) -> dict[str, list[Edit]]:
    at = a.snapshots[0]
    l1 = a.number(at)
    l2 = a.number(l1) & qcow2.OFFSET
    found: dict[str, list[Edit]] = {
        "L1 unaligned": [(at, u64(l1 | 0x200))],
        "L1 too large": [(at + 8, u32(4194305))],
        "L1 wrong twice": [(at, u64(l1 | 0x200)), (at + 8, u32(4194305))],
        "L1 longer": [(at + 8, u32(100))],
        "L1 far": [(at, u64(1 << 40))],
        "L1 at 0": [(at, u64(0))],
        "L1 empty": [(at + 8, u32(0))],
        "huge id": [(at + 12, u16(0xFFFF))],
        "too much extra data": [(at + 36, u32(1025))],
        "little extra data": [(at + 36, u32(8))],
        "no extra data": [(at + 36, u32(0))],
        "L2 unaligned": [(l1, u64(l2 | 0x200))],
        "L2 reserved": [(l1, u64(l2 | 0x100))],
        "entry reserved": [(l2 + 8, u64(a.number(l2 + 8) | 4))],
        "entry far": [(l2 + 8, u64(1 << 40))],
        "entry copied": [(l2 + 8, u64(a.number(l2 + 8) | COPIED))],
    }
    return {f"snapshot: {name}": change for name, change in found.items()}


def bitmap_edits(a: Anatomy) -> dict[str, list[Edit]]:
    assert a.bitmaps is not None
    directory = a.number(a.bitmaps + 16)
    table = a.number(directory)
    found: dict[str, list[Edit]] = {
        "directory shorter": [(a.bitmaps + 8, u64(32))],
        "table far": [(directory, u64(1 << 40))],
        "data elsewhere": [(table, u64(0x50000))],
        "data far": [(table, u64(1 << 40))],
        "in use": [(directory + 12, u32(1))],
        "in use, unaligned": [(directory + 12, u32(1)), (table, u64(0x50200))],
        "in use, reserved": [(directory + 12, u32(1)), (table, u64(0x50002))],
        "in use, far": [(directory + 12, u32(1)), (table, u64(1 << 40))],
        "not trusted": [(88, u64(0))],
        "not trusted and broken": [(88, u64(0)), (directory, u64(5))],
    }
    return {f"bitmaps: {name}": change for name, change in found.items()}


@pytest.mark.parametrize("kind", [*KINDS, "512"])
def test_every_kind_of_damage_is_found_as_the_real_program_finds_it(
    kind: str, images: dict[str, Path]
) -> None:
    source = images[kind]
    wrong = {}
    for name, change in edits(kind, Anatomy(source)).items():
        path = qcow2.patch(source, source.parent / "t.qcow2", change)
        if qcow2.opens_for_check(path):
            found = qcow2.differences(path)
            if found:
                wrong[name] = found
    assert wrong == {}


class Vandal:
    """Random damage to one image."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.a = Anatomy(path)
        self.rng = rng
        self._used: dict[int, list[int]] = {}

    def place(self) -> int:
        a, rng = self.a, self.rng
        kind = rng.random()
        if kind < 0.5:
            return rng.randrange(a.clusters + 3) * a.cluster_size
        if kind < 0.6:
            return rng.choice((0, a.l1, a.table, a.blocks[0], *a.l2_tables[:1]))
        if kind < 0.7:
            return rng.randrange(len(a.raw) // 512) * 512
        if kind < 0.8:
            return rng.randrange(1 << 40) // a.cluster_size * a.cluster_size
        if kind < 0.9:
            return rng.randrange(1 << 56) & qcow2.OFFSET
        return (a.clusters - 1 + rng.randrange(4)) * a.cluster_size

    def word(self) -> int:
        a, rng = self.a, self.rng
        kind = rng.random()
        if kind < 0.05:
            return rng.choice((0, 1, COPIED, COPIED | 1, 2, 1 << 57))
        word = self.place() | (COPIED if rng.random() < 0.6 else 0)
        if kind < 0.15:
            return word ^ 1 << rng.randrange(64)
        if kind < 0.3:
            shift = 70 - a.cluster_bits
            offset = (self.place() + rng.randrange(a.cluster_size)) & (1 << shift) - 1
            copied = COPIED if kind < 0.18 else 0
            return offset | COMPRESSED | copied | rng.randrange(1 << (a.cluster_bits - 8)) << shift
        return word | 1 if kind < 0.4 else word

    def used(self, table: int) -> list[int]:
        """Entries of an L2 table that are not zero."""
        if table not in self._used:
            a = self.a
            starts = ((index, a.entry(index, table)) for index in range(a.entries))
            self._used[table] = [index for index, at in starts if any(a.raw[at : at + a.entry_size])]
        return self._used[table]

    def edit(self) -> Edit | None:
        kinds = (
            self.l1,
            self.l2,
            self.l2,
            self.l2,
            self.l2,
            self.table,
            self.block,
            self.snapshot,
            self.header,
        )
        return self.rng.choice(kinds)()

    def l1(self) -> Edit:
        offset, count = self.rng.choice(self.a.l1_tables)
        return offset + 8 * self.rng.randrange(count + 1), u64(self.word())

    def l2(self) -> Edit | None:
        a, rng = self.a, self.rng
        if not a.l2_tables:
            return None
        table = rng.choice(a.l2_tables)
        used = self.used(table)
        index = rng.choice(used) if used and rng.random() < 0.8 else rng.randrange(a.entries)
        at = a.entry(index, table)
        if a.extended and rng.random() < 0.5:
            bits = rng.choice((rng.getrandbits(64), 1, 1 << 32, 1 << 32 | 1, 0xFFFF_FFFF, 0, (1 << 64) - 1))
            return (at + 8, u64(bits)) if rng.random() < 0.5 else (at, u64(self.word()) + u64(bits))
        if rng.random() < 0.3:
            return at, u64(a.number(at) ^ 1 << rng.randrange(64))
        return at, u64(self.word())

    def table(self) -> Edit:
        word = self.place() | (self.rng.randrange(512) if self.rng.random() < 0.3 else 0)
        return self.a.table + 8 * self.rng.randrange(3), u64(word)

    def block(self) -> Edit:
        byte = self.rng.choice((0, 1, 2, 255, self.rng.randrange(256)))
        return self.a.blocks[0] + self.rng.randrange(self.a.clusters * self.a.width // 8 + 2), bytes([byte])

    def snapshot(self) -> Edit | None:
        if not self.a.snapshots:
            return None
        field, width = self.rng.choice(((0, 8), (8, 4), (12, 2), (14, 2), (36, 4)))
        at = self.rng.choice(self.a.snapshots) + field
        old = self.a.number(at, width)
        new = self.rng.choice((0, 1, old ^ 1 << self.rng.randrange(8 * width), old + 1))
        return at, (new & (1 << 8 * width) - 1).to_bytes(width, "big")

    def header(self) -> Edit:
        field = self.rng.choice((36, 40, 48, 56, 60, 64))
        if field in (40, 48, 64):
            return field, u64(self.place())
        old = self.a.number(field, 4)
        return field, u32(self.rng.choice((0, 1, 2, 3, old + 1, old ^ 1 << self.rng.randrange(8))))


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_is_found_as_the_real_program_finds_it(seed: int, images: dict[str, Path]) -> None:
    rng = random.Random(seed)
    vandals = [Vandal(path, rng) for path in images.values()]
    for number in range(40):
        vandal = rng.choice(vandals)
        change = [edit for edit in (vandal.edit() for _ in range(rng.choice((1, 1, 1, 2, 3)))) if edit]
        path = qcow2.patch(vandal.path, vandal.path.parent / "t.qcow2", change)
        if rng.random() < 0.06:
            qcow2.truncate(path, rng.randrange(vandal.a.cluster_size, len(vandal.a.raw)))
        if qcow2.opens_for_check(path):
            assert qcow2.differences(path) == [], (number, vandal.path, change)


# -- what the real program is not needed for


def test_several_partitions_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions of 64 clusters, as many as a refcount block counts here, instead of 2^24 and more."""
    source = qcow2.make(tmp_path / "a.qcow2", "1M", "cluster_size=512,refcount_bits=64")
    qcow2.io(source, "write -P 1 0 200k", "write -c -P 2 300k 512", "write -z 0 64k", "write -P 3 500k 64k")
    anatomy = Anatomy(source)
    second = anatomy.l2_tables[1]
    change = [
        (anatomy.entry(0), u64(COPIED | 1 << 40)),
        (anatomy.entry(1, second), u64(anatomy.number(anatomy.entry(2, second)) & ~COPIED)),
        (anatomy.blocks[0] + 103, b"\5"),
        (anatomy.blocks[-1] + 7, b"\7"),
    ]
    built: list[counts.VectorCounts] = []

    def small(clusters: int, width: int) -> list[counts.VectorCounts]:
        walked, copied = counts.Spans(), counts.Spans()
        starts = range(0, clusters, 64)
        built.extend(Rewound(start, min(start + 64, clusters), width, walked, copied) for start in starts)
        return built

    monkeypatch.setattr(counts, "partitions", small)
    for path in (source, qcow2.patch(source, tmp_path / "t.qcow2", change)):
        whole = qcow2.our_check(path, plain=True)
        built.clear()
        parts = qcow2.our_check(path, plain=False)
        assert len(built) > 8
        assert sorted(parts[0]) == sorted(whole[0])
        assert parts[1] == whole[1]
    assert whole[0]


class Rewound(counts.VectorCounts):
    """Counts whose walks begin at the beginning, however early the object was made."""

    def walker(self, checker: Checker, active: bool) -> counts.VectorWalker:
        if active:
            self.walked.rewind()
            self.copied.rewind()
        return super().walker(checker, active)


def test_a_small_image_is_checked_without_numpy(images: dict[str, Path]) -> None:
    script = (
        "import sys\n"
        "from qimg.context import Context\n"
        "from qimg.formats.qcow2.format import Qcow2\n"
        "from qimg.storage.posix import PosixFile\n"
        "image = Qcow2().open(PosixFile.open(sys.argv[1]), context=Context(), for_check=True)\n"
        "image.check(print)\n"
        "assert 'numpy' not in sys.modules\n"
        "assert 'collections.abc' not in sys.modules or 'collections.abc' in before\n"
    )
    script = "import sys; before = set(sys.modules)\n" + script
    subprocess.run([sys.executable, "-S", "-c", script, str(images["v3"])], check=True, env=_path())


def _path() -> dict[str, str]:
    import os

    import qimg

    return {**os.environ, "PYTHONPATH": str(Path(qimg.__file__).parents[1])}


def test_a_file_of_too_many_clusters_is_refused(tmp_path: Path) -> None:
    path = qcow2.make(tmp_path / "a.qcow2", "1M", "cluster_size=512")
    qcow2.truncate(path, ((1 << 31) + 1) * 512)
    findings, numbers = qcow2.our_check(path)
    assert (findings, numbers) == (["Check failed: File too large"], None)
    assert qcow2.real_check(path) == (findings, None)


def test_checking_writes_nothing(images: dict[str, Path]) -> None:
    for path in images.values():
        before = path.read_bytes()
        qcow2.our_check(path)
        assert path.read_bytes() == before


def test_a_storage_error_ends_the_check(images: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, buf: object, offset: int) -> None:
        raise StorageError("Input/output error", errno=5, offset=offset)

    with qcow2.open_image(images["v3"], for_check=True) as image:
        monkeypatch.setattr(type(image.file), "read_into", broken)
        with pytest.raises(StorageError):
            image.check(print)
