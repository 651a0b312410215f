"""Internal snapshots: listed as the real program lists them, found by id and name, refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qimg.errors import FormatError, QimgError
from support import qcow2
from support.qcow2 import Anatomy, u32, u64

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


def listed(path: Path) -> list[dict[str, object]]:
    """Our list, as the real ``info --output=json`` has it."""
    with qcow2.open_image(path, for_info=True) as image:
        rows = []
        for snapshot in image.snapshots():
            row: dict[str, object] = {}
            if snapshot.icount is not None:
                row["icount"] = snapshot.icount
            row |= {"vm-clock-nsec": snapshot.vm_clock_nsec % 10**9, "name": snapshot.name}
            row |= {"date-sec": snapshot.date_sec, "date-nsec": snapshot.date_nsec}
            row |= {"vm-clock-sec": snapshot.vm_clock_nsec // 10**9, "id": snapshot.id}
            rows.append({**row, "vm-state-size": snapshot.vm_state_size})
        return rows


def really_listed(path: Path) -> list[dict[str, object]]:
    """The real list."""
    info = json.loads(qcow2.real("qemu-img", "info", "--output=json", path.name, cwd=path.parent))
    return info.get("snapshots", [])  # type: ignore[no-any-return]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return qcow2.rich(tmp_path / "a.qcow2", bitmaps=False)


def test_the_list_is_the_real_one(image: Path) -> None:
    assert listed(image) == really_listed(image) != []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (16, u32(1234567890) + u32(999999999)),
        (24, u64(3723004000000)),
        (32, u32(4096)),
        (40, u64(1 << 40)),
        (56, u64((1 << 64) - 1)),
        (56, u64(12345)),
        (36, u32(16)),
        (36, u32(0)),
    ],
    ids=["date", "clock", "small state", "large state", "no icount", "icount", "16 extra", "no extra"],
)
def test_each_field_reads_as_the_real_program_reads_it(field: int, value: bytes, image: Path) -> None:
    at = Anatomy(image).snapshots[-1]  # the last: what follows it does not matter
    path = qcow2.patch(image, image.parent / "t.qcow2", [(at + field, value)])
    assert listed(path) == really_listed(path)


def test_names_are_bytes_that_need_not_be_text(tmp_path: Path) -> None:
    path = qcow2.make(tmp_path / "a.qcow2", "1M")
    qcow2.real("qemu-img", "snapshot", "-c", "ünïcode ✓", path.name, cwd=tmp_path)
    assert [row["name"] for row in listed(path)] == ["ünïcode ✓"]
    at = Anatomy(path).snapshots[0]
    broken = qcow2.patch(path, tmp_path / "t.qcow2", [(at + 40 + 24 + 1, b"\xff\xfe")])
    with qcow2.open_image(broken) as image:
        name = image.snapshots()[0].name
        assert name.encode("utf-8", "surrogateescape")[:2] == b"\xff\xfe"
        image.load_snapshot(name=name)


def test_id_and_name_both_have_to_match(image: Path) -> None:
    for wanted in ({"id": "1"}, {"name": "s2"}, {"id": "2", "name": "s2"}):
        with qcow2.open_image(image) as opened:
            opened.load_snapshot(**wanted)
    for wanted in ({"id": "s1"}, {"name": "1"}, {"id": "1", "name": "s2"}, {"id": "", "name": None}):
        with qcow2.open_image(image) as opened, pytest.raises(QimgError, match=r"^Can't find snapshot$"):
            opened.load_snapshot(**wanted)


def test_an_image_without_snapshots_has_none_to_find(tmp_path: Path) -> None:
    with qcow2.open_image(qcow2.make(tmp_path / "a.qcow2", "1M")) as image:
        assert image.snapshots() == []
        with pytest.raises(QimgError, match="Can't find snapshot"):
            image.load_snapshot(id="1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((8, u32(4194305)), "Snapshot L1 table too large"),
        ((0, u64(0x50200)), "Snapshot L1 table offset invalid"),
        ((0, u64(1 << 63)), "Snapshot L1 table offset invalid"),
    ],
)
def test_a_damaged_snapshot_is_refused_when_it_is_used(change: qcow2.Edit, message: str, image: Path) -> None:
    offset, new = change
    at = Anatomy(image).snapshots[0]
    path = qcow2.patch(image, image.parent / "t.qcow2", [(at + offset, new)])
    with qcow2.open_image(path) as opened:
        assert len(opened.snapshots()) == 2
        with pytest.raises(FormatError, match=message):
            opened.load_snapshot(name="s1")


def test_a_snapshot_with_a_shorter_table_is_a_hole_behind_it(image: Path) -> None:
    at = Anatomy(image).snapshots[0]
    path = qcow2.patch(image, image.parent / "t.qcow2", [(at + 8, u32(0))])
    with qcow2.open_image(path) as opened:
        opened.load_snapshot(name="s1")
        assert [extent.flags for extent in opened.extents(0, opened.size)] == [1]


@pytest.mark.parametrize("extra", [1025, 0xFFFFFFFF])
def test_too_much_extra_data_keeps_an_image_from_opening(extra: int, image: Path) -> None:
    at = Anatomy(image).snapshots[0]
    path = qcow2.patch(image, image.parent / "t.qcow2", [(at + 36, u32(extra))])
    with pytest.raises(FormatError) as caught:
        qcow2.open_image(path, for_info=True)
    text = f"{caught.value}\n{caught.value.hint}"
    assert text == qcow2.real_error(path, "info")
    assert caught.value.found == extra
