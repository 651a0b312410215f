"""An image that was created before, opened for writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qimg.context import Context
from qimg.extent import HOLE
from qimg.formats.base import Image
from qimg.formats.qcow2.format import Qcow2
from qimg.storage.posix import PosixFile
from support import fresh
from support.build import assert_real_check_clean, build, real_content
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
K64 = 65536
CONTENT = fresh.mixed_content(MIB)


def create(path: Path, options: str = "") -> None:
    words = ["create", "-q", "-u", "-f", "qcow2", *(["-o", options] if options else [])]
    run_real([*words, path, str(MIB)], path.parent).ok()


def open_for_writing(path: Path) -> Image:
    file = PosixFile.open(str(path), writable=True)
    try:
        return Qcow2().open(file, writable=True, context=Context())
    except BaseException:
        file.close()
        raise


def fill(image: Image) -> None:
    """Half of it plain, a quarter compressed where that works, a quarter of zeros."""
    for extent in image.allocate(0, MIB // 2):
        assert extent.source is not None
        extent.source.write(CONTENT[extent.start :][: extent.length], extent.host or 0)
    for guest in range(MIB // 2, MIB * 3 // 4, image.cluster_size or 1):
        packed = image.encode(CONTENT[guest : guest + (image.cluster_size or 1)])
        if packed is None:
            for extent in image.allocate(guest, image.cluster_size or 1):
                assert extent.source is not None
                extent.source.write(CONTENT[extent.start :][: extent.length], extent.host or 0)
        else:
            image.write_encoded(guest, packed)
    if image.can_mark_zero:
        image.mark_zero(MIB * 3 // 4, MIB // 4)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=256k",
        "extended_l2=on,compression_type=zstd",
        "lazy_refcounts=on,cluster_size=4k",
        "backing_file=base,backing_fmt=raw",
    ],
)
def test_an_empty_one_is_filled_and_keeps_its_options(options: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    (tmp_path / "base").write_bytes(bytes(MIB))
    create(path, options)
    before = run_real(["info", "--output=json", path]).ok().out.splitlines()
    with open_for_writing(path) as image:
        fill(image)
        image.flush()
        assert not image.extents(0, MIB // 2)[0].flags & HOLE
    after = run_real(["info", "--output=json", path]).ok().out.splitlines()
    assert [line for line in before if "actual-size" not in line] == [
        line for line in after if "actual-size" not in line
    ]
    assert real_content(path) == CONTENT[: MIB * 3 // 4] + bytes(MIB // 4)
    assert_real_check_clean(path)


def test_opening_and_closing_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path)
    before = path.read_bytes()
    with open_for_writing(path) as image:
        assert image.extents(0, MIB)[0].flags == HOLE
        image.mark_zero(0, MIB)
        image.flush()
    assert path.read_bytes() == before


def test_what_was_not_flushed_was_never_there(tmp_path: Path) -> None:
    path = build(tmp_path / "image", "A" * 8)
    before = real_content(path)
    with open_for_writing(path) as image:
        fill(image)
        image.abandon()
    assert real_content(path)[K64 * 8 :] == before[K64 * 8 :]
    assert run_real(["check", path]).code in (0, 3)
