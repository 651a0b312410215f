"""Random extents, sizes and options: the real program finds images written by qimg sound and identical."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qimg.formats.qcow2 import alloc, refcounts, tables
from qimg.storage.base import Filter, Storage
from support import fresh
from support.build import assert_real_check_clean, assert_real_identical

pytestmark = pytest.mark.peer("qemu-img")


@st.composite
def images(draw: st.DrawFn) -> tuple[str, int, list[fresh.Run], set[int]]:
    """(options, size, runs, numbers of the runs after which a flush comes): any layout that create accepts,
    any runs in any order, some of them repeated."""
    version = draw(st.sampled_from(["1.1", "1.1", "0.10"]))
    bits = draw(st.integers(9, 17))
    options = [f"cluster_size={1 << bits}", f"compat={version}"]
    modern = version == "1.1"
    extended = modern and bits >= 14 and draw(st.booleans())
    data_file = modern and draw(st.integers(0, 5)) == 0
    if modern:
        options.append(f"refcount_bits={draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))}")
        options.append(f"compression_type={draw(st.sampled_from(['zlib', 'zstd']))}")
    if extended:
        options.append("extended_l2=on")
    if data_file:
        options.append("data_file=DATA")
        if draw(st.booleans()):
            options.append("data_file_raw=on")
    mode = draw(st.sampled_from(["off", "off", "metadata", "falloc", "full"]))
    backing = "data_file_raw=on" not in options and draw(st.integers(0, 2)) == 0
    if backing:
        options.append("backing_file=BACK,backing_fmt=raw")
        mode = mode if extended else "off"
    options.append(f"preallocation={mode}")
    unit = (1 << bits) // (32 if extended else 1)
    size = draw(st.integers(0, min(200 << bits, 1 << 21) // 512)) * 512
    kinds = [fresh.DATA, fresh.ZERO] if data_file else [fresh.DATA, fresh.ZERO, fresh.PACK]
    if backing and not modern:
        kinds.remove(fresh.ZERO)
    runs: list[fresh.Run] = []
    for _ in range(draw(st.integers(0, 12)) if size else 0):
        kind = draw(st.sampled_from(kinds))
        # Only whole clusters where compressed ones may be overwritten.
        step = 1 << bits if fresh.PACK in kinds else unit
        start = draw(st.integers(0, (size - 1) // step)) * step
        length = draw(st.integers(1, 40)) * step
        runs.append((kind, start, min(length, size - start)))
    flushes = draw(st.sets(st.integers(0, 12), max_size=2))
    return ",".join(options), size, runs, flushes


def expected(content: bytes, runs: list[fresh.Run], below: bytes) -> bytes:
    disk = bytearray(below[: len(content)].ljust(len(content), b"\0"))
    for kind, start, length in runs:
        disk[start : start + length] = (
            bytes(length) if kind == fresh.ZERO else content[start : start + length]
        )
    return bytes(disk)


class Reused(Filter):
    """A place of fixed size full of old bytes, like a block device."""

    def __init__(self, child: Storage) -> None:
        child.write(b"\xaa" * (12 << 20), 0)
        super().__init__(child)
        self.zero_init = False
        self.fixed_size = True

    def resize(self, size: int, preallocation: str = "off") -> None:
        raise AssertionError("a device keeps its size")


def judge(work: Path, case: Any, wrap: Callable[[Storage], Storage] = lambda storage: storage) -> None:
    """Write the image and have the real program look at it."""
    options, size, runs, flushes = case
    below = fresh.mixed_content(size * 3 // 4 // 512 * 512, 2) if "BACK" in options else b""
    (work / "below").write_bytes(below)
    options = options.replace("DATA", str(work / "data")).replace("BACK", str(work / "below"))
    content = fresh.mixed_content(size)
    with fresh.make(work / "ours.qcow2", size, options, wrap=wrap) as image:
        for number, run in enumerate(runs):
            fresh.fill(image, content, [run])
            if number in flushes:
                image.flush()
        image.flush()
    (work / "raw").write_bytes(expected(content, runs, below))
    assert_real_check_clean(work / "ours.qcow2")
    assert_real_identical(work / "ours.qcow2", work / "raw", formats=("qcow2", "raw"))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=images())
def test_any_runs_give_a_clean_image_of_the_right_content(case: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judge(Path(folder), case)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=images())
def test_tables_and_counts_that_leave_memory_early_come_out_the_same(case: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(alloc, "BATCH", 700)
        patch.setattr(tables, "CHUNK_BYTES", 1024)
        patch.setattr(tables, "STAGE_LIMIT", 4096)
        patch.setattr(refcounts, "OPEN_LIMIT", 600)
        judge(Path(folder), case)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=images())
def test_old_bytes_of_a_device_never_show(case: Any) -> None:
    assume("DATA" not in case[0])
    with tempfile.TemporaryDirectory() as folder:
        judge(Path(folder), case, Reused)
