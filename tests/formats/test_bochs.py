"""bochs: what growing images read as, and what of them is refused (bochs sheet)."""

from __future__ import annotations

import bz2
import random
import struct
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.errors import CorruptImage, FormatError, NotSupported
from qimg.formats.bochs import Bochs, BochsImage
from qimg.storage.memory import MemoryStorage
from support.run import run_qimg_inprocess, run_real

SAMPLES = Path(__file__).parents[1] / "samples"
ABSENT = 0xFFFFFFFF


def header(**fields: int | bytes) -> bytes:
    """A header; version 2, two extents of 4 KiB, unless `fields` say something else."""
    values: dict[str, int | bytes] = {
        "magic": b"Bochs Virtual HD Image", "type": b"Redolog", "subtype": b"Growing", "version": 0x20000,
        "header_size": 512, "catalog": 2, "bitmap": 1, "extent": 4096, "disk": 8192,
    }  # fmt: skip
    values.update(fields)
    disk = values.pop("disk")
    head = struct.pack("<32s16s16s5I", *values.values())
    tail = struct.pack("<Q", disk) if values["version"] == 0x10000 else struct.pack("<IQ", 0, disk)
    return (head + tail).ljust(512, b"\0")


def opened(data: bytes) -> BochsImage:
    return Bochs().open(MemoryStorage(data), context=Context())


def grown(seed: int, *, extent: int, count: int, version: int = 0x20000) -> bytes:
    """An image with extents in any order, each with some of its sectors."""
    rng = random.Random(seed)
    present = [number for number in range(count) if rng.random() < 0.7]
    rng.shuffle(present)
    catalog = [ABSENT] * count
    data = b""
    sectors = extent // 512
    for place, number in enumerate(present):
        catalog[number] = place
        bits = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(-(-sectors // 8)))
        data += bits.ljust(-(-len(bits) // 512) * 512, b"\0") + rng.randbytes(extent)
    head = header(
        version=version, catalog=count, bitmap=-(-sectors // 8), extent=extent, disk=extent * count - 1024
    )
    return head + struct.pack(f"<{count}I", *catalog) + data


def test_an_image_of_bximage_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(bz2.decompress((SAMPLES / "empty.bochs.bz2").read_bytes()))
    run_qimg_inprocess(["convert", "-O", "raw", "-S", "0", path, tmp_path / "out"]).ok()
    assert (tmp_path / "out").read_bytes() == bytes(1032192)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("extent", [512, 1024, 4096, 65536, 1 << 20])
@pytest.mark.parametrize("version", [0x10000, 0x20000])
def test_sectors_read_as_the_real_program_reads_them(extent: int, version: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(grown(extent, extent=extent, count=9, version=version))
    run_real(["convert", "-O", "raw", tmp_path / "x", tmp_path / "real"]).ok()
    run_qimg_inprocess(["convert", "-O", "raw", tmp_path / "x", tmp_path / "ours"]).ok()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes()


def test_the_example_of_the_sheet() -> None:
    """Catalog 0, sectors 0 and 2 present."""
    data = bytes(range(256)) * 16
    image = opened(header() + struct.pack("<2I", 0, ABSENT) + b"\x05".ljust(512, b"\0") + data)
    buf = bytearray(b"x" * 8192)
    image.read_into(buf, 0)
    assert bytes(buf) == data[:512] + bytes(512) + data[1024:1536] + bytes(8192 - 1536)


def test_ranges_that_are_no_whole_sectors() -> None:
    image = opened(grown(3, extent=4096, count=6))
    whole = bytearray(image.size)
    image.read_into(whole, 0)
    rng = random.Random(4)
    for _ in range(200):
        start = rng.randrange(image.size)
        length = rng.randrange(1, min(9000, image.size - start) + 1)
        buf = bytearray(length)
        image.read_into(buf, start)
        assert buf == whole[start : start + length]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": b"Bochs Virtual HD Images"}, "Image not in Bochs format"),
        ({"type": b"Redo"}, "Image not in Bochs format"),
        ({"subtype": b"Undoable"}, "Image not in Bochs format"),
        ({"subtype": b"Volatile"}, "Image not in Bochs format"),
        ({"version": 0x30000}, "Image not in Bochs format"),
        ({"catalog": 0x100001}, "Catalog size is too large"),
        ({"extent": 0}, "Extent size must be at least 512"),
        ({"extent": 256}, "Extent size must be at least 512"),
        ({"extent": 1536}, "Extent size 1536 is not a power of two"),
        ({"extent": 16 << 20}, "Extent size 16777216 is too large"),
        ({"disk": 8193 + 511}, "Catalog size is too small for this disk size"),
        ({"disk": (1 << 63) - 1}, "Catalog size is too small for this disk size"),
    ],
)
def test_what_the_real_program_refuses_in_its_words(
    fields: dict[str, int | bytes], message: str, tmp_path: Path
) -> None:
    data = header(**fields) + bytes(1024)
    (tmp_path / "x").write_bytes(data)
    real = run_real(["info", "-f", "bochs", tmp_path / "x"])
    assert real.code == 1 and real.err.rstrip().endswith(message)
    with pytest.raises(FormatError) as caught:
        opened(data)
    assert str(caught.value) == message
    assert caught.value.field is not None


def test_the_catalog_covers_a_disk_that_ends_inside_an_extent() -> None:
    assert opened(header(disk=8191) + bytes(1024)).size == 7680


@pytest.mark.parametrize("bitmap", [0, 1])
def test_a_bitmap_that_cannot_tell_of_all_sectors_is_refused(bitmap: int) -> None:
    with pytest.raises(FormatError, match="Bitmap size"):
        opened(header(bitmap=bitmap, extent=8192) + bytes(1024))


@pytest.mark.parametrize("fields", [{"header_size": 600}, {"header_size": 0xFFFFFFFF}, {"catalog": 0x100000}])
def test_a_catalog_that_the_file_does_not_hold_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="beyond the end of the file"):
        opened(header(**fields) + bytes(8))


def test_a_sector_that_is_there_but_beyond_the_end_of_the_file_fails() -> None:
    image = opened(header() + struct.pack("<2I", 0, ABSENT) + b"\x81".ljust(512, b"\0") + bytes(1024))
    image.read_into(bytearray(3584), 0)
    with pytest.raises(CorruptImage, match="beyond the end of the file"):
        image.read_into(bytearray(512), 3584)


def test_an_extent_beyond_the_end_of_the_file_has_no_sectors() -> None:
    image = opened(header() + struct.pack("<2I", 0xFFFFFFFE, ABSENT))
    buf = bytearray(b"x" * 4096)
    image.read_into(buf, 0)
    assert bytes(buf) == bytes(4096)


def test_it_cannot_be_opened_for_writing() -> None:
    with pytest.raises(NotSupported, match=r"^Image is read-only$"):
        Bochs().open(MemoryStorage(header() + bytes(8)), writable=True, context=Context())
