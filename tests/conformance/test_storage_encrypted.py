"""The storage that encrypts keeps the promises of `StorageSuite`, in a place of fixed length: new space reads
as whatever its zeros decrypt to."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.storage_suite import StorageSuite
from qimg.crypto.ciphers import sector_cipher
from qimg.errors import NotSupported
from qimg.formats.encryption import Encrypted
from qimg.storage.base import Storage
from qimg.storage.memory import MemoryStorage
from qimg.storage.window import Window


class TestEncrypted(StorageSuite):
    grows = False
    hole = None

    def make(self, folder: Path, size: int) -> Storage:
        cipher = sector_cipher("aes-256", "xts", "plain64", None, bytes(range(64)))
        place = Encrypted(Window(MemoryStorage(size=size), 0, size), cipher)
        place.zero(0, size)
        return place


@pytest.fixture
def below() -> MemoryStorage:
    return MemoryStorage(size=8192)


def encrypted(below: Storage, first_sector: int = 0) -> Encrypted:
    cipher = sector_cipher("aes-128", "cbc", "plain64", None, bytes(16))
    return Encrypted(below, cipher, first_sector=first_sector)


def test_equal_sectors_look_different_below(below: MemoryStorage) -> None:
    encrypted(below).zero(0, 8192)
    sectors = [below.read(at, 512) for at in range(0, 8192, 512)]
    assert len({bytes(sector) for sector in sectors}) == 16


def test_a_sector_is_numbered_from_where_the_payload_begins(below: MemoryStorage) -> None:
    """The same bytes, at another offset of the place but with the same numbers, are the same below."""
    encrypted(below).write(b"x" * 1024, 0)
    encrypted(below, -4).write(b"x" * 1024, 2048)
    assert below.read(2048, 1024) == below.read(0, 1024)
    encrypted(below).numbered(-8).write(b"x" * 1024, 4096)
    assert below.read(4096, 1024) == below.read(0, 1024)


def test_raw_copies_are_refused(below: MemoryStorage) -> None:
    with pytest.raises(NotSupported):
        encrypted(below).copy_from(MemoryStorage(size=512), 0, 0, 512)


def test_what_it_says_of_itself(below: MemoryStorage) -> None:
    place = encrypted(below)
    assert place.limits.request_alignment == 512
    assert not place.limits.fast_zero
    assert not place.zero_init
    assert place.size == 8192
