"""JSON text: the layout of the real program (common sheet, section 14), byte for byte."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qimg.cli.render_json import check_object, dumps, info_object, map_rows, measure_object
from qimg.formats.base import CheckResult, Measure, SnapshotInfo
from qimg.jobs.check import CheckOutcome
from qimg.jobs.info import ImageInfo
from qimg.jobs.map import MapEntry
from support.run import run_real


def test_four_blanks_a_level_and_empty_arrays_over_two_lines() -> None:
    value = {"a": [], "b": {}, "c": [1, {"x": True, "y": False}], "d": None}
    assert dumps(value) == (
        "{\n"
        '    "a": [\n'
        "    ],\n"
        '    "b": {\n'
        "    },\n"
        '    "c": [\n'
        "        1,\n"
        "        {\n"
        '            "x": true,\n'
        '            "y": false\n'
        "        }\n"
        "    ],\n"
        '    "d": null\n'
        "}"
    )


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain text", '"plain text"'),
        ('a"b\\c/', '"a\\"b\\\\c/"'),
        ("\b\f\n\r\t", '"\\b\\f\\n\\r\\t"'),
        ("\x01\x1f\x7f", '"\\u0001\\u001F\\u007F"'),
        ("ü€", '"\\u00FC\\u20AC"'),
        ("😀", '"\\uD83D\\uDE00"'),
        ("a\udcffb", '"a\\uFFFDb"'),
    ],
)
def test_strings_are_escaped_with_upper_case_hex(text: str, written: str) -> None:
    assert dumps(text) == written


@pytest.mark.peer("qemu-img")
def test_the_real_program_escapes_a_file_name_the_same_way(work: Path) -> None:
    name = b'\xc3\xbc\xf0\x9f\x98\x80"\\\x01\x7f\xff.raw'
    (work / os.fsdecode(name)).touch()
    real = run_real(["info", "-f", "raw", "--output=json", name], work).ok()
    line = next(line for line in real.lines if '"filename"' in line)
    assert line.strip() == f'"filename": {dumps(os.fsdecode(name))},'


def image() -> ImageInfo:
    info = ImageInfo("ov.qcow2", "qcow2", 10485760)
    info.actual_size = 237568
    info.cluster_size = 65536
    info.dirty = False
    info.backing_filename = "base.qcow2"
    info.full_backing_filename = "/d/base.qcow2"
    info.backing_format = "qcow2"
    info.encrypted = True
    info.format_specific = {"compat": "1.1"}
    info.snapshots = [
        SnapshotInfo(
            id="1",
            name="s1",
            vm_state_size=0,
            date_sec=1795378336,
            date_nsec=555109000,
            vm_clock_nsec=61_000_000_007,
            icount=None,
        )
    ]
    child = ImageInfo("ov.qcow2", "file", 197120)
    child.is_protocol = True
    child.actual_size = 237568
    child.dirty = False
    child.format_specific = {}
    info.children = [("file", child)]
    return info


def test_info_has_its_keys_in_the_order_of_release_10() -> None:
    written = json.loads(dumps(info_object(image())))
    assert list(written) == [
        "children",
        "backing-filename-format",
        "snapshots",
        "virtual-size",
        "filename",
        "cluster-size",
        "format",
        "actual-size",
        "format-specific",
        "full-backing-filename",
        "encrypted",
        "backing-filename",
        "dirty-flag",
    ]
    assert written["format-specific"] == {"type": "qcow2", "data": {"compat": "1.1"}}
    assert written["snapshots"] == [
        {
            "vm-clock-nsec": 7,
            "name": "s1",
            "date-sec": 1795378336,
            "date-nsec": 555109000,
            "vm-clock-sec": 61,
            "id": "1",
            "vm-state-size": 0,
        }
    ]


def test_a_file_child_is_described_by_the_same_keys() -> None:
    (child,) = json.loads(dumps(info_object(image())))["children"]
    assert child == {
        "name": "file",
        "info": {
            "children": [],
            "virtual-size": 197120,
            "filename": "ov.qcow2",
            "format": "file",
            "actual-size": 237568,
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": False,
        },
    }


def test_info_leaves_out_what_is_unknown_or_absent() -> None:
    bare = ImageInfo("x", "parallels", 512)
    assert list(info_object(bare)) == ["children", "virtual-size", "filename", "format"]


def test_check_leaves_out_zero_counters_but_not_check_errors() -> None:
    result = CheckResult()
    assert check_object(CheckOutcome("x", "qcow2", result), "typed") == {
        "check-errors": 0,
        "filename": "typed",
        "format": "qcow2",
    }


def test_check_has_its_keys_in_order() -> None:
    result = CheckResult()
    result.image_end_offset, result.compressed_clusters, result.total_clusters = 720896, 4, 16
    result.corruptions, result.corruptions_fixed, result.leaks, result.leaks_fixed = 1, 2, 2, 3
    result.allocated_clusters, result.fragmented_clusters = 5, 4
    assert list(check_object(CheckOutcome("x", "qcow2", result), "x").items()) == [
        ("image-end-offset", 720896),
        ("compressed-clusters", 4),
        ("total-clusters", 16),
        ("corruptions", 1),
        ("corruptions-fixed", 2),
        ("check-errors", 0),
        ("leaks", 2),
        ("leaks-fixed", 3),
        ("allocated-clusters", 5),
        ("filename", "x"),
        ("format", "qcow2"),
        ("fragmented-clusters", 4),
    ]


def test_measure_has_bitmaps_first_where_they_are_known() -> None:
    assert list(measure_object(Measure(1, 2, 0)).items()) == [
        ("bitmaps", 0),
        ("required", 1),
        ("fully-allocated", 2),
    ]
    assert list(measure_object(Measure(1, 2))) == ["required", "fully-allocated"]


def test_map_is_one_compact_object_a_line() -> None:
    entries = [
        MapEntry(0, 65536, 0, True, True, False, False, None, None),
        MapEntry(65536, 512, 1, True, False, True, False, 393216, "base.q"),
        MapEntry(66048, 512, 0, True, False, True, True, None, None),
    ]
    assert "".join(map_rows(entries)) == (
        '[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false,'
        ' "compressed": false},\n'
        '{ "start": 65536, "length": 512, "depth": 1, "present": true, "zero": false, "data": true,'
        ' "compressed": false, "offset": 393216},\n'
        '{ "start": 66048, "length": 512, "depth": 0, "present": true, "zero": false, "data": true,'
        ' "compressed": true}]'
    )
