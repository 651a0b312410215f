"""A walk over a disk costs what the disk holds, not what it could hold."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.extent import ZERO
from qimg.graph.disk import WINDOW_UNITS
from qimg.graph.open import ImageSpec, open_disk

KIB = 1 << 10
TIB = 1 << 40


@pytest.mark.parametrize(
    ("format", "size"),
    [
        ("vhdx", 64 * TIB),
        ("vdi", 2 * TIB),
        ("vpc", TIB),
        ("parallels", 8 * TIB),
        ("qed", 64 * TIB),
        ("vmdk", 2 * TIB),
        ("raw", 4 * TIB),
        ("qcow2", 4 * TIB),
    ],
)
def test_an_empty_disk_is_walked_in_large_windows(tmp_path: Path, format: str, size: int) -> None:
    path = str(tmp_path / "huge")
    qimg.create(path, size=size, format=format)
    with open_disk(ImageSpec(path, format=format), context=Context()) as disk:
        windows = list(disk.windows(0, disk.size))
    assert len(windows) <= -(-size // (4 << 30))
    assert sum(len(window) for window in windows) <= len(windows) + 1
    assert all(extent.flags & ZERO for window in windows for extent in window[1:])


def test_a_window_holds_no_more_units_than_there_is_room_for(tmp_path: Path) -> None:
    for format, options, unit in [
        ("qcow2", {"cluster_size": "512"}, 512),
        ("qcow2", {"extended_l2": "on"}, 2 * KIB),
        ("qed", {"cluster_size": "4k"}, 4 * KIB),
        ("vdi", {}, 16 * KIB),  # where blocks are larger, holes of the file may show inside of them
        ("raw", {}, 16 * KIB),
    ]:
        path = str(tmp_path / "image")
        qimg.create(path, size=8 << 30, format=format, options=options)
        with open_disk(ImageSpec(path, format=format), context=Context()) as disk:
            assert disk.window == WINDOW_UNITS * unit
