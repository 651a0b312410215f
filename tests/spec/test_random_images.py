"""Random chains of images, made by the real programs, look the same to qimg in every reading command.

Each seed is one chain. QIMG_SEEDS=1000:1200 in the environment tries other ones.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import qimg
from spec.differential import assert_same
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KIB = 1 << 10
MIB = 1 << 20
WRITES = ("write -q -P {}",) * 4 + ("write -q -z", "write -q -z -u", "discard -q", "write -q -c -P 5")


def seeds() -> range:
    first, _, last = os.environ.get("QIMG_SEEDS", "0:24").partition(":")
    return range(int(first), int(last))


class Chain:
    """Up to four images in `folder`, each with random options, size and content; `names` from the bottom."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.names: list[str] = []
        for number in range(self.chance.randrange(1, 5)):
            if number == 0 and self.chance.random() < 0.3:
                self._raw()
            else:
                self._qcow2(f"i{number}.q")
        # Space that the file system has only promised would change `disk size` later.
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    @property
    def top(self) -> str:
        return self.names[-1]

    def _size(self) -> int:
        chance = self.chance
        size = chance.choice((512 * chance.randrange(1, 8000), MIB, 65536 * chance.randrange(1, 64)))
        return chance.choice((size, chance.randrange(1, 4 * MIB)))

    def _raw(self) -> None:
        size = self._size()
        run_real(["create", "-q", "-f", "raw", "b.raw", str(size)], self.folder).ok()
        self._fill("b.raw", "raw", size, compress=False)

    def _qcow2(self, name: str) -> None:
        chance = self.chance
        cluster = chance.choice(("512", "4k", "64k", "64k", "256k", "2M"))
        options = f"cluster_size={cluster}"
        if cluster not in ("512", "4k") and chance.random() < 0.5:
            options += ",extended_l2=on"
        elif chance.random() < 0.2:
            options += ",compat=0.10"
        elif chance.random() < 0.2:
            options += f",data_file={name}.data"
        if not self.names and chance.random() < 0.2:
            options += ",preallocation=metadata"
        words = ["create", "-q", "-f", "qcow2", "-o", options]
        if self.names:
            words += ["-b", self.top, "-F", "raw" if self.top == "b.raw" else "qcow2"]
        size = self._size()
        run_real([*words, name, str(size)], self.folder).ok()
        self._fill(name, "qcow2", size, compress="data_file" not in options)

    def _fill(self, name: str, format: str, size: int, *, compress: bool) -> None:
        chance = self.chance
        size = -(-size // 512) * 512
        words = ["-t", "unsafe", "-f", format]
        for _ in range(chance.randrange(12)):
            start = chance.choice(
                (512 * chance.randrange(size // 512), 65536 * chance.randrange(size // 65536 + 1))
            )
            length = chance.choice((512 * chance.randrange(1, 300), 65536 * chance.randrange(1, 6), 4096))
            command = chance.choice(WRITES).format(chance.randrange(1, 255))
            if start < size and (compress or " -c " not in command):
                words += ["-c", f"{command} {start} {min(length, size - start)}"]
        # What does not fit (a compressed write that is not a whole cluster) is simply not there.
        run_peer("qemu-io", [*words, name], self.folder)
        self.names.append(name)


@pytest.mark.parametrize("seed", seeds())
def test_a_random_chain_looks_the_same(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chain = Chain(tmp_path, seed)
    top, other = chain.top, chain.chance.choice(chain.names)
    start, length = chain.chance.randrange(5 * MIB), chain.chance.randrange(3 * MIB)
    run_real(["convert", "-O", "qcow2", top, "flat.q"], tmp_path)
    readable = run_real(["convert", "-O", "raw", top, "flat.raw"], tmp_path).code == 0
    for line in (
        f"map {top}",
        f"map --output=json {top}",
        f"map --output=json -s {start} -l {length} {top}",
        f"info --backing-chain --output=json {top}",
        f"check {top}",
        f"measure -O qcow2 {top}",
        f"compare {top} {other}",
        f"compare -s {other} {top}",
    ):
        assert_same(line, tmp_path)
    if not readable:  # the real program cannot read all that it writes with clusters of 512 bytes
        assert run_qimg_inprocess(["convert", "-O", "raw", top, "ours.raw"], tmp_path).code == 1
        return
    for line in (
        f"compare {top} flat.q",
        f"compare -s {top} flat.q",
        f"compare -s {top} flat.raw",
        "compare -s flat.q flat.raw",
    ):
        assert_same(line, tmp_path)
    with qimg.open(top) as disk:
        assert disk.read(0, disk.size) == Path("flat.raw").read_bytes()
