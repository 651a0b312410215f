"""raw: what the real program says of the same file, and what an interrupted job leaves behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qimg.context import Context
from qimg.errors import LimitError, NotSupported, OptionError, QimgError, StorageError
from qimg.extent import MAPPED, ZERO, is_data, is_present, is_zero
from qimg.formats import registry
from qimg.formats.base import CreateHelp, MeasureSource
from qimg.formats.raw import RawImage
from qimg.storage.base import Storage
from qimg.storage.fault import FaultStorage
from qimg.storage.memory import MemoryStorage
from qimg.storage.posix import PosixFile
from qimg.storage.record import RecordStorage
from support.build import pattern, write_raw
from support.run import run_peer, run_real

MIB = 1 << 20
RAW = registry.get("raw")


def _never(name: str, size: int, preallocation: str) -> Storage:
    raise AssertionError("raw has no data file")


HELP = CreateHelp(Context(), _never)


def create(file: Storage, size: int, **options) -> RawImage:
    """A new image in `file`."""
    image = RAW.create(file, size, options, HELP)
    assert isinstance(image, RawImage)
    return image


def opened(name: str, **options) -> RawImage:
    image = RAW.open(PosixFile.open(name), options=options, context=Context())
    assert isinstance(image, RawImage)
    return image


def new_file(name: str) -> PosixFile:
    file = PosixFile.open(name, create=True)
    file.start_new({}, Context())
    return file


def our_map(image: RawImage) -> list[dict[str, object]]:
    """The extents as `map` shows them."""
    return [
        {
            "start": extent.start,
            "length": extent.length,
            "depth": extent.depth,
            "present": is_present(extent),
            "zero": is_zero(extent),
            "data": is_data(extent),
            "offset": extent.host,
        }
        for extent in image.extents(0, image.size)
    ]


def their_map(*words: str) -> list[dict[str, object]]:
    shown = json.loads(run_real(["map", "--output=json", *words]).ok().out)
    for row in shown:
        row.pop("compressed", None)
    return shown


# -- opening


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("length", [1, 3, 511, 512, 513, 1000, 4096, 10000, 65536, 100001])
@pytest.mark.parametrize("hole", [False, True])
def test_odd_lengths_are_rounded_up_and_mapped_as_by_qemu(work: Path, length: int, hole: bool) -> None:
    with open("odd", "wb") as file:
        file.truncate(length)
        if not hole:
            file.write(b"x" * length)
    with opened("odd") as image:
        info = json.loads(run_real(["info", "-f", "raw", "--output=json", "odd"]).ok().out)
        assert image.size == info["virtual-size"]
        assert our_map(image) == their_map("-f", "raw", "odd")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("layout", ["A-A", "-A-", "AA--", "--AA", "A", "-", "A-A-A-A-BB--C"])
def test_data_and_holes_are_mapped_as_by_qemu(work: Path, layout: str) -> None:
    write_raw(work / "a", layout)
    with opened("a") as image:
        assert our_map(image) == their_map("-f", "raw", "a")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "window",
    [
        {"offset": 512},
        {"offset": 65536},
        {"size": 1024},
        {"offset": 65536, "size": 65536},
        {"offset": 196608 - 512},
        {"offset": 0, "size": 196608},
    ],
    ids=str,
)
def test_a_window_is_mapped_as_by_qemu(work: Path, window: dict[str, int]) -> None:
    write_raw(work / "a", "A-B")
    words = ",".join(["driver=raw,file.filename=a", *(f"{key}={value}" for key, value in window.items())])
    with opened("a", **window) as image:
        assert our_map(image) == their_map("--image-opts", words)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "window",
    [
        {"offset": 204800},
        {"size": 1000},
        {"offset": 65536, "size": 204800},
        {"size": 197120},
        {"offset": 1, "size": 196608},
    ],
    ids=str,
)
def test_a_window_outside_the_file_is_refused_in_the_words_of_qemu(
    work: Path, window: dict[str, int]
) -> None:
    write_raw(work / "a", "A-B")
    words = ",".join(["driver=raw,file.filename=a", *(f"{key}={value}" for key, value in window.items())])
    told = run_real(["info", "--image-opts", words])
    with PosixFile.open("a") as file, pytest.raises(OptionError) as caught:
        RAW.open(file, options=window, context=Context())
    assert told.err == f"qemu-img: Could not open '{words}': {caught.value}\n"


def test_a_window_that_starts_inside_a_sector_is_rounded_up(work: Path) -> None:
    """The raw sheet's example; the real program's `map` of it ends in an assertion."""
    write_raw(work / "a", "A-B")
    with opened("a", offset=1) as image:
        assert image.size == 196608
        last = image.extents(image.size - 1, 1)
        assert [(extent.flags, extent.host) for extent in last] == [(ZERO, 196608)]


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 300000), st.integers(0, 300000), st.integers(0, 2 * MIB), st.integers(0, 2 * MIB))
def test_any_range_of_extents_is_covered_and_points_at_its_bytes(
    length: int, offset: int, start: int, span: int
) -> None:
    file = MemoryStorage(pattern("A", 0, length // 8 * 8), block=4096)
    try:
        image = RAW.open(file, options={"offset": offset}, context=Context())
    except OptionError:
        assert offset > image_length(length // 8 * 8)
        return
    start = min(start, image.size)
    span = min(span, image.size - start)
    at = start
    for extent in image.extents(start, span):
        assert (extent.start, extent.host) == (at, at + offset)
        assert extent.flags in (MAPPED, ZERO)
        at += extent.length
    assert at == start + span


def image_length(length: int) -> int:
    return -(-length // 512) * 512


# -- creation


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("size", [0, 1, 512, 1000, 2048, 4096, MIB, 5 * MIB + 512])
@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_a_new_image_is_the_file_that_qemu_makes(work: Path, mode: str, size: int) -> None:
    run_real(["create", "-q", "-f", "raw", "-o", f"preallocation={mode}", "real", str(size)]).ok()
    with create(new_file("ours"), size, preallocation=mode) as image:
        image.flush()
    real, ours = os.stat("real"), os.stat("ours")
    assert (ours.st_size, ours.st_blocks) == (real.st_size, real.st_blocks)
    assert their_map("-f", "raw", "ours") == their_map("-f", "raw", "real")


@pytest.mark.peer("qemu-img")
def test_a_converted_image_is_the_file_that_qemu_makes(work: Path) -> None:
    write_raw(work / "source", "--A-B---")
    run_real(["convert", "-f", "raw", "-O", "raw", "source", "real"]).ok()
    with opened("source") as source, create(new_file("ours"), source.size) as image:
        for extent in source.extents(0, source.size):
            if extent.flags & MAPPED:
                (place,) = image.allocate(extent.start, extent.length)
                assert place.source is not None
                place.source.write(source.file.read(extent.start, extent.length), extent.start)
            else:
                image.mark_zero(extent.start, extent.length)
        image.flush()
    assert Path("ours").read_bytes() == Path("real").read_bytes()
    assert their_map("-f", "raw", "ours") == their_map("-f", "raw", "real")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "option", ["preallocation=metadata", "preallocation=foo", "extent_size_hint=4294967296"], ids=str
)
def test_what_creation_refuses_it_refuses_in_the_words_of_qemu(work: Path, option: str) -> None:
    told = run_real(["create", "-q", "-f", "raw", "-o", option, "real", "1M"])
    name, _, text = option.partition("=")
    with pytest.raises(OptionError) as caught:
        RAW.validate_create(MIB, {name: int(text) if text.isdigit() else text})
    assert told.err == f"qemu-img: real: {caught.value}\n"


@pytest.mark.peer("qemu-img")
def test_a_size_that_the_file_system_refuses_is_too_large_for_the_format(work: Path) -> None:
    size = 7 << 60
    told = run_real(["create", "-q", "-f", "raw", "real", str(size)])
    if told.code == 0:
        pytest.skip("this file system takes files of 7 EiB")
    with new_file("ours") as file, pytest.raises(LimitError) as caught:
        create(file, size)
    assert told.err == f"qemu-img: real: {caught.value}\n"


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("size", [0, 1, 512, 1000, MIB])
def test_measure_agrees_with_qemu(size: int) -> None:
    told = json.loads(run_real(["measure", "--output=json", "-O", "raw", "--size", str(size)]).ok().out)
    measure = RAW.measure(MeasureSource(size, None, None), {})
    assert (measure.required, measure.fully_allocated) == (told["required"], told["fully-allocated"])


def test_a_place_of_fixed_length_must_be_long_enough() -> None:
    class Fixed(MemoryStorage):
        driver = "host_device"
        plural = "device files"
        fixed_size = True

    with pytest.raises(NotSupported, match=r"^Cannot grow device files$"):
        create(Fixed(size=MIB), MIB + 512)
    with pytest.raises(NotSupported, match=r"^Unsupported preallocation mode 'full'$"):
        create(Fixed(size=MIB), MIB, preallocation="full")
    place = Fixed(b"\xaa" * MIB)
    place.zero_init = False
    image = create(place, MIB // 2)
    assert not image.zero_init
    image.mark_zero(0, MIB // 2)
    image.flush()
    image.abandon()
    assert place.content() == bytes(MIB // 2) + b"\xaa" * (MIB // 2)


# -- interruption


def test_before_flush_the_file_is_too_short_and_after_it_whole(work: Path) -> None:
    with create(new_file("a"), MIB) as image:
        assert os.stat("a").st_size < MIB
        image.file.write(pattern("A", 0, 4096), 0)
        image.mark_zero(4096, MIB - 4096)
        assert os.stat("a").st_size < MIB
        image.flush()
        assert os.stat("a").st_size == MIB
    assert Path("a").read_bytes() == pattern("A", 0, 4096) + bytes(MIB - 4096)


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_an_abandoned_image_does_not_claim_to_be_whole(work: Path, mode: str) -> None:
    with create(new_file("a"), MIB, preallocation=mode) as image:
        image.file.write(pattern("A", MIB - 4096, 4096), MIB - 4096)
        image.abandon()
    assert os.stat("a").st_size < MIB


def test_abandoning_an_image_that_existed_before_leaves_it_alone(work: Path) -> None:
    write_raw(work / "a", "AB")
    image = RAW.open(PosixFile.open("a", writable=True), writable=True, context=Context())
    with image:
        image.abandon()
    assert Path("a").read_bytes() == pattern("A", 0, 65536) + pattern("B", 65536, 65536)


def steps(file: Storage, mode: str) -> None:
    """A small job on a new image, ending in flush or, where anything fails, in abandon."""
    image = create(file, 65536, preallocation=mode)
    try:
        image.file.write(pattern("A", 0, 8192), 0)
        image.mark_zero(8192, 8192)
        image.file.write(pattern("A", 16384, 49152), 16384)
        image.flush()
    except QimgError:
        image.abandon()
        raise


@pytest.mark.parametrize("cut", ["E", "N"])
@pytest.mark.parametrize("mode", ["off", "full"])
def test_a_fault_at_any_change_leaves_a_whole_image_or_one_that_is_too_short(mode: str, cut: str) -> None:
    counting = FaultStorage(MemoryStorage())
    steps(counting, mode)
    expected = pattern("A", 0, 8192) + bytes(8192) + pattern("A", 16384, 49152)
    for number in range(counting.counts["change"]):
        child = MemoryStorage()
        script = "c" * number + cut if number else f"-c{cut}"
        with pytest.raises(QimgError):
            steps(FaultStorage(child, [script]), mode)
        assert child.size < 65536 or child.content() == expected


def test_the_length_comes_after_the_data_are_durable() -> None:
    place = RecordStorage(MemoryStorage())
    steps(place, "off")
    assert [event.kind for event in place.events][-3:] == ["flush", "write", "flush"]
    whole = pattern("A", 0, 8192) + bytes(8192) + pattern("A", 16384, 49152)
    begin = [event.kind for event in place.events].index("write")
    for prefix in range(begin, len(place.events) + 1):
        # Changes of length reach the disk in order on a file system with a journal; data may not.
        unsafe = [number for number in place.unsafe(prefix) if place.events[number].kind != "resize"]
        for lost in ([], unsafe[:1], unsafe[-1:], unsafe):
            found = place.replay(prefix, lost)
            assert found.size < 65536 or found.content() == whole


@pytest.mark.parametrize("size", [512, 4096, 65536, 66048])
def test_whatever_is_written_first_the_file_is_too_short_until_flush(size: int) -> None:
    place = MemoryStorage()
    image = create(place, size)
    for start in reversed(range(0, size, 512)):
        write(image, pattern("A", start, 512), start)
        assert place.size < size
        assert image.file.read(start, size - start) == pattern("A", start, size - start)
    write(image, pattern("B", size - 8, 8), size - 8)
    image.flush()
    assert place.content() == pattern("A", 0, size - 8) + pattern("B", size - 8, 8)
    write(image, pattern("C", size - 512, 512), size - 512)
    assert place.content()[-512:] == pattern("C", size - 512, 512)


def test_before_flush_a_new_image_reads_as_what_was_written_and_copied_to_it() -> None:
    image = create(MemoryStorage(), 8192)
    source = MemoryStorage(pattern("S", 0, 8192))
    (place,) = image.allocate(4096, 4096)
    assert place.source is not None
    place.source.copy_from(source, 4096, 4096, 4096)
    place.source.zero(8000, 50)
    expected = bytearray(bytes(4096) + pattern("S", 4096, 4096))
    expected[8000:8050] = bytes(50)
    for start, length in ((0, 8192), (7000, 1192), (8190, 2), (8000, 1000), (9000, 10)):
        assert image.file.read(start, length) == bytes(expected[start : start + length]).ljust(length, b"\0")
    image.flush()
    assert image.file.read(0, 8192) == expected


# -- the image whose format was guessed


@pytest.fixture
def guarded() -> Iterator[RawImage]:
    """A guessed raw image at offset 512, over a probe that knows one magic."""

    def probe(sector: bytes) -> str:
        assert len(sector) == 512
        return "qcow2" if sector.startswith(b"QFI\xfb") else "raw"

    image = RAW.open(MemoryStorage(size=65536), options={"offset": 512}, writable=True, context=Context())
    assert isinstance(image, RawImage)
    image.guard_first_sector(probe)
    yield image


def write(image: RawImage, data: bytes, guest: int) -> None:
    (place,) = image.allocate(guest, len(data))
    assert place.source is not None
    assert place.host is not None
    place.source.write(data, place.host)


def test_a_guessed_raw_image_cannot_be_given_another_formats_header(guarded: RawImage) -> None:
    for data in (b"QFI\xfb", b"QFI\xfb" + bytes(100000)):
        with pytest.raises(StorageError, match=r"^Operation not permitted$") as caught:
            write(guarded, data, 0)
        assert caught.value.errno == errno.EPERM
    write(guarded, b"QF", 0)
    with pytest.raises(StorageError):
        write(guarded, b"I\xfb", 2)
    assert guarded.file.read(512, 4) == b"QF\0\0"


def test_other_writes_to_a_guessed_raw_image_pass(guarded: RawImage) -> None:
    write(guarded, b"x" * 1024, 0)
    write(guarded, b"QFI\xfb", 512)
    write(guarded, b"", 0)
    guarded.mark_zero(0, 512)
    assert guarded.file.read(512, 1024) == bytes(512) + b"QFI\xfb" + b"x" * 508


@pytest.mark.peer("qemu-io")
def test_the_real_program_refuses_the_same_write(work: Path) -> None:
    """The sheet's fact that the guard stands on."""
    Path("a").write_bytes(bytes(65536))
    Path("header").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(504))
    told = run_peer("qemu-io", ["-c", "write -s header 0 512", "a"])
    assert "Operation not permitted" in told.out + told.err
