"""Files behind a real sshd keep the promises of `StorageSuite`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from conformance.storage_suite import StorageSuite
from qimg.storage.base import Storage
from qimg.storage.ssh import SshFile
from support.servers import Ssh, sshd

pytestmark = pytest.mark.peer("sshd", "ssh-agent")


@pytest.fixture(scope="module")
def server() -> Iterator[Ssh]:
    with sshd() as running:
        yield running


class TestSsh(StorageSuite):
    hole = None
    examples = 8

    @pytest.fixture(autouse=True)
    def _server(self, server: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        self.server = server
        self.numbers = count()

    def make(self, folder: Path, size: int) -> Storage:
        name = f"place{next(self.numbers)}"
        with (self.server.root / name).open("wb") as file:
            file.truncate(size)
        return SshFile.from_options(SshFile.parse(self.server.url(name)), writable=True)
