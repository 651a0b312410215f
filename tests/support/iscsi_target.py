"""A real iSCSI target: tgtd, with one thinly provisioned disk in a file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import peers
from support.servers import free_port

NAME = "iqn.2026-01.test:disk"
USER, PASSWORD = "somebody", "secretsecret12"


class Target:
    """A running tgtd; the disk's bytes are in `file`."""

    def __init__(self, folder: Path, size: int, *, login: bool) -> None:
        self.file = folder / "disk.img"
        with self.file.open("wb") as disk:
            disk.truncate(size)
        self.portal = f"127.0.0.1:{free_port()}"
        self._environment = {**os.environ, "TGT_IPC_SOCKET": str(folder / "s")}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [peers.need("tgtd"), "-f", "-d", "0", "-C", "7", "--iscsi", f"portal={self.portal}"],
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        self._wait()
        self._admin("target", "new", "--tid", "1", "-T", NAME)
        self._admin("logicalunit", "new", "--tid", "1", "--lun", "1", "-b", str(self.file))
        self._admin("logicalunit", "update", "--tid", "1", "--lun", "1", "--params", "thin_provisioning=1")
        if login:
            self._admin("account", "new", "--user", USER, "--password", PASSWORD)
            self._admin("account", "bind", "--tid", "1", "--user", USER)
        self._admin("target", "bind", "--tid", "1", "-I", "ALL")

    @property
    def url(self) -> str:
        """The name of the disk."""
        return f"iscsi://{self.portal}/{NAME}/1"

    def _admin(self, mode: str, operation: str, *words: str) -> bool:
        command = [
            peers.need("tgtadm"),
            "-C",
            "7",
            "--lld",
            "iscsi",
            "--mode",
            mode,
            "--op",
            operation,
            *words,
        ]
        done = subprocess.run(command, env=self._environment, capture_output=True, check=False, timeout=20)
        return done.returncode == 0

    def _wait(self) -> None:
        end = time.monotonic() + 10
        while not self._admin("sys", "show"):
            assert time.monotonic() < end and self.process.poll() is None, "tgtd does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def iscsi_target(size: int, *, login: bool = False) -> Iterator[Target]:
    """A target with a disk of `size` bytes of zeros; with `login` only for USER."""
    folder = Path(tempfile.mkdtemp(prefix="/tmp/q"))  # the socket's name has to be short
    try:
        target = Target(folder, size, login=login)
        try:
            yield target
        finally:
            target.kill()
    finally:
        shutil.rmtree(folder)
