"""Counts of another width: all that the real program finds afterwards, and its words (qcow2 sheet 17)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import qimg
from qimg.formats.qcow2 import shadow_counts
from support import model
from support.build import assert_real_check_clean, build, io, real_content
from support.qcow2 import Anatomy
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def width(path: Path) -> int:
    """Bits of a count, as the real program tells."""
    shown = json.loads(run_real(["info", "--output=json", path], path.parent).ok().out)
    return int(shown["format-specific"]["data"]["refcount-bits"])


def unshared(path: Path, bits: int, cluster: int) -> Path:
    """An image in which all counts are 1."""
    return build(path, "AB-C0#" * 4, options=f"refcount_bits={bits}", cluster=cluster)


@pytest.mark.parametrize("before", WIDTHS)
@pytest.mark.parametrize("after", WIDTHS)
def test_any_width_becomes_any_other(before: int, after: int, tmp_path: Path) -> None:
    path = unshared(tmp_path / "a.q", before, 512)
    content = real_content(path)
    qimg.amend(path, {"refcount_bits": after})
    assert width(path) == after
    assert_real_check_clean(path)
    assert real_content(path) == content
    io(path, ["write -q -P 9 1k 8k"])
    assert_real_check_clean(path)


@pytest.mark.parametrize("bits", [bits for bits in WIDTHS if bits != 16])
@pytest.mark.parametrize(
    "name", ["snapshots", "subclusters, snapshots", "clusters of 4096", "over a long file"]
)
def test_shared_clusters_keep_their_counts_or_the_width_is_refused(
    name: str, bits: int, tmp_path: Path
) -> None:
    """In the real program's words, with the first cluster that counts too many."""
    path = model.prepare(tmp_path, name)
    copy = tmp_path / "real"
    shutil.copy(path, copy)
    before = path.read_bytes()
    real = run_real(["amend", "-f", "qcow2", "-o", f"refcount_bits={bits}", "real"], tmp_path)
    try:
        qimg.amend(path, {"refcount_bits": bits})
    except qimg.QimgError as error:
        assert real.code == 1
        assert real.err.startswith(f"qemu-img: {error}")
        assert path.read_bytes() == before
    else:
        assert real.code == 0
        assert width(path) == bits
        assert_real_check_clean(path)
        assert real_content(path, format="qcow2") == real_content(copy, format="qcow2")


@pytest.mark.parametrize("bits", [1, 64])
def test_many_blocks_pass_through_little_memory(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_counts, "CACHE_BYTES", 0)
    path = build(tmp_path / "a.q", "", options="refcount_bits=32", cluster=512, size=2 << 20)
    io(path, ["write -q -P 7 0 1500k"])
    blocks = len([word for word in Anatomy(path).blocks if word])
    assert blocks == 8
    qimg.amend(path, {"refcount_bits": bits})
    assert_real_check_clean(path)
    assert width(path) == bits


def test_a_table_that_needs_more_blocks_grows(tmp_path: Path) -> None:
    """64 blocks of 256 counts become more than 64 of 64 counts, which fill more than one cluster."""
    path = build(tmp_path / "a.q", "", cluster=512, size=4 << 20)
    io(path, ["write -q -P 7 0 4M"])
    assert Anatomy(path).number(56, 4) == 1
    qimg.amend(path, {"refcount_bits": 64})
    assert Anatomy(path).number(56, 4) > 1
    assert_real_check_clean(path)


def test_progress_ends_with_all_blocks(tmp_path: Path) -> None:
    path = unshared(tmp_path / "a.q", 16, 512)
    seen: list[tuple[int, int]] = []
    qimg.amend(path, {"refcount_bits": 8}, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
