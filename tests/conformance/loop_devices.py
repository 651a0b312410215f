"""Block devices over files, where the machine permits (Linux, root)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import peers


@contextmanager
def loop_device(backing: Path, *, read_only: bool = False) -> Iterator[str]:
    """Path of a block device with the bytes of `backing`; skips the test where none can be had."""
    losetup = peers.find("losetup")
    if losetup is None:
        pytest.skip("no block devices: losetup is missing")
    words = [losetup, "--find", "--show", *(["--read-only"] if read_only else []), str(backing)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip("no block devices: losetup is refused (needs root and free loop devices)")
    device = answer.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([losetup, "--detach", device], check=True)
