"""Opening refuses what the real program refuses, in its order and with its words; packing gives its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qimg.context import Notice
from qimg.errors import FormatError, LimitError, OptionError, QimgError
from qimg.formats.qcow2.header import ParsedHeader, parse
from qimg.formats.qcow2.structs import Header
from qimg.storage.memory import MemoryStorage
from support import qcow2
from support.qcow2 import u32, u64

peer = pytest.mark.peer("qemu-img", "qemu-io")

BACKING_FORMAT, FEATURE_NAMES, BITMAPS = 0xE2792ACA, 0x6803F857, 0x23852875
CRYPTO, DATA_FILE = 0x0537BE77, 0x44415441


def extension(kind: int, data: bytes) -> bytes:
    """A header extension."""
    return u32(kind) + u32(len(data)) + data + bytes(-len(data) % 8)


def feature(kind: int, bit: int, name: bytes) -> bytes:
    """A row of the feature name table."""
    return bytes((kind, bit)) + name.ljust(46, b"\0")


def bitmaps(count: int, reserved: int, size: int, offset: int) -> bytes:
    """The bitmaps extension."""
    return extension(BITMAPS, u32(count) + u32(reserved) + u64(size) + u64(offset))


DAMAGES: dict[str, list[qcow2.Edit]] = {
    "magic": [(0, b"QFI\xfa")],
    "version 1": [(4, u32(1))],
    "version 4": [(4, u32(4))],
    "cluster_bits 8": [(20, u32(8))],
    "cluster_bits 22": [(20, u32(22))],
    "header_length 103": [(100, u32(103))],
    "header_length 104": [(100, u32(104))],
    "header_length 105": [(100, u32(105))],
    "header_length too long": [(100, u32(65537))],
    "longer header": [(100, u32(120)), (112, bytes(200))],
    "compression type without its bit": [(104, b"\1")],
    "bit of the compression type without one": [(72, u64(8))],
    "unknown compression type": [(72, u64(8)), (104, b"\2")],
    "unknown compression type without its bit": [(104, b"\2")],
    "unknown features without names": [(72, u64(1 << 20 | 1 << 5)), (112, bytes(8))],
    "unknown features with names": [
        (72, u64(1 << 20 | 1 << 7 | 1 << 5)),
        (112, extension(FEATURE_NAMES, feature(0, 7, b"seven, eight") + feature(0, 5, b"five"))),
    ],
    "the same feature named twice": [
        (72, u64(1 << 5)),
        (112, extension(FEATURE_NAMES, feature(1, 5, b"a") + feature(0, 5, b"b") + feature(0, 5, b"c"))),
    ],
    "two tables of feature names": [
        (72, u64(3 << 5)),
        (
            112,
            extension(FEATURE_NAMES, feature(0, 5, b"five"))
            + extension(FEATURE_NAMES, feature(0, 6, b"six")),
        ),
    ],
    "a feature name cut short": [(72, u64(1 << 5)), (112, extension(FEATURE_NAMES, b"\0\5five"))],
    "known and unknown features": [(72, u64(1 << 5 | 3))],
    "subclusters too small": [(72, u64(16))],
    "refcount_order 7": [(96, u32(7))],
    "no refcount table": [(56, u32(0))],
    "refcount table too large": [(56, u32(16385))],
    "refcount table unaligned": [(48, u64(0x10001))],
    "refcount table too far": [(48, u64((1 << 63) - 65536))],
    "too many snapshots": [(60, u32(65537))],
    "snapshot table unaligned": [(64, u64(3))],
    "L1 table too large": [(36, u32(4194305))],
    "L1 table unaligned": [(40, u64(5))],
    "L1 table too small": [(36, u32(0))],
    "size too big": [(24, u64(1 << 63))],
    "crypt_method 3": [(32, u32(3))],
    "extension too large": [(112, u32(5) + u32(65536))],
    "backing format too long": [(112, extension(BACKING_FORMAT, b"x" * 16))],
    "backing name beyond the cluster": [(8, u64(65537)), (16, u32(3))],
    "backing name at the end of the cluster": [(8, u64(65536)), (16, u32(3))],
    "backing name over the end of the cluster": [(8, u64(65535)), (16, u32(2))],
    "backing name of 1024 bytes": [(8, u64(1000)), (16, u32(1024))],
    "backing name of 1023 bytes": [(8, u64(1000)), (16, u32(1023)), (1000, b"n" * 1023)],
    "backing name of no bytes": [(8, u64(1000)), (16, u32(0))],
    "raw data file without data file": [(88, u64(2))],
    "data file without name": [(72, u64(4))],
    "corrupt bit": [(72, u64(2))],
    "crypto extension without encryption": [(112, extension(CRYPTO, bytes(16)))],
    "bitmaps: wrong length": [(112, extension(BITMAPS, bytes(23))), (88, u64(1))],
    "bitmaps: wrong length, not trusted": [(112, extension(BITMAPS, bytes(23)))],
    "bitmaps: reserved field": [(112, bitmaps(1, 1, 65536, 0)), (88, u64(1))],
    "bitmaps: none": [(112, bitmaps(0, 0, 65536, 0)), (88, u64(1))],
    "bitmaps: too many": [(112, bitmaps(65536, 0, 65536, 0)), (88, u64(1))],
    "bitmaps: directory unaligned": [(112, bitmaps(1, 0, 100, 1)), (88, u64(1))],
    "bitmaps: directory too large": [(112, bitmaps(1, 0, 67107841, 65536)), (88, u64(1))],
    "bitmaps: directory empty": [(112, bitmaps(1, 0, 0, 65536)), (88, u64(1))],
    "bitmaps: directory broken": [(112, bitmaps(1, 0, 32, 0)), (88, u64(1))],
    "bitmaps: not trusted": [(112, bitmaps(1, 0, 0, 65536))],
    "bitmaps: everything wrong": [(112, bitmaps(70000, 1, 1 << 40, 1)), (88, u64(1))],
}
KINDS = {"v3": "", "v2": "compat=0.10", "512": "cluster_size=512"}
#: Where the real program reads a table at once and fails, ours when somebody needs it.
LATER = {("512", "refcount table too far")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("header")
    return {name: qcow2.make(folder / f"{name}.qcow2", "1M", options) for name, options in KINDS.items()}


def our_error(path: Path, **how: bool) -> str:
    """What opening says, as the command line would print it."""
    notices: list[Notice] = []
    try:
        qcow2.open_image(path, notices, **how).close()
        text = ""
    except QimgError as error:
        text = f"{error}\n{error.hint or ''}"
    lines = [f"warning: {notice.text}\n{notice.hint or ''}" for notice in notices]
    return "".join([*lines, text]).strip()


@peer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_header_is_refused_with_the_real_words(
    name: str, kind: str, images: dict[str, Path], tmp_path: Path
) -> None:
    path = qcow2.patch(images[kind], tmp_path / "t.qcow2", DAMAGES[name])
    expected = "" if (kind, name) in LATER else qcow2.real_error(path, "info")
    assert our_error(path, for_info=True) == expected


@peer
@pytest.mark.parametrize("name", ["raw data file without data file", "data file without name"])
def test_what_info_tolerates_readers_do_not(name: str, images: dict[str, Path], tmp_path: Path) -> None:
    path = qcow2.patch(images["v3"], tmp_path / "t.qcow2", DAMAGES[name])
    assert our_error(path, for_info=True) == ""
    assert our_error(path) == qcow2.real_error(path, "map") != ""


@peer
def test_check_opens_what_it_is_there_to_report(images: dict[str, Path], tmp_path: Path) -> None:
    for name in ("no refcount table", "too many snapshots", "snapshot table unaligned"):
        path = qcow2.patch(images["v3"], tmp_path / "t.qcow2", DAMAGES[name])
        assert our_error(path) != ""
        assert our_error(path, for_check=True) == ""


@peer
def test_an_encrypted_image_opens_for_info_only(images: dict[str, Path], tmp_path: Path) -> None:
    path = qcow2.patch(images["v3"], tmp_path / "t.qcow2", [(32, u32(1))])
    with qcow2.open_image(path, for_info=True) as image:
        assert image.encrypted
        assert image.format_specific()["encrypt"] == {"format": "aes"}
    with pytest.raises(OptionError, match=r"Parameter 'encrypt\.key-secret' is required for cipher"):
        qcow2.open_image(path)


@peer
def test_a_corrupt_image_cannot_be_written_to(images: dict[str, Path], tmp_path: Path) -> None:
    path = qcow2.patch(images["v3"], tmp_path / "t.qcow2", [(72, u64(2))])
    with pytest.raises(FormatError, match="qcow2: Image is corrupt; cannot be opened read/write"):
        qcow2.open_image(path, writable=True)
    with qcow2.open_image(path) as image:
        assert image.format_specific()["corrupt"] is True


def test_an_error_names_file_field_offset_and_values() -> None:
    header = Header(magic=0x514649FB, version=3, cluster_bits=30, header_length=112)
    with pytest.raises(FormatError) as caught:
        parse(MemoryStorage(header.pack(), name="x.qcow2"))
    error = caught.value
    assert (error.file, error.field, error.offset) == ("x.qcow2", "header.cluster_bits", 20)
    assert (error.expected, error.found) == ("9..21", 30)


@peer
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ("", ()),
        ("compat=0.10", ()),
        ("cluster_size=512", ()),
        ("cluster_size=4096", ("-b", "base.qcow2", "-F", "qcow2")),
        ("cluster_size=8192", ("-b", "base.qcow2", "-F", "qcow2")),
        ("compat=0.10", ("-b", "base.qcow2", "-F", "qcow2")),
        ("data_file=d.bin", ()),
        ("compression_type=zstd,lazy_refcounts=on,extended_l2=on,refcount_bits=1", ()),
    ],
)
def test_packing_a_real_header_gives_its_bytes(options: str, more: tuple[str, ...], tmp_path: Path) -> None:
    qcow2.make(tmp_path / "base.qcow2", "1M")
    path = qcow2.make(tmp_path / "a.qcow2", "1M", options, *more)
    first = path.read_bytes()
    parsed = parse(MemoryStorage(first))
    assert parsed.pack() == first[: parsed.cluster_size]


@peer
def test_packing_a_real_header_with_bitmaps_gives_its_bytes(tmp_path: Path) -> None:
    path = qcow2.rich(tmp_path / "a.qcow2")
    first = path.read_bytes()
    assert parse(MemoryStorage(first)).pack() == first[:65536]


def test_unknown_extensions_and_a_longer_header_survive_packing() -> None:
    header = Header(
        magic=0x514649FB,
        version=3,
        cluster_bits=16,
        header_length=120,
        refcount_order=4,
        refcount_table_offset=65536,
        refcount_table_clusters=1,
        l1_size=1,
        size=512,
        l1_table_offset=131072,
    )
    extensions = (
        extension(0x1234, b"one") + extension(BACKING_FORMAT, b"raw") + extension(0x5678, b"twotwotwo")
    )
    raw = header.pack() + b"TAILTAIL" + extensions + bytes(8)
    parsed = parse(MemoryStorage(raw))
    assert parsed.unknown == [(0x1234, b"one"), (0x5678, b"twotwotwo")]
    again = parse(MemoryStorage(parsed.pack()))
    assert again.tail == b"TAILTAIL"
    assert again.backing_format == b"raw"
    assert again.unknown == [(0x5678, b"twotwotwo"), (0x1234, b"one")]  # reversed by every rewrite


def test_a_name_that_does_not_fit_the_first_cluster_is_refused() -> None:
    header = Header(magic=0x514649FB, version=3, cluster_bits=9)
    room = 512 - 112 - len(extension(BACKING_FORMAT, b"raw")) - 8
    assert room == 376  # sheet, section 3
    assert len(ParsedHeader(header, backing_name=b"n" * room, backing_format=b"raw").pack()) == 512
    with pytest.raises(LimitError, match="No space left on device"):
        ParsedHeader(header, backing_name=b"n" * (room + 1), backing_format=b"raw").pack()


@peer
def test_a_file_cut_anywhere_reads_as_if_zeros_followed(tmp_path: Path) -> None:
    path = qcow2.rich(tmp_path / "a.qcow2", bitmaps=False, snapshots=False)
    for size in (112, 200, 65536, 70000, 200000, 300000):
        cut = tmp_path / "t.qcow2"
        cut.write_bytes(path.read_bytes()[:size])
        rows = qcow2.real_map(cut)
        with qcow2.open_chain(cut) as disk:
            assert qcow2.map_rows(disk) == rows
