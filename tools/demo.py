"""The main job, shown: a disk to compressed qcow2, what qimg says of it, and back, each step with its time.

``./dev demo`` builds a disk from files of this machine; ``./dev demo IMAGE`` takes an image of yours, which
is only read. Everything is made in a temporary folder, which is removed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import realdisk

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1 << 30
CONTENT = 300 << 20
SHOWN = 6


class Stop(Exception):
    """A step failed; carries its exit code."""


class Demo:
    """Runs the program as a user would and shows each command, its output and its time."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.program = "qimg"

    def step(self, *words: str, program: list[str] | None = None, show: bool = True) -> str:
        """One command; its output goes to the screen (and is returned)."""
        name = self.program if program is None else Path(program[0]).name
        command = program or [sys.executable, str(ROOT / "bin" / "qimg")]
        print(f"\n$ {name} {' '.join(words)}", flush=True)
        start = time.perf_counter()
        run = subprocess.run([*command, *words], cwd=self.work, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        output = run.stdout + run.stderr
        if show or run.returncode != 0:
            print("".join(f"    {line}\n" for line in output.splitlines()), end="")
        print(f"    -- {seconds:.2f} s")
        if run.returncode != 0:
            raise Stop(run.returncode)
        return output

    def map(self, image: str) -> None:
        """``map`` of a disk has thousands of rows: the first ones, and what they add up to."""
        rows = json.loads(self.step("map", "--output=json", image, show=False))
        for row in rows[:SHOWN]:
            print(f"    {json.dumps(row)}")
        if len(rows) > SHOWN:
            print(f"    ... {len(rows) - SHOWN} more rows")
        data = sum(row["length"] for row in rows if row["data"])
        zero = sum(row["length"] for row in rows if row["zero"])
        print(f"    data {data / 2**20:.0f} MiB, zero {zero / 2**20:.0f} MiB, {len(rows)} rows")


def allocated(path: Path) -> float:
    """MiB that a file occupies."""
    return path.stat().st_blocks * 512 / 2**20


def run(demo: Demo, image: str | None) -> None:
    """All steps."""
    work = demo.work
    if image is None:
        print("Building a disk from files of this machine ...", flush=True)
        start = time.perf_counter()
        image = "disk.raw"
        made = realdisk.build(work / image, SIZE, CONTENT)
        seconds = time.perf_counter() - start
        used = f"{allocated(work / image):.0f} MiB in use"
        print(f"{image}: {made} of {SIZE >> 20} MiB, {used} ({seconds:.2f} s)")
    demo.step("info", image)
    demo.step("convert", "-c", "-O", "qcow2", image, "disk.qcow2")
    demo.step("info", "disk.qcow2")
    demo.step("check", "disk.qcow2")
    demo.map("disk.qcow2")
    demo.step("convert", "-O", "raw", "disk.qcow2", "back.raw")
    demo.step("compare", image, "back.raw")
    before = allocated(work / image)
    print(f"\n{before:.0f} MiB in {image}, {allocated(work / 'disk.qcow2'):.0f} MiB in disk.qcow2.")
    real = shutil.which("qemu-img")
    if real is not None:
        print("\nThe real qemu-img is on this machine; it reads what qimg wrote:")
        demo.step("check", "disk.qcow2", program=[real])
        demo.step("compare", image, "disk.qcow2", program=[real])


def main() -> int:
    """Make the folder, run, clean up."""
    if len(sys.argv) > 2:
        print("usage: ./dev demo [IMAGE]", file=sys.stderr)
        return 2
    image = os.path.abspath(sys.argv[1]) if len(sys.argv) == 2 else None
    if image is not None and not os.path.exists(image):
        print(f"demo: no such file: {sys.argv[1]}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="qimg-demo-") as folder:
        try:
            run(Demo(Path(folder)), image)
        except Stop as stop:
            print("\ndemo: the step above failed")
            return int(stop.args[0]) or 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
