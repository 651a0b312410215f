"""qimg beside the real qemu-img, in pairs (A B B A ...) of one run on one machine.

    ./dev bench                               the full run: 1 GiB of real files, a 1 TiB image; many minutes
    ./dev bench --quick                       small inputs, one round; shows that it works, measures little
    ./dev bench --list                        the names of the jobs
    ./dev bench --only check --only vmdk --rounds 9    the jobs whose name contains "check" or "vmdk"
    ./dev bench --update docs/performance.md  also write the table into the document

What a row says: wall seconds, CPU seconds and peak memory are medians over the rounds; "times as fast" is the
median of the ratios of the pairs (above 1: qimg is faster), so a slow moment of the machine that hits a whole
pair does not count. Every result is checked with the real program: `compare` against the source, `check`
where the result has tables. Inputs are made once, in .cache/bench (``--dir``), by the jobs that need them;
their pages are warm in every run. The exit code says whether the results were right; it judges no times.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import convert
import encrypted
import inplace
import remote
import tables
from bench import MIB, ROOT, Cost, Job, Row, Workshop

START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
HEAD = (
    "| job | qemu-img s | qimg s | times as fast | wanted | qemu-img CPU s | qimg CPU s "
    "| qemu-img MiB | qimg MiB | size | right |\n"
    "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|\n"
)


def line(row: Row) -> str:
    """A row of the table."""

    def median(costs: list[Cost], value: Callable[[Cost], float]) -> float:
        return statistics.median(value(cost) for cost in costs)

    size = row.size_ratio()
    cells = [row.job.name]
    cells += [f"{median(costs, lambda cost: cost.wall):.3f}" for costs in (row.real, row.ours)]
    cells += [f"{row.ratio():.2f}", row.job.wanted]
    cells += [f"{median(costs, lambda cost: cost.cpu):.3f}" for costs in (row.real, row.ours)]
    cells += [f"{median(costs, lambda cost: cost.memory) / MIB:.0f}" for costs in (row.real, row.ours)]
    cells += ["" if size is None else f"{size:.3f}", "yes" if row.right else "NO"]
    return "| " + " | ".join(cells) + " |\n"


def machine(shop: Workshop, rounds: int) -> str:
    """Where the figures come from."""
    model = "unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for text in file:
            if text.startswith("model name"):
                model = text.partition(":")[2].strip()
                break
    version = subprocess.run([shop.real, "--version"], capture_output=True, text=True, check=True).stdout
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, {python}, "
        f"{version.splitlines()[0]}; {shop.content // MIB} MiB of real files, {rounds} pairs a job, "
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
    parser.add_argument("--size", type=int, metavar="MIB", help="real files in the disk (1024; quick: 32)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only jobs whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the names of the jobs")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the inputs live")
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the table into this document")
    return parser.parse_args()


def jobs(shop: Workshop, only: list[str] | None) -> list[Job]:
    """The chosen ones."""
    found = [
        *convert.jobs(shop),
        *tables.jobs(shop),
        *inplace.jobs(shop),
        *encrypted.jobs(shop),
        *remote.jobs(shop),
    ]
    found = [job for job in found if not (job.full_only and shop.quick)]
    return [job for job in found if only is None or any(text in job.name for text in only)]


def main() -> int:
    """Measure and print."""
    options = arguments()
    rounds = options.rounds or (1 if options.quick else 5)
    size = options.size or (32 if options.quick else 1024)
    shop = Workshop(options.dir.resolve(), size * MIB, quick=options.quick)
    chosen = jobs(shop, options.only)
    if options.list:
        print("\n".join(job.name for job in chosen))
        return 0
    text = machine(shop, rounds) + "\n" + HEAD
    print(text, end="", flush=True)
    right = True
    for job in chosen:
        row = shop.measure(job, rounds)
        right = right and row.right
        text += line(row)
        print(line(row), end="", flush=True)
    if options.update is not None:
        update(options.update, text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
