"""Predicted sizes of qcow2 images are the real program's, to the byte, and so are its refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qimg.errors import QimgError
from qimg.formats.base import Measure, MeasureSource
from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.formats.qcow2.measure import measure
from qimg.options import parse_values
from support.run import run_real

Answer = tuple[int, int, int | None] | str

GIB = 1 << 30
TIB = 1 << 40

#: measure sheet, "Numbers": size, options, required, fully allocated.
SHEET = [
    (1 << 20, {}, 327680, 1376256),
    (GIB, {}, 393216, 1074135040),
    (2 * TIB, {}, 335806464, 2199359062016),
    (GIB, {"cluster_size": "4k"}, 2637824, 1076379648),
    (GIB, {"extended_l2": "on"}, 524288, 1074266112),
    (GIB, {"preallocation": "full"}, 1074135040, 1074135040),
    (GIB, {"preallocation": "falloc"}, 1074135040, 1074135040),
    (GIB, {"refcount_bits": "1"}, 393216, 1074135040),
    (GIB, {"compat": "0.10"}, 393216, 1074135040),
    (GIB, {"data_file": "x"}, 393216, 1074135040),
    (GIB, {"backing_file": "x", "backing_fmt": "raw"}, 393216, 1074135040),
]


def ours(source: MeasureSource, options: dict[str, str]) -> Answer:
    try:
        told = measure(source, parse_values(CREATE_OPTIONS, options.items()))
    except QimgError as error:
        return str(error)
    return told.required, told.fully_allocated, told.bitmaps


def real(words: list[str | Path], options: dict[str, str]) -> Answer:
    given = ",".join(f"{name}={value}" for name, value in options.items())
    result = run_real(["measure", "-O", "qcow2", "--output=json", *(["-o", given] if given else []), *words])
    if result.code:
        return result.err.removeprefix("qemu-img: ").rstrip("\n")
    told = json.loads(result.out)
    return told["required"], told["fully-allocated"], told.get("bitmaps")


@pytest.mark.parametrize(("size", "options", "required", "full"), SHEET, ids=str)
def test_the_numbers_of_the_sheet(size: int, options: dict[str, str], required: int, full: int) -> None:
    assert ours(MeasureSource(size, None, None), options) == (required, full, None)


def random_options(chance: random.Random) -> dict[str, str]:
    """Options of which some are wrong."""
    choices = {
        "cluster_size": ["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "1M", "2M", "300", "4M"],
        "extended_l2": ["on", "off"],
        "compat": ["0.10", "1.1", "1.1", "2", "v2"],
        "refcount_bits": ["1", "2", "4", "8", "16", "32", "64", "3"],
        "preallocation": ["off", "metadata", "falloc", "full", "foo"],
        "backing_file": ["x"],
        "lazy_refcounts": ["on"],
        "data_file": ["x"],
        "data_file_raw": ["on"],
        "compression_type": ["zstd", "foo"],
    }
    likely = {"cluster_size": 0.8, "refcount_bits": 0.5}
    return {
        name: chance.choice(values)
        for name, values in choices.items()
        if chance.random() < likely.get(name, 0.25)
    }


@pytest.mark.peer("qemu-img")
def test_two_hundred_random_questions_get_the_real_programs_answers() -> None:
    chance = random.Random(18)
    different = []
    for _ in range(200):
        options = random_options(chance)
        size = chance.randrange(1 << chance.randrange(1, 62))
        wanted = real(["--size", str(size)], options)
        got = ours(MeasureSource(size, None, None), options)
        if wanted != got:
            different.append((size, options, wanted, got))
    assert different == []


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("seed", range(12))
def test_files_count_by_the_clusters_that_hold_data(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    size = chance.randrange(1, 400) * 4096
    runs = []
    path = tmp_path / "source"
    with path.open("wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(chance.randrange(1, 12) * 4096, size - at)
            if chance.random() < 0.4:
                file.seek(at)
                file.write(b"\x11" * length)
                runs.append((at, length))
            at += length
    for _ in range(4):
        options = random_options(chance)
        wanted = real(["-f", "raw", path], options)
        assert ours(MeasureSource(size, runs, None), options) == wanted, options


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("count", [0, 1, 2, 11])
def test_bitmaps_are_measured_in_target_clusters(count: int, tmp_path: Path) -> None:
    path = tmp_path / "source"
    run_real(["create", "-q", "-f", "qcow2", path, "70M"]).ok()
    bitmaps = []
    for number in range(count):
        name = "b" * (number + 1)
        run_real(["bitmap", "--add", "-g", str(512 << number % 3), path, name]).ok()
        bitmaps.append((512 << number % 3, name))
    for options in ({}, {"cluster_size": "512"}, {"cluster_size": "2M"}, {"compat": "0.10"}):
        wanted = real(["-f", "qcow2", path], options)
        assert ours(MeasureSource(70 << 20, [], bitmaps), options) == wanted


def test_runs_that_share_a_cluster_count_it_once() -> None:
    source = MeasureSource(1 << 20, [(0, 10), (100, 50), (65530, 6), (65536, 1), (131071, 3)], None)
    told = measure(source, {})
    assert isinstance(told, Measure)
    assert told.required == 327680 + 3 * 65536


def test_luks_needs_a_key() -> None:
    assert ours(MeasureSource(0, None, None), {"encrypt.format": "luks"}) == (
        "Parameter 'encrypt.key-secret' is required for cipher"
    )
