"""Files of an NFS server keep the promises of `StorageSuite`."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from conformance.storage_suite import StorageSuite
from qimg.context import Context
from qimg.storage import registry
from qimg.storage.base import Storage
from support.nfs_server import NfsServer, nfs_server

pytestmark = pytest.mark.peer("ganesha.nfsd", "rpcbind")


@pytest.fixture(scope="module")
def server():
    with nfs_server() as running:
        yield running


class TestNfs(StorageSuite):
    hole = None
    numbers = count()

    @pytest.fixture(autouse=True)
    def _inside(self, server: NfsServer):
        with server.reached():
            yield

    def make(self, folder: Path, size: int) -> Storage:
        kind = registry.get("nfs")
        name = f"nfs://127.0.0.1/vol/{next(self.numbers)}"
        place = kind.from_options(kind.parse(name), create=True)
        place.start_new({}, Context())
        place.resize(size)
        return place
