"""Conversions that are interrupted: by an error at every request, by a power cut, by a signal.

Afterwards the target does not claim to be whole: the real program refuses it, or a raw file is shorter than
the disk; or nothing was missing any more, and it is whole. The message is one line, the exit code 1.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.storage.base import Storage
from qimg.storage.fault import CHANGE, WRITE, FaultStorage, Rule
from qimg.storage.record import RESIZE, RecordStorage
from support.build import build, write_raw
from support.faults import opened_through
from support.run import Result, command, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: Name of a case -> words before the source, the source, whether `out` has an old image in it.
CASES: dict[str, tuple[list[str], str, bool]] = {
    "raw": ([], "mixed.raw", False),
    "raw over an old image": ([], "mixed.raw", True),
    "raw, every byte": (["-S", "0"], "mixed.raw", False),
    "raw, all data": ([], "full.raw", False),
    "raw, preallocated": (["-o", "preallocation=falloc"], "mixed.raw", False),
    "qcow2": (["-O", "qcow2"], "mixed.raw", False),
    "qcow2 over an old image": (["-O", "qcow2"], "mixed.raw", True),
    "qcow2, compressed": (["-O", "qcow2", "-c"], "mixed.raw", False),
    "qcow2, small clusters": (["-O", "qcow2", "-o", "cluster_size=512"], "full.raw", False),
    "qcow2, subclusters": (["-O", "qcow2", "-o", "extended_l2=on"], "mixed.raw", False),
    "qcow2, preallocated": (["-O", "qcow2", "-o", "preallocation=metadata"], "mixed.raw", False),
    "qcow2, version 2": (["-O", "qcow2", "-o", "compat=0.10"], "mixed.raw", False),
    "qcow2, data file": (["-O", "qcow2", "-o", "data_file=out.data"], "mixed.raw", False),
    "qcow2, raw data file": (
        ["-O", "qcow2", "-o", "data_file=out.data,data_file_raw=on"],
        "mixed.raw",
        False,
    ),
    "qcow2, backing file": (["-O", "qcow2", "-B", "base.raw", "-F", "raw"], "over.q", False),
    "qcow2, larger clusters over a backing file": (
        ["-O", "qcow2", "-B", "base.raw", "-F", "raw", "-o", "cluster_size=256k"],
        "over.q",
        False,
    ),
    "qcow2, compressed over a backing file": (
        ["-c", "-O", "qcow2", "-B", "base.raw", "-F", "raw"],
        "over.q",
        False,
    ),
    "qcow2, bitmaps": (["-O", "qcow2", "--bitmaps"], "marked.q", False),
}
SECTOR = 512
#: More requests than any case makes.
MANY = 400
LINE = re.compile(
    r"qemu-img: (error while writing at byte \d+: |out: error while (completing the image|converting \w+): )"
    r"(Could not [^:]*: )*(Input/output error|No space left on device)\n"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_raw(folder / "mixed.raw", "A0B--CC-")
    write_raw(folder / "full.raw", "ABC")
    write_raw(folder / "base.raw", "RR-R-RRR")
    build(folder / "over.q", "-O-0#-P-", backing="base.raw", backing_format="raw")
    build(folder / "marked.q", "A-B-")
    for name in ("b1", "b2"):
        run_real(["bitmap", "--add", "marked.q", name], folder).ok()
    build(folder / "old.q", "ZZZZZZZZ")
    return folder


@pytest.fixture
def place(tmp_path: Path, sources: Path) -> Path:
    for entry in os.scandir(sources):
        os.link(entry.path, tmp_path / entry.name)
    return tmp_path


class Faults(FaultStorage):
    """Faults in which a sector is written whole or not at all, as disks do it."""

    def write(self, buf: bytes | bytearray | memoryview, offset: int) -> None:
        if len(buf) > SECTOR:
            super().write(buf, offset)
        else:
            self._pass(WRITE, offset)
            self.child.write(buf, offset)


def _failing(rule: Rule, made: list[FaultStorage]) -> Callable[[Storage], Storage]:
    """What puts this fault on top of a file; `made` gets the filters."""

    def wrap(file: Storage) -> Storage:
        made.append(Faults(file, [rule]))
        return made[-1]

    return wrap


class Record(RecordStorage):
    """Remembers also that an old image was cut to nothing."""

    def start_new(self, values: dict[str, object], context: Context) -> None:
        super().start_new(values, context)  # type: ignore[arg-type]
        self._record(RESIZE, 0, 0)


class Case:
    """One conversion in a folder, to be run again and again."""

    def __init__(self, name: str, folder: Path) -> None:
        self.words, self.source, self._old = CASES[name]
        self.folder = folder
        self.out = folder / "out"
        self.format = "qcow2" if "qcow2" in self.words else "raw"
        self.size = 512 * 1024 if self.source != "full.raw" else 192 * 1024
        if self.source == "marked.q":
            self.size = 256 * 1024

    def prepare(self) -> None:
        for name in ("out", "out.data"):
            (self.folder / name).unlink(missing_ok=True)
        if self._old:
            self.out.write_bytes((self.folder / "old.q").read_bytes())

    def run(self, rule: Rule) -> tuple[Result, list[FaultStorage]]:
        """Convert with this fault in each file of the target."""
        self.prepare()
        made: list[FaultStorage] = []
        with opened_through(_failing(rule, made), "out", "out.data"):
            shown = run_qimg_inprocess(["convert", *self.words, self.source, "out"], self.folder)
        return shown, made

    def state(self) -> str:
        """What the target is: refused, short, whole, or what is wrong with it."""
        if not self.out.exists():
            return "refused"
        if self.format == "raw" and self.out.stat().st_size < self.size:
            return "short"
        formats = ["-f", "raw" if self.source.endswith(".raw") else "qcow2", "-F", self.format]
        if self.format == "qcow2":
            checked = run_real(["check", "-f", "qcow2", "out"], self.folder)
            if checked.code == 1 and (
                "incomplete image" in checked.err or "not in qcow2 format" in checked.err
            ):
                return "refused"
            if checked.code:
                return f"check: {checked.code} {checked.out}{checked.err}"
        compared = run_real(["compare", *formats, self.source, "out"], self.folder)
        return f"compare: {compared.out}{compared.err}" if compared.code else "whole"

    def assert_honest(self, context: str) -> str:
        state = self.state()
        assert state in ("refused", "short", "whole"), f"{context}: {state}"
        return state


FAULTS = {
    "an error": lambda nth: Rule(CHANGE, nth),
    "a full disk": lambda nth: Rule(CHANGE, nth, errno.ENOSPC),
    "a power cut": lambda nth: Rule(CHANGE, nth, power_cut=True),
    "a torn write": lambda nth: Rule(CHANGE, nth, power_cut=True, torn=True),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CASES)
def test_at_whatever_request_it_fails_nobody_takes_the_target_for_whole(
    name: str, fault: str, place: Path
) -> None:
    case = Case(name, place)
    for nth in range(1, MANY):
        shown, made = case.run(FAULTS[fault](nth))
        if not any(file.counts.get(CHANGE, 0) >= nth for file in made):
            break
        context = f"{fault} at change {nth}: {shown}"
        state = case.assert_honest(context)
        if shown.code == 0:
            # What failed was a favour: giving space back, for example.
            assert state == "whole", context
            continue
        assert (shown.code, shown.out) == (1, ""), context
        assert LINE.fullmatch(shown.err), context
    else:
        pytest.fail("it never came through")
    assert shown.code == 0
    assert case.state() == "whole"
    assert nth > 2


@pytest.mark.parametrize(
    "name", ["raw", "qcow2", "qcow2, compressed", "qcow2, backing file", "qcow2 over an old image"]
)
def test_an_image_is_whole_only_when_all_of_it_is_durable(name: str, place: Path) -> None:
    """Power is cut after every request, and takes with it what no barrier had made durable."""
    case = Case(name, place)
    case.prepare()
    old = case.out.read_bytes() if case.out.exists() else None
    made: list[Record] = []

    def wrap(file: Storage) -> Storage:
        made.append(Record(file))
        return made[-1]

    with opened_through(wrap, "out"):
        run_qimg_inprocess(["convert", "-t", "writeback", *case.words, case.source, "out"], place).ok()
    (file,) = made
    states = set()
    for prefix in range(len(file.events) + 1):
        unsafe = file.unsafe(prefix)
        for lost in ([], unsafe, unsafe[:-1], unsafe[1:], unsafe[::2]):
            left = file.replay(prefix, lost)
            content = bytes(left.read(0, left.size))
            if content == old:
                continue  # nothing has happened
            case.out.write_bytes(content)
            states.add(case.assert_honest(f"after {prefix} of {len(file.events)} requests without {lost}"))
    assert "whole" in states
    assert len(states) > 1


@pytest.mark.parametrize("more", [[], ["-S", "0"], ["-m", "1"], ["--target-is-zero"]], ids=" ".join)
def test_a_failing_write_into_an_existing_file_is_told(more: list[str], place: Path) -> None:
    old = b"\xee" * (600 * 1024)
    target = place / "there"
    for nth in range(1, MANY):
        target.write_bytes(old)
        made: list[FaultStorage] = []
        with opened_through(_failing(Rule(CHANGE, nth), made), "there"):
            shown = run_qimg_inprocess(["convert", "-n", *more, "mixed.raw", "there"], place)
        assert target.stat().st_size == len(old)
        assert target.read_bytes()[512 * 1024 :] == old[512 * 1024 :], "what lies behind the copy stays"
        if made[0].counts.get(CHANGE, 0) < nth:
            break
        assert shown.code == 1, nth
        assert re.fullmatch(
            r"qemu-img: (error while writing at byte \d+|there: error while completing the image):"
            r" Input/output error\n",
            shown.err,
        )
    assert shown.code == 0
    if "--target-is-zero" not in more:
        assert target.read_bytes()[: 512 * 1024] == (place / "mixed.raw").read_bytes()


@pytest.mark.parametrize("name", ["raw", "qcow2", "qcow2, compressed"])
def test_many_workers_stop_at_the_first_error(name: str, place: Path) -> None:
    """With a source that is large enough for several threads."""
    write_raw(place / "big.raw", "ABCDEFG-" * 32)  # 16 MiB
    case = Case(name, place)
    case.source, case.size = "big.raw", 16 << 20
    for nth in (1, 2, 3, 5, 9, 20):
        shown, made = case.run(Rule(CHANGE, nth))
        if made[0].counts[CHANGE] < nth:
            assert shown.code == 0
            break
        assert shown.code == 1
        assert LINE.fullmatch(shown.err), shown
        assert case.state() in ("refused", "short")


# -- signals


def _until_it_writes(process: subprocess.Popen[bytes], out: Path) -> None:
    for _ in range(1000):
        if out.exists() and out.stat().st_size > (1 << 20):
            return
        assert process.poll() is None, "ended early"
        time.sleep(0.01)
    raise AssertionError("nothing was written")


@pytest.fixture
def noise(place: Path) -> Iterator[Path]:
    path = place / "noise.raw"
    path.write_bytes(os.urandom(8 << 20))
    build(place / "noise.q", "", size=8 << 20, backing="noise.raw", backing_format="raw")
    yield path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "name", ["raw", "raw, every byte", "qcow2", "qcow2, compressed", "qcow2 over an old image"]
)
def test_a_killed_conversion_leaves_no_whole_image(
    name: str, number: signal.Signals, place: Path, noise: Path
) -> None:
    case = Case(name, place)
    case.source, case.size = "noise.raw", 8 << 20
    case.prepare()
    # At this rate it takes seconds.
    words = ["convert", "-r", "1M", *case.words, "noise.raw", "out"]
    process = subprocess.Popen([*command(), *words], cwd=place, stderr=subprocess.PIPE)
    try:
        _until_it_writes(process, case.out)
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == -number
    assert err == b""
    assert case.state() in ("refused", "short")
