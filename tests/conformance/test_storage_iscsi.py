"""Disks of an iSCSI target keep the promises of `StorageSuite`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from conformance.storage_suite import SIZE, StorageSuite
from qimg.storage import registry
from qimg.storage.base import Storage
from support.iscsi_target import Target, iscsi_target

pytestmark = pytest.mark.peer("tgtd")


@pytest.fixture(scope="module")
def targets():
    with ExitStack() as stack:
        yield [stack.enter_context(iscsi_target(SIZE)) for _ in range(2)]


class TestIscsi(StorageSuite):
    grows = False

    @pytest.fixture(autouse=True)
    def _targets(self, targets: list[Target]) -> None:
        self.targets = targets

    def make(self, folder: Path, size: int) -> Storage:
        kind = registry.get("iscsi")
        target = self.targets[1 if folder.name == "2" else 0]
        place = kind.from_options(kind.parse(target.url), writable=True)
        place.zero(0, size)
        return place
