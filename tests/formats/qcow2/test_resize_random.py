"""Disks of plain bytes that are resized at random, beside images that qimg resizes and the real programs
write to, read and check."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qimg
from support import crash
from support.build import io
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

K = 1 << 10
LARGEST = 3000 * K
OPTIONS = (
    "compat=1.1",
    "compat=1.1,cluster_size=512",
    "compat=0.10,cluster_size=4k",
    "refcount_bits=1,cluster_size=1k",
    "refcount_bits=64,cluster_size=512",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on",
    "cluster_size=2M",
)


class Model:
    """An image `path` and what it has to hold; `content` is the guest's disk, `below` its backing file."""

    def __init__(self, folder: Path, options: str, chance: random.Random, *, overlay: bool) -> None:
        self.chance = chance
        self.path = folder / "a.q"
        self.options = options
        size = self._size()
        self.content = bytearray(size)
        words = ["create", "-q", "-f", "qcow2", "-o", options]
        if overlay:
            below = bytes([7]) * (self._size() // 2)
            (folder / "back.raw").write_bytes(below)
            words += ["-b", "back.raw", "-F", "raw"]
            self.content[: len(below)] = below[:size]
        run_real([*words, "a.q", str(size)], folder).ok()

    def _size(self) -> int:
        """In sectors, often with a ragged end, sometimes not."""
        unit = self.chance.choice([512, 512, 4096, 65536])
        return self.chance.randrange(1, LARGEST // unit) * unit

    def write(self) -> None:
        """The real program writes, clears or discards."""
        size = len(self.content)
        start = self.chance.randrange(size // 512) * 512
        length = min(self.chance.randrange(1, 600) * 512, size - start)
        byte = self.chance.randrange(1, 255)
        kind = self.chance.choice(["write -q -P", "write -q -P", "write -q -z"])
        if kind.endswith("-P"):
            io(self.path, [f"{kind} {byte} {start} {length}"])
            self.content[start : start + length] = bytes([byte]) * length
        else:
            io(self.path, [f"{kind} {start} {length}"])
            self.content[start : start + length] = bytes(length)

    def resize(self) -> None:
        """We resize."""
        size = self._size()
        grows = size > len(self.content)
        mode = self.chance.choice(["off", "off", "metadata", "falloc", "full"]) if grows else "off"
        qimg.resize(self.path, size, shrink=True, preallocation=mode)
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    def snapshot(self) -> None:
        """The real program makes a snapshot, where that does not forbid resizing."""
        if "0.10" not in self.options and "refcount_bits=1," not in self.options:
            run_real(["snapshot", "-c", f"s{self.chance.random()}", "a.q"], self.path.parent).ok()

    def assert_holds(self, what: str) -> None:
        """The real program finds neither damage nor leaks, and the content."""
        checked = run_real(["check", "a.q"], self.path.parent)
        assert checked.code == 0, f"{what}: {checked.out}{checked.err}"
        wrong = crash.difference(crash.guest_content(self.path), [bytes(self.content)], atomic=True)
        assert wrong is None, f"{what}: {wrong}"


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_cut_off_is_gone_and_what_is_added_is_zero(
    options: str, overlay: bool, tmp_path: Path
) -> None:
    chance = random.Random(f"{options} {overlay}")
    model = Model(tmp_path, options, chance, overlay=overlay)
    for step in range(24):
        action = chance.choice([model.write, model.write, model.resize, model.resize, model.snapshot])
        try:
            action()
        except qimg.NotSupported as error:
            # Version 2 knows no zero clusters to put over a backing file.
            assert "zero out new clusters" in str(error)
            assert "0.10" in options and overlay
        model.assert_holds(f"step {step}, {action.__name__}")
