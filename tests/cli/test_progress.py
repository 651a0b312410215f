"""Progress: which records are written, and the report on SIGUSR1 (common sheet, section 13)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qimg.cli.console import Console
from qimg.cli.progressbar import ProgressBar
from support.run import command, run_qimg_inprocess, run_real

MIB = 1 << 20


class Recorder(Console):
    """A console that keeps what would be written."""

    def __init__(self) -> None:
        super().__init__("qimg")
        self.written = ""
        self.remarks: list[str] = []

    def out(self, text: str) -> None:
        self.written += text

    def remark(self, text: str) -> None:
        self.remarks.append(text)


@pytest.fixture
def console() -> Recorder:
    return Recorder()


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def shares(*values: float) -> str:
    return "".join(f"    ({value:.2f}/100%)\r" for value in values)


def test_a_record_is_due_when_the_share_has_grown_by_more_than_one_percent(console: Recorder) -> None:
    bar = ProgressBar(console, shown=True)
    bar.start()
    for done in (0, 5, 10, 11, 20, 21, 22, 500, 500, 1000, 1000):
        bar.update(done, 1000)
    bar.complete()
    bar.finish()
    assert console.written == shares(0, 1.1, 2.2, 50, 100, 100) + "\n"


def test_compare_writes_fewer_records(console: Recorder) -> None:
    bar = ProgressBar(console, shown=True, step=2.0)
    for done in (0, 11, 20, 21, 1000):
        bar.update(done, 1000)
    assert console.written == shares(0, 2.1, 100)


@pytest.mark.peer("qemu-img")
def test_the_real_compare_shows_no_step_of_one_and_a_half_percent_either(work: Path) -> None:
    """64 requests of 2 MiB: 1.5625 percent each, which the real convert does show."""
    write(work / "a.raw", mib=128)
    (work / "b.raw").symlink_to("a.raw")
    for run in (run_real, run_qimg_inprocess):
        assert "(1.56/100%)" not in run(["compare", "-p", "a.raw", "b.raw"], work).ok().out
    assert "(1.56/100%)" in run_real(["convert", "-p", "a.raw", "c.raw"], work).ok().out


def test_no_work_at_all_goes_from_0_to_100(console: Recorder) -> None:
    bar = ProgressBar(console, shown=True)
    bar.start()
    bar.update(0, 0)
    bar.complete()
    bar.finish()
    assert console.written == shares(0, 100) + "\n"


def test_the_newline_comes_after_a_failure_too(console: Recorder) -> None:
    bar = ProgressBar(console, shown=True)
    bar.finish()
    assert console.written == "\n"


def test_without_p_nothing_is_written_until_a_signal_asks(console: Recorder) -> None:
    bar = ProgressBar(console, shown=False)
    bar.start()
    bar.update(310, 1000)
    os.kill(os.getpid(), signal.SIGUSR1)
    bar.update(315, 1000)
    bar.update(900, 1000)
    bar.finish()
    assert (console.written, console.remarks) == ("", ["    (31.00/100%)"])


def test_with_p_the_signal_is_ignored(console: Recorder) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    bar = ProgressBar(console, shown=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    bar.update(500, 1000)
    assert console.remarks == []


def write(path: Path, *, mib: int) -> None:
    path.write_bytes(b"data" * (mib * MIB // 4))


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "words",
    [
        ["compare", "-p", "one.raw", "same.raw"],
        ["compare", "-p", "-s", "one.raw", "longer.raw"],
        ["compare", "-p", "empty.raw", "empty.raw"],
        ["compare", "-p", "missing.raw", "one.raw"],
        ["convert", "-p", "empty.raw", "new.raw"],
        ["convert", "-p", "missing.raw", "new.raw"],
        ["convert", "-p", "-q", "one.raw", "new.raw"],
    ],
)
def test_the_real_program_writes_the_same_records(words: list[str], work: Path) -> None:
    write(work / "one.raw", mib=1)
    write(work / "same.raw", mib=1)
    write(work / "longer.raw", mib=2)
    (work / "empty.raw").touch()
    real, ours = run_real(words, work), run_qimg_inprocess(words, work)
    assert ours == real


@pytest.mark.peer("qemu-img")
def test_a_convert_begins_with_0_ends_with_100_twice_and_grows(work: Path) -> None:
    write(work / "a.raw", mib=20)
    for run in (run_real, run_qimg_inprocess):
        out = run(["convert", "-p", "-O", "qcow2", "a.raw", "b.qcow2"], work).ok().out
        assert out.startswith(shares(0))
        assert out.endswith(shares(100, 100) + "\n")
        values = [float(record[5:].partition("/")[0]) for record in out.split("\r")[:-1]]
        assert values == sorted(values)


def _running(work: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*command(), *words], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _when(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_a_running_convert_reports_to_stderr_on_sigusr1(work: Path) -> None:
    write(work / "a.raw", mib=16)
    process = _running(work, "convert", "-q", "-r", "8M", "a.raw", "b.raw")
    _when((work / "b.raw").exists)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"")
    assert err.startswith(b"    (")
    assert err.endswith(b"/100%)\n")
    assert err.count(b"\n") == 1


def test_an_interrupt_ends_the_process_at_once_without_a_word(work: Path) -> None:
    write(work / "a.raw", mib=16)
    process = _running(work, "convert", "-r", "1M", "a.raw", "b.raw")
    _when((work / "b.raw").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")
    assert (work / "b.raw").exists()
