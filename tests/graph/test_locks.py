"""Which lock bytes are held while an image is open (common sheet 11), and who excludes whom.

The expected sets are those that the real programs were seen to hold.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from graph.oracle import Gallery
from qimg.context import Context
from qimg.errors import LockError, OpenError
from qimg.graph.open import ImageSpec, open_disk, target
from support.holders import qemu_io_holding
from support.run import run_real

_FLOCK = struct.Struct("@hhqqi4x")

FORMAT_READER = [100, 201, 203]
FORMAT_WRITER = [100, 101, 103, 201, 203]


def held(path: Path | str) -> list[int]:
    """The lock bytes of `path` that anybody holds."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        found = []
        for byte in (*range(100, 104), *range(200, 204)):
            question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                found.append(byte)
        return found
    finally:
        os.close(descriptor)


@pytest.fixture
def images(gallery: Gallery, work: Path) -> Path:
    """Copies of the gallery's images in the working directory."""
    for name in ("a.raw", "a.q", "ov.q", "ext.q", "df.raw"):
        (work / name).write_bytes((gallery.folder / name).read_bytes())
    return work


@pytest.mark.peer("qemu-img")
@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("spec", "settings", "expected"),
    [
        (ImageSpec("a.q"), {}, {"a.q": FORMAT_READER}),
        (ImageSpec("a.q", force_share=True), {}, {"a.q": [100]}),
        (ImageSpec("a.q"), {"writable": True}, {"a.q": FORMAT_WRITER}),
        (ImageSpec("a.q"), {"for_info": True}, {"a.q": [201, 203]}),
        (ImageSpec("a.q", force_share=True), {"for_info": True}, {"a.q": []}),
        (ImageSpec("a.raw"), {}, {"a.raw": FORMAT_READER}),
        (ImageSpec("a.raw"), {"raw_shares_all": True}, {"a.raw": [100]}),
        (ImageSpec("a.raw"), {"for_info": True}, {"a.raw": []}),
        (ImageSpec("a.raw", format="raw"), {"writable": True}, {"a.raw": [100, 101]}),
        (ImageSpec("a.raw", format="file"), {}, {"a.raw": FORMAT_READER}),
        (ImageSpec("ov.q"), {}, {"ov.q": FORMAT_READER, "a.raw": FORMAT_READER}),
        (ImageSpec("ov.q"), {"raw_shares_all": True}, {"ov.q": FORMAT_READER, "a.raw": [100]}),
        (ImageSpec("ov.q"), {"writable": True}, {"ov.q": FORMAT_WRITER, "a.raw": [100]}),
        (ImageSpec("ov.q", force_share=True), {}, {"ov.q": [100], "a.raw": [100]}),
        (ImageSpec("ov.q"), {"backing": False}, {"ov.q": FORMAT_READER, "a.raw": []}),
        (ImageSpec("ext.q"), {}, {"ext.q": FORMAT_READER, "df.raw": FORMAT_READER}),
        (ImageSpec("ext.q"), {"raw_shares_all": True}, {"ext.q": FORMAT_READER, "df.raw": [100, 203]}),
        (ImageSpec("ext.q"), {"writable": True}, {"ext.q": FORMAT_WRITER, "df.raw": [100, 101, 103, 203]}),
        (ImageSpec("ext.q"), {"for_info": True}, {"ext.q": [201, 203], "df.raw": []}),
        (ImageSpec("driver=qcow2,file.filename=a.q,file.locking=off", image_opts=True), {}, {"a.q": []}),
        (ImageSpec("json:{'driver':'qcow2','file.filename':'a.q','force-share':true}"), {}, {"a.q": [100]}),
        (
            ImageSpec("json:{'driver':'raw','file':{'driver':'qcow2','file.filename':'ov.q'}}"),
            {"raw_shares_all": True},
            {"ov.q": FORMAT_READER, "a.raw": [100]},
        ),
        (
            ImageSpec("json:{'driver':'qcow2','file':{'driver':'raw','file.filename':'a.q'}}"),
            {},
            {"a.q": FORMAT_READER},
        ),
    ],
    ids=lambda value: value.text if isinstance(value, ImageSpec) else None,
)
def test_an_open_image_holds(
    spec: ImageSpec, settings: dict[str, bool], expected: dict[str, list[int]]
) -> None:
    with open_disk(spec, context=Context(), **settings):  # type: ignore[arg-type]
        assert {name: held(name) for name in expected} == expected
    assert {name: held(name) for name in expected} == {name: [] for name in expected}


def test_a_target_is_locked_before_it_is_cut(work: Path) -> None:
    (work / "new.raw").write_bytes(b"old content")
    with target("new.raw", context=Context()).create({}, Context()):
        assert held("new.raw") == [101, 103, 203]
        assert (work / "new.raw").stat().st_size == 0


# -- against the real program


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_reader_is_refused_while_the_real_program_writes(images: Path) -> None:
    with qemu_io_holding(images / "a.q"):
        real = run_real(["map", "a.q"], images)
        with pytest.raises(OpenError) as raised:
            open_disk(ImageSpec("a.q"), context=Context())
        with open_disk(ImageSpec("a.q", force_share=True), context=Context()):
            pass
    assert f"qemu-img: {raised.value}\n{raised.value.hint}\n" == real.err


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_writer_is_refused_while_the_real_program_reads(images: Path) -> None:
    with qemu_io_holding(images / "a.q", read_only=True):
        real = run_real(["resize", "a.q", "2M"], images)
        with pytest.raises(OpenError) as raised:
            open_disk(ImageSpec("a.q"), context=Context(), writable=True)
        with open_disk(ImageSpec("a.q"), context=Context()):
            pass
    assert f"qemu-img: {raised.value}\n{raised.value.hint}\n" == real.err


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_locked_image_is_not_created_anew(images: Path) -> None:
    before = (images / "a.q").read_bytes()
    with qemu_io_holding(images / "a.q"):
        real = run_real(["create", "-q", "-f", "raw", "a.q", "1M"], images)
        with pytest.raises(LockError) as raised:
            target("a.q", context=Context()).create({}, Context())
    assert f"qemu-img: a.q: {raised.value}\n{raised.value.hint}\n" == real.err
    assert (images / "a.q").read_bytes() == before


@pytest.mark.peer("qemu-img", "qemu-io")
def test_copying_refuses_a_raw_source_that_somebody_writes_and_mapping_does_not(images: Path) -> None:
    with qemu_io_holding(images / "a.raw", format="raw"):
        for name in ("a.raw", "ov.q"):
            real = run_real(["convert", "-O", "raw", name, "out"], images)
            with pytest.raises(OpenError) as raised:
                open_disk(ImageSpec(name), context=Context())
            assert f"qemu-img: {raised.value}\n{raised.value.hint}\n" == real.err
            run_real(["map", name], images).ok()
            with open_disk(ImageSpec(name), context=Context(), raw_shares_all=True):
                pass


@pytest.mark.peer("qemu-img", "qemu-io")
def test_the_real_program_is_refused_while_we_write(images: Path) -> None:
    with open_disk(ImageSpec("a.q"), context=Context(), writable=True):
        result = run_real(["map", "a.q"], images)
    assert result.err.startswith("qemu-img: Could not open 'a.q': Failed to get shared \"write\" lock\n")
    run_real(["map", "a.q"], images).ok()
