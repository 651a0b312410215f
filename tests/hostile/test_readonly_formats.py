"""Hostile dmg, cloop and bochs images cost an error, not memory and not minutes.

Each image is opened and read here and there in a process of its own, with 400 MiB of address space and a few
seconds. Mutations of sound images end in content or in one of our errors.
"""

from __future__ import annotations

import base64
import bz2
import lzma
import os
import resource
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg import adc, lzfse
from qimg.codec import CodecError, unpack
from qimg.context import Context
from qimg.errors import QimgError
from qimg.formats import registry
from qimg.storage.memory import MemoryStorage
from support import udif
from support.bounds import bounded
from support.udif import Chunk

SECONDS = 20
SPACE = 400 << 20
SAMPLES = Path(__file__).parents[1] / "samples"
IMAGES = {"dmg": "simple-dmg.dmg", "cloop": "simple-pattern.cloop", "bochs": "empty.bochs"}

SCRIPT = """
import sys
from qimg.context import Context
from qimg.errors import QimgError
from qimg.formats import registry
from qimg.storage.posix import PosixFile

try:
    image = registry.get(sys.argv[1]).open(PosixFile.open(sys.argv[2]), context=Context(lambda notice: None))
except QimgError as error:
    print(type(error).__name__, error)
else:
    for start in (0, image.size // 3, max(0, image.size - 70000)):
        buf = bytearray(min(image.size - start, 70000))
        try:
            image.read_into(buf, start)
        except QimgError as error:
            print(type(error).__name__, error)
print("peak", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def survive(format: str, path: Path) -> str:
    """What opening and reading printed. Fails unless it ended in values or errors of ours, within 256 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, format, str(path)],
        preexec_fn=limit,
        env={**os.environ, "PYTHONPATH": str(Path(qimg.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=SECONDS * 3,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, _, peak = done.stdout.rpartition("peak ")
    assert int(peak) < 256 << 10
    return said


def mish(rows: bytes, **fields: int) -> bytes:
    head = struct.pack(">4sIQQQ", b"mish", 1, fields.get("first", 0), 0, fields.get("base", 0))
    return head.ljust(204, b"\0") + rows


def plist_image(text: bytes, sectors: int = 8) -> bytes:
    return text + udif.trailer(xml_length=len(text), sectors=sectors)


# -- dmg


def test_the_largest_property_list_full_of_chunks(tmp_path: Path) -> None:
    """300000 chunks, in the worst order."""
    rows = b"".join(
        struct.pack(">IIQQQQ", udif.RAW, 0, number, 1, 0, 512)
        for number in range((12 << 20) // 40 - 20, 0, -1)
    )
    text = b"<data>" + base64.b64encode(mish(rows)) + b"</data>"
    assert len(text) <= 16 << 20
    (tmp_path / "x").write_bytes(plist_image(text, sectors=1 << 18))
    assert "no chunk has the guest sector 0" in survive("dmg", tmp_path / "x")


def test_a_property_list_of_empty_data_elements(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(plist_image(b"<data></data>" * ((16 << 20) // 13)))
    survive("dmg", tmp_path / "x")


def test_a_property_list_larger_than_any(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(plist_image(b" " * ((16 << 20) + 1)))
    assert "xml_length 16777217 is larger than 16777216" in survive("dmg", tmp_path / "x")


def test_a_property_list_with_entities_is_not_expanded(tmp_path: Path) -> None:
    text = b'<!DOCTYPE x [<!ENTITY a "' + b"a" * 1000 + b'">' + b"<!ENTITY b '" + b"&a;" * 1000 + b"'>]>"
    (tmp_path / "x").write_bytes(plist_image(text + b"<data>&b;&b;</data>"))
    survive("dmg", tmp_path / "x")


def test_the_largest_resource_fork(tmp_path: Path) -> None:
    rows = b"".join(struct.pack(">IIQQQQ", 1, 0, number, 1, 0, 512) for number in range(800000, 0, -1))
    fork = udif.resource_fork([mish(rows)])
    (tmp_path / "x").write_bytes(fork + udif.trailer(fork_length=len(fork), sectors=1 << 20))
    survive("dmg", tmp_path / "x")
    fork = udif.resource_fork([mish(rows + rows[:4000000])])
    (tmp_path / "x").write_bytes(fork + udif.trailer(fork_length=len(fork), sectors=1 << 20))
    assert "are more than 33554432" in survive("dmg", tmp_path / "x")


def test_a_resource_fork_of_the_smallest_resources(tmp_path: Path) -> None:
    fork = udif.resource_fork([b"x"] * 2000000)
    (tmp_path / "x").write_bytes(fork + udif.trailer(fork_length=len(fork), sectors=8))
    survive("dmg", tmp_path / "x")


def test_sectors_and_places_beyond_64_bits(tmp_path: Path) -> None:
    rows = b"".join(
        struct.pack(">IIQQQQ", kind, 0, (1 << 64) - 1, 8, (1 << 64) - 1, 100)
        for kind in (udif.ZERO, udif.RAW, udif.ZLIB)
    )
    rows += struct.pack(">IIQQQQ", udif.ZERO, 0, 1, (1 << 64) - 1, 0, 0)
    rows += struct.pack(">IIQQQQ", udif.ZLIB, 0, 0, 8, (1 << 64) - 1, 100)
    for first in (0, 1, (1 << 64) - 1):
        text = b"<data>" + base64.b64encode(mish(rows, first=first, base=(1 << 64) - 1)) + b"</data>"
        (tmp_path / "x").write_bytes(plist_image(text))
        assert "CorruptImage" in survive("dmg", tmp_path / "x")


@pytest.mark.parametrize("kind", ["zlib", "bzip2", "xz"])
def test_bombs(kind: str, tmp_path: Path) -> None:
    """A chunk of 64 MiB, one of 512 bytes, and as much compressed data as a chunk may have."""
    compress = {"zlib": zlib.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind]
    number = {"zlib": udif.ZLIB, "bzip2": udif.BZIP2, "xz": udif.XZ}[kind]
    bomb = compress(bytes(200 << 20))
    chunks = [
        Chunk(number, 0, 1, bomb),
        Chunk(number, 1, 131072, bomb),
        Chunk(number, 131073, 131072, compress(bytes(64 << 20))),
    ]
    udif.write(tmp_path / "x", chunks)
    assert "gives more than" in survive("dmg", tmp_path / "x")


def test_a_chunk_of_as_much_stored_data_as_there_may_be(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 60
    stream = zlib.compressobj(0)
    stored = stream.compress(data) + stream.flush()
    udif.write(tmp_path / "x", [Chunk(udif.ZLIB, 0, len(data) // 512, stored)])
    assert survive("dmg", tmp_path / "x") == ""


def test_an_xz_stream_that_wants_a_large_dictionary() -> None:
    """3 GiB, in the filter's only property: the block's header at 12 is its own size, flags, the filter's id,
    the size of its properties, the property, padding, and a checksum."""
    stream = bytearray(lzma.compress(b"x" * 512, preset=0))
    stream[12 + 4] = 39
    head = bytes(stream[12:20])
    stream[20:24] = zlib.crc32(head).to_bytes(4, "little")
    with pytest.raises(CodecError, match=r"[Mm]emory"):
        unpack("xz", [bytes(stream)], memoryview(bytearray(512)))


def test_many_empty_blocks_of_lzfse_cost_nothing() -> None:
    block = b"bvx2" + struct.pack("<IQQQ", 0, 7 << 60, 7 << 60, 32)
    with pytest.raises(ValueError, match="a block says it gives 0 bytes"):
        lzfse.decode(block * 100000 + b"bvx$", 512)


# -- cloop


def test_the_longest_table_of_offsets_in_a_hole(tmp_path: Path) -> None:
    head = bytes(128) + struct.pack(">II", 512, (1 << 26) - 1)
    (tmp_path / "x").write_bytes(head)
    os.truncate(tmp_path / "x", 513 << 20)
    assert "CorruptImage" in survive("cloop", tmp_path / "x")


def test_the_largest_block_of_a_bomb(tmp_path: Path) -> None:
    for inflated in (64 << 20, 200 << 20):
        bomb = zlib.compress(bytes(inflated))
        head = bytes(128) + struct.pack(">IIQQ", 64 << 20, 1, 152, 152 + len(bomb))
        (tmp_path / "x").write_bytes(head + bomb)
        assert ("gives more than" in survive("cloop", tmp_path / "x")) == (inflated > 64 << 20)


# -- bochs


def test_the_largest_disk_of_the_shortest_file(tmp_path: Path) -> None:
    texts = struct.pack("<32s16s16s", b"Bochs Virtual HD Image", b"Redolog", b"Growing")
    head = texts + struct.pack("<5IIQ", 0x20000, 512, 1 << 20, 2048, 8 << 20, 0, 8 << 40)
    (tmp_path / "x").write_bytes(head)
    os.truncate(tmp_path / "x", 512 + (4 << 20))
    assert survive("bochs", tmp_path / "x") == ""
    (tmp_path / "y").write_bytes(head[:72] + struct.pack("<3IIQ", 1 << 20, 0xFFFFFFFF, 512, 0, 1 << 29))
    os.truncate(tmp_path / "y", 512 + (4 << 20))
    assert survive("bochs", tmp_path / "y") == ""


# -- mutations


def read_somehow(format: str, data: bytes) -> None:
    """Open and read; errors of ours are fine, everything else fails the test."""
    try:
        image = registry.get(format).open(MemoryStorage(data), context=Context(lambda notice: None))
    except QimgError:
        return
    for start in (0, image.size // 2, max(0, image.size - 5000)):
        buf = bytearray(min(5000, image.size - start))
        try:
            image.read_into(buf, start)
        except QimgError:
            pass


def sample(format: str) -> bytes:
    return bz2.decompress((SAMPLES / (IMAGES[format] + ".bz2")).read_bytes())


def interesting(format: str, data: bytes) -> list[int]:
    """Where the structures are."""
    return {
        "dmg": list(range(len(data) - 512, len(data))),
        "cloop": list(range(128, 280)),
        "bochs": list(range(96)),
    }[format]


@pytest.mark.parametrize("format", list(IMAGES))
@given(data=st.data())
@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
def test_a_changed_image_reads_or_fails_with_an_error_of_ours(format: str, data: st.DataObject) -> None:
    image = bytearray(sample(format))
    places = interesting(format, bytes(image))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(places) | st.integers(0, len(image) - 1))
        new = data.draw(
            st.binary(min_size=1, max_size=8)
            | st.sampled_from([b"\xff" * 4, b"\0" * 8, b"\x7f" + b"\xff" * 7])
        )
        image[at : at + len(new)] = new
    if data.draw(st.booleans()):
        del image[data.draw(st.integers(0, len(image))) :]
    with bounded():
        read_somehow(format, bytes(image))


CHUNKS = [
    Chunk(udif.ZLIB, 0, 8, zlib.compress(b"abcdefgh" * 512)),
    Chunk(udif.BZIP2, 8, 8, bz2.compress(b"abcdefgh" * 512)),
    Chunk(udif.XZ, 16, 8, lzma.compress(b"abcdefgh" * 512)),
    Chunk(udif.LZFSE, 24, 128, (SAMPLES / "lzfse" / "bvx2-chunk.lzfse").read_bytes()),
    Chunk(udif.ADC, 152, 1, b"\x83abcd" + bytes((0x40 | 63, 0, 3)) * 8),
]


@given(data=st.data())
@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
def test_changed_chunks_of_every_kind_read_or_fail_with_an_error_of_ours(data: st.DataObject) -> None:
    chunks = list(CHUNKS)
    number = data.draw(st.integers(0, len(chunks) - 1))
    stored = bytearray(chunks[number].data)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(stored) - 1, 700)) | st.integers(0, len(stored) - 1))
        stored[at] = data.draw(st.integers(0, 255))
    image = udif.udif([*chunks[:number], chunks[number]._replace(data=bytes(stored)), *chunks[number + 1 :]])
    opened = registry.get("dmg").open(MemoryStorage(image), context=Context())
    buf = bytearray(opened.size)
    with bounded(), suppress(QimgError):
        opened.read_into(buf, 0)
    assert len(buf) == opened.size


@given(st.binary(max_size=300), st.integers(1, 5000))
@settings(max_examples=300, deadline=5000)
def test_any_bytes_decode_or_fail_as_they_say(data: bytes, size: int) -> None:
    for decode, prefix in (
        (adc.decode, b""),
        (lzfse.decode, b""),
        (lzfse.decode, b"bvxn" + struct.pack("<II", size, len(data))),
    ):
        try:
            assert len(decode(prefix + data, size)) == size
        except (ValueError, IndexError, struct.error):
            pass
