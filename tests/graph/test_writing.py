"""Opening for writing: the raw that was only guessed, formats on formats, and that reading never writes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from graph.oracle import Gallery, open_ours, open_real
from qimg.context import Context, Notice
from qimg.errors import OpenError, StorageError
from qimg.graph.open import ImageSpec, open_disk
from support.run import run_real

QCOW2_HEADER = b"QFI\xfb\0\0\0\3"


def _open_for_writing(text: str, *, image_opts: bool = False, format: str | None = None) -> list[Notice]:
    notices: list[Notice] = []
    spec = ImageSpec(text, image_opts=image_opts, format=format)
    open_disk(spec, context=Context(notices.append), writable=True).close()
    return notices


@pytest.fixture
def raw(work: Path) -> Path:
    """``a.raw`` of 1 MiB of zeros in the working directory."""
    path = work / "a.raw"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("text", "image_opts"),
    [
        ("a.raw", False),
        ("file:a.raw", False),
        ("json:{'file.filename':'a.raw'}", False),
        ("file.filename=a.raw", True),
        ("file.driver=raw,file.offset=512,file.file.filename=a.raw", True),
        ("driver=raw,file.filename=a.raw", True),
        ("driver=file,filename=a.raw", True),
        ("driver=raw,file.filename=a.raw,read-only=on", True),
        ("driver=raw,file.filename=a.raw,file.read-only=on", True),
        ("driver=raw,file.filename=a.raw,force-share=on", True),
        ("driver=raw,file.filename=a.raw,file.force-share=on", True),
        ("driver=raw,file.filename=a.raw,read-only=off,auto-read-only=on", True),
        ("nosuch", False),
    ],
)
def test_opening_for_writing_says_what_the_real_program_says(text: str, image_opts: bool, raw: Path) -> None:
    # Growing by nothing opens the image for writing and changes nothing.
    words = ["resize", *(["--image-opts"] if image_opts else []), text, "+0"]
    real = open_real(words, raw.parent)
    ours = open_ours(text, "map", image_opts=image_opts, writable=True)
    assert ours.err == real.err


@pytest.mark.usefixtures("raw")
def test_a_given_format_gives_no_warning() -> None:
    assert _open_for_writing("a.raw", format="raw") == []
    assert len(_open_for_writing("a.raw")) == 1
    assert _open_for_writing("a.raw")[0].plain


@pytest.mark.parametrize("start", [0, 4, 7])
def test_a_guessed_raw_image_cannot_be_turned_into_another_format(raw: Path, start: int) -> None:
    # The last bytes of the magic count together with those that are there already.
    raw.write_bytes(QCOW2_HEADER[:start] + bytes(4096))
    before = raw.read_bytes()
    with open_disk(ImageSpec("a.raw"), context=Context(lambda _: None), writable=True) as disk:
        (extent,) = disk.top.allocate(0, 4096)
        assert extent.source is not None
        with pytest.raises(StorageError) as raised:
            extent.source.write(QCOW2_HEADER[start:], start)
        assert raised.value.errno == errno.EPERM
        assert raw.read_bytes() == before
        extent.source.write(b"no image", 0)
    assert raw.read_bytes()[:8] == b"no image"


def test_an_image_said_to_be_raw_may_become_anything(raw: Path) -> None:
    with open_disk(ImageSpec("a.raw", format="raw"), context=Context(), writable=True) as disk:
        (extent,) = disk.top.allocate(0, 512)
        assert extent.source is not None
        extent.source.write(QCOW2_HEADER, 0)
    assert raw.read_bytes()[:8] == QCOW2_HEADER


@pytest.mark.usefixtures("raw")
def test_forced_sharing_excludes_writing() -> None:
    with pytest.raises(OpenError) as raised:
        open_disk(ImageSpec("a.raw", force_share=True), context=Context(), writable=True)
    assert str(raised.value) == (
        "Could not open 'a.raw': force-share=on can only be used with read-only images"
    )


# -- formats on formats


@pytest.mark.peer("qemu-img")
def test_raw_over_qcow2_shows_a_part_of_the_guest_disk(gallery: Gallery, work: Path) -> None:
    content = bytes(range(256)) * 4096
    (work / "a.raw").write_bytes(content)
    run_real(["convert", "-O", "qcow2", "a.raw", "a.q"], work).ok()
    text = "driver=raw,offset=300,file.driver=qcow2,file.file.filename=a.q"
    with open_disk(ImageSpec(text, image_opts=True), context=Context()) as disk:
        got = bytearray(disk.size)
        disk.read_into(got, 0)
    assert bytes(got) == content[300:].ljust(len(got), b"\0")
    assert gallery.folder.exists()


@pytest.mark.peer("qemu-img")
def test_qcow2_inside_a_raw_window_is_read_through_it(work: Path) -> None:
    (work / "a.raw").write_bytes(b"guest".ljust(65536, b"\0"))
    run_real(["convert", "-O", "qcow2", "a.raw", "a.q"], work).ok()
    (work / "outer").write_bytes(bytes(4096) + (work / "a.q").read_bytes())
    text = "driver=qcow2,file.driver=raw,file.offset=4096,file.file.filename=outer"
    run_real(["compare", "--image-opts", text, "driver=raw,file.filename=a.raw"], work).ok()
    with open_disk(ImageSpec(text, image_opts=True), context=Context()) as disk:
        got = bytearray(512)
        disk.read_into(got, 0)
    assert got.startswith(b"guest")


@pytest.mark.peer("qemu-img")
def test_writing_through_raw_over_qcow2_allocates_clusters_and_keeps_the_rest(work: Path) -> None:
    (work / "base.raw").write_bytes(b"\xaa" * (1 << 20))
    run_real(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "ov.q"], work).ok()
    text = "driver=raw,file.driver=qcow2,file.file.filename=ov.q"
    with open_disk(ImageSpec(text, image_opts=True), context=Context(), writable=True) as disk:
        (extent,) = disk.top.allocate(100_000, 70_000)
        assert extent.source is not None
        extent.source.write(b"\x55" * 40_000, 100_000)
        extent.source.write(b"\x55" * 30_000, 140_000)
        disk.top.flush()
    run_real(["check", "-q", "ov.q"], work).ok()
    expected = b"\xaa" * 100_000 + b"\x55" * 70_000
    (work / "expected").write_bytes(expected.ljust(1 << 20, b"\xaa"))
    run_real(["compare", "-f", "qcow2", "-F", "raw", "ov.q", "expected"], work).ok()


# -- reading


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ["a.raw", "a.q", "ov.q", "ext.q", "v2.q"])
def test_opening_for_reading_writes_nothing(
    name: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gallery.folder)
    before = {path: path.read_bytes() for path in gallery.folder.iterdir() if path.is_file()}
    with open_disk(ImageSpec(name), context=Context()) as disk:
        disk.read_into(bytearray(512), 0)
    assert {path: path.read_bytes() for path in gallery.folder.iterdir() if path.is_file()} == before


def test_a_fifo_is_refused_without_waiting(work: Path) -> None:
    import os

    os.mkfifo(work / "fifo")
    assert open_ours("fifo").err == (
        "qemu-img: Could not open 'fifo': 'file' driver requires 'fifo' to be a regular file"
    )
