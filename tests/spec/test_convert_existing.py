"""convert -n: into an image that exists and holds something (convert sheet), beside the real program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spec.chains import (
    OVERLAY_WRITES,
    assert_sound,
    content,
    create,
    make_base,
    make_overlay,
    run_line,
    twice,
)
from support.build import io
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

TARGETS = [
    "",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "compat=0.10",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "refcount_bits=1",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=full",
    "compression_type=zstd",
]


def _source(folder: Path) -> None:
    """Data, ragged data, zeros, and blocks of zeros inside of data."""
    create(folder / "source.raw", "raw", "4M")
    io(
        folder / "source.raw",
        [
            "write -q -P 21 0 1M",
            "write -q -P 0 64k 8k",
            "write -q -P 0 200k 200k",
            "write -q -P 22 1500k 3k",
            "write -q -P 23 2M 512",
            "write -q -P 24 3000k 700k",
        ],
        format="raw",
    )


def _target(options: str, size: str = "4M") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _source(folder)
        create(folder / "t.q", "qcow2", size, options)
        packs = not any(word in options for word in ("cluster_size=2M", "preallocation"))
        writes = [write for write in OVERLAY_WRITES if packs or "-c" not in write]
        io(folder / "t.q", [*writes, "write -q -P 1 0 1M", "write -q -P 3 2200k 300k"])

    return make


def _assert_same(folders: tuple[Path, Path], *, size: int = 4 << 20) -> None:
    wanted = (folders[1] / "source.raw").read_bytes()
    for folder in folders:
        assert content(folder / "t.q")[: len(wanted)][:size] == wanted[:size]
    assert content(folders[0] / "t.q") == content(folders[1] / "t.q")
    assert_sound(folders[1] / "t.q")


@pytest.mark.parametrize("options", TARGETS)
@pytest.mark.parametrize("flags", ["", "-S 0", "-S 64k", "-W", "-t none"])
def test_what_was_there_is_gone(flags: str, options: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _target(options))
    run_line(f"convert -n {flags} -O qcow2 source.raw t.q", folders)
    _assert_same(folders)


@pytest.mark.parametrize("options", TARGETS)
def test_what_lies_behind_a_shorter_source_stays(options: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _target(options, "6M")(folder)
        io(folder / "t.q", ["write -q -P 55 4M 100k", "write -q -P 56 5900k 100k"])

    folders = twice(tmp_path, make)
    run_line("convert -n -O qcow2 source.raw t.q", folders)
    _assert_same(folders)


@pytest.mark.parametrize("options", [o for o in TARGETS if "prealloc" not in o])
def test_compressed_clusters_go_over_whatever_is_there(options: str, tmp_path: Path) -> None:
    """The real program fails (Input/output error) where a cluster has a place already."""
    _target(options)(tmp_path)
    result = run_qimg_inprocess(["convert", "-n", "-c", "-O", "qcow2", "source.raw", "t.q"], tmp_path).ok()
    assert (result.out, result.err) == ("", "")
    assert content(tmp_path / "t.q") == (tmp_path / "source.raw").read_bytes()
    assert_sound(tmp_path / "t.q")


@pytest.mark.parametrize("options", TARGETS)
def test_compression_into_an_image_that_holds_nothing(options: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _source(folder)
        create(folder / "t.q", "qcow2", "4M", options)

    folders = twice(tmp_path, make) if "prealloc" not in options else None
    if folders is None:
        make(tmp_path)
        run_qimg_inprocess(["convert", "-n", "-c", "-O", "qcow2", "source.raw", "t.q"], tmp_path).ok()
        assert content(tmp_path / "t.q") == (tmp_path / "source.raw").read_bytes()
        return
    run_line("convert -n -c -O qcow2 source.raw t.q", folders)
    _assert_same(folders)


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "compat=0.10", "extended_l2=on"])
@pytest.mark.parametrize("flags", ["", "-S 0"])
@pytest.mark.parametrize("base_size", ["4M", "6M", "2500k"])
def test_a_backing_file_does_not_show_through(
    base_size: str, flags: str, options: str, tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        _source(folder)
        make_base(folder / "base", size=base_size if base_size != "2500k" else "4M")
        if base_size == "2500k":
            run_real(["resize", "-q", "--shrink", "-f", "raw", "base", base_size], folder).ok()
        make_overlay(folder / "t.q", ("base", "raw"), options, "5M")

    folders = twice(tmp_path, make)
    before = (folders[1] / "base").read_bytes()
    run_line(f"convert -n {flags} -O qcow2 source.raw t.q", folders)
    _assert_same(folders)
    assert (folders[1] / "base").read_bytes() == before


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on"])
def test_with_a_backing_file_given_only_what_the_top_image_holds_is_copied(
    options: str, tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        make_base(folder / "base")
        make_overlay(folder / "source.q", ("base", "raw"), "cluster_size=4k")
        create(folder / "t.q", "qcow2", "4M", options, ("base", "raw"))

    folders = twice(tmp_path, make)
    run_line("convert -n -B base -F raw -O qcow2 source.q t.q", folders)
    for folder in folders:
        assert content(folder / "t.q") == content(folder / "source.q")
    assert_sound(folders[1] / "t.q")


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=2M"])
def test_a_target_that_is_said_to_be_zero_gets_the_data_only(options: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _source(folder)
        create(folder / "t.q", "qcow2", "4M", options)
        io(folder / "t.q", ["write -q -P 0 0 1M", "write -q -z 2M 1M"])

    folders = twice(tmp_path, make)
    run_line("convert -n --target-is-zero -O qcow2 source.raw t.q", folders)
    _assert_same(folders)


def test_snapshots_of_the_target_keep_what_they_hold(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _target("")(folder)
        run_real(["snapshot", "-c", "one", "t.q"], folder).ok()
        io(folder / "t.q", ["write -q -P 77 0 128k"])
        run_real(["snapshot", "-c", "two", "t.q"], folder).ok()

    folders = twice(tmp_path, make)
    run_line("convert -n -O qcow2 source.raw t.q", folders)
    _assert_same(folders)
    for name in ("one", "two"):
        for folder in folders:
            run_real(["snapshot", "-a", name, "t.q"], folder).ok()
        assert content(folders[0] / "t.q") == content(folders[1] / "t.q")


@pytest.mark.parametrize("more", ["", ",data_file_raw=on"])
def test_an_external_data_file_gets_the_data(more: str, tmp_path: Path) -> None:
    """A data file is named relative to the working directory, so each folder has its own."""
    _source(tmp_path)
    create(tmp_path / "t.q", "qcow2", "4M", "data_file=t.data" + more)
    io(tmp_path / "t.q", ["write -q -P 1 0 3M", "write -q -z 1M 1M"])
    run_qimg_inprocess(["convert", "-n", "-O", "qcow2", "source.raw", "t.q"], tmp_path).ok()
    assert content(tmp_path / "t.q") == (tmp_path / "source.raw").read_bytes()
    assert_sound(tmp_path / "t.q")
    if more:
        assert (tmp_path / "t.data").read_bytes() == (tmp_path / "source.raw").read_bytes()


def test_bitmaps_of_the_target_note_what_was_written(tmp_path: Path) -> None:
    """More may be noted than the real program notes, never less: what changed has to be backed up."""

    def make(folder: Path) -> None:
        _target("")(folder)
        run_real(["bitmap", "--add", "t.q", "b0"], folder).ok()

    folders = twice(tmp_path, make)
    before = content(folders[1] / "t.q")
    run_line("convert -n -O qcow2 source.raw t.q", folders)
    _assert_same(folders)
    import qimg

    (bitmap,) = qimg.bitmaps(folders[1] / "t.q")
    after = content(folders[1] / "t.q")
    for at in range(0, len(after), bitmap.granularity):
        number = at // bitmap.granularity
        noted = number // 8 < len(bitmap.bits) and bitmap.bits[number // 8] >> number % 8 & 1
        if not noted:
            assert after[at : at + bitmap.granularity] == before[at : at + bitmap.granularity]


@pytest.mark.parametrize(
    "line",
    [
        "convert -n -O qcow2 t.q t.q",
        "convert -n -f qcow2 -O qcow2 over.q t.q",
        "convert -n -O qcow2 source.raw small.q",
        "convert -n -O qcow2 source.raw nosuch.q",
        "convert -n -O qcow2 source.raw source.raw",
        "convert -n -O raw source.raw source.raw",
        "convert -n -O qcow2 -o cluster_size=4k source.raw t.q",
    ],
)
def test_what_cannot_be_is_refused_and_the_target_is_left_alone(line: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _target("")(folder)
        create(folder / "over.q", "qcow2", "4M", "", ("t.q", "qcow2"))
        create(folder / "small.q", "qcow2", "1M")

    folders = twice(tmp_path, make)
    files = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    assert run_line(line, folders).ours.code == 1
    assert files == {path.name: path.read_bytes() for path in folders[1].iterdir()}


def test_large_units_that_are_kept_are_not_moved(tmp_path: Path) -> None:
    """Data goes where the cluster lies: the file does not grow, and what is beside it stays."""
    create(tmp_path / "t.q", "qcow2", "4M", "cluster_size=2M")
    io(tmp_path / "t.q", ["write -q -P 9 0 4M"])
    _source(tmp_path)
    length = (tmp_path / "t.q").stat().st_size
    run_qimg_inprocess(["convert", "-n", "-O", "qcow2", "source.raw", "t.q"], tmp_path).ok()
    assert (tmp_path / "t.q").stat().st_size == length
    assert content(tmp_path / "t.q") == (tmp_path / "source.raw").read_bytes()
