"""Other processes that hold an image: for tests of locks and of serving."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import peers


@contextmanager
def qemu_io_holding(
    path: Path, *, format: str = "qcow2", read_only: bool = False, share: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A real qemu-io with the image open, and its locks taken, until the block ends."""
    words = [peers.need("qemu-io"), "-f", format]
    words += ["-r"] if read_only else []
    words += ["-U"] if share else []
    process = subprocess.Popen(
        [*words, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # The prompt is printed once the image is open; "help" makes it speak without touching the image.
        process.stdin.write(b"help quit\n")
        process.stdin.flush()
        answer = process.stdout.read(1)
        assert answer, "qemu-io did not open the image"
        _settle(process)
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=20)


def _settle(process: subprocess.Popen[bytes]) -> None:
    """Locks are there before the first prompt; only a process that died at once is caught here."""
    time.sleep(0.02)
    assert process.poll() is None, "qemu-io ended early"


@contextmanager
def qemu_nbd_serving(
    path: Path, *, format: str = "qcow2", read_only: bool = False, options: tuple[str, ...] = ()
) -> Iterator[str]:
    """A real qemu-nbd serving the image on a Unix socket; gives the socket's path."""
    socket = f"/tmp/qimg-test-{os.getpid()}-{abs(hash(path)) % 10**8}.sock"
    words = [peers.need("qemu-nbd"), "--persistent", "--shared=8", f"--socket={socket}", "-f", format]
    words += ["--read-only"] if read_only else []
    process = subprocess.Popen([*words, *options, str(path)], stdin=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if os.path.exists(socket):
                break
            assert process.poll() is None, f"qemu-nbd ended with {process.returncode}"
            time.sleep(0.01)
        else:
            raise AssertionError("qemu-nbd made no socket")
        yield socket
    finally:
        process.terminate()
        process.wait(timeout=20)
        if os.path.exists(socket):
            os.unlink(socket)
