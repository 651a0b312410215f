"""NBD exports keep the promises of `StorageSuite`, whatever the server can and wants."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from conformance.storage_suite import SIZE, StorageSuite
from qimg.storage.base import Storage
from qimg.storage.nbd.storage import NbdStorage
from support.nbdservers import Server, nbdkit, qemu_nbd


class ExportSuite(StorageSuite):
    grows = False
    #: What nbdkit is started with.
    words: ClassVar[tuple[object, ...]] = ("memory", SIZE)

    @pytest.fixture(scope="class")
    @classmethod
    def servers(cls) -> Iterator[list[Server]]:
        with (
            tempfile.TemporaryDirectory() as folder,
            nbdkit(Path(folder), *cls.words) as one,
            nbdkit(Path(folder), *cls.words) as two,
        ):
            yield [one, two]

    @pytest.fixture(autouse=True)
    def _servers(self, servers: list[Server]) -> None:
        self.servers = servers

    def make(self, folder: Path, size: int) -> Storage:
        server = self.servers[1 if folder.name == "2" else 0]
        place = NbdStorage.from_options(NbdStorage.parse(server.url()), writable=True)
        place.zero(0, size)
        return place


@pytest.mark.peer("nbdkit")
class TestMemory(ExportSuite):
    hole = 32 << 10


@pytest.mark.peer("nbdkit")
class TestBlocksOf4K(ExportSuite):
    words = (
        "--filter=blocksize-policy",
        "memory",
        SIZE,
        "blocksize-error-policy=error",
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=128K",
    )
    hole = 32 << 10


@pytest.mark.peer("nbdkit")
class TestServerWithoutZeroesAndExtents(ExportSuite):
    words = (
        "--filter=nozero",
        "--filter=noextents",
        "--filter=multi-conn",
        "memory",
        SIZE,
        "multi-conn-mode=disable",
    )
    hole = None


@pytest.mark.peer("nbdkit")
class TestServerWithoutStructuredReplies(ExportSuite):
    words = ("--no-sr", "memory", SIZE)
    hole = None


@pytest.mark.peer("nbdkit")
class TestSlowServerThatAnswersInAnyOrder(ExportSuite):
    words = ("-t", 8, "--filter=delay", "memory", SIZE, "delay-read=1ms", "delay-write=1ms")
    hole = 32 << 10


@pytest.mark.peer("qemu-nbd")
class TestQemu(ExportSuite):
    hole = 4096

    @pytest.fixture(scope="class")
    @classmethod
    def servers(cls) -> Iterator[list[Server]]:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("1", "2"):
                (Path(folder) / name).write_bytes(bytes(SIZE))
            start = ("-f", "raw", "-e", 8, "--discard=unmap")
            with (
                qemu_nbd(Path(folder), *start, Path(folder) / "1") as one,
                qemu_nbd(Path(folder), *start, Path(folder) / "2") as two,
            ):
                yield [one, two]
