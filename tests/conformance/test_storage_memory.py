"""Memory, windows and the test filters keep the promises of `StorageSuite`."""

from __future__ import annotations

from pathlib import Path

from conformance.storage_suite import StorageSuite
from qimg.storage.base import Storage
from qimg.storage.fault import FaultStorage
from qimg.storage.memory import MemoryStorage
from qimg.storage.record import RecordStorage
from qimg.storage.window import Window


class TestMemory(StorageSuite):
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        return MemoryStorage(size=size, block=4096)


class TestMemoryWithoutHoles(StorageSuite):
    hole = None
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        return MemoryStorage(size=size, holes=False)


class TestWindowToTheEnd(StorageSuite):
    def make(self, folder: Path, size: int) -> Storage:
        return Window(MemoryStorage(size=size + 8192, block=4096), 8192)


class TestWindowOfFixedLength(StorageSuite):
    grows = False

    def make(self, folder: Path, size: int) -> Storage:
        child = MemoryStorage(size=size + 100 * 4096, block=4096)
        child.write(b"\xaa" * 4096, 0)
        child.write(b"\xbb" * 4096, size + 4096)
        return Window(child, 4096, size)


class TestFaultFilterWithoutFaults(StorageSuite):
    def make(self, folder: Path, size: int) -> Storage:
        return FaultStorage(MemoryStorage(size=size, block=4096))


class TestRecorder(StorageSuite):
    def make(self, folder: Path, size: int) -> Storage:
        return RecordStorage(MemoryStorage(size=size, block=4096))
