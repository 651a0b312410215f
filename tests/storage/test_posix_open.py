"""Opening files and devices: what is refused, in which words, and what opening leaves alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.errors import LocationError, OptionError, QimgError, StorageError
from qimg.storage.device import HostDevice
from qimg.storage.posix import PosixFile, node_driver
from support.run import run_real


def refusal(opener: type[PosixFile], name: str, **how) -> str:
    """The words with which an opening fails."""
    with pytest.raises(QimgError) as caught:
        opener.open(name, **how)
    return str(caught.value)


def their_refusal(driver: str, name: str, *more: str) -> str:
    """The real program's words for the same, without the outer ``Could not open``."""
    words = ",".join([f"driver={driver}", f"filename={name}", *more])
    told = run_real(["info", "--image-opts", words])
    assert told.code == 1
    return told.err.splitlines()[0].removeprefix(f"qemu-img: Could not open '{words}': ")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ["missing", "folder", "a/b", "loop", "/dev/null", "x" * 300])
def test_what_cannot_be_opened_is_refused_in_the_words_of_qemu(work: Path, name: str) -> None:
    (work / "folder").mkdir()
    (work / "a").write_bytes(b"")
    (work / "loop").symlink_to("loop")
    assert refusal(PosixFile, name) == their_refusal("file", name)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ["a", "missing", "folder"])
def test_a_device_driver_wants_a_device(work: Path, name: str) -> None:
    (work / "folder").mkdir()
    (work / "a").write_bytes(b"")
    assert refusal(HostDevice, name) == their_refusal("host_device", name)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "more",
    [
        {"locking": "foo"},
        {"aio": "foo"},
        {"aio": "native"},
        {"pr-manager": "foo"},
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_the_words_of_qemu(work: Path, more: dict[str, str]) -> None:
    (work / "a").write_bytes(b"")
    with pytest.raises(OptionError) as caught:
        PosixFile.from_options({"filename": "a", **more})
    assert str(caught.value) == their_refusal("file", "a", *(f"{key}={value}" for key, value in more.items()))


def test_a_name_is_required() -> None:
    with pytest.raises(LocationError, match=r"^The 'file' block driver requires a file name$"):
        PosixFile.open("")
    with pytest.raises(LocationError, match=r"^The 'host_device' block driver requires a file name$"):
        HostDevice.open("")


def test_a_fifo_or_a_socket_is_refused_without_waiting(work: Path) -> None:
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("fifo", "socket"):
            for how in ({}, {"writable": True}, {"create": True}):
                assert (
                    refusal(PosixFile, name, **how) == f"'file' driver requires '{name}' to be a regular file"
                )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_permission_is_asked_of_the_system(work: Path) -> None:
    Path("a").write_bytes(b"")
    Path("a").chmod(0o400)
    assert refusal(PosixFile, "a", writable=True) == "Could not open 'a': Permission denied"


@pytest.mark.peer("qemu-img")
def test_a_device_without_direct_access_is_refused_in_the_words_of_qemu(work: Path) -> None:
    told = run_real(["convert", "-T", "none", "-O", "raw", "/dev/null", "x"])
    words = refusal(HostDevice, "/dev/null", cache="none")
    assert told.err == f"qemu-img: Could not open '/dev/null': {words}\n"


def test_a_nul_byte_in_a_name_is_no_crash() -> None:
    assert refusal(PosixFile, "a\0b") == "Could not open 'a\0b': No such file or directory"
    assert node_driver("a\0b") == "file"


def test_the_driver_follows_the_kind_of_node(work: Path) -> None:
    Path("a").write_bytes(b"")
    assert node_driver("a") == "file"
    assert node_driver("missing") == "file"
    assert node_driver("/dev/null") == "host_device"


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ["nodir/a", "folder"])
def test_what_cannot_be_created_is_refused_in_the_words_of_qemu(work: Path, name: str) -> None:
    (work / "folder").mkdir()
    told = run_real(["create", "-q", "-f", "raw", name, "1M"])
    assert told.err == f"qemu-img: {name}: {refusal(PosixFile, name, create=True)}\n"


def test_creating_leaves_old_content_until_told_to_start_anew(work: Path) -> None:
    Path("a").write_bytes(b"old content")
    with PosixFile.open("a", create=True) as file:
        assert file.writable
        assert Path("a").read_bytes() == b"old content"
        file.start_new({}, Context())
        assert Path("a").read_bytes() == b""


def test_a_hint_that_is_too_large_is_refused_before_the_old_content_goes(work: Path) -> None:
    Path("a").write_bytes(b"old content")
    too_large = pytest.raises(OptionError, match=r"^Extent size hint is too large$")
    with PosixFile.open("a", create=True) as file, too_large:
        file.start_new({"extent_size_hint": 1 << 32}, Context())
    assert Path("a").read_bytes() == b"old content"


def test_a_new_file_has_the_mode_that_the_mask_leaves(work: Path) -> None:
    before = os.umask(0o077)
    try:
        PosixFile.open("a", create=True).close()
    finally:
        os.umask(before)
    PosixFile.open("b", create=True).close()
    assert Path("a").stat().st_mode & 0o777 == 0o600
    assert Path("b").stat().st_mode & 0o777 == 0o644 & ~before


def test_a_file_opened_for_reading_cannot_be_written(work: Path) -> None:
    Path("a").write_bytes(b"12345")
    with PosixFile.open("a") as file:
        with pytest.raises(StorageError, match=r"^Bad file descriptor$"):
            file.write(b"x", 0)
        file.flush()
    assert Path("a").read_bytes() == b"12345"


def test_an_unknown_cache_mode_is_refused(work: Path) -> None:
    Path("a").write_bytes(b"")
    assert refusal(PosixFile, "a", cache="Writeback") == "Invalid cache option: Writeback"


@pytest.mark.peer("qemu-img")
def test_device_files_are_as_long_as_qemu_says() -> None:
    with HostDevice.open("/dev/null") as device:
        assert device.size == 0
        assert device.allocated_bytes() == 0
        assert device.driver == "host_device"
        device.flush()
    assert "virtual size: 0 B" in run_real(["info", "/dev/null"]).ok().out
