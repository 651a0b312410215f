"""Block devices: fixed length, clear first sector, and the words with which they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.loop_devices import loop_device
from qimg.context import Context
from qimg.errors import NotSupported, StorageError
from qimg.formats import registry
from qimg.formats.base import CreateHelp
from qimg.graph.open import target
from qimg.storage.base import Storage
from qimg.storage.device import HostDevice
from qimg.storage.posix import PosixFile, node_driver
from support.run import run_real

MIB = 1 << 20


@pytest.fixture
def device(work: Path) -> Iterator[str]:
    """A device of 10 MiB full of 0xaa."""
    (work / "backing").write_bytes(b"\xaa" * (10 * MIB))
    with loop_device(work / "backing") as path:
        yield path


def _never(name: str, size: int, preallocation: str) -> Storage:
    raise AssertionError("raw has no data file")


@pytest.mark.peer("qemu-img")
def test_a_device_has_its_length_and_no_disk_size(device: str) -> None:
    told = run_real(["info", device]).ok().out
    assert node_driver(device) == "host_device"
    with HostDevice.open(device) as place:
        assert f"({place.size} bytes)" in told
        assert place.allocated_bytes() == 0
        assert "disk size: 0 B" in told
        assert not place.zero_init
        assert place.fixed_size


@pytest.mark.peer("qemu-img")
def test_a_new_image_clears_what_qemu_clears(device: str, work: Path) -> None:
    run_real(["create", "-q", "-f", "raw", device, "5M"]).ok()
    theirs = Path(device).read_bytes()
    (work / "again").write_bytes(b"\xaa" * (10 * MIB))
    with loop_device(work / "again") as second:
        with HostDevice.open(second, create=True) as place:
            place.start_new({}, Context())
            registry.get("raw").create(place, 5 * MIB, {}, CreateHelp(Context(), _never)).flush()
        assert Path(second).read_bytes() == theirs


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("size", "options", "words"),
    [(11 * MIB, {}, []), (MIB, {"preallocation": "full"}, ["-o", "preallocation=full"])],
)
def test_what_a_device_cannot_do_is_refused_in_the_words_of_qemu(
    device: str, size: int, options: dict[str, str], words: list[str]
) -> None:
    told = run_real(["create", "-q", "-f", "raw", *words, device, str(size)])
    with HostDevice.open(device, create=True) as place, pytest.raises(NotSupported) as caught:
        registry.get("raw").create(place, size, options, CreateHelp(Context(), _never))
    assert told.err == f"qemu-img: {device}: {caught.value}\n"


@pytest.mark.peer("qemu-img")
def test_resizing_a_device_with_preallocation_is_refused_in_the_words_of_qemu(device: str) -> None:
    told = run_real(["resize", "-q", "-f", "raw", "--preallocation=falloc", device, "11M"])
    with HostDevice.open(device, writable=True) as place, pytest.raises(NotSupported) as caught:
        place.resize(11 * MIB, "falloc")
    assert told.err == f"qemu-img: {caught.value}\n"


@pytest.mark.peer("qemu-img")
def test_a_write_protected_device_is_refused_in_the_words_of_qemu(work: Path) -> None:
    (work / "backing").write_bytes(bytes(MIB))
    with loop_device(work / "backing", read_only=True) as device:
        told = run_real(["resize", "-f", "raw", device, "1M"])
        with pytest.raises(StorageError) as caught:
            HostDevice.open(device, writable=True)
        assert told.err == f"qemu-img: Could not open '{device}': {caught.value}\n"
        with pytest.raises(StorageError) as caught:
            target(device, context=Context()).create({}, Context())
        # The wording of 10.0 (common sheet 5).
        assert str(caught.value) == (
            "Protocol driver 'host_device' does not support creating new images, so an existing image must"
            " be selected as the target; however, opening the given target as an existing image failed:"
            " The device is not writable: Permission denied"
        )
        HostDevice.open(device).close()


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_zeroing_inside_blocks_leaves_the_neighbours(device: str, cache: str, unmap: bool) -> None:
    with HostDevice.open(device, writable=True, cache=cache) as place:
        place.write(b"\xbb" * 4096, 0)
        place.zero(100, MIB, unmap)
        place.zero(2 * MIB + 1, 5, unmap)
        place.flush()
        assert place.read(0, 100 + MIB + 100) == b"\xbb" * 100 + bytes(MIB) + b"\xaa" * 100
        assert place.read(2 * MIB, 8) == b"\xaa" + bytes(5) + b"\xaa\xaa"


def test_zeroing_with_leave_gives_space_of_a_loop_device_back(device: str, work: Path) -> None:
    before = (work / "backing").stat().st_blocks
    with HostDevice.open(device, writable=True) as place:
        place.zero(0, 8 * MIB, unmap=True)
        place.flush()
    assert (work / "backing").stat().st_blocks <= before - 8 * MIB // 512


def test_a_write_past_the_end_is_no_space_left(device: str) -> None:
    with HostDevice.open(device, writable=True) as place:
        with pytest.raises(StorageError, match=r"^No space left on device$"):
            place.write(b"x" * 1024, 10 * MIB - 512)
        with pytest.raises(StorageError, match=r"^No space left on device$"):
            place.zero(10 * MIB - 512, 1024)


def test_copy_offload_between_a_device_and_a_file_is_refused(device: str, work: Path) -> None:
    with (
        HostDevice.open(device, writable=True) as place,
        PosixFile.open(str(work / "a"), create=True) as file,
    ):
        with pytest.raises(NotSupported):
            place.copy_from(file, 0, 0, 512)
        with pytest.raises(NotSupported):
            file.copy_from(place, 0, 0, 512)
