"""The same command lines through the real qemu-img and through qimg, in one folder of images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from support import release7
from support.run import Result, run_qimg_inprocess, run_real


class Difference(NamedTuple):
    """How qimg differs on purpose: `reason` names the number in docs/differences.md, or says what the real
    program does that nobody can want. What is None must be the same as the real program's."""

    reason: str
    code: int | None = None
    out: str | None = None
    err: str | None = None


def cases(*tables: str) -> list[str]:
    """The invocations of tables: one a line, remarks and empty lines left out, ``{a,b}`` is not expanded."""
    lines = [line.strip() for table in tables for line in table.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def as_release_7(line: str, ours: Result) -> Result:
    """What qimg showed, in the layout of the real program at hand."""
    out = ours.out
    command = line.split()[0]
    if command == "info":
        out = release7.info_json(out) if out.startswith(("{", "[")) else release7.info_human(out)
    elif command == "map":
        out = release7.map_json(out)
    elif line.startswith("snapshot -l"):
        out = release7.snapshot_table(out)
    return Result(ours.code, out, release7.errors(ours.err))


def assert_same(line: str, folder: Path, different: dict[str, Difference] | None = None) -> None:
    """Both programs answer `line` with the same exit code, output and messages, or as `different` says."""
    words = shlex.split(line)
    real = run_real(words, folder)
    ours = as_release_7(line, run_qimg_inprocess(words, folder))
    known = (different or {}).get(line)
    if known is None:
        assert ours == real
        return
    expected = Result(
        real.code if known.code is None else known.code,
        real.out if known.out is None else known.out,
        real.err if known.err is None else known.err,
    )
    assert ours == expected, known.reason
    assert ours != real, "no difference any more: take it from the list"
