"""cloop: what images read as, and what of them is refused (cloop sheet)."""

from __future__ import annotations

import bz2
import hashlib
import os
import struct
import zlib
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.errors import CorruptImage, FormatError, NotSupported, QimgError
from qimg.formats.cloop import Cloop, CloopImage
from qimg.storage.memory import MemoryStorage
from qimg.storage.posix import PosixFile
from support.run import run_qimg_inprocess, run_real

SAMPLES = Path(__file__).parents[1] / "samples"
PREAMBLE = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
BLOCK = 4096
WORDS = b"".join(struct.pack(">Q", 8 * number) for number in range(BLOCK))
BLOCKS = [WORDS[at : at + BLOCK] for at in range(0, len(WORDS), BLOCK)]


def cloop(
    blocks: list[bytes], *, size: int = BLOCK, offsets: list[int] | None = None, count: int | None = None
) -> bytes:
    """An image of these compressed blocks; `offsets` and `count` say something else than is so."""
    if offsets is None:
        offsets = [136 + 8 * (len(blocks) + 1)]
        for block in blocks:
            offsets.append(offsets[-1] + len(block))
    number = len(blocks) if count is None else count
    head = PREAMBLE.ljust(128, b"\0") + struct.pack(">II", size, number)
    return head + struct.pack(f">{len(offsets)}Q", *offsets) + b"".join(blocks)


def opened(data: bytes) -> CloopImage:
    return Cloop().open(MemoryStorage(data), context=Context())


GOOD = cloop([zlib.compress(block) for block in BLOCKS])


def test_an_image_of_create_compressed_fs_reads_as_its_makers_say(tmp_path: Path) -> None:
    path = tmp_path / "simple"
    path.write_bytes(bz2.decompress((SAMPLES / "simple-pattern.cloop.bz2").read_bytes()))
    run_qimg_inprocess(["convert", "-O", "raw", path, tmp_path / "out"]).ok()
    digest = hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
    assert digest == "7c77af2771e0f86b7ec9707374c7416037fedae45cb0e6e27fbdf55688a5dd12"


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("size", [512, 4096, 5 * 512, 65536, (1 << 20) + 512])
def test_blocks_of_every_size_read_as_the_real_program_reads_them(size: int, tmp_path: Path) -> None:
    text = (WORDS * (7 * size // len(WORDS) + 1))[: 7 * size]
    blocks = [zlib.compress(text[at : at + size], at % 10) for at in range(0, len(text), size)]
    (tmp_path / "x").write_bytes(cloop(blocks, size=size))
    run_real(["convert", "-O", "raw", tmp_path / "x", tmp_path / "real"]).ok()
    run_qimg_inprocess(["convert", "-O", "raw", tmp_path / "x", tmp_path / "ours"]).ok()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes() == text


def test_ranges_across_blocks_and_inside_them() -> None:
    image = opened(GOOD)
    for start, length in ((0, 1), (4095, 2), (4000, 9000), (8192, 4096), (0, len(WORDS))):
        buf = bytearray(length)
        image.read_into(buf, start)
        assert bytes(buf) == WORDS[start : start + length]


@pytest.mark.parametrize(
    "data",
    [
        zlib.compress(BLOCKS[1])[:-1],
        zlib.compress(BLOCKS[1])[:-4] + b"abcd",
        zlib.compress(BLOCKS[1][:-1]),
        zlib.compress(BLOCKS[1] + b"x"),
        b"",
        BLOCKS[1],
    ],
)
def test_a_damaged_block_fails_and_the_others_read(data: bytes) -> None:
    image = opened(cloop([zlib.compress(BLOCKS[0]), data, zlib.compress(BLOCKS[2])]))
    for length in (BLOCK, 512, 512):
        with pytest.raises(CorruptImage) as caught:
            image.read_into(bytearray(length), BLOCK)
        assert caught.value.guest == BLOCK
    for number in (0, 2):
        buf = bytearray(BLOCK)
        image.read_into(buf, number * BLOCK)
        assert bytes(buf) == BLOCKS[number]


def test_a_block_beyond_the_end_of_the_file_fails() -> None:
    image = opened(cloop([b""], offsets=[1 << 40, (1 << 40) + 100]))
    with pytest.raises(CorruptImage, match="beyond the end of the file"):
        image.read_into(bytearray(512), 0)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (cloop([], size=100), "block_size 100 must be a multiple of 512"),
        (cloop([], size=0), "block_size cannot be zero"),
        (cloop([], size=(64 << 20) + 512), "block_size 67109376 must be 64 MB or less"),
        (cloop([], count=536870912), "n_blocks 536870912 must be 536870911 or less"),
        (cloop([], count=0xFFFFFFFF), "n_blocks 4294967295 must be 536870911 or less"),
        (cloop([], count=1 << 26), "image requires too many offsets, try increasing block size"),
        (
            cloop([b"", b""], offsets=[300, 400, 399]),
            "offsets not monotonically increasing at index 2, image file is corrupt",
        ),
        (
            cloop([b"", b""], offsets=[300, 301 + (128 << 20), 1 << 30]),
            "invalid compressed block size at index 1, image file is corrupt",
        ),
        (
            cloop([b"", b""], offsets=[(1 << 64) - 1, 0, 0]),
            "offsets not monotonically increasing at index 1, image file is corrupt",
        ),
    ],
)
def test_what_the_real_program_refuses_in_its_words(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data + bytes(512))
    real = run_real(["info", "-f", "cloop", tmp_path / "x"])
    assert real.err.splitlines()[-1].endswith(message)
    with pytest.raises(FormatError) as caught:
        opened(data)
    assert str(caught.value) == message
    assert caught.value.field is not None and caught.value.offset is not None


def test_an_image_without_blocks_is_empty() -> None:
    assert opened(cloop([])).size == 0


def test_a_table_that_the_file_does_not_hold_is_not_asked_for_memory() -> None:
    with pytest.raises(FormatError, match="reach beyond the end of the file"):
        opened(cloop([], count=(1 << 26) - 1))


def test_a_size_is_counted_in_64_bits(tmp_path: Path) -> None:
    """2^26 - 1 blocks of 64 MiB, all of them empty: a hole of 512 MiB, looked at within seconds."""
    path = tmp_path / "x"
    path.write_bytes(cloop([], size=64 << 20, offsets=[0], count=(1 << 26) - 1))
    os.truncate(path, (512 << 20) + 136)
    with Cloop().open(PosixFile.open(str(path)), context=Context()) as image:
        assert image.size == ((1 << 26) - 1) << 26
        with pytest.raises(QimgError):
            image.read_into(bytearray(512), image.size - 512)


def test_without_probing_the_preamble_may_say_anything() -> None:
    assert opened(b"x" * 128 + GOOD[128:]).size == len(WORDS)


def test_it_cannot_be_opened_for_writing() -> None:
    with pytest.raises(NotSupported, match=r"^Image is read-only$"):
        Cloop().open(MemoryStorage(GOOD), writable=True, context=Context())
