"""What the benchmark is made of: costs, jobs, rows, and the workshop that makes inputs and judges results."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import realdisk  # noqa: E402

MIB = 1 << 20
#: Formats whose tables the real program can check.
CHECKED = ("qcow2", "qed", "vdi", "vhdx", "vmdk")
#: Copies that jobs work on.
WORK = ("top.qcow2", "base.work", "work.qcow2")


@dataclass(frozen=True)
class Cost:
    """What one run of a program cost: seconds, seconds, bytes."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Job:
    """One row. `words` are what follows the program's name; `target` is the file that they make.

    before      makes what the words need, at first: inputs are made by who needs them.
    fresh       makes copies of what they change, before each run.
    check       says whether what qimg made is right.
    other       replaces the real program as what qimg is compared with.
    wanted      the aim, as text. `by_cpu`: CPU seconds are compared, not the clock's.
    full_only   not in the quick run.
    """

    name: str
    words: tuple[str, ...]
    wanted: str = "-"
    target: str | None = None
    before: Callable[[], None] | None = None
    fresh: Callable[[], None] | None = None
    check: Callable[[], bool] | None = None
    other: tuple[str, ...] | None = None
    by_cpu: bool = False
    full_only: bool = False
    rounds_factor: int = 1


@dataclass
class Row:
    """Measurements of one job."""

    job: Job
    real: list[Cost] = field(default_factory=list)
    ours: list[Cost] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of the targets: real, ours
    right: bool = True

    def ratio(self) -> float:
        """How many times as fast qimg is: the median over the pairs."""
        pairs = zip(self.real, self.ours, strict=True)
        if self.job.by_cpu:
            return statistics.median(real.cpu / ours.cpu for real, ours in pairs)
        return statistics.median(real.wall / ours.wall for real, ours in pairs)

    def size_ratio(self) -> float | None:
        """The space of qimg's target over that of the real program's."""
        return self.sizes[1] / self.sizes[0] if len(self.sizes) == 2 and self.sizes[0] else None


def run(words: list[str], folder: Path) -> tuple[int, Cost]:
    """Exit code and cost of a process."""
    # Nothing of the caller's Python settings: an installed program runs from compiled modules.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with open(os.devnull, "wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    return process.returncode, cost


class Workshop:
    """The folder with the inputs, and both programs."""

    def __init__(self, folder: Path, content: int, *, quick: bool) -> None:
        """`content` bytes of real files."""
        self.folder = folder
        self.content = content
        self.quick = quick
        self.real = shutil.which("qemu-img") or sys.exit("bench: needs the real qemu-img (qemu-utils)")
        self.ours = [sys.executable, str(ROOT / "bin" / "qimg")]
        folder.mkdir(parents=True, exist_ok=True)

    # -- inputs: names carry the sizes, so runs of different sizes share a folder

    @property
    def raw(self) -> str:
        """The disk of real files."""
        return f"real-{self.content // MIB}.raw"

    def real_files(self) -> None:
        """Make it."""
        self.make(self.raw, lambda path: realdisk.build(path, self.content * 5 // 4, self.content))

    def named(self, ending: str) -> str:
        """The name of an input made from it."""
        return f"real-{self.content // MIB}{ending}"

    def convert(self, name: str, *words: str) -> None:
        """Make the input `name` from it by a convert with `words` of the real program."""
        self.real_files()
        self.make(name, lambda path: self.qemu_img("convert", "-f", "raw", *words, self.raw, path.name))

    def make(self, name: str, build: Callable[[Path], object]) -> None:
        """Build a file under a temporary name, so that an interrupted run leaves no half input; warm it."""
        path = self.folder / name
        if not path.exists():
            print(f"making {name} ...", file=sys.stderr, flush=True)
            new = path.with_name("new-" + name)
            new.unlink(missing_ok=True)
            build(new)
            new.rename(path)
        self.warm(name)

    def qemu_img(self, *words: str) -> None:
        """The real program, for inputs."""
        subprocess.run([self.real, *words], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def qemu_io(self, name: str, kind: str, writes: list[tuple[int, int, int]]) -> None:
        """The real program writes patterns: (offset, length, byte)."""
        commands = [f"write -q -P {byte} {start} {size}" for start, size, byte in writes]
        subprocess.run(
            ["qemu-io", "-f", kind, name],
            cwd=self.folder,
            check=True,
            input="\n".join(commands),
            text=True,
            stdout=subprocess.DEVNULL,
        )

    def warm(self, name: str) -> None:
        """Read the data of a file once, so that all runs find it in memory."""
        with (self.folder / name).open("rb", buffering=0) as file:
            at, end = 0, os.fstat(file.fileno()).st_size
            while at < end:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    return
                at += len(os.pread(file.fileno(), 4 * MIB, at)) or 1

    def copy(self, source: str, target: str) -> None:
        """A copy that is on disk and in memory."""
        subprocess.run(["cp", "--sparse=always", source, target], cwd=self.folder, check=True)
        if not self.quick:
            subprocess.run(["sync", target], cwd=self.folder, check=True)
        self.warm(target)

    # -- results

    def same(self, target: str, source: str, source_kind: str, kind: str) -> bool:
        """The real program finds source and target identical, and the target's tables sound."""
        right = self.ask("compare", "-f", source_kind, "-F", kind, source, target)
        return right and (kind not in CHECKED or self.ask("check", "-f", kind, target))

    def ask(self, *words: str) -> bool:
        """Whether the real program agrees."""
        run = subprocess.run(
            [self.real, *words], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            print(f"WRONG: qemu-img {' '.join(words)}: {run.stdout}{run.stderr}", file=sys.stderr)
        return run.returncode == 0

    # -- measuring

    def measure(self, job: Job, rounds: int) -> Row:
        """Run a job's pairs; the two take turns in being first, which on some machines costs time: memory
        that was just freed may have to come back from the host."""
        if job.before is not None:
            job.before()
        row = Row(job)
        real = list(job.other) if job.other is not None else [self.real, *job.words]
        both = ((real, row.real), ([*self.ours, *job.words], row.ours))
        if not self.quick:  # first runs compile modules and fill caches
            for words, _ in both:
                self._clear(job)
                run(words, self.folder)
        for turn in range(rounds * (1 if self.quick else job.rounds_factor)):
            for words, costs in both[:: -1 if turn % 2 else 1]:
                self._clear(job)
                code, cost = run(words, self.folder)
                costs.append(cost)
                if code != 0:
                    print(f"WRONG: exit {code}: {' '.join(words)}", file=sys.stderr)
                    row.right = False
                if turn == 0:
                    self._look(row, ours=costs is row.ours)
        for name in (job.target, *WORK):
            if name is not None:
                (self.folder / name).unlink(missing_ok=True)
        return row

    def _clear(self, job: Job) -> None:
        """As it was before the first run."""
        if job.target is not None:
            (self.folder / job.target).unlink(missing_ok=True)
            if not self.quick:
                os.sync()  # nobody pays for what the one before left to write
        if job.fresh is not None:
            job.fresh()

    def _look(self, row: Row, *, ours: bool) -> None:
        """How large the result is, and whether it is right."""
        target = row.job.target
        if target is not None and (self.folder / target).exists():
            row.sizes.append((self.folder / target).stat().st_blocks * 512)
        if ours and row.job.check is not None:
            row.right = row.job.check() and row.right
