"""The vmdk rows of the benchmark: `run.py` with jobs of its own.

.venv/bin/python benchmarks/vmdk.py [the options of run.py]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run


class VmdkBench(run.Bench):
    """Inputs: the same real files, in two kinds of vmdk, written by the real program."""

    def prepare(self) -> None:
        """Make what is missing."""
        super().prepare()
        self.sparse = f"real-{self.content // run.MIB}.vmdk"
        self.stream = f"real-{self.content // run.MIB}-stream.vmdk"
        convert = ("convert", "-f", "raw", "-O", "vmdk")
        self.make(self.sparse, lambda path: self.qemu_img(*convert, self.raw, path.name))
        stream = ("-o", "subformat=streamOptimized")
        self.make(self.stream, lambda path: self.qemu_img(*convert, *stream, self.raw, path.name))
        for name in (self.sparse, self.stream):
            self.warm(self.folder / name)

    def jobs(self) -> list[run.Job]:
        """All rows."""
        raw = self.raw

        def job(name: str, source: str, kinds: tuple[str, str], *more: str, wanted: str) -> run.Job:
            target = "target." + kinds[1]
            words = ("convert", *more, "-f", kinds[0], "-O", kinds[1], source, target)
            return run.Job(name, words, wanted, target, lambda path: self.same(path, raw, "raw", kinds[1]))

        stream = ("-o", "subformat=streamOptimized")
        return [
            job("convert raw to vmdk", raw, ("raw", "vmdk"), wanted="1"),
            job("convert vmdk to raw", self.sparse, ("vmdk", "raw"), wanted="1"),
            job("convert raw to vmdk streamOptimized", raw, ("raw", "vmdk"), *stream, wanted="10"),
            job("convert vmdk streamOptimized to raw", self.stream, ("vmdk", "raw"), wanted="2"),
        ]


if __name__ == "__main__":
    run.Bench = VmdkBench  # type: ignore[misc]
    sys.exit(run.main())
