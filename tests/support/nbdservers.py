"""NBD servers for tests: nbdkit and qemu-nbd on sockets in a folder, ready when they are handed out."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import peers

_numbers = itertools.count()
#: Seconds to wait for a server before it counts as broken.
PATIENCE = 20


class Server:
    """A running server: its `socket`, its process and the words it was started with."""

    def __init__(self, words: list[str], socket: Path, ready: Path) -> None:
        self.socket = socket
        self._words = words
        self._ready = ready
        self.start()

    def start(self) -> None:
        """Start it (again) and wait until it listens."""
        self._ready.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            self._words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        end = time.monotonic() + PATIENCE
        while not (self._ready.exists() and self._ready.read_text().strip()):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"{self._words} did not start: {self.process.communicate()[1]!r}")
            time.sleep(0.005)

    def stop(self) -> None:
        """Ask it to end."""
        self.process.terminate()
        try:
            self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it without a chance to say goodbye."""
        self.process.kill()
        self.process.communicate()

    def url(self, export: str = "", scheme: str = "nbd+unix") -> str:
        """The name of an export."""
        return f"{scheme}:///{export}?socket={self.socket}"


def _paths(folder: Path) -> tuple[Path, Path]:
    number = next(_numbers)
    # Short: a socket's name has 107 bytes at most.
    return folder / f"{os.getpid() % 1000}-{number}.sock", folder / f"{os.getpid() % 1000}-{number}.pid"


@contextmanager
def nbdkit(folder: Path, *words: object) -> Iterator[Server]:
    """A server of nbdkit with these words (filters, plugin, parameters)."""
    socket, ready = _paths(folder)
    program = peers.need("nbdkit")
    server = Server([program, "-f", "-U", str(socket), "-P", str(ready), *map(str, words)], socket, ready)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def qemu_nbd(folder: Path, *words: object) -> Iterator[Server]:
    """A server of qemu-nbd with these words, for any number of clients one after the other."""
    socket, ready = _paths(folder)
    program = peers.need("qemu-nbd")
    more = ["-t", "-k", str(socket), f"--pid-file={ready}"]
    server = Server([program, *more, *map(str, words)], socket, ready)
    try:
        yield server
    finally:
        server.stop()
