"""A power cut or a failing disk while images of a chain change: commit and rebase.

The harness and its rules are those of `support.crash`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qimg
from support import crash, model
from support.qcow2 import make

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


@pytest.mark.parametrize(
    "mid", ["", "cluster_size=4096", "extended_l2=on", "compat=0.10", "cluster_size=512"]
)
@pytest.mark.parametrize("keep", [False, True], ids=["emptied", "kept"])
def test_a_power_cut_while_an_image_is_committed(mid: str, keep: bool, tmp_path: Path) -> None:
    """The top image reads the same at every moment."""
    make(tmp_path / "mid", 512 << 10, mid)
    model.scribble(tmp_path / "mid", model.Kind(mid, 512 << 10, packed=True), random.Random(1))
    make(tmp_path / "top", 700 << 10, "cluster_size=4096", "-b", "mid", "-F", "qcow2")
    model.scribble(
        tmp_path / "top", model.Kind("cluster_size=4096", 700 << 10, packed=True), random.Random(2), 14
    )
    shown = crash.guest_content(tmp_path / "top")
    # The base grows before it is written to.
    below = crash.guest_content(tmp_path / "mid").ljust(700 << 10, b"\0")

    def run() -> None:
        qimg.commit(tmp_path / "top", keep=keep)

    crash.assert_survives(tmp_path, ["mid", "top"], run, between=[below], after=shown, limit=70)
    assert crash.guest_content(tmp_path / "top") == shown


@pytest.mark.parametrize("new", ["other", ""])
@pytest.mark.parametrize("top", ["", "cluster_size=4096", "extended_l2=on", "compat=0.10,cluster_size=1024"])
def test_a_power_cut_while_an_image_gets_another_backing_file(top: str, new: str, tmp_path: Path) -> None:
    """The image reads the same at every moment."""
    chance = random.Random(top + new)
    (tmp_path / "below").write_bytes(model.mixed_stretches(400 << 10, chance))
    (tmp_path / "other").write_bytes(model.mixed_stretches(500 << 10, chance))
    make(tmp_path / "top", 450 << 10, top, "-b", "below", "-F", "raw")
    model.scribble(tmp_path / "top", model.Kind(top, 450 << 10, packed=True), chance)
    shown = crash.guest_content(tmp_path / "top")

    def run() -> None:
        qimg.rebase(tmp_path / "top", new, backing_format="raw" if new else None)

    crash.assert_survives(tmp_path, ["top"], run, after=shown, atomic=True, limit=70)


@pytest.mark.parametrize("mid", ["", "cluster_size=4096,compat=0.10", "extended_l2=on"])
def test_a_commit_that_fails_can_be_repeated(mid: str, tmp_path: Path) -> None:
    make(tmp_path / "mid", 300 << 10, mid)
    make(tmp_path / "top", 400 << 10, "cluster_size=4096", "-b", "mid", "-F", "qcow2")
    for name, seed in (("mid", 3), ("top", 4)):
        kind = model.Kind("cluster_size=4096", 300 << 10, packed=True)
        model.scribble(tmp_path / name, kind, random.Random(seed))
    below = crash.guest_content(tmp_path / "mid").ljust(400 << 10, b"\0")
    crash.assert_survives_errors(
        tmp_path, ["mid", "top"], lambda: qimg.commit(tmp_path / "top"), between=[below], again=True, limit=40
    )


@pytest.mark.parametrize("top", ["", "cluster_size=4096", "extended_l2=on"])
def test_a_rebase_that_fails_can_be_repeated(top: str, tmp_path: Path) -> None:
    chance = random.Random(top)
    (tmp_path / "below").write_bytes(model.mixed_stretches(400 << 10, chance))
    (tmp_path / "other").write_bytes(model.mixed_stretches(500 << 10, chance))
    make(tmp_path / "top", 450 << 10, top, "-b", "below", "-F", "raw")
    model.scribble(tmp_path / "top", model.Kind(top, 450 << 10), chance)
    crash.assert_survives_errors(
        tmp_path,
        ["top"],
        lambda: qimg.rebase(tmp_path / "top", "other", backing_format="raw"),
        atomic=True,
        again=True,
        limit=40,
    )
