"""Image locks: who refuses whom, judged by two real QEMU programs meeting each other (protocols sheet 4)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qimg.context import Context, Notice
from qimg.errors import LockError
from qimg.storage import lock
from qimg.storage.base import USE_ALL, USE_READ, USE_RESIZE, USE_WRITE, USE_WRITE_UNCHANGED
from qimg.storage.posix import PosixFile
from support import peers
from support.holders import qemu_io_holding, qemu_nbd_serving
from support.run import run_peer, run_real

NO_WRITERS = USE_READ | USE_WRITE_UNCHANGED

# How a program opens an image -> (format, read-only, -U, what it uses, what it shares).
MODES = {
    "raw writer": ("raw", False, False, USE_READ | USE_WRITE, USE_ALL),
    "raw reader": ("raw", True, False, USE_READ, USE_ALL),
    "qcow2 writer": ("qcow2", False, False, USE_READ | USE_WRITE | USE_RESIZE, NO_WRITERS),
    "qcow2 reader": ("qcow2", True, False, USE_READ, NO_WRITERS),
    "sharing reader": ("qcow2", True, True, USE_READ, USE_ALL),
}


@pytest.fixture
def image(work: Path) -> str:
    """A qcow2 image (which can be opened as raw too), called ``a.q`` in messages."""
    run_real(["create", "-q", "-f", "qcow2", "a.q", "1M"]).ok()
    return "a.q"


@contextmanager
def ours(name: str, mode: str) -> Iterator[PosixFile]:
    """Qimg with the image open as `mode` says."""
    _, read_only, _, use, share = MODES[mode]
    with PosixFile.open(name, writable=not read_only) as file:
        file.lock(use, share)
        yield file


@contextmanager
def theirs(name: str, mode: str) -> Iterator[None]:
    """A real qemu-io with the image open as `mode` says."""
    format, read_only, share, *_ = MODES[mode]
    with qemu_io_holding(Path(name), format=format, read_only=read_only, share=share):
        yield


def their_refusal(name: str, mode: str) -> list[str]:
    """What a real qemu-io says when it cannot have the image, nothing when it can."""
    format, read_only, share, *_ = MODES[mode]
    words = ["-f", format, *(["-r"] if read_only else []), *(["-U"] if share else []), "-c", "quit", name]
    told = run_peer("qemu-io", words)
    lines = (told.out + told.err).splitlines()
    return [lines[0].removeprefix(f"qemu-io: can't open device {name}: "), *lines[1:]] if lines else []


def our_refusal(name: str, mode: str) -> list[str]:
    """The same for qimg."""
    try:
        with ours(name, mode):
            return []
    except LockError as error:
        assert error.hint is not None
        return [str(error), error.hint]


def held(name: str) -> list[int]:
    """Bytes of the file on which the kernel knows locks, each once."""
    inode = os.stat(name).st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[-3].endswith(f":{inode}"):
            found.update(range(int(words[-2]), int(words[-1]) + 1))
    return sorted(found)


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_qimg_and_qemu_refuse_each_other_as_two_qemus_do(image: str, first: str, second: str) -> None:
    with theirs(image, first):
        expected = their_refusal(image, second)
        assert our_refusal(image, second) == expected
    with ours(image, first):
        assert their_refusal(image, second) == expected
        assert our_refusal(image, second) == expected


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bytes_are_locked_as_by_qemu(image: str, mode: str) -> None:
    with theirs(image, mode):
        expected = held(image)
    with ours(image, mode):
        assert held(image) == expected
    assert held(image) == []


def wait_for_greeting(address: str) -> None:
    """Until the server speaks: a SIGTERM that comes before that is lost, and it would never end."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(address)
        assert client.recv(8) == b"NBDMAGIC"


@pytest.mark.peer("qemu-img", "qemu-nbd")
def test_a_running_qemu_nbd_keeps_qimg_out_and_lets_sharing_readers_in(image: str, work: Path) -> None:
    with qemu_nbd_serving(work / image) as address:
        wait_for_greeting(address)
        assert our_refusal(image, "qcow2 reader") == [
            'Failed to get shared "write" lock',
            "Is another process using the image [a.q]?",
        ]
        assert our_refusal(image, "qcow2 writer") == [
            'Failed to get "write" lock',
            "Is another process using the image [a.q]?",
        ]
        assert our_refusal(image, "sharing reader") == []


@pytest.mark.peer("qemu-img", "qemu-nbd")
def test_qimg_keeps_qemu_nbd_out(image: str) -> None:
    words = [peers.need("qemu-nbd"), "-f", "qcow2", "--socket=/tmp/qimg-test-never.sock", image]
    with ours(image, "qcow2 reader"):
        told = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert told.returncode == 1
    assert 'Failed to get "write" lock' in told.stderr


@pytest.fixture
def file(work: Path) -> str:
    (work / "a.q").write_bytes(bytes(1024))
    return "a.q"


@contextmanager
def foreign_lock(name: str, byte: int, kind: int) -> Iterator[None]:
    """Somebody else with a lock of its own on one byte."""
    fd = os.open(name, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
        yield
    finally:
        os.close(fd)


# The second line is missing where the lock itself is refused: seen with the real qemu-io.
@pytest.mark.parametrize(
    ("byte", "message"),
    [(100, "Failed to lock byte 100"), (201, "Failed to lock byte 201"), (203, "Failed to lock byte 203")],
)
def test_an_exclusive_lock_on_a_byte_of_ours_is_named(file: str, byte: int, message: str) -> None:
    with foreign_lock(file, byte, fcntl.F_WRLCK), PosixFile.open(file) as storage:
        with pytest.raises(LockError) as caught:
            storage.lock(USE_READ, NO_WRITERS)
        assert str(caught.value) == message
        assert caught.value.hint is None
        assert caught.value.errno == errno.EAGAIN


@pytest.mark.parametrize(
    ("index", "name"), [(0, "consistent read"), (1, "write"), (2, "write unchanged"), (3, "resize")]
)
def test_the_permission_in_conflict_is_named(file: str, index: int, name: str) -> None:
    with PosixFile.open(file) as storage:
        with foreign_lock(file, 200 + index, fcntl.F_RDLCK), pytest.raises(LockError) as caught:
            storage.lock(USE_ALL, USE_ALL)
        assert str(caught.value) == f'Failed to get "{name}" lock'
        with foreign_lock(file, 100 + index, fcntl.F_RDLCK), pytest.raises(LockError) as caught:
            storage.lock(0, 0)
        assert str(caught.value) == f'Failed to get shared "{name}" lock'
        assert held(file) == []


def test_a_refused_change_leaves_what_was_held_before(file: str) -> None:
    with PosixFile.open(file, writable=True) as storage:
        storage.lock(USE_READ, NO_WRITERS)
        with PosixFile.open(file) as other:
            other.lock(USE_READ, NO_WRITERS)
            with pytest.raises(LockError):
                storage.lock(USE_READ | USE_WRITE, NO_WRITERS)
        assert held(file) == [100, 201, 203]


def test_a_change_drops_what_is_no_longer_wanted(file: str) -> None:
    with PosixFile.open(file, writable=True) as storage:
        storage.lock(USE_WRITE | USE_RESIZE, USE_ALL & ~USE_RESIZE)
        assert held(file) == [101, 103, 203]
        storage.lock(USE_READ, USE_ALL)
        assert held(file) == [100]
        storage.lock(0, USE_ALL)
        assert held(file) == []


def test_another_open_and_close_of_the_same_file_does_not_lose_the_lock(file: str) -> None:
    with PosixFile.open(file) as storage:
        storage.lock(USE_READ, NO_WRITERS)
        Path(file).read_bytes()
        PosixFile.open(file).close()
        assert held(file) == [100, 201, 203]


def test_locking_off_takes_and_meets_no_locks(file: str) -> None:
    with PosixFile.open(file, writable=True) as storage:
        storage.lock(USE_ALL, 0)
        with PosixFile.open(file, locking="off") as other:
            other.lock(USE_ALL, 0)


def test_without_ofd_locks_auto_takes_none_and_on_warns(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_commands", lambda: None)
    notices: list[Notice] = []
    context = Context(notices.append)
    with PosixFile.open(file, locking="auto", context=context) as storage:
        storage.lock(USE_READ, NO_WRITERS)
        assert held(file) == []
    assert notices == []
    with PosixFile.open(file, locking="on", context=context) as storage:
        storage.lock(USE_READ, NO_WRITERS)
        assert held(file) == [100, 201, 203]
    assert len(notices) == 1
