"""Fixtures of the tests of opening."""

from __future__ import annotations

import pytest

from graph.oracle import Gallery
from support import peers
from support.run import run_real


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Plain images, a chain, external data files, and files that are no images."""
    peers.need("qemu-img")
    folder = tmp_path_factory.mktemp("gallery")
    made = Gallery(folder)
    for sub in ("sub", "dir", "c:dir"):
        (folder / sub).mkdir()
    for name in ("a.raw", "sub/base.raw", "x,y.raw", "c:d.raw", "c:dir/b.raw"):
        (folder / name).write_bytes(bytes(1 << 20))
    (folder / "three").write_bytes(b"abc")
    (folder / "empty").touch()
    for words in (
        "-f qcow2 a.q 1M",
        "-f qcow2 -o compat=0.10 v2.q 1M",
        "-f qcow2 -o data_file=df.raw ext.q 1M",
        "-f qcow2 -o data_file=df2.raw,data_file_raw=on extraw.q 1M",
        "-f qcow2 -o data_file=gone.raw extno.q 1M",
    ):
        run_real(["create", "-q", *words.split()], folder).ok()
    (folder / "gone.raw").unlink()
    made.overlay("ov.q", "a.raw")
    made.overlay("sub/ov.q", "base.raw")
    made.overlay("./c:dir/ov.q", "b.raw")
    made.overlay("m1.q", "nosuch")
    return made
