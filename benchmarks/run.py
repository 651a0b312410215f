"""qimg beside the real qemu-img, in pairs (A B B A ...) of one run on one machine.

    ./dev bench                               the full run: 1 GiB of real files, a 1 TiB image; some minutes
    ./dev bench --quick                       small inputs, one round; shows that it works, measures little
    ./dev bench --only check --rounds 9       the jobs whose name contains "check"
    ./dev bench --update docs/performance.md  also write the table into the document

What a row says: wall seconds, CPU seconds and peak memory are medians over the rounds; "times as fast" is the
median of the ratios of the pairs (above 1: qimg is faster), so a slow moment of the machine that hits a whole
pair does not count. Every result is checked with the real program: `compare` against the source, `check`
where the result has tables. Inputs are made once, in .cache/bench (``--dir``); their pages are warm in every
run. The exit code says whether the results were right; it judges no times.
"""

from __future__ import annotations

import argparse
import os
import platform
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
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"


@dataclass(frozen=True)
class Cost:
    """What one run of a program cost: seconds, seconds, bytes."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Job:
    """One row. `words` are what follows the program's name; `target` is the file that they make.

    `check` says whether the result is right (it gets the target made by qimg). `other` replaces the real
    program as what qimg is compared with. `wanted` is the aim, as text.
    """

    name: str
    words: tuple[str, ...]
    wanted: str
    target: str | None = None
    check: Callable[[Path], bool] | None = None
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
    size_ratio: float | None = None
    right: bool = True

    def ratio(self) -> float:
        """How many times as fast qimg is: the median over the pairs."""
        pairs = zip(self.real, self.ours, strict=True)
        if self.job.by_cpu:
            return statistics.median(real.cpu / ours.cpu for real, ours in pairs)
        return statistics.median(real.wall / ours.wall for real, ours in pairs)


def run(words: list[str], folder: Path, output: Path | None = None) -> tuple[int, Cost]:
    """Exit code and cost of a process."""
    # Nothing of the caller's Python settings: an installed program runs from compiled modules.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with open(output or os.devnull, "wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    return process.returncode, cost


class Bench:
    """Inputs, programs and the loop."""

    def __init__(self, folder: Path, content: int, meta: str) -> None:
        self.folder = folder
        self.content = content
        self.meta = meta
        self.real = shutil.which("qemu-img") or sys.exit("bench: needs the real qemu-img (qemu-utils)")
        self.ours = [sys.executable, str(ROOT / "bin" / "qimg")]

    # -- inputs

    def prepare(self) -> None:
        """Make what is missing; names carry the sizes, so runs of different sizes share a folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.raw = f"real-{self.content // MIB}.raw"
        self.qcow2 = f"real-{self.content // MIB}.qcow2"
        self.big = f"metadata-{self.meta}.qcow2"
        self.make(self.raw, lambda path: realdisk.build(path, self.content * 5 // 4, self.content))
        self.make(self.qcow2, lambda path: self.qemu_img("convert", "-O", "qcow2", self.raw, path.name))
        options = ("-f", "qcow2", "-o", "preallocation=metadata")
        self.make(self.big, lambda path: self.qemu_img("create", *options, path.name, self.meta))
        self.make("small.qcow2", lambda path: self.qemu_img("create", "-f", "qcow2", path.name, "1G"))
        for name in (self.raw, self.qcow2, self.big):
            self.warm(self.folder / name)

    def make(self, name: str, build: Callable[[Path], object]) -> None:
        """Build a file under a temporary name, so that an interrupted run leaves no half input."""
        path = self.folder / name
        if path.exists():
            return
        print(f"making {name} ...", file=sys.stderr, flush=True)
        new = path.with_name("new-" + name)
        new.unlink(missing_ok=True)
        build(new)
        new.rename(path)

    def qemu_img(self, *words: str) -> None:
        """The real program, for inputs."""
        subprocess.run([self.real, *words], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def warm(self, path: Path) -> None:
        """Read the data of a file once, so that all runs find it in memory."""
        with path.open("rb", buffering=0) as file:
            at, end = 0, os.fstat(file.fileno()).st_size
            while at < end:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    return
                at += len(os.pread(file.fileno(), 4 * MIB, at)) or 1

    # -- results

    def same(self, target: Path, source: str, *formats: str) -> bool:
        """The real program finds source and target identical, and the target's tables sound."""
        chosen = ("-f", formats[0], "-F", formats[1])
        right = self.ask("compare", *chosen, source, target.name)
        if formats[1] == "qcow2":
            right = right and self.ask("check", "-f", "qcow2", target.name)
        return right

    def ask(self, *words: str) -> bool:
        """Whether the real program agrees."""
        run = subprocess.run(
            [self.real, *words], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            print(f"WRONG: qemu-img {' '.join(words)}: {run.stdout}{run.stderr}", file=sys.stderr)
        return run.returncode == 0

    def jobs(self) -> list[Job]:
        """All rows."""
        raw, qcow2, big = self.raw, self.qcow2, self.big

        def convert(
            name: str,
            source: str,
            kinds: tuple[str, str],
            *more: str,
            wanted: str = "1",
            full_only: bool = False,
        ) -> Job:
            target = "target." + kinds[1]
            words = ("convert", *more, "-f", kinds[0], "-O", kinds[1], source, target)
            return Job(
                name,
                words,
                wanted,
                target,
                lambda path: self.same(path, source, *kinds),
                full_only=full_only,
            )

        zstd = ("-c", "-o", "compression_type=zstd")
        return [
            convert("convert raw to raw", raw, ("raw", "raw")),
            convert("convert raw to qcow2", raw, ("raw", "qcow2")),
            convert("convert qcow2 to raw", qcow2, ("qcow2", "raw")),
            convert("convert qcow2 to qcow2", qcow2, ("qcow2", "qcow2")),
            convert("convert -c raw to qcow2", raw, ("raw", "qcow2"), "-c", wanted="5, size 1.06"),
            convert("convert -c raw to qcow2, zstd", raw, ("raw", "qcow2"), *zstd, wanted="-"),
            convert(
                f"convert {self.meta} empty qcow2 with full metadata",
                big,
                ("qcow2", "qcow2"),
                wanted="memory 200 MiB",
                full_only=True,
            ),
            Job("compare raw with qcow2", ("compare", raw, qcow2), "-"),
            Job(f"check {self.meta} with full metadata", ("check", big), "2"),
            Job("map --output=json qcow2", ("map", "--output=json", qcow2), "-"),
            Job("info of a small qcow2", ("info", "small.qcow2"), "-", rounds_factor=4),
            Job(
                "info of a small qcow2 / bare python -c pass, CPU",
                ("info", "small.qcow2"),
                "0.4 (1 / 2.5)",
                other=(sys.executable, "-c", "pass"),
                by_cpu=True,
                rounds_factor=8,
            ),
        ]

    def measure(self, job: Job, rounds: int) -> Row:
        """Run a job's pairs; the two take turns in being first, which on some machines costs time: memory
        that was just freed may have to come back from the host."""
        row = Row(job)
        real = list(job.other) if job.other is not None else [self.real, *job.words]
        sizes: list[int] = []
        both = ((real, row.real), ([*self.ours, *job.words], row.ours))
        if job.target is None or rounds > 1:  # first runs compile modules and fill caches
            for words, _ in both:
                run(words, self.folder)
        for turn in range(rounds * job.rounds_factor):
            for words, costs in both[:: -1 if turn % 2 else 1]:
                target = None if job.target is None else self.folder / job.target
                if target is not None:
                    target.unlink(missing_ok=True)
                    os.sync()  # nobody pays for what the one before left to write
                code, cost = run(words, self.folder)
                costs.append(cost)
                if code != 0:
                    print(f"WRONG: exit {code}: {' '.join(words)}", file=sys.stderr)
                    row.right = False
                if turn == 0 and target is not None and target.exists():
                    sizes.append(target.stat().st_blocks * 512)
                    if costs is row.ours and job.check is not None:
                        row.right = job.check(target) and row.right
        if len(sizes) == 2 and sizes[0]:
            row.size_ratio = sizes[1] / sizes[0]
        if job.target is not None:
            (self.folder / job.target).unlink(missing_ok=True)
        return row


HEAD = (
    "| job | qemu-img s | qimg s | times as fast | wanted | qemu-img CPU s | qimg CPU s "
    "| qemu-img MiB | qimg MiB | size | right |\n"
    "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|\n"
)


def line(row: Row) -> str:
    """A row of the table."""

    def median(costs: list[Cost], value: Callable[[Cost], float]) -> float:
        return statistics.median(value(cost) for cost in costs)

    cells = [row.job.name]
    cells += [f"{median(costs, lambda cost: cost.wall):.3f}" for costs in (row.real, row.ours)]
    cells += [f"{row.ratio():.2f}", row.job.wanted]
    cells += [f"{median(costs, lambda cost: cost.cpu):.3f}" for costs in (row.real, row.ours)]
    cells += [f"{median(costs, lambda cost: cost.memory) / MIB:.0f}" for costs in (row.real, row.ours)]
    cells += ["" if row.size_ratio is None else f"{row.size_ratio:.3f}", "yes" if row.right else "NO"]
    return "| " + " | ".join(cells) + " |\n"


def machine(bench: Bench, rounds: int) -> str:
    """Where the figures come from."""
    model = "unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for text in file:
            if text.startswith("model name"):
                model = text.partition(":")[2].strip()
                break
    version = subprocess.run([bench.real, "--version"], capture_output=True, text=True, check=True).stdout
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, {python}, "
        f"{version.splitlines()[0]}; {bench.content // MIB} MiB of real files, {rounds} pairs a job, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}.\n"
    )


def update(path: Path, text: str) -> None:
    """Put the table between its two marks."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        sys.exit(f"bench: {path} lacks {START} or {END}")
    path.write_text(f"{before}{START}\n{text}{END}{after}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, one round")
    parser.add_argument("--rounds", type=int, help="pairs a job (5; quick: 1)")
    parser.add_argument("--size", type=int, metavar="MIB", help="real files in the disk (1024; quick: 64)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name contains TEXT")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the inputs live")
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the table into this document")
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    options = arguments()
    rounds = options.rounds or (1 if options.quick else 5)
    size = options.size or (64 if options.quick else 1024)
    bench = Bench(options.dir.resolve(), size * MIB, "64G" if options.quick else "1T")
    bench.prepare()
    text = machine(bench, rounds) + "\n" + HEAD
    print(text, end="", flush=True)
    right = True
    for job in bench.jobs():
        if options.only not in job.name or (job.full_only and options.quick):
            continue
        row = bench.measure(job, rounds)
        right = right and row.right
        text += line(row)
        print(line(row), end="", flush=True)
    if options.update is not None:
        update(options.update, text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
