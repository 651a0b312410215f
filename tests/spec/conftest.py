"""Fixtures of the tests that compare the commands with the real program."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from spec import gallery


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the images of `gallery`, made once in a test run. Nobody may change a file in it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "gallery"
    with (base / "gallery.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = base / "gallery.making"
            making.mkdir()
            gallery.build(making, folder)
            making.rename(folder)
        before = gallery.digest(folder)
    yield folder
    assert gallery.digest(folder) == before, "a command that only reads changed a file"
