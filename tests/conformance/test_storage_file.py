"""Regular files, in every cache mode, keep the promises of `StorageSuite`."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.storage_suite import StorageSuite
from qimg.errors import StorageError
from qimg.storage.base import Storage
from qimg.storage.posix import PosixFile


def make_file(folder: Path, size: int, **how) -> Storage:
    """A new sparse file of `size` bytes."""
    path = folder / "place"
    with path.open("wb") as file:
        file.truncate(size)
    return PosixFile.open(str(path), writable=True, **how)


class TestFile(StorageSuite):
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        return make_file(folder, size)


class TestFileThatKeepsItsSpace(StorageSuite):
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        return make_file(folder, size, discard=False)


class TestFilePastThePageCache(StorageSuite):
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        try:
            return make_file(folder, size, cache="none")
        except StorageError as error:
            pytest.skip(f"{folder}: {error}")


class TestFileWrittenThrough(StorageSuite):
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        return make_file(folder, size, cache="writethrough")


class TestFileWithoutFlushes(StorageSuite):
    copies = True

    def make(self, folder: Path, size: int) -> Storage:
        return make_file(folder, size, cache="unsafe")
