"""Repairs that are interrupted: no moment leaves an image worse than it was, and they can be repeated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest

from formats.qcow2.test_check_images import edits
from qimg.context import Context
from qimg.errors import QimgError, StorageError
from qimg.formats.qcow2.format import Qcow2
from qimg.formats.qcow2.image import Qcow2Image
from qimg.formats.qcow2.repair import repair
from qimg.storage.base import Storage
from qimg.storage.fault import FaultStorage, Rule
from qimg.storage.memory import MemoryStorage
from qimg.storage.record import DISCARD, FLUSH, RecordStorage
from support import qcow2
from support.qcow2 import COPIED, Anatomy, Edit, u32, u64
from support.run import Result, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KINDS: dict[str, tuple[str, dict[str, bool]]] = {
    "plain": ("", {"snapshots": False, "bitmaps": False, "compressed": False}),
    "snapshots": ("cluster_size=4k", {"bitmaps": False}),
    "one bit": ("refcount_bits=1", {"snapshots": False, "bitmaps": False}),
    "extended": ("extended_l2=on", {"bitmaps": False}),
}
CASES = [
    ("plain", "L1 not copied", "leaks"),
    ("plain", "L1 zero", "leaks"),
    ("plain", "L2 twice", "all"),
    ("plain", "L2 zero unaligned", "all"),
    ("plain", "L1 to the refcount table", "all"),
    ("plain", "refcounts: none", "all"),
    ("plain", "refcounts: reserved", "all"),
    ("plain", "refcounts: unaligned", "all"),
    ("plain", "refcounts: all zero", "all"),
    ("plain", "refcounts: all ones", "all"),
    ("plain", "refcounts: second block is data", "all"),
    ("plain", "header: no table", "all"),
    ("plain", "header: table far", "all"),
    ("plain", "dirty", "all"),
    ("snapshots", "header: one snapshot", "all"),
    ("snapshots", "snapshot: too much extra data", "all"),
    ("snapshots", "snapshot: L1 empty", "all"),
    ("snapshots", "refcounts: all zero", "all"),
    ("one bit", "L1 not copied", "all"),
    ("one bit", "refcounts: none", "all"),
    ("extended", "subclusters: zero, unaligned", "all"),
    ("extended", "refcounts: behind the end", "all"),
]


class Damaged(NamedTuple):
    """A damaged image: its content, what the real check says of it, whether guests can read all of it, and
    what they see (where they cannot: when it is repaired)."""

    content: bytes
    code: int
    readable: bool
    raw: Path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (options, what) in KINDS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        found[name] = qcow2.rich(folder / "a.qcow2", options, **what)
    return found


def damage(name: str, a: Anatomy) -> list[Edit]:
    if name == "dirty":
        return [(72, u64(1)), (a.blocks[0], bytes(a.cluster_size)), (a.entry(1), u64(a.number(a.entry(2))))]
    return edits("", a)[name]


def damaged(source: Path, name: str, folder: Path) -> Damaged:
    path = qcow2.patch(source, folder / "damaged", damage(name, Anatomy(source)))
    raw = folder / "raw"
    readable = real_convert(path, raw)
    if not readable:
        repaired = MemoryStorage(path.read_bytes(), size=path.stat().st_size)
        mend(repaired, "all")
        (folder / "repaired").write_bytes(repaired.content())
        assert real_convert(folder / "repaired", raw)
    return Damaged(path.read_bytes(), real_check(path).code, readable, raw)


def real_convert(path: Path, raw: Path) -> bool:
    """Whether the real program can read all of an image."""
    return run_real(["convert", "-f", "qcow2", "-O", "raw", path, raw]).code == 0


def real_check(path: Path) -> Result:
    return run_real(["check", "-f", "qcow2", path])


def mend(file: Storage, fix: str) -> None:
    """Repair the image in `file`, as the command does."""
    image = Qcow2().open(file, writable=True, context=Context(lambda _: None), for_check=True)
    assert isinstance(image, Qcow2Image)
    repair(image, lambda _: None, fix)


def rank(code: int) -> int:
    """How bad an exit code of check is."""
    return (0, 3, 2, 1).index(code)


class Judge:
    """Looks at what interruptions leave. `end` is what the whole repair makes of the image."""

    def __init__(self, folder: Path, before: Damaged, end: int) -> None:
        self._path = folder / "left"
        self._before = before
        self._end = end
        self._known: set[bytes] = set()

    def see(self, content: bytes, fix: str) -> None:
        """Fails the test unless the image is no worse than it was, and the repair can be repeated."""
        if content in self._known:
            return
        self._known.add(content)
        self._path.write_bytes(content)
        found = real_check(self._path)
        if rank(found.code) > rank(self._before.code):
            # While counts fall, a COPIED bit may say already what the count will say: no harm comes of it.
            left = [line for line in found.err.splitlines() if not line.startswith("Leaked cluster")]
            assert found.code == 2
            assert all(line.startswith("ERROR OFLAG_COPIED") for line in left), found.err
        self._same_for_guests(repaired=False)
        mend_again = MemoryStorage(content, size=len(content))
        mend(mend_again, fix)
        self._path.write_bytes(mend_again.content())
        assert real_check(self._path).code == self._end
        self._same_for_guests(repaired=True)

    def _same_for_guests(self, *, repaired: bool) -> None:
        seen = run_real(["compare", "-f", "qcow2", "-F", "raw", self._path, self._before.raw])
        if repaired or self._before.readable:
            assert seen.code == 0, seen.out + seen.err
        else:
            assert seen.code != 1, "what can be read is right"


def whole_repair(before: Damaged, fix: str, folder: Path) -> tuple[RecordStorage, int]:
    """The repair without interruption, recorded, and the exit code of the real check afterwards."""
    record = RecordStorage(MemoryStorage(before.content, size=len(before.content)))
    record.writable = True
    mend(record, fix)
    path = folder / "whole"
    path.write_bytes(record.replay().content())
    return record, real_check(path).code


@pytest.mark.parametrize(("kind", "name", "fix"), CASES)
def test_a_power_cut_leaves_no_image_worse_than_it_was(
    kind: str, name: str, fix: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    before = damaged(sources[kind], name, tmp_path)
    record, end = whole_repair(before, fix, tmp_path)
    assert end == 0
    judge = Judge(tmp_path, before, end)
    chance = random.Random(f"{kind} {name}")
    for prefix in range(len(record.events) + 1):
        unsafe = record.unsafe(prefix)
        some = chance.sample(unsafe, len(unsafe) // 2)
        for lost in ([], some, unsafe[:-1]):
            judge.see(record.replay(prefix, lost).content(), fix)
    kinds = [event.kind for event in record.events if event.kind != DISCARD]
    assert kinds[-1] == FLUSH, "what was told to be repaired is durable"


@pytest.mark.parametrize(("kind", "name", "fix"), CASES[::3])
def test_a_request_that_fails_leaves_no_image_worse_than_it_was(
    kind: str, name: str, fix: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    before = damaged(sources[kind], name, tmp_path)
    record, end = whole_repair(before, fix, tmp_path)
    judge = Judge(tmp_path, before, end)
    for number, event in enumerate(record.events, 1):
        place = MemoryStorage(before.content, size=len(before.content))
        rule = Rule("change", number, power_cut=event.kind != DISCARD and number % 2 == 1)
        try:
            mend(FaultStorage(place, [rule]), fix)
        except StorageError:
            assert event.kind != DISCARD, "giving space back is not the repair"
        else:
            assert event.kind == DISCARD
        judge.see(place.content(), fix)


@pytest.mark.parametrize("nth", [1, 2, 3, 5])
def test_an_image_that_cannot_be_repaired_is_not_opened_for_writing(
    nth: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    before = damaged(sources["plain"], "dirty", tmp_path)
    place = MemoryStorage(before.content, size=len(before.content))
    with pytest.raises(QimgError, match=r"^Could not repair dirty image: Input/output error$"):
        Qcow2().open(
            FaultStorage(place, [Rule("change", nth)]), writable=True, context=Context(lambda _: None)
        )
    assert place.read(72, 8) == u64(1), "it is still dirty"


def test_counts_rise_before_and_fall_after_everything_else(sources: dict[str, Path], tmp_path: Path) -> None:
    """A cluster that is used twice and counted once; another that is counted twice and used once."""
    a = Anatomy(sources["plain"])
    high, low = 8, 6
    change = [
        (a.entry(0), u64(a.number(a.entry(1)))),
        (a.blocks[0] + 2 * high, b"\0\2"),
        (a.entry(3), u64(a.number(a.entry(3)) & ~COPIED)),
    ]
    content = qcow2.patch(sources["plain"], tmp_path / "damaged", change).read_bytes()
    record = RecordStorage(MemoryStorage(content, size=len(content)))
    record.writable = True
    mend(record, "all")

    def count(place: MemoryStorage, cluster: int) -> int:
        return int.from_bytes(place.read(a.blocks[0] + 2 * cluster, 2), "big")

    changed = []
    for prefix in range(len(record.events) + 1):
        place = record.replay(prefix)
        bits = bytes(place.read(a.entry(0), 1)) + bytes(place.read(a.entry(3), 1))
        changed.append((count(place, low), bits, count(place, high)))
    order = list(dict.fromkeys(changed))
    assert order == [
        (1, b"\x80\x00", 2),
        (2, b"\x80\x00", 2),
        (2, b"\x00\x80", 2),
        (2, b"\x00\x80", 1),
    ]


def test_a_table_that_lies_over_another_is_not_written(sources: dict[str, Path], tmp_path: Path) -> None:
    """A snapshot whose L1 table claims the file: the real program refuses as well, and so does a repeated
    repair; the image is marked."""
    a = Anatomy(sources["plain"])
    name = "header: L1 elsewhere"
    one_bit = Anatomy(sources["one bit"])
    path = qcow2.patch(sources["one bit"], tmp_path / "damaged", damage(name, one_bit))
    before = path.read_bytes()
    place = MemoryStorage(before, size=len(before))
    for _ in range(2):
        with pytest.raises(StorageError, match="Input/output error"):
            mend(place, "all")
    after = place.content()
    assert after[79] & 2
    guest = a.cluster_size * 5
    assert after[guest:] == before[guest:]
    assert u32(0) == after[60:64]
