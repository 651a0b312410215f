"""Signals while a command changes an image (common sheet, sections 3 and 13).

SIGINT and SIGTERM end the process as they end the real program: by the signal, without a word. The image then
has leaks at most, every part of it reads as before or as afterwards, nothing else is left behind, and the
command can be run again. SIGUSR1 changes nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support import peers
from support.build import build, io, real_content, write_raw
from support.run import command, run_real, start

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

CLUSTER = 4096
MIB = 1 << 20

#: Runs the command line in its arguments; the nth change of a file, in whatever thread, sends it the signal.
DRIVER = """
import os, sys, threading
from qimg.storage import registry
from qimg.storage.fault import CHANGE, FaultStorage

number, nth, *words = sys.argv[1:]
kind = registry.get("file")
guard = threading.Lock()
left = int(nth)

class Struck(FaultStorage):
    def _count(self, operation):
        global left
        if operation in ("write", "zero", "flush", "resize", "discard"):
            with guard:
                left -= 1
                if not left:
                    os.kill(os.getpid(), int(number))
        return super()._count(operation)

class Wrapped(kind):
    @classmethod
    def from_options(cls, values, **more):
        opened = kind.from_options(values, **more)
        return Struck(opened, []) if opened.writable else opened

registry._loaded["file"] = Wrapped
sys.argv = ["qemu-img", *words]
from qimg.cli.main import main
sys.exit(main())
"""


class Case(NamedTuple):
    """A command line, the images that it changes, and what it leaves that was not there."""

    words: str
    changed: tuple[str, ...]
    made: tuple[str, ...] = ()


CASES = [
    Case("amend -o refcount_bits=64 a.q", ("a.q",)),
    Case("amend -o compat=0.10 plain.q", ("plain.q",)),
    Case("bench -w -c 300 -s 2048 -S 8192 --flush-interval=100 a.q", ("a.q",)),
    Case("bench -w -c 300 -s 2048 -S 8192 -d 1 ov.q", ("ov.q",)),
    Case("bitmap --add a.q new", ("a.q",)),
    Case("bitmap --merge one a.q off", ("a.q",)),
    Case("check -q -r all leaky.q", ("leaky.q",)),
    Case("commit ov.q", ("ov.q", "a.q")),
    Case("commit -d over.q", ("over.q", "r.raw")),
    Case("convert -n -O qcow2 r.raw a.q", ("a.q",)),
    Case("dd -O qcow2 bs=64k if=a.q of=new.q", (), ("new.q",)),
    Case("dd bs=64k if=a.q of=new.raw", (), ("new.raw",)),
    Case("rebase -b b.q -F qcow2 ov.q", ("ov.q",)),
    Case("rebase -b '' ov.q", ("ov.q",)),
    Case("resize a.q 40M", ("a.q",)),
    Case("resize b.q 40M", ("b.q",)),
    Case("resize --shrink plain.q 300k", ("plain.q",)),
    Case("snapshot -c new a.q", ("a.q",)),
    Case("snapshot -a snap plain.q", ("plain.q",)),
    Case("snapshot -d snap a.q", ("a.q",)),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of small clusters, so that there is much to do in them; to be copied."""
    folder = tmp_path_factory.mktemp("signals")
    for name in ("a.q", "b.q", "plain.q"):
        build(folder / name, "AB-c0#-DD-" * 20, cluster=CLUSTER)
        run_real(["snapshot", "-c", "snap", name], folder).ok()
        io(folder / name, [f"write -q -P {len(name)} 100k 300k"])
    for name, more in (("one", ()), ("off", ("--disable",))):
        run_real(["bitmap", "--add", *more, "a.q", name], folder).ok()
    io(folder / "a.q", ["write -q -P 9 400k 300k"])
    build(folder / "ov.q", "EEE-" * 50, cluster=CLUSTER, backing="a.q", size=200 * CLUSTER)
    write_raw(folder / "r.raw", "RS-T" * 3)
    over = folder / "over.q"
    build(over, "-FF--GG-" * 24, cluster=CLUSTER, backing="r.raw", backing_format="raw", size=12 << 16)
    build(folder / "large.q", "", size=16 * MIB, backing="r.raw", backing_format="raw")
    io(folder / "large.q", ["write -q -P 3 0 16M"])
    build(folder / "room.q", "", size=16 * MIB)
    build(folder / "leaky.q", "AABB" * 25, cluster=CLUSTER)
    data = bytearray((folder / "leaky.q").read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    data[l2 : l2 + 400] = bytes(400)  # 50 entries
    (folder / "leaky.q").write_bytes(data)
    assert run_real(["check", "-q", "leaky.q"], folder).code == 3
    return folder


@pytest.fixture
def folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    copy(images, tmp_path)
    return tmp_path


def copy(images: Path, folder: Path) -> None:
    for entry in os.scandir(images):
        shutil.copyfile(entry.path, folder / entry.name)


def contents(names: tuple[str, ...]) -> dict[str, bytes]:
    """What a guest reads of images."""
    return {name: content(name) for name in names}


def content(name: str) -> bytes:
    return real_content(Path(name), format="raw" if name.endswith(".raw") else "qcow2")


def struck(words: str, number: int, nth: int) -> subprocess.CompletedProcess[bytes]:
    """Our command, which gets the signal at its nth change; its return code, negative where it died of it."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(int(number)), str(nth), *shlex.split(words)],
        capture_output=True,
        timeout=60,
        check=False,
    )


def moments() -> Iterator[int]:
    """1, 2, 4, 8 ... the numbers of changes at which a command is struck."""
    nth = 1
    while True:
        yield nth
        nth *= 2


@pytest.mark.parametrize("case", CASES, ids=[case.words for case in CASES])
def test_whenever_the_signal_comes_the_image_is_sound_and_the_work_can_be_done_again(
    case: Case, folder: Path, images: Path
) -> None:
    before = contents(case.changed)
    assert struck(case.words, signal.SIGTERM, 10**9).returncode == 0
    after = contents(case.changed)
    died = 0
    for turn, nth in enumerate(moments()):
        copy(images, folder)
        for name in case.made:
            (folder / name).unlink(missing_ok=True)
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        done = struck(case.words, number, nth)
        told = [line for line in done.stderr.splitlines() if not line.startswith((b"Leaked ", b"Repairing "))]
        assert not told, done
        if done.returncode == 0:
            break
        assert done.returncode == -number, done
        died += 1
        assert_sound(case, before, after)
        assert {entry.name for entry in os.scandir(folder)} - set(case.made) == {
            entry.name for entry in os.scandir(images)
        }
        if turn % 3 == 0:
            again = struck(case.words, number, 10**9)
            if again.returncode:
                # What was done before the end came cannot be done twice; bitmaps that were in use then are
                # inconsistent, as with the real program.
                assert any(
                    word in again.stderr for word in (b"already exists", b"not found", b"inconsistent")
                )
                continue
            assert contents(case.changed) == after
    assert died > 0, "it has changed nothing"


def assert_sound(case: Case, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    for name in case.changed:
        if name.endswith(".q"):
            checked = run_real(["check", "-q", name])
            assert checked.code in (0, 3), checked
        now = content(name)
        assert len(now) in (len(before[name]), len(after[name]))
        if case.words.startswith("commit") and name == case.changed[0]:
            assert now in (before[name], after[name])  # all of it shows what it showed
        for at in range(0, len(now), 512):
            sector = now[at : at + 512]
            assert sector in (before[name][at : at + 512], after[name][at : at + 512]), (name, at)
    for name in case.made:
        made = Path(name)
        if made.exists() and name.endswith(".q"):
            refused = run_real(["map", "-f", "qcow2", name])
            assert refused.code == 1
        elif made.exists():
            assert made.stat().st_size < len(real_content(Path("a.q"), format="qcow2"))


def newest() -> int:
    return max(entry.stat().st_mtime_ns for entry in os.scandir())


def wait_until_it_works(process: subprocess.Popen[bytes], since: int, *, writes: bool = True) -> None:
    """Until a file of this folder is newer than `since`; a second where it writes none."""
    for _ in range(1000 if writes else 50):
        assert process.poll() is None, "ended early"
        if newest() > since:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    assert process.poll() is None, "ended early"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "words",
    [
        "commit -r 50k large.q",
        "convert -n -r 50k -O qcow2 large.q room.q",
        "bench -w -c 2000000000 -s 512 -S 4096 a.q",
        "bench -w -d 1 -c 2000000000 -s 512 -S 4096 ov.q",
        "bench -c 2000000000 a.q",
    ],
)
def test_it_ends_as_the_real_program_does(words: str, number: signal.Signals, folder: Path) -> None:
    ends = []
    for program in ([peers.need("qemu-img")], command()):
        since = newest()
        process = start([*program, *words.split()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_until_it_works(process, since, writes="bench -c" not in words)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        ends.append((process.returncode, err))
        assert run_real(["check", "-q", "a.q"]).code in (0, 3)
        if program[0] == peers.need("qemu-img"):
            # A bitmap in use is left inconsistent by the real program, which then takes the image no more.
            run_real(["bitmap", "--remove", "a.q", "one"])
    assert ends == [(-number, b"")] * 2


@pytest.mark.parametrize(
    "words",
    ["bench -w -c 2000000000 -s 512 -S 4096 plain.q", "convert -n -r 50k -O qcow2 large.q room.q"],
)
def test_a_signal_that_asks_for_a_report_ends_nothing(words: str, folder: Path) -> None:
    since = newest()
    process = start([*command(), *words.split()], stdout=subprocess.DEVNULL)
    try:
        wait_until_it_works(process, since)
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate()


def test_an_interrupt_that_is_ignored_stays_ignored(folder: Path) -> None:
    """What runs in the background of a shell, or below nohup."""
    words = [*command(), "bench", "-w", "-c", "2000000000", "plain.q"]
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    since = newest()
    process = start([*shell, *words], stdout=subprocess.DEVNULL)
    try:
        wait_until_it_works(process, since)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == -signal.SIGTERM


def test_an_interrupt_in_the_library_leaves_a_sound_image(folder: Path) -> None:
    """There it is Python's KeyboardInterrupt; what has been written by then is kept."""
    program = "import qimg; qimg.bench('plain.q', count=2 * 10**9, write=True)"
    since = newest()
    process = start([sys.executable, "-c", program], stderr=subprocess.PIPE)
    wait_until_it_works(process, since)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert err.rstrip().endswith(b"KeyboardInterrupt")
    run_real(["check", "-q", "plain.q"]).ok()
    assert real_content(Path("plain.q"), format="qcow2")[:4096] == bytes(4096)
