"""Persistent bitmaps stored in a fresh image, as the real programs find them (sheet, section 9)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from qimg.errors import LimitError, NotSupported, QimgError
from qimg.formats.base import BitmapData
from support import fresh
from support.build import assert_real_check_clean
from support.holders import qemu_nbd_serving
from support.run import run_peer, run_real

MIB = 1 << 20


def told_bitmaps(path: Path) -> list[dict[str, object]]:
    told = json.loads(run_real(["info", "-f", "qcow2", "--output=json", path]).ok().out)
    bitmaps = told["format-specific"]["data"]["bitmaps"]
    assert isinstance(bitmaps, list)
    return bitmaps


@pytest.mark.peer("qemu-img")
def test_the_real_program_lists_them_in_order_with_their_flags(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", 64 * MIB) as image:
        image.store_bitmaps(
            [
                BitmapData("on", 65536, b"\x05", enabled=True),
                BitmapData("off", 512, b"", enabled=False),
                BitmapData("ü" * 100, 1 << 31, b"\x01", enabled=True),
            ]
        )
        image.flush()
    assert told_bitmaps(tmp_path / "image") == [
        {"flags": ["auto"], "name": "on", "granularity": 65536},
        {"flags": [], "name": "off", "granularity": 512},
        {"flags": ["auto"], "name": "ü" * 100, "granularity": 1 << 31},
    ]
    assert_real_check_clean(tmp_path / "image")


@pytest.mark.peer("qemu-img", "qemu-nbd", "nbdinfo")
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_their_bits_are_what_a_server_shows(cluster_size: int, tmp_path: Path) -> None:
    # Bits 0, 2, 3 and 12345 of 4 KiB each; the table of 512-byte clusters has many entries, most of them 0.
    bits = bytearray(12345 // 8 + 1)
    for bit in (0, 2, 3, 12345):
        bits[bit // 8] |= 1 << bit % 8
    with fresh.make(tmp_path / "image", 64 * MIB, f"cluster_size={cluster_size}") as image:
        image.store_bitmaps([BitmapData("b0", 4096, bytes(bits), enabled=False)])
        image.flush()
    with qemu_nbd_serving(tmp_path / "image", read_only=True, options=("-B", "b0")) as socket:
        words = ["--map=qemu:dirty-bitmap:b0", "--json", f"nbd+unix:///?socket={socket}"]
        shown = json.loads(run_peer("nbdinfo", words).ok().out)
    dirty = [(run["offset"] // 4096, run["length"] // 4096) for run in shown if run["type"] == 1]
    assert dirty == [(0, 1), (2, 2), (12345, 1)]


@pytest.mark.peer("qemu-img")
def test_a_second_flush_adds_to_the_first(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        image.store_bitmaps([BitmapData("a", 65536, b"\x01", enabled=True)])
        image.flush()
        image.store_bitmaps([BitmapData("b", 65536, b"\x01", enabled=True)])
        image.flush()
    assert [bitmap["name"] for bitmap in told_bitmaps(tmp_path / "image")] == ["a", "b"]
    assert_real_check_clean(tmp_path / "image")


@pytest.mark.peer("qemu-img")
def test_an_inconsistent_one_stays_so(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        image.store_bitmaps([BitmapData("a", 65536, b"", enabled=False, inconsistent=True)])
        image.flush()
    assert told_bitmaps(tmp_path / "image")[0]["flags"] == ["in-use"]


def test_the_header_says_that_they_can_be_trusted(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        image.store_bitmaps([BitmapData("a", 65536, b"\x01", enabled=True)])
        image.flush()
    (autoclear,) = struct.unpack_from(">Q", (tmp_path / "image").read_bytes(), 88)
    assert autoclear == 1


def test_version_2_cannot_hold_any(tmp_path: Path) -> None:
    image = fresh.make(tmp_path / "image", MIB, "compat=0.10")
    with image, pytest.raises(NotSupported, match="Cannot store dirty bitmaps in qcow2 v2 files"):
        image.store_bitmaps([BitmapData("a", 65536, b"", enabled=True)])


@pytest.mark.parametrize(
    ("size", "name", "granularity", "kind", "message"),
    [
        (MIB, "a", 256, LimitError, "Granularity must be power of 2 and at least 512"),
        (MIB, "a", 1 << 32, LimitError, "Granularity must be power of 2 and at least 512"),
        (MIB, "a", 65537, LimitError, "Granularity must be power of 2 and at least 512"),
        (MIB, "a" * 1024, 512, LimitError, "Name length exceeds maximum (1023 characters)"),
        (
            4 << 40,
            "a",
            512,
            LimitError,
            "Too much space will be occupied by the bitmap. Use larger granularity",
        ),
        (MIB, "twice", 512, NotSupported, "Bitmap already exists: twice"),
        (0, "a", 512, NotSupported, "An image of size 0 cannot store bitmaps"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    size: int, name: str, granularity: int, kind: type[QimgError], message: str, tmp_path: Path
) -> None:
    with fresh.make(tmp_path / "image", size) as image:
        if name == "twice":
            image.store_bitmaps([BitmapData("twice", 512, b"", enabled=True)])
        with pytest.raises(kind) as caught:
            image.store_bitmaps([BitmapData(name, granularity, b"", enabled=True)])
        assert str(caught.value) == message
        image.abandon()
