"""What a power cut or a failing disk leaves of a rebase. The common cases are in `test_living_chain`."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from support import crash
from support.build import io
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

K = 1 << 10


def make(folder: Path, options: str, *, backing: bool = True) -> None:
    """An overlay of `old` (or of nothing), and another disk `new`."""
    (folder / "old").write_bytes((bytes(range(1, 251)) * 2000)[: 448 * K])
    (folder / "new").write_bytes((bytes(range(3, 251)) * 3000)[: 600 * K])
    words = ["create", "-q", "-f", "qcow2", *(["-b", "old", "-F", "raw"] if backing else [])]
    run_real([*words, *(["-o", options] if options else []), "top.q", "512k"], folder).ok()
    io(folder / "top.q", ["write -q -P 2 10k 30k", "write -q -z 64k 64k", "write -q -P 6 200k 4k"])


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on,cluster_size=16k", "compat=0.10"])
@pytest.mark.parametrize("new", ["new", ""])
def test_with_compression(new: str, options: str, tmp_path: Path) -> None:
    make(tmp_path, options)
    shown = crash.guest_content(tmp_path / "top.q")

    def run() -> None:
        qimg.rebase(tmp_path / "top.q", new, backing_format="raw" if new else None, compress=True)

    crash.assert_survives_errors(tmp_path, ["top.q"], run, atomic=True, again=True, limit=30)
    crash.assert_survives(tmp_path, ["top.q"], run, after=shown, atomic=True, limit=60)


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on", "compat=0.10"])
def test_of_an_image_that_had_no_backing_file(options: str, tmp_path: Path) -> None:
    make(tmp_path, options, backing=False)
    shown = crash.guest_content(tmp_path / "top.q")

    def run() -> None:
        qimg.rebase(tmp_path / "top.q", "new", backing_format="raw")

    crash.assert_survives_errors(tmp_path, ["top.q"], run, atomic=True, again=True, limit=30)
    crash.assert_survives(tmp_path, ["top.q"], run, after=shown, atomic=True, limit=60)


def test_the_header_changes_last(tmp_path: Path) -> None:
    make(tmp_path, "")
    recording = crash.record(
        tmp_path, ["top.q"], lambda: qimg.rebase(tmp_path / "top.q", "new", backing_format="raw")
    )
    changes = [event for _name, event in recording.events if event.kind != "flush"]
    header = [event for event in changes if event.offset < 65536]
    assert any(b"new" in event.data for event in header)
    assert changes[-len(header) :] == header
