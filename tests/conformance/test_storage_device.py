"""Block devices (loop devices, which need root) keep the promises of `StorageSuite`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from conformance.loop_devices import loop_device
from conformance.storage_suite import SIZE, StorageSuite
from qimg.storage.base import Storage
from qimg.storage.device import HostDevice


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory):
    """Two devices of SIZE bytes."""
    with ExitStack() as stack:
        devices = []
        for number in range(2):
            backing = tmp_path_factory.mktemp("loops") / f"backing{number}"
            with backing.open("wb") as file:
                file.truncate(SIZE)
            devices.append(stack.enter_context(loop_device(backing)))
        yield devices


class DeviceSuite(StorageSuite):
    grows = False
    hole = None
    cache = "writeback"

    @pytest.fixture(autouse=True)
    def _devices(self, loops: list[str]) -> None:
        self.devices = loops

    def make(self, folder: Path, size: int) -> Storage:
        number = 1 if folder.name == "2" else 0
        device = HostDevice.open(self.devices[number], writable=True, cache=self.cache)
        device.zero(0, size)
        return device


class TestBlockDevice(DeviceSuite):
    pass


class TestBlockDevicePastThePageCache(DeviceSuite):
    cache = "none"
