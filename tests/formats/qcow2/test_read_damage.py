"""Damage met on the way through the tables: requests fail like the real program's, told with its words."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from qimg.context import Notice
from qimg.errors import CorruptImage
from qimg.extent import COMPRESSED
from support import peers, qcow2
from support.qcow2 import COMPRESSED as COMPRESSED_BIT
from support.qcow2 import COPIED, u64

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

ALL = 0xFFFF_FFFF
KINDS = {
    "v3": "",
    "v2": "compat=0.10",
    "extended": "extended_l2=on",
    "data file": "data_file=data.bin",
    "extended data file": "data_file=data.bin,extended_l2=on",
}
#: Words of an L2 entry (standard ones use the first only) that replace that of guest cluster 1.
ENTRIES = {
    "unaligned": (COPIED | 0x60200, ALL),
    "far": (COPIED | 1 << 50, ALL),
    "reserved bits": (COPIED | 0x60000 | 0x3F << 56 | 0x1FE, ALL),
    "zero": (1, ALL << 32),
    "zero with space": (COPIED | 0x60001, ALL << 32),
    "zero with unaligned space": (COPIED | 0x60201, ALL << 32),
    "zero with space at the guest's offset": (COPIED | 0x10001, ALL << 32),
    "zero with space elsewhere": (COPIED | 0x20001, ALL << 32),
    "copied only": (COPIED, ALL),
    "copied only, nothing allocated": (COPIED, 0),
    "nothing, but bits allocated": (0, 2),
    "nothing, but a late bit allocated": (0, 1 << 31),
    "zero and allocated": (COPIED | 0x60000, 1 << 32 | 1),
    "zero and allocated, late": (COPIED | 0x60000, 1 << 63 | ALL),
    "place without allocation": (COPIED | 0x60000, 0),
    "unaligned without allocation": (COPIED | 0x60200, 0),
    "some of both": (COPIED | 0x60000, 0x00FF0000_0000FF01),
    "bit 0": (COPIED | 0x60001, ALL),
    "compressed nonsense": (COMPRESSED_BIT | 0x123, 0),
    "compressed with bitmap": (COMPRESSED_BIT | 0x123, 1 << 32 | 1),
    "compressed past the end": (COMPRESSED_BIT | (1 << 54) - 1, 0),
}
#: The same for the L1 entry.
TABLES = {
    "unaligned": COPIED | 0x40200,
    "past the end": COPIED | 1 << 40,
    "nowhere": COPIED,
    "reserved bits": COPIED | 0x40000 | 0x7F << 56 | 0x1FF,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, options in KINDS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        found[name] = qcow2.make(folder / "a.qcow2", "1M", options)
        qcow2.io(found[name], "write -P 1 0 256k", "write -z 512k 64k")
    return found


def real_map_and_error(path: Path) -> tuple[list[str], str]:
    """Rows of the real ``map``, as far as they came, and what it complained of."""
    done = subprocess.run(
        [peers.need("qemu-img"), "map", "--output=json", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.strip("[],") for line in done.stdout.splitlines()]
    return [row for row in rows if row], done.stderr


def our_map_and_error(path: Path) -> tuple[list[str], str]:
    """The same of ours: what lies before the damage is still told."""
    notices: list[Notice] = []
    with qcow2.open_image(path, notices) as image:
        end, failed = image.size, False
        try:
            image.extents(0, image.size)
        except CorruptImage as error:
            assert (error.errno, error.reason) == (errno.EIO, "Input/output error")
            assert error.guest is not None
            end, failed = error.guest, True
            with pytest.raises(CorruptImage):
                image.extents(error.guest, image.size - error.guest)
        rows = []
        if end:
            disk = qcow2.Disk([qcow2.Layer(image, path.name)])
            disk.size = end
            for row in qcow2.map_rows(disk):
                fields = [f'"{name}": {str(value).lower()}' for name, value in row.items()]
                rows.append("{ " + ", ".join(fields) + "}")
    text = "".join(f"{notice.text}\n" for notice in notices)
    return rows, text + "qemu-img: Could not read file metadata: Input/output error\n" * failed


def assert_same(path: Path) -> None:
    rows, error = real_map_and_error(path)
    our_rows, our_error = our_map_and_error(path)
    assert our_error == error
    # The real program prints a row when the next one begins, so the last before the damage is missing.
    assert our_rows[: len(rows)] == rows
    assert len(our_rows) - len(rows) <= (1 if error else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENTRIES)
def test_an_l2_entry_means_what_it_means_to_the_real_program(
    name: str, kind: str, images: dict[str, Path]
) -> None:
    source = images[kind]
    anatomy = qcow2.Anatomy(source)
    words = ENTRIES[name] if anatomy.extended else ENTRIES[name][:1]
    edit = (anatomy.entry(1), b"".join(map(u64, words)))
    assert_same(qcow2.patch(source, source.parent / "t.qcow2", [edit]))


@pytest.mark.parametrize("kind", ["v3", "extended"])
@pytest.mark.parametrize("name", TABLES)
def test_an_l1_entry_means_what_it_means_to_the_real_program(
    name: str, kind: str, images: dict[str, Path]
) -> None:
    source = images[kind]
    edit = (qcow2.Anatomy(source).l1, u64(TABLES[name]))
    assert_same(qcow2.patch(source, source.parent / "t.qcow2", [edit]))


def test_damage_is_told_once_for_an_image(images: dict[str, Path]) -> None:
    source = images["v3"]
    edit = (qcow2.Anatomy(source).entry(1), u64(0x60200))
    path = qcow2.patch(source, source.parent / "t.qcow2", [edit])
    notices: list[Notice] = []
    with qcow2.open_image(path, notices) as image:
        for _ in range(3):
            with pytest.raises(CorruptImage):
                image.extents(0, image.size)
    text = (
        "qcow2: Image is corrupt: Cluster allocation offset 0x60200 unaligned (L2 offset: 0x40000,"
        " L2 index: 0x1); further non-fatal corruption events will be suppressed"
    )
    assert [(notice.text, notice.plain) for notice in notices] == [(text, True)]


def test_nonsense_in_a_compressed_cluster_is_an_error_of_reading_only(images: dict[str, Path]) -> None:
    source = images["v3"]
    edit = (qcow2.Anatomy(source).entry(1), u64(COMPRESSED_BIT | 0x123))
    path = qcow2.patch(source, source.parent / "t.qcow2", [edit])
    with qcow2.open_image(path) as image:
        assert image.extents(65536, 65536)[0].flags == COMPRESSED
        with pytest.raises(CorruptImage) as caught:
            image.read_into(bytearray(512), 65536 + 512)
    assert (caught.value.guest, caught.value.offset, caught.value.errno) == (65536, 0x123, errno.EIO)
