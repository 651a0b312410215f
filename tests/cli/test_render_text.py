"""Text for people: the lines of the sheets, in their order."""

from __future__ import annotations

import pytest

from qimg.cli.render_text import (
    MAP_HEADER,
    check_summary,
    info_block,
    map_row,
    measure_lines,
    option_table,
    snapshot_table,
    verdict,
)
from qimg.formats.base import CheckResult, Measure, SnapshotInfo
from qimg.jobs.compare import Comparison
from qimg.jobs.info import ImageInfo
from qimg.jobs.map import MapEntry
from qimg.options import BOOL, SIZE, STR, Option


def snapshot(**changes: object) -> SnapshotInfo:
    values: dict[str, object] = {
        "id": "1",
        "name": "s1",
        "vm_state_size": 0,
        "date_sec": 1795378336,
        "date_nsec": 0,
        "vm_clock_nsec": 0,
        "icount": 0,
    }
    return SnapshotInfo(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def _in_berlin(monkeypatch: pytest.MonkeyPatch) -> object:
    import time

    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_in_berlin")
def test_the_snapshot_table_has_the_layout_of_release_10_and_local_dates() -> None:
    rows = snapshot_table([snapshot(), snapshot(id="12", icount=None, vm_clock_nsec=3_723_004_000_000)])
    assert rows == [
        "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT",
        "1       s1                    0 B 2026-11-22 21:12:16  0000:00:00.000          0",
        "12      s1                    0 B 2026-11-22 21:12:16  0001:02:03.004         --",
    ]


def test_long_snapshot_names_push_the_rest_and_widths_count_bytes() -> None:
    _, long, umlaut = snapshot_table([snapshot(name="a" * 20), snapshot(name="ü" * 8)])
    assert long.startswith("1       " + "a" * 20 + "      0 B ")
    assert umlaut.startswith("1       " + "ü" * 8 + "      0 B ")


def test_a_snapshot_of_an_impossible_date_is_still_listed() -> None:
    _, row = snapshot_table([snapshot(date_sec=1 << 62)])
    assert str(1 << 62) in row


def full_image() -> ImageInfo:
    info = ImageInfo("sub/ov.qcow2", "qcow2", 10485760)
    info.actual_size = 200704
    info.encrypted = True
    info.cluster_size = 65536
    info.dirty = True
    info.backing_filename, info.full_backing_filename = "base.qcow2", "sub/base.qcow2"
    info.backing_format = "qcow2"
    info.format_specific = {
        "compat": "1.1",
        "lazy-refcounts": False,
        "bitmaps": [{"flags": [], "name": "b", "granularity": 65536}],
        "encrypt": {"slots": [{"active": True}], "format": ""},
    }
    child = ImageInfo("sub/ov.qcow2", "file", 197120)
    child.is_protocol = True
    child.dirty = False
    child.format_specific = {}
    info.children = [("file", child)]
    return info


def test_info_has_its_lines_in_the_order_of_the_sheet() -> None:
    assert info_block(full_image()) == (
        "image: sub/ov.qcow2\n"
        "file format: qcow2\n"
        "virtual size: 10 MiB (10485760 bytes)\n"
        "disk size: 196 KiB\n"
        "encrypted: yes\n"
        "cluster_size: 65536\n"
        "cleanly shut down: no\n"
        "backing file: base.qcow2 (actual path: sub/base.qcow2)\n"
        "backing file format: qcow2\n"
        "Format specific information:\n"
        "    compat: 1.1\n"
        "    lazy refcounts: false\n"
        "    bitmaps:\n"
        "        [0]:\n"
        "            flags:\n"
        "            name: b\n"
        "            granularity: 65536\n"
        "    encrypt:\n"
        "        slots:\n"
        "            [0]:\n"
        "                active: true\n"
        "        format: \n"
        "Child node '/file':\n"
        "    filename: sub/ov.qcow2\n"
        "    protocol type: file\n"
        "    file length: 192 KiB (197120 bytes)\n"
        "    disk size: unavailable\n"
    )


def test_children_of_children_nest() -> None:
    top, middle, bottom = (
        ImageInfo(name, kind, 512) for name, kind in (("a", "q"), ("b", "raw"), ("c", "file"))
    )
    bottom.is_protocol = True
    middle.children = [("image", bottom)]
    top.children = [("file", middle)]
    assert "Child node '/file':\n    image: b\n" in info_block(top)
    assert "\n    Child node '/file/image':\n        filename: c\n" in info_block(top)


@pytest.mark.parametrize(
    ("resolved", "line"),
    [
        ("base.q", "backing file: base.q\n"),
        ("/d/base.q", "backing file: base.q (actual path: /d/base.q)\n"),
        (None, "backing file: base.q (cannot determine actual path)\n"),
    ],
)
def test_the_backing_line_has_three_forms(resolved: str | None, line: str) -> None:
    info = ImageInfo("x", "qcow2", 0)
    info.backing_filename, info.full_backing_filename = "base.q", resolved
    assert line in info_block(info)


def test_an_empty_image_has_zero_bytes() -> None:
    assert "virtual size: 0 B (0 bytes)\n" in info_block(ImageInfo("x", "raw", 0))


def result(**changes: int) -> CheckResult:
    made = CheckResult()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_clean_check_says_so_and_tells_how_full_the_image_is() -> None:
    clean = result(
        total_clusters=16,
        allocated_clusters=4,
        fragmented_clusters=1,
        compressed_clusters=0,
        image_end_offset=589824,
    )
    assert check_summary(clean) == (
        "No errors were found on the image.\n"
        "4/16 = 25.00% allocated, 25.00% fragmented, 0.00% compressed clusters\n"
        "Image end offset: 589824\n"
    )


def test_nothing_allocated_means_no_percentages() -> None:
    assert check_summary(result(total_clusters=16, allocated_clusters=0)) == (
        "No errors were found on the image.\n"
    )


def test_each_problem_comes_after_an_empty_line() -> None:
    assert check_summary(result(corruptions=2, leaks=1, check_errors=9)) == (
        "\n2 errors were found on the image.\n"
        "Data may be corrupted, or further writes to the image may corrupt it.\n"
        "\n1 leaked clusters were found on the image.\n"
        "This means waste of disk space, but no harm to data.\n"
        "\n9 internal errors have occurred during the check.\n"
    )


def test_repairs_are_told_before_the_second_result() -> None:
    assert check_summary(result(leaks_fixed=2)) == (
        "The following inconsistencies were found and repaired:\n\n"
        "    2 leaked clusters\n    0 corruptions\n\n"
        "Double checking the fixed image now...\n"
        "No errors were found on the image.\n"
    )


@pytest.mark.parametrize(
    ("comparison", "line"),
    [
        (Comparison("identical"), "Images are identical.\n"),
        (Comparison("content", 5242880), "Content mismatch at offset 5242880!\n"),
        (Comparison("size"), "Strict mode: Image size mismatch!\n"),
        (Comparison("status", 0), "Strict mode: Offset 0 block status mismatch!\n"),
    ],
)
def test_a_verdict_is_one_line(comparison: Comparison, line: str) -> None:
    assert verdict(comparison) == line


def test_map_has_columns_of_sixteen_and_a_plain_zero() -> None:
    assert MAP_HEADER == "Offset          Length          Mapped to       File\n"
    entry = MapEntry(0, 0x10000, 0, True, False, True, False, 0x50000, "a b.q")
    assert map_row(entry) == "0               0x10000         0x50000         a b.q\n"


def test_measure_has_bitmaps_last_where_they_are_known() -> None:
    assert measure_lines(Measure(1, 2)) == "required size: 1\nfully allocated size: 2\n"
    assert measure_lines(Measure(1, 2, 0)).endswith("bitmaps size: 0\n")


OPTIONS = (
    Option("size", SIZE, None, "how large"),
    Option("encrypt.cipher-alg", STR, None, "which cipher"),
    Option("lazy", BOOL, None, "postpone"),
)


def test_the_option_table_is_sorted_and_padded() -> None:
    assert option_table(OPTIONS, None) == (
        "Supported options:\n"
        "  encrypt.cipher-alg=<str> - which cipher\n"
        "  lazy=<bool (on/off)>   - postpone\n"
        "  size=<size>            - how large\n"
    )


def test_without_a_target_the_table_names_the_format_and_points_on() -> None:
    lines = option_table(OPTIONS, "qcow2").splitlines()
    assert lines[0] == "Supported qcow2 options:"
    assert lines[-3:] == [
        "",
        "The protocol level may support further options.",
        "Specify the target filename to include those options.",
    ]
