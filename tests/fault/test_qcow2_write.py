"""Interruptions at every request: what is left is whole, or every reader refuses it by name."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qimg.errors import QimgError, StorageError
from qimg.formats.base import BitmapData
from qimg.formats.qcow2 import alloc, refcounts, tables
from qimg.formats.qcow2.fresh import FreshImage
from qimg.storage.base import Storage
from qimg.storage.fault import FaultStorage, Rule
from qimg.storage.record import RecordStorage
from support import fresh
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 1 << 20
CONTENT = fresh.mixed_content(SIZE)
RUNS = [
    (fresh.DATA, 0, 65536 * 2),
    (fresh.PACK, 65536 * 3, 65536 * 3),
    (fresh.DATA, 65536 * 7, 65536),
    (fresh.ZERO, 65536, 65536),
    (fresh.PACK, 65536 * 9, 65536 * 5),
    (fresh.DATA, 65536 * 4, 65536),
]
LAYOUTS = {
    "default": "",
    "version 2": "compat=0.10",
    "small clusters": "cluster_size=512",
    "counts of one bit": "cluster_size=512,refcount_bits=1",
    "subclusters": "extended_l2=on",
    "preallocated": "preallocation=metadata",
    "fully preallocated": "preallocation=full,cluster_size=4096",
    "backing file": "backing_file=BASE,backing_fmt=raw",
}
REFUSALS = (
    "Unsupported qcow2 feature(s): incomplete image (interrupted conversion)",
    "Image is not in qcow2 format",
)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables leave memory early, so that interruptions find them half written."""
    monkeypatch.setattr(alloc, "BATCH", 50000)
    monkeypatch.setattr(tables, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(tables, "STAGE_LIMIT", 16384)
    monkeypatch.setattr(refcounts, "OPEN_LIMIT", 4096)


def write_all(path: Path, options: str, wrap: object) -> FreshImage:
    image = fresh.make(path, SIZE, options, wrap=wrap)  # type: ignore[arg-type]
    fresh.fill(image, CONTENT, RUNS)
    if "0.10" not in options:
        image.store_bitmaps([BitmapData("b0", 65536, b"\x81\x40", enabled=True)])
    image.flush()
    return image


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the content to compare with, and a backing file of zeros."""
    disk = bytearray(SIZE)
    for kind, start, length in RUNS:
        disk[start : start + length] = (
            bytes(length) if kind == fresh.ZERO else CONTENT[start : start + length]
        )
    (tmp_path / "raw").write_bytes(disk)
    (tmp_path / "base").write_bytes(bytes(SIZE))
    return tmp_path


class Judge:
    """What the real program says of the images that are left. It is asked about every one that is not
    plainly refused, and about some of the others: its start takes most of the time."""

    def __init__(self) -> None:
        self.refused = 0

    def verdict(self, path: Path) -> str:
        """Whether the image is "whole" or "refused"; fails the test where it is anything else."""
        head = path.read_bytes()[:80] if path.exists() else b""
        plain = head[:4] != b"QFI\xfb" or (head[7] == 3 and head[72] & 0x80)
        if plain:
            self.refused += 1
            if self.refused % 8 != 1:
                return "refused"
        checked = run_real(["check", "-f", "qcow2", path])
        if checked.code == 1:
            assert any(refusal in checked.err for refusal in REFUSALS), checked.err
            return "refused"
        assert not plain
        assert checked.code == 0, checked.out + checked.err
        same = run_real(["compare", "-f", "qcow2", "-F", "raw", path, path.with_name("raw")])
        assert same.code == 0, same.out + same.err
        return "whole"


def moments(total: int) -> list[int]:
    """Some of 0 .. `total` - 1: the first, the last, and a few dozen between."""
    chance = random.Random(total)
    return sorted(
        {*range(min(total, 12)), *range(max(0, total - 12), total)}
        | set(chance.sample(range(total), min(total, 40)))
    )


def interrupt(path: Path, options: str, rule: Rule | None, wraps: list[FaultStorage]) -> None:
    """Write an image whose storage obeys `rule`."""

    def wrap(storage: Storage) -> Storage:
        wraps.append(FaultStorage(storage, [] if rule is None else [rule]))
        return wraps[-1]

    image = None
    try:
        image = fresh.make(path, SIZE, options, wrap=wrap)
        fresh.fill(image, CONTENT, RUNS)
        image.flush()
    except StorageError:
        if image is not None:
            image.abandon()
    finally:
        wraps[0].close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_request_that_fails_leaves_no_image_that_claims_to_be_whole(layout: str, place: Path) -> None:
    options = LAYOUTS[layout].replace("BASE", str(place / "base"))
    judge = Judge()
    path = place / "image"
    counting: list[FaultStorage] = []
    interrupt(path, options, None, counting)
    total = counting[0].counts["change"]
    assert total > 8
    for number in moments(total):
        interrupt(path, options, Rule("change", number + 1, power_cut=bool(number % 2)), [])
        # The last request is the barrier behind the final header: then either is right.
        judge.verdict(path)
    interrupt(path, options, Rule("change", total + 1), [])
    assert judge.verdict(path) == "whole"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_power_cut_at_any_moment_leaves_a_whole_image_or_a_refused_one(layout: str, place: Path) -> None:
    options = LAYOUTS[layout].replace("BASE", str(place / "base"))
    judge = Judge()
    records: list[RecordStorage] = []

    def wrap(storage: Storage) -> Storage:
        records.append(RecordStorage(storage))
        return records[-1]

    write_all(place / "image", options, wrap).close()
    record = records[0]
    chance = random.Random(layout)
    path = place / "cut"
    found: list[str] = []
    for prefix in moments(len(record.events) + 1):
        unsafe = record.unsafe(prefix)
        losses = [[], unsafe, chance.sample(unsafe, len(unsafe) // 2)] if unsafe else [[]]
        for lost in losses:
            path.write_bytes(record.replay(prefix, lost).content())
            found.append(judge.verdict(path))
    assert found[0] == "refused"
    assert found[-1] == "whole"
    assert found.index("whole") >= len(found) - 4, "nothing but the last steps make it whole"


def test_changes_after_a_flush_make_the_image_incomplete_again(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with fresh.make(path, SIZE) as image:
        fresh.fill(image, CONTENT, RUNS[:2])
        image.flush()
        assert run_real(["check", path]).code == 0
        fresh.fill(image, CONTENT, RUNS[2:])
        image.abandon()
    refused = run_real(["info", path])
    assert refused.code == 1
    assert REFUSALS[0] in refused.err


def test_an_older_image_on_a_device_is_gone_before_its_bytes_are_overwritten(tmp_path: Path) -> None:
    records: list[RecordStorage] = []

    def wrap(storage: Storage) -> Storage:
        storage.write(b"QFI\xfb\0\0\0\3" + b"\x55" * 200000, 0)
        storage.zero_init = False
        records.append(RecordStorage(storage))
        return records[-1]

    with fresh.make(tmp_path / "image", SIZE, wrap=wrap) as image:
        image.flush()
    events = records[0].events
    assert (events[0].kind, events[0].offset) == ("write", 0)
    assert events[1].kind == "flush"
    assert b"incomplete image" in events[0].data


def test_an_image_that_is_not_whole_cannot_be_read(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", SIZE) as image:
        fresh.fill(image, CONTENT, RUNS)
        with pytest.raises(QimgError, match="before it is flushed"):
            image.extents(0, SIZE)
