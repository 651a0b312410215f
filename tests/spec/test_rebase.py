"""rebase: another backing file under an image that reads as before, beside the real program (its sheet)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from spec.chains import (
    assert_sound,
    content,
    create,
    make_base,
    make_overlay,
    run_line,
    twice,
)
from support.build import io
from support.holders import qemu_io_holding, qemu_nbd_serving
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

DEPRECATED = (
    "warning: Deprecated use of backing file without explicit backing format (detected format of {})\n"
)

#: What another disk has changed, as qemu-io commands: data, data that is zero, zeros over data, a few bytes.
OTHER_WRITES = (
    "write -q -P 8 300k 10k",
    "write -q -P 0 2M 64k",
    "write -q -z 2304k 128k",
    "write -q -P 4 3200k 80k",
    "write -q -P 5 512 512",
)


def make_other(path: Path, format: str = "raw", options: str = "", size: str = "4M") -> None:
    """What `make_base` makes, with `OTHER_WRITES`."""
    make_base(path, format, options, size)
    io(path, OTHER_WRITES, format=format)


# (old backing's format, new one's format, its size, the overlay's options, its size)
CASES = [
    ("raw", "raw", "4M", "", "4M"),
    ("raw", "raw", "4M", "cluster_size=512", "4M"),
    ("raw", "raw", "4M", "cluster_size=2M", "4M"),
    ("raw", "raw", "4M", "extended_l2=on", "4M"),
    ("raw", "raw", "4M", "extended_l2=on,cluster_size=16k", "4000k"),
    ("raw", "raw", "4M", "compat=0.10", "4M"),
    ("raw", "raw", "6M", "", "5M"),
    ("raw", "raw", "6M", "compat=0.10", "5M"),
    ("qcow2", "raw", "3700k", "", "5M"),
    ("qcow2", "qcow2", "4M", "cluster_size=4k", "4M"),
    ("raw", "qcow2", "3700k", "cluster_size=4k", "3900k"),
    ("raw", "qcow2", "6M", "refcount_bits=1", "5M"),
    ("qcow2", "qcow2", "6M", "lazy_refcounts=on", "3000k"),
]


def _overlay(old: str, new: str, size: str, options: str, overlay_size: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        make_base(folder / "old", old)
        make_other(folder / "new", new, size=size)
        writes = ("write -q -P 2 100k 300k", "write -q -z 640k 64k", "write -q -P 9 2600k 4k")
        make_overlay(folder / "ov.q", ("old", old), options, overlay_size, writes)

    return make


def _assert_reads(folders: tuple[Path, Path], before: bytes, untouched: tuple[str, ...]) -> None:
    for folder in folders:
        assert content(folder / "ov.q") == before
    assert_sound(folders[1] / "ov.q")
    for name in untouched:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def _backing(folder: Path) -> str:
    shown = run_real(["info", "ov.q"], folder).ok().out
    return "".join(line for line in shown.splitlines(keepends=True) if line.startswith("backing"))


@pytest.mark.parametrize(("old", "new", "size", "options", "overlay_size"), CASES)
def test_the_image_reads_as_before_over_its_whole_size(
    old: str, new: str, size: str, options: str, overlay_size: str, tmp_path: Path
) -> None:
    folders = twice(tmp_path, _overlay(old, new, size, options, overlay_size))
    before = content(folders[1] / "ov.q")
    run_line(f"rebase -b new -F {new} ov.q", folders)
    _assert_reads(folders, before, ("old", "new"))
    assert _backing(folders[1]) == _backing(folders[0])
    real, ours = ((folder / "ov.q").stat() for folder in folders)
    assert ours.st_blocks <= real.st_blocks


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "compat=0.10", "extended_l2=on"])
@pytest.mark.parametrize("flags", ["-b ''", "-b '' -F raw"])
def test_without_a_backing_file_everything_that_is_not_zero_is_in_the_image(
    flags: str, options: str, tmp_path: Path
) -> None:
    folders = twice(tmp_path, _overlay("raw", "raw", "4M", options, "5M"))
    before = content(folders[1] / "ov.q")
    run_line(f"rebase {flags} ov.q", folders)
    _assert_reads(folders, before, ("old",))
    assert _backing(folders[1]) == ""
    real, ours = ((folder / "ov.q").stat() for folder in folders)
    assert ours.st_blocks <= real.st_blocks


def test_version_2_has_no_zero_clusters_so_the_zeros_are_written(tmp_path: Path) -> None:
    """The real program lets the new backing file show where the image had none before."""
    make_other(tmp_path / "new", size="6M")
    create(tmp_path / "ov.q", "qcow2", "5M", "compat=0.10")
    io(tmp_path / "ov.q", ["write -q -P 2 100k 300k"])
    before = content(tmp_path / "ov.q")
    qimg.rebase(tmp_path / "ov.q", "new", backing_format="raw")
    assert content(tmp_path / "ov.q") == before
    assert_sound(tmp_path / "ov.q")


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on"])
def test_an_image_that_had_no_backing_file_hides_the_new_one(options: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        make_other(folder / "new", size="6M")
        create(folder / "ov.q", "qcow2", "5M", options)
        io(folder / "ov.q", ["write -q -P 2 100k 300k", "write -q -P 3 4M 1k"])

    folders = twice(tmp_path, make)
    before = content(folders[1] / "ov.q")
    run_line("rebase -b new -F raw ov.q", folders)
    _assert_reads(folders, before, ("new",))


def test_zeros_are_noted_where_the_format_can_do_that(tmp_path: Path) -> None:
    """No space is taken by zeros: 4 MiB over a full disk."""
    (tmp_path / "new").write_bytes(b"\7" * (4 << 20))
    create(tmp_path / "ov.q", "qcow2", "4M")
    qimg.rebase(tmp_path / "ov.q", "new", backing_format="raw")
    assert content(tmp_path / "ov.q") == bytes(4 << 20)
    assert (tmp_path / "ov.q").stat().st_blocks * 512 < 512 << 10


@pytest.mark.parametrize(("size", "other_size"), [("6M", "4M"), ("4M", "6M"), ("3900k", "4100k")])
def test_what_lies_behind_the_end_of_either_backing_file_reads_as_before(
    size: str, other_size: str, tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        for name, length, byte in (("old", size, 1), ("new", other_size, 1)):
            create(folder / name, "raw", length)
            io(folder / name, [f"write -q -P {byte} 0 {length}"], format="raw")
        create(folder / "ov.q", "qcow2", "7M", "", ("old", "raw"))

    folders = twice(tmp_path, make)
    before = content(folders[1] / "ov.q")
    run_line("rebase -b new -F raw ov.q", folders)
    _assert_reads(folders, before, ("old", "new"))


def _deep(folder: Path) -> None:
    make_base(folder / "base", size="5M")
    make_overlay(folder / "low.q", ("base", "raw"), size="4M")
    make_overlay(
        folder / "mid.q", ("low.q", "qcow2"), "", "3M", ("write -q -P 7 1M 200k", "write -q -z 2M 64k")
    )
    make_overlay(folder / "ov.q", ("mid.q", "qcow2"), "cluster_size=4k", "5M", ("write -q -P 8 1M 64k",))
    make_overlay(folder / "side.q", ("low.q", "qcow2"), "", "4M", ("write -q -P 6 1200k 64k",))


@pytest.mark.parametrize(
    "words",
    [
        "-b low.q -F qcow2",
        "-b base -F raw",
        "-b mid.q -F qcow2",
        "-b ./mid.q -F qcow2",
        "-b side.q -F qcow2",
        "-b ''",
    ],
)
def test_a_deep_chain(words: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _deep)
    before = content(folders[1] / "ov.q")
    run_line(f"rebase {words} ov.q", folders)
    _assert_reads(folders, before, ("base", "low.q", "mid.q", "side.q"))
    assert _backing(folders[1]) == _backing(folders[0])
    real, ours = ((folder / "ov.q").stat() for folder in folders)
    assert ours.st_blocks <= real.st_blocks


def test_the_same_backing_file_under_another_name_costs_nothing(tmp_path: Path) -> None:
    _deep(tmp_path)
    before = (tmp_path / "ov.q").read_bytes()
    qimg.rebase(tmp_path / "ov.q", "./mid.q", backing_format="qcow2")
    after = (tmp_path / "ov.q").read_bytes()
    assert after[65536:] == before[65536:]
    assert "./mid.q" in _backing(tmp_path)


def test_only_layers_above_a_common_backing_file_are_compared(tmp_path: Path) -> None:
    """The common one need not be readable where neither of the others hides it."""
    from qimg.storage.fault import READ, FaultStorage
    from support.faults import opened_through

    _deep(tmp_path)
    before = content(tmp_path / "ov.q")
    counters: list[FaultStorage] = []

    def counted(storage):  # type: ignore[no-untyped-def]
        counters.append(FaultStorage(storage))
        return counters[-1]

    with opened_through(counted, "base"):
        qimg.rebase(tmp_path / "ov.q", "side.q", backing_format="qcow2")
    assert sum(counter.counts.get(READ, 0) for counter in counters) < 12
    assert content(tmp_path / "ov.q") == before


def test_one_disk_becomes_the_difference_to_another(tmp_path: Path) -> None:
    """The manual's recipe: an overlay of `changed`, rebased to `old`, holds what differs."""

    def make(folder: Path) -> None:
        make_base(folder / "old")
        make_other(folder / "changed")

    folders = twice(tmp_path, make)
    run_line("create -q -f qcow2 -b changed -F raw ov.q", folders)
    run_line("rebase -b old -F raw ov.q", folders)
    changed = (folders[1] / "changed").read_bytes()
    _assert_reads(folders, changed, ("old", "changed"))
    (folders[1] / "changed").unlink()
    assert content(folders[1] / "ov.q") == changed
    rows = run_real(["map", "--output=json", "ov.q"], folders[1]).ok().out
    real_rows = run_real(["map", "--output=json", "ov.q"], folders[0]).ok().out
    assert rows.count('"depth": 0') <= real_rows.count('"depth": 0')


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on", "compression_type=zstd"])
def test_what_has_to_be_copied_can_be_compressed(options: str, tmp_path: Path) -> None:
    """-c came with 9.x: the real program at hand reads and checks the result."""
    _overlay("raw", "raw", "4M", options, "4000k")(tmp_path)
    before = content(tmp_path / "ov.q")
    run_qimg_inprocess(["rebase", "-c", "-b", "", "ov.q"], tmp_path).ok()
    assert content(tmp_path / "ov.q") == before
    checked = run_real(["check", "ov.q"], tmp_path).ok().out
    assert "compressed clusters" in checked
    assert " 0.00% compressed" not in checked
    assert (tmp_path / "ov.q").stat().st_blocks * 512 < 2 << 20


@pytest.mark.parametrize(
    "line",
    [
        "rebase -u -b nosuch -F raw ov.q",
        "rebase -u -b new -F raw ov.q",
        "rebase -u -b ov.q -F qcow2 ov.q",
        "rebase -u -b '' ov.q",
        "rebase -u ov.q",
        "rebase -u -F raw ov.q",
        "rebase -u -p -b nosuch -F raw ov.q",
        "rebase -u -q -p -b nosuch -F raw ov.q",
        'rebase -u -b \'json:{"driver":"raw","file":{"driver":"file","filename":"new"}}\' -F raw ov.q',
        "rebase -U -u -b nosuch -F raw ov.q",
        "rebase -u -f qcow2 -b a,b -F raw ov.q",
        "rebase --image-opts -u -b x -F raw driver=qcow2,file.filename=ov.q",
    ],
)
def test_unsafe_changes_the_header_and_nothing_else(line: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _overlay("raw", "raw", "4M", "", "4M"))
    run_line(line, folders)
    assert (folders[0] / "ov.q").read_bytes() == (folders[1] / "ov.q").read_bytes()


def test_unsafe_needs_neither_the_old_nor_the_new_backing_file(tmp_path: Path) -> None:
    folders = twice(tmp_path, _overlay("raw", "raw", "4M", "", "4M"))
    for folder in folders:
        (folder / "old").unlink()
    run_line("rebase -u -b elsewhere/new -F raw ov.q", folders)
    assert (folders[0] / "ov.q").read_bytes() == (folders[1] / "ov.q").read_bytes()


@pytest.mark.parametrize(("new", "found"), [("raw", "raw"), ("qcow2", "qcow2")])
def test_a_backing_format_that_is_not_given_is_found_out_and_recorded(
    new: str, found: str, tmp_path: Path
) -> None:
    """Difference 4: the real program refuses after it has copied."""
    _overlay("raw", new, "4M", "", "4M")(tmp_path)
    before = content(tmp_path / "ov.q")
    result = run_qimg_inprocess(["rebase", "-b", "new", "ov.q"], tmp_path).ok()
    assert result.err == "qemu-img: " + DEPRECATED.format(found)
    assert content(tmp_path / "ov.q") == before
    assert _backing(tmp_path).endswith(f"backing file format: {found}\n")


def test_unsafe_without_a_backing_format_records_none(tmp_path: Path) -> None:
    """Difference 4: the file need not be there, so nothing can be found out."""
    _overlay("raw", "raw", "4M", "", "4M")(tmp_path)
    result = run_qimg_inprocess(["rebase", "-u", "-b", "nosuch", "ov.q"], tmp_path).ok()
    assert result.err == ""
    shown = run_real(["info", "ov.q"], tmp_path).ok().out
    assert "backing file: nosuch\n" in shown
    assert "backing file format" not in shown


REFUSED = """
rebase
rebase ov.q
rebase -b
rebase -b new
rebase -b new -F raw ov.q ov.q
rebase -u
rebase -p
rebase -b new -F raw nosuch
rebase -p -b new -F raw nosuch
rebase -b nosuch -F raw ov.q
rebase -p -b nosuch -F raw ov.q
rebase -b new -F nosuch ov.q
rebase -u -b new -F nosuch ov.q
rebase -u -F nosuch ov.q
rebase -b '' -F nosuch ov.q
rebase -b new -F qcow2 ov.q
rebase -b new -F raw -f raw ov.q
rebase -u -b new -F raw -f raw ov.q
rebase -b new -F raw old
rebase -u -f raw old
rebase -b '' -f raw old
rebase -b ov.q -F qcow2 ov.q
rebase -b above.q -F qcow2 ov.q
rebase -t foo -b new ov.q
rebase -T foo -b new ov.q
rebase -t foo -T bar -b new ov.q
rebase -p -t foo -b new ov.q
rebase --image-opts -f qcow2 -b new ov.q
rebase --image-opts -b new -F raw driver=qcow2,file.filename=ov.q,read-only=on
rebase -b new -F raw orphan.q
rebase -b orphan.q -F qcow2 ov.q
rebase -z -b new ov.q
rebase -b new -F raw -r 1 ov.q
rebase -u -b {long} -F raw ov.q
rebase -u -b {longest} -F raw tiny.q
rebase -U -b new -F raw old
"""


@pytest.mark.parametrize("line", [line for line in REFUSED.splitlines() if line])
def test_what_cannot_be_is_refused_in_the_same_words(line: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _overlay("raw", "raw", "4M", "", "4M")(folder)
        create(folder / "orphan.q", "qcow2", "1M", "", ("gone", "raw"))
        create(folder / "above.q", "qcow2", "4M", "", ("ov.q", "qcow2"))
        create(folder / "tiny.q", "qcow2", "1M", "cluster_size=512")

    folders = twice(tmp_path, make)
    files = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    line = line.format(long="a" * 1024, longest="b" * 600)
    assert run_line(line, folders).ours.code == 1
    assert files == {path.name: path.read_bytes() for path in folders[1].iterdir()}


def test_names_are_resolved_from_the_folder_of_the_image_and_stored_as_typed(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        _overlay("raw", "raw", "4M", "", "4M")(folder)
        (folder / "new").rename(folder / "sub" / "next")
        create(folder / "sub" / "ov.q", "qcow2", "4M", "", ("../old", "raw"))

    folders = twice(tmp_path, make)
    before = content(folders[1] / "sub" / "ov.q")
    run_line("rebase -b next -F raw sub/ov.q", folders)
    assert content(folders[1] / "sub" / "ov.q") == before
    assert "backing file: next " in run_real(["info", "sub/ov.q"], folders[1]).ok().out
    run_line("rebase -b sub/next -F raw sub/ov.q", folders)


@pytest.mark.parametrize("cache", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_every_cache_mode_gives_the_same(cache: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _overlay("raw", "qcow2", "3700k", "cluster_size=4k", "3900k"))
    before = content(folders[1] / "ov.q")
    run_line(f"rebase -t {cache} -T {cache} -b new -F qcow2 ov.q", folders)
    _assert_reads(folders, before, ("old", "new"))


def test_progress_goes_from_0_to_100(tmp_path: Path) -> None:
    folders = twice(tmp_path, _overlay("raw", "raw", "4M", "", "4M"))
    shown = run_qimg_inprocess(["rebase", "-p", "-b", "new", "-F", "raw", "ov.q"], folders[1]).ok().out
    records, _, rest = shown.rpartition("\r")
    assert rest == "\n"
    shares = [float(record.strip()[1:-6]) for record in records.split("\r")]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 100.0)


def test_snapshots_are_left_alone_and_keep_their_place(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _overlay("raw", "raw", "4M", "", "4M")(folder)
        run_real(["snapshot", "-c", "one", "ov.q"], folder).ok()
        io(folder / "ov.q", ["write -q -P 77 0 128k"])

    folders = twice(tmp_path, make)
    before = content(folders[1] / "ov.q")
    run_line("rebase -b new -F raw ov.q", folders)
    _assert_reads(folders, before, ("old", "new"))
    for folder in folders:
        run_real(["snapshot", "-a", "one", "ov.q"], folder).ok()
    assert content(folders[0] / "ov.q") == content(folders[1] / "ov.q")


# -- others who use the images


@pytest.mark.parametrize("read_only", [False, True], ids=["writer", "reader"])
@pytest.mark.parametrize("held", ["old", "new", "ov.q"])
@pytest.mark.parametrize("flags", ["-b new", "-u -b new", "-U -b new"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_who_else_uses_an_image_decides_as_with_the_real_program(
    format: str, flags: str, held: str, read_only: bool, tmp_path: Path
) -> None:
    folders = twice(tmp_path, _overlay(format, format, "4M", "", "4M"))
    files = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    kind = "qcow2" if held == "ov.q" else format
    with (
        qemu_io_holding(folders[0] / held, format=kind, read_only=read_only),
        qemu_io_holding(folders[1] / held, format=kind, read_only=read_only),
    ):
        both = run_line(f"rebase {flags} -F {format} ov.q", folders)
        if both.ours.code:
            assert files == {path.name: path.read_bytes() for path in folders[1].iterdir()}


@pytest.mark.peer("qemu-nbd")
def test_an_image_that_a_server_serves_is_not_rebased(tmp_path: Path) -> None:
    folders = twice(tmp_path, _overlay("raw", "raw", "4M", "", "4M"))
    before = (folders[1] / "ov.q").read_bytes()
    with qemu_nbd_serving(folders[0] / "ov.q"), qemu_nbd_serving(folders[1] / "ov.q"):
        assert run_line("rebase -b new -F raw ov.q", folders).ours.code == 1
        assert run_line("rebase -u -b new -F raw ov.q", folders).ours.code == 1
    assert (folders[1] / "ov.q").read_bytes() == before


def test_an_unreadable_backing_file_is_told_and_the_image_keeps_the_old_one(tmp_path: Path) -> None:
    from qimg.storage.fault import FaultStorage
    from support.faults import opened_through

    _overlay("raw", "raw", "4M", "", "4M")(tmp_path)
    before = content(tmp_path / "ov.q")
    for name in ("old", "new"):
        with opened_through(lambda storage: FaultStorage(storage, ["-rE"]), name):
            result = run_qimg_inprocess(["rebase", "-b", "new", "-F", "raw", "ov.q"], tmp_path)
        assert (result.code, result.err) == (1, f"qemu-img: error while reading from {name} backing file\n")
        assert content(tmp_path / "ov.q") == before
        assert "backing file: old\n" in _backing(tmp_path)


def test_a_full_disk_is_told_in_the_same_words(tmp_path: Path) -> None:
    from qimg.storage.fault import FaultStorage
    from support.faults import opened_through

    _overlay("raw", "raw", "4M", "", "4M")(tmp_path)
    before = content(tmp_path / "ov.q")
    with opened_through(lambda storage: FaultStorage(storage, ["-wN"]), "ov.q"):
        result = run_qimg_inprocess(["rebase", "-b", "new", "-F", "raw", "ov.q"], tmp_path)
    assert result.err == "qemu-img: Error while writing to COW image: No space left on device\n"
    assert content(tmp_path / "ov.q") == before
    assert_sound(tmp_path / "ov.q")
