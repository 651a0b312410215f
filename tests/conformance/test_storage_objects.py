"""Objects in a store keep the promises of `StorageSuite`, new ones and such as are changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.storage_suite import StorageSuite
from qimg.context import Context
from qimg.storage.base import Storage
from qimg.storage.s3 import S3
from support.moto import BUCKET, CREDENTIALS, S3Server, s3_server


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


class ObjectSuite(StorageSuite):
    hole = None

    @pytest.fixture(autouse=True)
    def _server(self, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)

    def open(self, folder: Path, *, create: bool) -> Storage:
        values = {"bucket": BUCKET, "key": f"{folder.name}.img", "endpoint": self.server.endpoint}
        return S3.from_options(values, writable=True, create=create)


class TestNewObject(ObjectSuite):
    def make(self, folder: Path, size: int) -> Storage:
        place = self.open(folder, create=True)
        place.start_new({}, Context())
        place.resize(size)
        return place


class TestObjectThatIsChanged(ObjectSuite):
    def make(self, folder: Path, size: int) -> Storage:
        self.server.put(f"{folder.name}.img", bytes(size))
        return self.open(folder, create=False)

    def test_nothing_changes_until_it_is_published(self, tmp_path: Path) -> None:
        with self.make(tmp_path, 4096) as place:
            place.write(b"x" * 512, 512)
            place.flush()
            assert self.server.get(f"{tmp_path.name}.img") == bytes(4096)
            place.publish()
            assert self.server.get(f"{tmp_path.name}.img") == bytes(512) + b"x" * 512 + bytes(3072)
