"""Random extents, sizes and options: the real program finds images written by qimg sound and identical."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import fresh
from support.build import assert_real_check_clean, assert_real_identical

pytestmark = pytest.mark.peer("qemu-img")

KIB = 1024


@st.composite
def images(draw: st.DrawFn) -> tuple[str, int, list[fresh.Run]]:
    """(options, size, runs): any layout that create accepts, any runs in any order, some of them repeated."""
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
        options.append("data_file=data")
        if draw(st.booleans()):
            options.append("data_file_raw=on")
    mode = draw(st.sampled_from(["off", "off", "metadata", "falloc", "full"]))
    options.append(f"preallocation={mode}")
    unit = (1 << bits) // (32 if extended else 1)
    size = draw(st.integers(0, min(200 << bits, 1 << 21) // 512)) * 512
    kinds = [fresh.DATA, fresh.ZERO] if data_file else [fresh.DATA, fresh.ZERO, fresh.PACK]
    runs: list[fresh.Run] = []
    for _ in range(draw(st.integers(0, 12)) if size else 0):
        kind = draw(st.sampled_from(kinds))
        # Only whole clusters where compressed ones may be overwritten.
        step = 1 << bits if fresh.PACK in kinds else unit
        start = draw(st.integers(0, (size - 1) // step)) * step
        length = draw(st.integers(1, 40)) * step
        runs.append((kind, start, min(length, size - start)))
    return ",".join(options), size, runs


def expected(content: bytes, runs: list[fresh.Run]) -> bytes:
    disk = bytearray(len(content))
    for kind, start, length in runs:
        disk[start : start + length] = (
            bytes(length) if kind == fresh.ZERO else content[start : start + length]
        )
    return bytes(disk)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=images())
def test_any_runs_give_a_clean_image_of_the_right_content(case: Any) -> None:
    options, size, runs = case
    content = fresh.mixed_content(size)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with fresh.make(work / "ours.qcow2", size, options) as image:
            fresh.fill(image, content, runs)
            image.flush()
        (work / "raw").write_bytes(expected(content, runs))
        import os

        os.chdir(work)
        assert_real_check_clean(work / "ours.qcow2")
        assert_real_identical(work / "ours.qcow2", work / "raw", formats=("qcow2", "raw"))
        os.chdir("/")
