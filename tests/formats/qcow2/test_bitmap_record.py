"""Enabled bitmaps record every change of the disk, and are never wrong on disk (qcow2 sheet, section 9)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qimg.formats.base import BitmapData
from qimg.formats.qcow2.write import WritableQcow2
from qimg.storage.base import Storage
from support import bitmaps, crash
from support.build import assert_real_check_clean
from support.faults import opened_through
from support.model import Guest
from support.run import run_peer, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

MIB = 1 << 20
SIZE = 8 * MIB


def make(path: Path, *adds: str, options: str = "cluster_size=64k", size: int = SIZE) -> Path:
    """An image with the bitmaps that `adds` (words of the real ``bitmap``, name last) ask for."""
    run_real(["create", "-q", "-f", "qcow2", "-o", options, path, str(size)]).ok()
    for add in adds:
        *words, name = add.split()
        run_real(["bitmap", "--add", *words, path, name]).ok()
    return path


def image_of(guest: Guest) -> WritableQcow2:
    assert isinstance(guest.image, WritableQcow2)
    return guest.image


def flags(path: Path) -> dict[object, object]:
    """Name -> flags, as the real ``info -U`` lists them now."""
    return {row["name"]: row["flags"] for row in bitmaps.listed(path)}


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "extended_l2=on"])
def test_whatever_changes_the_disk_is_recorded(options: str, tmp_path: Path) -> None:
    path = make(tmp_path / "a.q", "-g 512 fine", "-g 1M coarse", options=options)
    with Guest(path, bytes(SIZE)) as guest:
        unit = guest.image.granularity
        cluster = guest.image.cluster_size
        assert cluster is not None
        guest.write(0, b"\1" * cluster)
        guest.zero(MIB, 4 * cluster)
        guest.discard(2 * MIB, 4 * cluster)
        guest.pack(3 * MIB, b"\2" * cluster)
        guest.write(SIZE - unit, b"\3" * unit)
        guest.image.flush()
    found = bitmaps.dirty_ranges(path)
    assert found["fine"] == [
        (0, cluster),
        (MIB, MIB + 4 * cluster),
        (2 * MIB, 2 * MIB + 4 * cluster),
        (3 * MIB, 3 * MIB + cluster),
        (SIZE - unit, SIZE),
    ]
    assert found["coarse"] == [(0, 4 * MIB), (7 * MIB, SIZE)]
    assert_real_check_clean(path)


def test_disabled_bitmaps_record_nothing_and_are_left_alone(tmp_path: Path) -> None:
    path = make(tmp_path / "a.q", "on", "--disable off")
    with Guest(path, bytes(SIZE)) as guest:
        guest.write(0, b"\1" * 65536)
        assert flags_on_disk(path) == {"on": 3, "off": 0}, "a crash now does not cost the resting one"
        guest.image.flush()
    assert flags(path) == {"on": ["auto"], "off": []}
    assert bitmaps.dirty_ranges(path) == {"on": [(0, 65536)], "off": []}


def flags_on_disk(path: Path) -> dict[str, int]:
    """What the directory says now, while the image is open: read as bytes."""
    from support.qcow2 import Anatomy

    anatomy = Anatomy(path)
    assert anatomy.bitmaps is not None
    count = int.from_bytes(anatomy.raw[anatomy.bitmaps : anatomy.bitmaps + 4], "big")
    at = anatomy.number(anatomy.bitmaps + 16)
    found = {}
    for _ in range(count):
        length = int.from_bytes(anatomy.raw[at + 18 : at + 20], "big")
        name = anatomy.raw[at + 24 : at + 24 + length].decode()
        found[name] = int.from_bytes(anatomy.raw[at + 12 : at + 16], "big")
        at += 24 + length + 7 & ~7
    return found


def test_a_bitmap_is_in_use_from_the_first_change_to_the_flush(tmp_path: Path) -> None:
    path = make(tmp_path / "a.q", "b")
    with Guest(path, bytes(SIZE)) as guest:
        guest.disk.read_into(bytearray(512), 0)
        assert flags_on_disk(path) == {"b": 2}, "reading changes nothing"
        guest.write(0, b"\1" * 65536)
        assert flags_on_disk(path) == {"b": 3}
        guest.image.flush()
        assert flags_on_disk(path) == {"b": 2}
        guest.write(MIB, b"\1" * 65536)
        assert flags_on_disk(path) == {"b": 3}
        guest.image.flush()
        guest.image.flush()
    assert bitmaps.dirty_ranges(path) == {"b": [(0, 65536), (MIB, MIB + 65536)]}


def test_a_job_that_fails_leaves_it_in_use(tmp_path: Path) -> None:
    path = make(tmp_path / "a.q", "b")
    guest = Guest(path, bytes(SIZE))
    guest.write(0, b"\1" * 65536)
    guest.image.abandon()
    guest.disk.close()
    assert flags(path) == {"b": ["in-use", "auto"]}
    run_real(["bitmap", "--remove", path, "b"]).ok()
    assert run_real(["check", path]).code in (0, 3)


def test_an_inconsistent_bitmap_stays_as_it_is(tmp_path: Path) -> None:
    path = make(tmp_path / "a.q", "bad")
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write 0 64k", "-c", "sigraise 9", path])
    run_real(["bitmap", "--add", path, "good"]).ok()
    with Guest(path) as guest:
        guest.write(MIB, b"\1" * 65536)
        guest.image.flush()
    assert flags(path) == {"bad": ["in-use", "auto"], "good": ["auto"]}
    assert bitmaps.dirty_ranges(path) == {"good": [(MIB, MIB + 65536)]}
    assert_real_check_clean(path)


def test_an_image_without_bitmaps_that_record_pays_nothing(tmp_path: Path) -> None:
    from qimg.storage.record import RecordStorage

    counts = []
    for number, adds in enumerate([(), ("--disable off",)]):
        path = make(tmp_path / f"{number}.q", *adds)
        records: list[RecordStorage] = []

        def wrap(file: Storage, records: list[RecordStorage] = records) -> Storage:
            records.append(RecordStorage(file))
            return records[-1]

        with opened_through(wrap, path.name), Guest(path, bytes(SIZE)) as guest:
            guest.write(0, b"\1" * 65536)
            guest.image.flush()
        counts.append([(event.kind, event.length) for event in records[0].events])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("seed", range(6))
def test_many_writes_anywhere_set_the_bits_of_a_set(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    options = chance.choice(["cluster_size=64k", "cluster_size=512", "cluster_size=4k"])
    sizes = sorted(chance.sample([512, 4096, 65536, 1 << 20], 2))
    path = make(tmp_path / "a.q", *(f"-g {size} g{size}" for size in sizes), options=options)
    unit = {"cluster_size=64k": 65536, "cluster_size=512": 512, "cluster_size=4k": 4096}[options]
    units: set[int] = set()
    with Guest(path, bytes(SIZE)) as guest:
        for _ in range(60):
            first = chance.randrange(SIZE // unit)
            count = min(chance.choice([1, 1, 2, 7, 40]), SIZE // unit - first)
            change = chance.choice([guest.zero, guest.discard, None])
            if change is None:
                guest.write(first * unit, bytes([chance.randrange(256)]) * (count * unit))
            else:
                change(first * unit, count * unit)
            units |= set(range(first, first + count))
            if chance.random() < 0.1:
                guest.image.flush()
        guest.image.flush()
    dirty = {unit * number // 512 + part for number in units for part in range(unit // 512)}
    found = bitmaps.dirty_ranges(path)
    for size in sizes:
        bits = sorted({sector * 512 // size for sector in dirty})
        assert found[f"g{size}"] == bitmaps.joined([(bit * size, size) for bit in bits])
    assert_real_check_clean(path)
    assert crash.guest_content(path) == bytes(guest.content)


def test_new_bitmaps_are_durable_at_once_and_record_from_then_on(tmp_path: Path) -> None:
    path = make(tmp_path / "a.q", "old")
    with Guest(path, bytes(SIZE)) as guest:
        image = image_of(guest)
        guest.write(0, b"\1" * 65536)
        image.store_bitmaps([BitmapData("new", 65536, b"\x80\1", enabled=True)])
        assert flags_on_disk(path) == {"old": 2, "new": 2}
        guest.write(MIB, b"\1" * 65536)
        image.change_bitmap("old", clear=True)
        guest.write(2 * MIB, b"\1" * 65536)
        image.remove_bitmap("new")
        image.add_bitmap("third", None)
        guest.write(3 * MIB, b"\1" * 65536)
        image.flush()
    two, three = 2 * MIB, 3 * MIB
    assert bitmaps.dirty_ranges(path) == {
        "old": [(two, two + 65536), (three, three + 65536)],
        "third": [(three, three + 65536)],
    }
    assert_real_check_clean(path)
