"""dmg: what images of every kind of chunk read as, and what of them is refused (dmg sheet).

Chunks are compressed by the standard library, by Apple's LZFSE library (tests/samples/lzfse), or by hand from
the published description; the real program reads the kinds that it knows, 7-Zip all of them.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import sys
import zlib
from pathlib import Path
from threading import Thread

import pytest

from qimg import adc, lzfse
from qimg.context import Context, Notice
from qimg.errors import CorruptImage, FormatError, LimitError, NotSupported
from qimg.formats.dmg import Dmg, DmgImage
from qimg.storage.memory import MemoryStorage
from support import udif
from support.run import run_peer, run_qimg_inprocess, run_real
from support.udif import Chunk

SAMPLES = Path(__file__).parents[1] / "samples"
SQUARES = b"".join(b"%d squared is %d\n" % (number, number * number) for number in range(3000))
NOISE = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(64))
TEXT = SQUARES[: 64 * 512]
SECTORS = len(TEXT) // 512


def opened(data: bytes, notices: list[Notice] | None = None) -> DmgImage:
    warn = (lambda notice: None) if notices is None else notices.append
    return Dmg().open(MemoryStorage(data), context=Context(warn))


def content(data: bytes) -> bytes:
    image = opened(data)
    buf = bytearray(image.size)
    image.read_into(buf, 0)
    return bytes(buf)


def vector(name: str) -> bytes:
    return (SAMPLES / "lzfse" / f"{name}.lzfse").read_bytes()


def packed(kind: int, sector: int = 0, data: bytes = TEXT) -> Chunk:
    how = {udif.ZLIB: zlib.compress, udif.BZIP2: bz2.compress, udif.XZ: lzma.compress, udif.RAW: bytes}
    return Chunk(kind, sector, len(data) // 512, how[kind](data))


def sectors(*chunks: Chunk, **options: object) -> bytes:
    return content(udif.udif(chunks, **options))  # type: ignore[arg-type]


# -- what is there


def test_an_image_of_macos_reads_as_its_makers_say(tmp_path: Path) -> None:
    path = tmp_path / "simple.dmg"
    path.write_bytes(bz2.decompress((SAMPLES / "simple-dmg.dmg.bz2").read_bytes()))
    run_qimg_inprocess(["convert", "-O", "raw", path, tmp_path / "out"]).ok()
    digest = hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
    assert digest == "20647e0a98a830a6a250b91e0e6d7200a872caea07b87a3c19611f3dd031c9df"


@pytest.mark.parametrize("kind", [udif.ZLIB, udif.BZIP2, udif.XZ, udif.RAW])
@pytest.mark.parametrize("fork", [False, True], ids=["xml", "fork"])
def test_a_chunk_of_every_kind_of_the_standard_library(kind: int, fork: bool) -> None:
    assert sectors(packed(kind), packed(kind, SECTORS, TEXT[::-1]), fork=fork) == TEXT + TEXT[::-1]


@pytest.mark.parametrize("kind", [udif.ZERO, udif.IGNORE])
def test_chunks_without_data_read_as_zeros_and_may_be_of_any_size(kind: int) -> None:
    image = opened(udif.udif([Chunk(kind, 0, 1 << 40), packed(udif.RAW, 1 << 40)]))
    assert image.size == (1 << 49) + len(TEXT)
    buf = bytearray(b"x" * 2048)
    image.read_into(buf, (1 << 49) - 1024)
    assert bytes(buf) == bytes(1024) + TEXT[:1024]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bvx-", NOISE),
        ("bvxn", SQUARES[:1500]),
        ("bvx1", SQUARES),
        ("bvx2", SQUARES),
        ("bvx2-chunk", SQUARES[:65536]),
        ("mixed", NOISE + SQUARES[:1500] + SQUARES),
    ],
)
def test_what_apples_library_compressed_with_lzfse(name: str, expected: bytes) -> None:
    assert lzfse.decode(vector(name), len(expected)) == expected


def test_zlib_without_the_fast_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    text = b"ab" * (5 << 20)  # a stream whose last input gives megabytes
    assert sectors(packed(udif.ZLIB, 0, text)) == text
    chunk = packed(udif.ZLIB)
    for data in (
        chunk.data[:-4],
        chunk.data[:-1] + b"?",
        zlib.compress(TEXT + b"x"),
        zlib.compress(TEXT[1:]),
    ):
        with pytest.raises(CorruptImage):
            sectors(chunk._replace(data=data))


def test_a_chunk_of_lzfse() -> None:
    data = vector("bvx-")
    assert sectors(Chunk(udif.LZFSE, 0, len(NOISE) // 512, data)) == NOISE


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (b"\x82abc", b"abc"),
        (b"\x80a" + bytes((0x00, 0x00)), b"aaaa"),
        (b"\x82abc" + bytes((2 << 2, 2)), b"abcabcab"),
        (b"\x83abcd" + bytes((0x40, 0, 3)), b"abcdabcd"),
        (b"\x80a" + bytes((0x40 | 63, 0, 0)), b"a" * 68),
        (b"\xff" + bytes(range(128)) + bytes((0x40 | 1, 0, 127)), bytes(range(128)) + bytes(range(5))),
        (b"\xff" + b"x" * 128 + b"\xff" + b"y" * 128 + bytes((12, 255)), b"x" * 128 + b"y" * 128 + b"x" * 6),
        # A distance of 257: two bits of it are in the first byte.
        (
            b"\x80w\xff" + b"x" * 128 + b"\xff" + b"y" * 128 + bytes((12 | 1, 0)),
            b"w" + b"x" * 128 + b"y" * 128 + b"wxxxxx",
        ),
    ],
)
def test_adc_by_its_description(code: bytes, expected: bytes) -> None:
    assert adc.decode(code, len(expected)) == expected


def adc_sectors() -> tuple[bytes, bytes]:
    """A chunk in ADC and what it holds."""
    code = b"\x83wxyz" + bytes((4 << 2, 3)) + b"\x80A" + bytes((0x40 | 63, 0, 0)) * 15
    held = b"wxyz" + b"wxyzwxy" + b"A" + b"A" * 67 * 15
    code, held = code + bytes((0x40 | 3, 0, 0)), held + b"A" * 7
    assert len(held) == 1024
    return code, held


@pytest.mark.peer("7zz")
def test_7_zip_reads_the_same_from_all_kinds_of_chunks(tmp_path: Path) -> None:
    code, held = adc_sectors()
    kinds = [udif.ZLIB, udif.BZIP2, udif.XZ, udif.RAW]
    chunks = [packed(kind, number * SECTORS) for number, kind in enumerate(kinds)]
    at = len(kinds) * SECTORS
    chunks += [
        Chunk(udif.ADC, at, 2, code),
        Chunk(udif.LZFSE, at + 2, 128, vector("bvx2-chunk")),
        Chunk(udif.ZERO, at + 130, 8),
        Chunk(udif.IGNORE, at + 138, 8),
    ]
    path = udif.write(tmp_path / "all.dmg", chunks)
    run_peer("7zz", ["e", f"-o{tmp_path}", path]).ok()
    ours = content(path.read_bytes())
    assert ours == TEXT * 4 + held + SQUARES[:65536] + bytes(16 * 512)
    assert (tmp_path / "0.p").read_bytes() == ours


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("split", [0, 1, 3])
def test_the_real_program_reads_the_same(split: int, tmp_path: Path) -> None:
    chunks, at = [], 0
    for number in range(20):
        part = TEXT[number * 512 : number * 512 + 512 * (1 + number % 5)]
        kind = (udif.ZLIB, udif.RAW, udif.ZERO, udif.IGNORE)[number % 4]
        chunks.append(packed(kind, at, part) if kind in (udif.ZLIB, udif.RAW) else Chunk(kind, at, 7))
        at += chunks[-1].sectors
    path = udif.write(tmp_path / "x.dmg", chunks, split=split, lead=b"before" * 100)
    run_real(["convert", "-O", "raw", path, tmp_path / "real"]).ok()
    run_qimg_inprocess(["convert", "-O", "raw", path, tmp_path / "ours"]).ok()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes()


def test_ranges_across_chunks_and_inside_them() -> None:
    image = opened(udif.udif([packed(udif.ZLIB), Chunk(udif.ZERO, SECTORS, 3), packed(udif.XZ, SECTORS + 3)]))
    whole = TEXT + bytes(1536) + TEXT
    for start, length in ((0, 1), (511, 2), (len(TEXT) - 700, 3000), (len(TEXT) + 1000, 9000), (100, 65000)):
        buf = bytearray(length)
        image.read_into(buf, start)
        assert bytes(buf) == whole[start : start + length], (start, length)


def test_several_threads_read_one_chunk_at_a_time() -> None:
    image = opened(udif.udif([packed(udif.XZ)]))
    wrong: list[int] = []

    def read(start: int) -> None:
        for at in range(start, len(TEXT) - 512, 512 * 7):
            buf = bytearray(512)
            image.read_into(buf, at)
            if bytes(buf) != TEXT[at : at + 512]:
                wrong.append(at)

    threads = [Thread(target=read, args=(512 * number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_chunks_may_stand_in_any_order() -> None:
    chunks = [
        packed(udif.ZLIB, 2 * SECTORS, TEXT[::-1]),
        packed(udif.RAW, 0),
        Chunk(udif.ZERO, SECTORS, SECTORS),
    ]
    assert sectors(*chunks, split=1) == TEXT + bytes(len(TEXT)) + TEXT[::-1]


def test_a_raw_chunk_that_is_short_ends_in_zeros() -> None:
    assert sectors(Chunk(udif.RAW, 0, 4, TEXT[:700])) == TEXT[:700] + bytes(4 * 512 - 700)


def test_what_follows_a_compressed_stream_does_not_matter() -> None:
    chunk = packed(udif.ZLIB)
    assert sectors(chunk._replace(data=chunk.data + b"more")) == TEXT


# -- damage: an I/O error, and only where it is


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(udif.ZLIB, 0, SECTORS, zlib.compress(TEXT)[:-4]),
        Chunk(udif.ZLIB, 0, SECTORS, zlib.compress(TEXT)[:-4] + b"abcd"),
        Chunk(udif.ZLIB, 0, SECTORS, zlib.compress(TEXT[:-1])),
        Chunk(udif.ZLIB, 0, SECTORS, zlib.compress(TEXT + b"x")),
        Chunk(udif.ZLIB, 0, SECTORS, TEXT),
        Chunk(udif.ZLIB, 0, SECTORS, b""),
        Chunk(udif.BZIP2, 0, SECTORS, bz2.compress(TEXT)[:-4]),
        Chunk(udif.BZIP2, 0, SECTORS, bz2.compress(TEXT + b"x")),
        Chunk(udif.BZIP2, 0, SECTORS, b"BZh9"),
        Chunk(udif.XZ, 0, SECTORS, lzma.compress(TEXT)[:-9]),
        Chunk(udif.XZ, 0, SECTORS, lzma.compress(TEXT[:-1])),
        Chunk(udif.LZFSE, 0, 5, vector("bvx-")),
        Chunk(udif.LZFSE, 0, 3, vector("bvx-")),
        Chunk(udif.LZFSE, 0, 4, vector("bvx-")[:-4]),
        Chunk(udif.LZFSE, 0, 4, b"bvx3" + bytes(100)),
        Chunk(udif.ADC, 0, 1, b"\x00\x00"),
        Chunk(udif.ADC, 0, 1, b"\x8fabc"),
        Chunk(udif.RAW, 0, SECTORS, TEXT, at=1 << 40),
        Chunk(udif.ZLIB, 0, SECTORS, b"", at=1 << 40, length=500),
        Chunk(0x80000009, 0, SECTORS, TEXT),
    ],
)
def test_a_damaged_chunk_fails_and_its_neighbour_reads(chunk: Chunk) -> None:
    image = opened(udif.udif([chunk, packed(udif.ZLIB, chunk.sectors)]))
    size = chunk.sectors * 512
    for buf in (bytearray(size), bytearray(512), bytearray(512)):
        with pytest.raises(CorruptImage) as caught:
            image.read_into(buf, 0)
        assert caught.value.guest == 0
    buf = bytearray(len(TEXT))
    image.read_into(buf, size)
    assert bytes(buf) == TEXT


@pytest.mark.parametrize(
    "image",
    [
        udif.udif([packed(udif.ZLIB, 8), packed(udif.ZLIB, 16 + SECTORS)]),
        udif.udif([packed(udif.ZLIB)], sectors=SECTORS + 8),
        udif.udif([], sectors=SECTORS + 8),
    ],
    ids=["between", "behind", "nothing"],
)
def test_a_sector_that_no_chunk_has_is_an_error_not_zeros(image: bytes) -> None:
    found = opened(image)
    with pytest.raises(CorruptImage, match="no chunk has the guest sector"):
        found.read_into(bytearray(found.size), 0)


# -- opening


def test_the_trailer_is_found_where_the_real_program_finds_it() -> None:
    image = udif.udif([packed(udif.ZLIB)])
    for tail in range(-len(image) % 512 + 1):
        assert opened(image + bytes(tail)).size == len(TEXT)
    with pytest.raises(FormatError, match=r"^Could not locate UDIF trailer in dmg file$"):
        opened(image + bytes(-len(image) % 512 + 1))


@pytest.mark.parametrize("data", [b"", b"x" * 511, b"x" * 512, b"x" * 5000])
def test_no_trailer(data: bytes) -> None:
    expected = (
        "Could not locate UDIF trailer in dmg file" if data else "dmg file must be at least 512 bytes long"
    )
    with pytest.raises(FormatError) as caught:
        opened(data)
    assert str(caught.value) == expected


LENGTH = len(udif.udif([packed(udif.ZLIB)]))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"data_offset": LENGTH - 511}, "koly.data_offset"),
        ({"fork_offset": LENGTH - 512}, "koly.fork_offset"),
        ({"fork_offset": -1}, "koly.fork_offset"),
        ({"fork_length": LENGTH}, "koly.fork_length"),
        ({"fork_length": -1}, "koly.fork_length"),
        ({"fork_offset": 8, "fork_length": 100}, "fork.data_length"),
        ({"xml_offset": LENGTH - 512}, "koly.xml_offset"),
        ({"xml_length": LENGTH}, "koly.xml_length"),
        ({"xml_length": 0}, "koly.xml_length"),
        ({"sectors": -1}, "koly.sectors"),
    ],
)
def test_a_trailer_that_cannot_be_names_its_field(fields: dict[str, int], field: str) -> None:
    with pytest.raises(FormatError) as caught:
        opened(udif.udif([packed(udif.ZLIB)], **fields))  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.offset is not None


def test_a_disk_larger_than_any_is_refused() -> None:
    with pytest.raises(LimitError):
        opened(udif.udif([packed(udif.ZLIB)], sectors=(1 << 54) - 1))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk(udif.ZLIB, 0, 131073), "sector count 131073 for chunk 0 is larger than max (131072)"),
        (
            Chunk(udif.RAW, 0, 8, length=(64 << 20) + 1),
            "length 67108865 for chunk 0 is larger than max (67108864)",
        ),
    ],
)
def test_limits_of_a_chunk(chunk: Chunk, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        opened(udif.udif([chunk]))
    assert str(caught.value) == message


def test_the_largest_chunk_there_can_be() -> None:
    data = bytes(64 << 20)
    image = opened(udif.udif([packed(udif.ZLIB, 0, data)]))
    buf = bytearray(b"x" * 1000)
    image.read_into(buf, (64 << 20) - 1000)
    assert bytes(buf) == bytes(1000)


def test_an_unknown_kind_is_told_of_once() -> None:
    notices: list[Notice] = []
    opened(
        udif.udif([Chunk(0x80000009, 0, 8, b"x"), Chunk(0x80000009, 8, 8, b"x"), packed(udif.RAW, 16)]),
        notices,
    )
    expected = "Image contains chunks of unknown type 80000009, accessing them will result in I/O errors"
    assert [notice.text for notice in notices] == [expected]


def test_a_property_list_that_ends_inside_a_data_element() -> None:
    image = udif.udif([packed(udif.ZLIB)]).replace(b"</data>", b"<<data>")
    with pytest.raises(FormatError, match="data element without end"):
        opened(image)


def test_data_elements_that_hold_something_else_are_passed_over() -> None:
    image = udif.udif([packed(udif.ZLIB)])
    other = b"<key>other</key><data>AAAA</data><data>?</data><data>A</data>"
    cut = image.index(b"<key>blkx")
    longer = int.from_bytes(image[-512 + 224 : -512 + 232], "big") + len(other)
    image = image[:cut] + other + image[cut:]
    image = image[: -512 + 224] + longer.to_bytes(8, "big") + image[-512 + 232 :]
    assert content(image) == TEXT


def test_it_cannot_be_opened_for_writing() -> None:
    with pytest.raises(NotSupported, match=r"^Image is read-only$"):
        Dmg().open(MemoryStorage(udif.udif([packed(udif.ZLIB)])), writable=True, context=Context())
