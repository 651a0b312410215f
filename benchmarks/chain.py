"""Commit and rebase: the rows of the benchmark in which images change in place.

    .venv/bin/python benchmarks/chain.py [the options of run.py]

An overlay has a tenth of its clusters, written in random order. Each run gets fresh copies, in memory and on
disk, of all that it may change. Results are checked with the real program: the top image reads as before, all
tables are sound.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run

CLUSTER = 64 << 10
FORMATS = ("raw", "qcow2")


class ChainBench(run.Bench):
    """Inputs: real files as a base, raw and qcow2; an overlay on each; and, for rebase, another disk that
    differs from the base here and there."""

    def prepare(self) -> None:
        """Make what is missing."""
        super().prepare()
        self.before = f"chain-{self.content // run.MIB}-before.raw"
        for kind, base in zip(FORMATS, (self.raw, self.qcow2), strict=True):
            self.make(self.overlay(kind), partial(self.make_overlay, base=base, kind=kind))
            self.make(self.other(kind), partial(self.make_other, base=base, kind=kind))
            self.warm(self.folder / self.other(kind))
        top = self.overlay("raw")
        self.make(self.before, lambda path: self.qemu_img("convert", "-O", "raw", top, path.name))

    def overlay(self, kind: str) -> str:
        """The overlay of the base of this format."""
        return f"chain-{self.content // run.MIB}-on-{kind}.qcow2"

    def other(self, kind: str) -> str:
        """The disk to rebase to."""
        return f"chain-{self.content // run.MIB}-other.{kind}"

    def make_overlay(self, path: Path, base: str, kind: str) -> None:
        """A tenth of the clusters, in random order, the same for each format."""
        self.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", kind, path.name)
        clusters = (self.folder / self.raw).stat().st_size // CLUSTER
        chance = random.Random(1)
        chosen = chance.sample(range(clusters), clusters // 10)
        self.qemu_io(path.name, "qcow2", [(at * CLUSTER, CLUSTER, at % 255 + 1) for at in chosen])

    def make_other(self, path: Path, base: str, kind: str) -> None:
        """The base with a hundredth of it changed."""
        self.copy(base, path.name)
        size = (self.folder / self.raw).stat().st_size
        self.qemu_io(path.name, kind, [(at, size // 1600, 7) for at in range(0, size, size // 16)])

    def qemu_io(self, name: str, kind: str, writes: list[tuple[int, int, int]]) -> None:
        """The real program writes patterns: (offset, length, byte)."""
        commands = []
        for start, size, byte in writes:
            commands.append(f"write -q -P {byte} {start // 512 * 512} {size // 512 * 512}")
        subprocess.run(
            ["qemu-io", "-f", kind, name],
            cwd=self.folder,
            check=True,
            input="\n".join(commands),
            text=True,
            stdout=subprocess.DEVNULL,
        )

    def copy(self, source: str, target: str) -> None:
        """A copy that is on disk and in memory."""
        subprocess.run(["cp", "--sparse=always", source, target], cwd=self.folder, check=True)
        subprocess.run(["sync", target], cwd=self.folder, check=True)
        self.warm(self.folder / target)

    def fresh(self, job: run.Job) -> None:
        """Copies for one run of `job`."""
        kind = job.words[-2]
        self.copy(self.overlay(kind), "top.qcow2")
        if job.words[0] == "commit":
            self.copy(self.raw if kind == "raw" else self.qcow2, "base.work")
            self.qemu_img("rebase", "-u", "-b", "base.work", "-F", kind, "top.qcow2")

    def right(self, job: run.Job) -> bool:
        """Whether the top image reads as before, and the tables are sound."""
        same = self.same(self.folder / "top.qcow2", self.before, "raw", "qcow2")
        if job.words[0] == "commit" and job.words[-2] == "qcow2":
            same = same and self.ask("check", "-f", "qcow2", "base.work")
        return same

    def jobs(self) -> list[run.Job]:
        """All rows. The last word but one is the base's format: for `fresh`, not for the program."""
        rows = []
        for kind in FORMATS:
            rows.append(run.Job(f"commit a tenth into {kind}", ("commit", kind, "top.qcow2"), "1"))
            rebase = ("rebase", "-b", self.other(kind), "-F", kind, "top.qcow2")
            rows.append(run.Job(f"rebase a tenth from {kind} to {kind}", rebase, "1"))
        return rows

    def measure(self, job: run.Job, rounds: int) -> run.Row:
        """Run a job's pairs, each run on fresh copies."""
        row = run.Row(job)
        words = [word for word in job.words if job.words[0] == "rebase" or word not in FORMATS]
        both: list[tuple[list[str], list[run.Cost], Callable[[], bool]]] = [
            ([self.real, *words], row.real, lambda: True),
            ([*self.ours, *words], row.ours, lambda: self.right(job)),
        ]
        for turn in range(rounds + 1):
            for command, costs, check in both[:: -1 if turn % 2 else 1]:
                self.fresh(job)
                code, cost = run.run(command, self.folder)
                if turn:  # the first runs compile modules and fill caches
                    costs.append(cost)
                row.right = row.right and code == 0 and (turn > 0 or check())
        for name in ("top.qcow2", "base.work"):
            (self.folder / name).unlink(missing_ok=True)
        return row


if __name__ == "__main__":
    run.Bench = ChainBench  # type: ignore[misc]
    sys.exit(run.main())
