"""Length, holes and space of files, judged by the real program and by the file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qimg.context import Context, Notice
from qimg.errors import NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, ZERO, Runs
from qimg.storage import hostcalls
from qimg.storage.posix import PosixFile
from support.build import pattern
from support.run import run_peer, run_real

MIB = 1 << 20


def blocks(path: Path | str) -> int:
    """512-byte blocks that the file occupies."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks


def opened(path: Path | str, **how) -> PosixFile:
    return PosixFile.open(str(path), writable=True, **how)


@pytest.fixture
def full(work: Path) -> Path:
    """A file of 1 MiB without holes."""
    path = work / "a"
    path.write_bytes(pattern("A", 0, MIB))
    blocks(path)
    return path


@pytest.fixture
def direct(full: Path) -> Path:
    """The same, where the page cache can be passed by."""
    try:
        opened(full, cache="none").close()
    except StorageError as error:
        pytest.skip(f"{full.parent}: {error}")
    return full


def test_zeroing_with_leave_gives_space_back(full: Path) -> None:
    before = blocks(full)
    with opened(full) as file:
        file.zero(256 * 1024, 512 * 1024, unmap=True)
        assert file.allocated_bytes() == (before - 1024) * 512
    assert blocks(full) == before - 1024


def test_zeroing_without_leave_keeps_space(full: Path) -> None:
    before = blocks(full)
    with opened(full) as file:
        file.zero(256 * 1024, 512 * 1024, unmap=False)
        assert file.read(0, MIB) == pattern("A", 0, MIB // 4) + bytes(MIB // 2) + pattern(
            "A", MIB * 3 // 4, MIB // 4
        )
    assert blocks(full) == before
    assert full.stat().st_size == MIB


def test_a_place_opened_without_discard_keeps_its_space(full: Path) -> None:
    before = blocks(full)
    with opened(full, discard=False) as file:
        file.zero(0, MIB, unmap=True)
        file.discard(0, MIB)
    assert blocks(full) == before


def test_discarding_gives_space_back(full: Path) -> None:
    with opened(full) as file:
        file.discard(0, MIB)
        file.discard(MIB, MIB)
        assert file.size == MIB
    assert blocks(full) == 0


def test_zeroing_far_past_the_end_takes_no_space(full: Path) -> None:
    before = blocks(full)
    with opened(full) as file:
        file.zero(2 * MIB, 100 * MIB)
    assert full.stat().st_size == 102 * MIB
    assert blocks(full) == before


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS])
def test_without_help_of_the_file_system_zeros_are_written(
    full: Path, monkeypatch: pytest.MonkeyPatch, code: int, unmap: bool
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hostcalls, "punch_hole", refuse)
    monkeypatch.setattr(hostcalls, "zero_range", refuse)
    with opened(full) as file:
        file.zero(100, MIB, unmap)
        file.discard(0, 50)
        assert file.size == MIB + 100
        assert file.read(0, MIB + 100) == pattern("A", 0, 104)[:100] + bytes(MIB)


def test_zeroing_passes_on_what_the_disk_reports(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(hostcalls, "punch_hole", fail)
    with opened(full) as file, pytest.raises(StorageError, match=r"^Input/output error$") as caught:
        file.zero(4096, 4096)
    assert caught.value.offset == 4096


def test_older_kernels_are_asked_by_fallocate(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(fd: int, request: int, data: bytes) -> bytes:
        raise OSError(errno.ENOTTY, "")

    monkeypatch.setattr(hostcalls.fcntl, "ioctl", ioctl)
    before = blocks(full)
    with opened(full) as file:
        file.zero(0, MIB // 2, unmap=True)
        file.zero(MIB // 2, MIB // 4, unmap=False)
    assert blocks(full) == before - 1024
    assert full.read_bytes() == bytes(MIB * 3 // 4) + pattern("A", MIB * 3 // 4, MIB // 4)


# -- extents


def test_a_huge_sparse_file_costs_as_many_steps_as_it_has_runs(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(work / "a", create=True) as file:
        file.zero(0, 1 << 43)
        file.write(b"x" * 4096, 1 << 42)
        calls: list[int] = []
        seek = os.lseek
        monkeypatch.setattr(os, "lseek", lambda *args: calls.append(args[1]) or seek(*args))
        found = [tuple(extent[:3]) for extent in file.extents(0, 1 << 43)]
    assert found == [
        (0, 1 << 42, ZERO),
        (1 << 42, 4096, MAPPED),
        ((1 << 42) + 4096, (1 << 42) - 4096, ZERO),
    ]
    assert len(calls) <= 4


def test_a_file_system_that_knows_no_holes_says_that_all_is_data(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, how: int) -> int:
        raise OSError(errno.EINVAL, "")

    with opened(full) as file:
        monkeypatch.setattr(os, "lseek", lseek)
        assert [tuple(extent[:3]) for extent in file.extents(0, 2 * MIB)] == [
            (0, MIB, MAPPED),
            (MIB, MIB, ZERO),
        ]


def test_a_file_cut_while_it_is_looked_at_ends_in_zeros(full: Path) -> None:
    with opened(full) as file:
        walk = file.extents(0, MIB)
        os.truncate(full, 4096)
        runs = Runs(0, MIB)
        runs.extend(walk)
        assert sum(extent.length for extent in runs.take()) == MIB


# -- length and preallocation


def ours(path: Path, size: int, mode: str) -> None:
    with opened(path, create=True) as file:
        file.resize(size, mode)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("size", [0, 512, 2048, 4096, MIB, 3 * MIB + 512])
@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_growing_from_nothing_takes_the_space_that_qemu_takes(work: Path, mode: str, size: int) -> None:
    run_real(["create", "-q", "-f", "raw", "-o", f"preallocation={mode}", "real", str(size)]).ok()
    ours(work / "ours", size, mode)
    assert (work / "ours").read_bytes() == (work / "real").read_bytes()
    assert blocks("ours") == blocks("real")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_growing_a_file_takes_the_space_that_qemu_takes(work: Path, mode: str) -> None:
    for name in ("real", "ours"):
        run_real(["create", "-q", "-f", "raw", name, "1M"]).ok()
    run_real(["resize", "-q", "-f", "raw", f"--preallocation={mode}", "real", "3M"]).ok()
    ours(work / "ours", 3 * MIB, mode)
    assert blocks("ours") == blocks("real")
    assert os.stat("ours").st_size == 3 * MIB


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("metadata", "Unsupported preallocation mode: metadata"),
        ("bogus", "invalid parameter value: bogus"),
    ],
)
def test_an_unknown_preallocation_is_refused(full: Path, mode: str, message: str) -> None:
    with opened(full) as file, pytest.raises(OptionError) as caught:
        file.resize(2 * MIB, mode)
    assert str(caught.value) == message


def test_shrinking_with_preallocation_is_refused(full: Path) -> None:
    with opened(full) as file:
        with pytest.raises(NotSupported, match=r"^Cannot use preallocation for shrinking files$"):
            file.resize(512, "falloc")
        assert file.size == MIB


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("size", [(1 << 63) - 512, 1 << 63, (1 << 64) - 512])
def test_a_length_that_no_file_can_have_is_one_line(work: Path, size: int) -> None:
    told = run_real(["create", "-q", "-f", "raw", "real", "-o", f"size={size}"])
    with opened(work / "ours", create=True) as file, pytest.raises(StorageError) as caught:
        file.resize(size)
    if size == 1 << 63:
        assert told.err == f"qemu-img: real: {caught.value}\n"
    assert str(caught.value).startswith("Could not resize file: ")


def _no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# The wording is the real program's on a full tmpfs (create sheet, stage 2).
def test_a_full_disk_at_falloc_restores_the_length(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _no_space)
    with opened(full) as file, pytest.raises(StorageError) as caught:
        file.resize(2 * MIB, "falloc")
    assert str(caught.value) == "Could not preallocate new data: No space left on device"
    assert full.stat().st_size == MIB


def test_a_full_disk_at_full_restores_the_length(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", _no_space)
    with opened(full) as file, pytest.raises(StorageError) as caught:
        file.resize(2 * MIB, "full")
    assert str(caught.value) == "Could not write zeros for preallocation: No space left on device"
    assert full.stat().st_size == MIB


# -- short transfers, signals, flushes


def test_short_transfers_are_continued(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: pread(fd, (views[0][:1000],), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:1000], at))
    with opened(full) as file:
        assert file.read(0, 10000) == pattern("A", 0, 10000)
        file.write(pattern("B", 0, 10000), 4096)
    assert full.read_bytes()[4096:14096] == pattern("B", 0, 10000)


def test_an_error_in_the_middle_names_its_offset(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.preadv

    def preadv(fd: int, views: tuple[memoryview], at: int) -> int:
        if at >= 8192:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, (views[0][:4096],), at)

    monkeypatch.setattr(os, "preadv", preadv)
    with opened(full) as file, pytest.raises(StorageError) as caught:
        file.read(0, 65536)
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, 8192)
    assert str(caught.value) == "Input/output error"


def test_after_a_failed_flush_every_later_flush_fails(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(full) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fdatasync)
            with pytest.raises(StorageError, match=r"^Input/output error$"):
                file.flush()
        with pytest.raises(StorageError, match=r"^Input/output error$"):
            file.flush()


@pytest.mark.parametrize(
    ("cache", "count"), [("writeback", 1), ("none", 1), ("unsafe", 0), ("direct-unsafe", 0)]
)
def test_the_cache_mode_decides_what_a_flush_does(
    direct: Path, monkeypatch: pytest.MonkeyPatch, cache: str, count: int
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    with opened(direct, cache=cache) as file:
        file.write(b"x" * 512, 0)
        file.zero(4096, 4096)
        assert flushed == []
        file.flush()
    assert len(flushed) == count


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_writing_through_makes_every_change_durable(
    direct: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    import fcntl

    flushed: list[int] = []
    with opened(direct, cache=cache) as file:
        assert fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DSYNC
        monkeypatch.setattr(os, "fdatasync", flushed.append)
        file.zero(4096, 4096)
        file.resize(2 * MIB)
    assert len(flushed) == 2


def test_direct_access_shows_its_alignment_and_takes_any_request(direct: Path) -> None:
    with opened(direct, cache="none") as file:
        unit = file.limits.request_alignment
        assert unit in (512, 1024, 2048, 4096)
        assert file.limits.memory_alignment == 4096
        file.write(b"y" * 100, MIB - 50)
        assert file.size == MIB + 50
        file.write(b"z" * 10, 5)
    expected = bytearray(pattern("A", 0, MIB)) + bytes(50)
    expected[MIB - 50 :] = b"y" * 100
    expected[5:15] = b"z" * 10
    assert direct.read_bytes() == expected


# -- creation


def test_an_explicit_extent_size_hint_that_fails_is_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(hostcalls, "set_extent_size_hint", refuse)
    notices: list[Notice] = []
    with opened(work / "a", create=True) as file:
        file.start_new({}, Context(notices.append))
        assert notices == []
        file.start_new({"extent_size_hint": 65536, "nocow": True}, Context(notices.append))
    assert [notice.text for notice in notices] == ["Failed to set extent size hint: Operation not supported"]


def test_the_extent_size_hint_reaches_the_file_system(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(hostcalls, "set_extent_size_hint", lambda fd, size: asked.append(size))
    with opened(work / "a", create=True) as file:
        file.start_new({}, Context())
        file.start_new({"extent_size_hint": 65536}, Context())
        file.start_new({"extent_size_hint": 0}, Context())
    assert asked == [1 << 20, 65536]


@pytest.mark.peer("qemu-io")
def test_what_qemu_io_writes_we_read_and_the_other_way_round(work: Path) -> None:
    with opened(work / "a", create=True) as file:
        file.resize(MIB)
        file.write(b"\x11" * 4096, 65536)
    told = run_peer("qemu-io", ["-f", "raw", "-c", "read -P 0x11 64k 4k", "-c", "write -P 0x22 128k 1k", "a"])
    assert "verification failed" not in told.ok().out
    with PosixFile.open("a") as file:
        assert file.read(128 * 1024, 2048) == b"\x22" * 1024 + bytes(1024)
