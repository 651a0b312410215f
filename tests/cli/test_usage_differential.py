"""Wrong and odd command lines: qimg answers as the real qemu-img does, or the difference is listed here.

None of these reaches the contents of an image. Each line is one invocation, in shell syntax; the folder holds
``a.raw`` (1 MiB of zeros) and ``a.q`` (qcow2, 1 MiB).
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from cli.usage_lines import CASES
from support import peers, release7
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img")

HINT = "Try 'qemu-img --help' for more information\n"
NO_COMMAND = "options without a command: the real program ends silently with 0, which hides a mistake"
NOT_YET = "the format is not written yet, and the message says so"
SILENT = "the real program ends with 0 although it refuses the command line (decisions 6)"

#: Invocation -> why we differ, our exit code, our standard error.
DIFFERENT: dict[str, tuple[str, int, str]] = {
    "--": (NO_COMMAND, 1, f"qemu-img: Not enough arguments\n{HINT}"),
    "-Tz": (
        NO_COMMAND,
        1,
        f"qemu-img: warning: trace event 'z' does not exist\nqemu-img: Not enough arguments\n{HINT}",
    ),
    "compare --image-opts -F raw a.q a.q": (
        "the conflict is found before the first image is opened",
        2,
        "qemu-img: --image-opts and --format are mutually exclusive\n",
    ),
    "convert -n -O nosuch a.raw a.q": (
        "an unknown -O gets the same words with -n as without",
        1,
        "qemu-img: Unknown file format 'nosuch'\n",
    ),
    "convert -t foo missing b": (
        "cache modes are looked at before any image is opened",
        1,
        "qemu-img: Invalid cache option: foo\n",
    ),
    "convert -n --target-image-opts -O raw missing b": (
        "the conflict is found before the sources are opened",
        1,
        "qemu-img: --image-opts and --format are mutually exclusive\n",
    ),
    "measure -z": (SILENT, 1, "measure: invalid option -- 'z'\n"),
    "measure --size 1 -zU": (SILENT, 1, "measure: invalid option -- 'z'\n"),
    "measure -f": (SILENT, 1, "measure: option requires an argument -- 'f'\n"),
    "measure --output": (SILENT, 1, "measure: option '--output' requires an argument\n"),
    "measure --siz": (SILENT, 1, "measure: option '--size' requires an argument\n"),
    "measure --bogus=x": (SILENT, 1, "measure: unrecognized option '--bogus=x'\n"),
    "measure --image=1": (SILENT, 1, "measure: option '--image-opts' doesn't allow an argument\n"),
    "measure --o=x": (
        SILENT,
        1,
        "measure: option '--o=x' is ambiguous; possibilities: '--object' '--output'\n",
    ),
    "measure --=x": (
        SILENT,
        1,
        (
            "measure: option '--=x' is ambiguous; possibilities: '--help' '--image-opts' '--object'"
            " '--output' '--size' '--force-share'\n"
        ),
    ),
    "measure -q --size 1": (SILENT, 1, "measure: invalid option -- 'q'\n"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usage")
    run_real(["create", "-q", "-f", "raw", "a.raw", "1M"], folder).ok()
    run_real(["create", "-q", "-f", "qcow2", "a.q", "1M"], folder).ok()
    (folder / "patterns").write_text("nosuch\n# remark\n\n-other\n")
    return folder


def _clean(folder: Path) -> None:
    for name in os.listdir(folder):
        if name not in ("a.raw", "a.q", "patterns"):
            (folder / name).unlink()


def _compared(result: Result) -> tuple[int, str, str]:
    """Exit code, standard error, and what of standard output is not help, version or a list of events.

    The name by which the program was called is in few messages: the real one has its path there."""
    out = result.out
    if out.startswith("qemu-img version") and out.count("\n") == 2:
        out = "(version)"
    if "usage: qemu-img" in out:
        out = "(help)"
    if "Supported" in out and "options:" in out:
        out = out.splitlines()[0]
    return result.code, result.err.replace(f"'{peers.find('qemu-img')}'", "'qemu-img'"), out


@pytest.mark.parametrize("line", CASES)
def test_a_wrong_command_line_gets_the_same_answer(line: str, folder: Path) -> None:
    words = shlex.split(line)
    real = _compared(run_real(words, folder))
    _clean(folder)
    ours = _compared(run_qimg_inprocess(words, folder))
    _clean(folder)
    if line in DIFFERENT:
        reason, code, err = DIFFERENT[line]
        assert ours == (code, err, real[2]), reason
        assert ours != real, "no difference any more: take it from the list"
        return
    assert (ours[0], release7.errors(ours[1]), ours[2]) == real


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(CASES)


@pytest.mark.parametrize(
    "line", ["compare a.q -f", "compare a.q -U -z", "frobnicate -V", "create x -zf raw", "info -U -- -z"]
)
def test_posixly_correct_ends_options_at_the_first_operand(line: str, folder: Path) -> None:
    words = shlex.split(line)
    env = {"POSIXLY_CORRECT": "1"}
    real, ours = run_real(words, folder, env=env), run_qimg_inprocess(words, folder, env=env)
    assert (ours.code, ours.err) == (real.code, real.err)
