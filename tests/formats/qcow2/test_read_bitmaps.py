"""Persistent bitmaps: listed and read as the real program left them, refused as it refuses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qimg.context import Notice
from qimg.errors import QimgError
from support import qcow2
from support.qcow2 import Anatomy, u32, u64

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: (offset in the first directory entry, new bytes)
ENTRIES: dict[str, list[qcow2.Edit]] = {
    "no table": [(0, u64(0))],
    "table unaligned": [(0, u64(0x10200))],
    "table of no entries": [(8, u32(0))],
    "table too large": [(8, u32(8193))],
    "table of more entries than needed": [(8, u32(2))],
    "flag 2": [(12, u32(4))],
    "flag 9": [(12, u32(512))],
    "in use": [(12, u32(1))],
    "in use, of too few entries": [(12, u32(1)), (17, b"\x09")],
    "type 0": [(16, b"\0")],
    "type 2": [(16, b"\2")],
    "granularity 2^8": [(17, b"\x08")],
    "granularity 2^9": [(17, b"\x09")],
    "granularity 2^31": [(17, b"\x1f")],
    "granularity 2^32": [(17, b"\x20")],
    "long name": [(18, b"\x04\x00")],
    "empty name": [(18, b"\0\0")],
    "extra data": [(20, u32(8))],
}
#: The same for the first word of its table.
WORDS = {
    "all clear": 0,
    "all set": 1,
    "reserved low": 2,
    "reserved high": 1 << 56,
    "unaligned": 0x50200,
    "place and all set": 0x50001,
    "far": 1 << 40,
}
#: And for the extension.
POINTERS: dict[str, qcow2.Edit] = {
    "one bitmap": (0, u32(1)),
    "three bitmaps": (0, u32(3)),
    "short directory": (8, u64(32)),
    "directory of half an entry": (8, u64(40)),
    "directory with a tail": (8, u64(64 + 32)),
    "directory elsewhere": (16, u64(0x50000)),
    "directory past the end": (16, u64(1 << 40)),
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = qcow2.make(tmp_path_factory.mktemp("bitmaps") / "a.qcow2", "48M")
    for name, granularity, state in (
        ("b0", "64k", "--enable"),
        ("b1", "4k", "--enable"),
        ("b2", "512", "--disable"),
    ):
        words = ("bitmap", "--add", "-g", granularity, state, path.name, name)
        qcow2.real("qemu-img", *words, cwd=path.parent)
    qcow2.io(path, "write -P 1 0 64k", "write -P 2 1M 4k", "write -P 3 40M 1M")
    return path


def listed(path: Path) -> tuple[object, str]:
    """Our bitmaps as ``info --output=json`` has them, and what was said on the way."""
    notices: list[Notice] = []
    try:
        with qcow2.open_image(path, notices, for_info=True) as opened:
            found = opened.format_specific().get("bitmaps")
            error = ""
    except QimgError as reason:
        found, error = None, str(reason)
    said = "".join(f"warning: {notice.text}\n{notice.hint}" for notice in notices)
    return found, said + error


def really_listed(path: Path) -> tuple[object, str]:
    """The same of the real program."""
    out = qcow2.real("qemu-img", "info", "--output=json", path.name, cwd=path.parent, fail=True)
    data = json.loads(out)["format-specific"]["data"] if out.strip() else {}
    return data.get("bitmaps"), qcow2.real_error(path, "info")


def bits(data: bytes, count: int) -> list[int]:
    """Numbers of the bits that are set."""
    return [
        number for number in range(count) if number // 8 < len(data) and data[number // 8] >> number % 8 & 1
    ]


def test_the_list_is_the_real_one(image: Path) -> None:
    assert listed(image) == really_listed(image)
    assert listed(image)[0] is not None


def test_the_contents_are_the_ranges_that_were_written(image: Path) -> None:
    with qcow2.open_image(image) as opened:
        found = {bitmap.name: bitmap for bitmap in opened.bitmaps()}
    assert list(found) == ["b0", "b1", "b2"]
    assert bits(found["b0"].bits, 768) == [0, 16, *range(640, 656)]
    assert bits(found["b1"].bits, 12288) == [*range(16), 256, *range(10240, 10496)]
    assert bits(found["b2"].bits, 98304) == []
    assert [bitmap.enabled for bitmap in found.values()] == [True, True, False]
    assert [bitmap.granularity for bitmap in found.values()] == [65536, 4096, 512]


def test_an_all_set_entry_reads_as_ones_up_to_the_end_of_the_image(image: Path) -> None:
    anatomy = Anatomy(image)
    assert anatomy.bitmaps is not None
    table = anatomy.number(anatomy.number(anatomy.bitmaps + 16))
    path = qcow2.patch(image, image.parent / "t.qcow2", [(table, u64(1))])
    with qcow2.open_image(path) as opened:
        assert opened.bitmaps()[0].bits == b"\xff" * 96


def test_an_inconsistent_bitmap_has_no_contents(image: Path) -> None:
    anatomy = Anatomy(image)
    assert anatomy.bitmaps is not None
    path = qcow2.patch(image, image.parent / "t.qcow2", [(anatomy.number(anatomy.bitmaps + 16) + 12, u32(3))])
    with qcow2.open_image(path) as opened:
        first = opened.bitmaps()[0]
        assert (first.inconsistent, first.bits) == (True, b"")


@pytest.mark.parametrize("name", ENTRIES)
def test_a_damaged_directory_entry_is_judged_as_the_real_program_judges_it(name: str, image: Path) -> None:
    anatomy = Anatomy(image)
    assert anatomy.bitmaps is not None
    directory = anatomy.number(anatomy.bitmaps + 16)
    change = [(directory + offset, new) for offset, new in ENTRIES[name]]
    path = qcow2.patch(image, image.parent / "t.qcow2", change)
    assert listed(path) == really_listed(path)


@pytest.mark.parametrize("name", WORDS)
def test_a_damaged_table_is_judged_as_the_real_program_judges_it(name: str, image: Path) -> None:
    anatomy = Anatomy(image)
    assert anatomy.bitmaps is not None
    table = anatomy.number(anatomy.number(anatomy.bitmaps + 16))
    path = qcow2.patch(image, image.parent / "t.qcow2", [(table, u64(WORDS[name]))])
    assert listed(path) == really_listed(path)


@pytest.mark.parametrize("name", POINTERS)
def test_a_damaged_extension_is_judged_as_the_real_program_judges_it(name: str, image: Path) -> None:
    anatomy = Anatomy(image)
    assert anatomy.bitmaps is not None
    offset, new = POINTERS[name]
    path = qcow2.patch(image, image.parent / "t.qcow2", [(anatomy.bitmaps + offset, new)])
    assert listed(path) == really_listed(path)


def test_bitmaps_that_may_be_stale_are_left_out_with_a_warning(image: Path) -> None:
    path = qcow2.patch(image, image.parent / "t.qcow2", [(88, u64(0))])
    assert listed(path) == really_listed(path)
    assert listed(path)[0] is None
    with qcow2.open_image(path) as opened:
        assert opened.bitmaps() == []


def test_version_2_images_never_have_trusted_bitmaps(tmp_path: Path) -> None:
    path = qcow2.make(tmp_path / "a.qcow2", "1M", "compat=0.10")
    extension = u32(0x23852875) + u32(24) + u32(1) + u32(0) + u64(32) + u64(0x50000)
    path = qcow2.patch(path, tmp_path / "t.qcow2", [(72, extension + bytes(8))])
    assert listed(path) == really_listed(path)
