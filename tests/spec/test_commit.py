"""commit: what an overlay holds goes into an image below it (commit sheet), beside the real program."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import qimg
from spec import chains
from spec.chains import assert_alike, assert_sound, content, create, make_base, make_overlay, run_line, twice
from support.build import io
from support.holders import qemu_io_holding, qemu_nbd_serving
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

# (base's format, its options, the overlay's options, the overlay's size; the base has 4 MiB)
CHAINS = [
    ("raw", "", "", "4M"),
    ("raw", "", "", "6M"),
    ("raw", "", "cluster_size=512", "4M"),
    ("raw", "", "extended_l2=on", "4000k"),
    ("raw", "", "compat=0.10", "4M"),
    ("qcow2", "", "", "4M"),
    ("qcow2", "", "", "6M"),
    ("qcow2", "", "", "3800k"),
    ("qcow2", "cluster_size=4k", "", "5M"),
    ("qcow2", "cluster_size=1M", "cluster_size=512", "5000k"),
    ("qcow2", "cluster_size=2M", "cluster_size=4k", "4M"),
    ("qcow2", "compat=0.10", "compat=0.10", "6M"),
    ("qcow2", "compat=0.10", "", "4M"),
    ("qcow2", "extended_l2=on", "", "4M"),
    ("qcow2", "", "extended_l2=on", "6M"),
    ("qcow2", "refcount_bits=1", "refcount_bits=64", "6M"),
    ("qcow2", "lazy_refcounts=on", "lazy_refcounts=on", "4M"),
    ("qcow2", "preallocation=metadata", "", "4M"),
    ("qcow2", "", "cluster_size=2M", "4M"),
]


def _chain(base_format: str, base_options: str, options: str, size: str):  # type: ignore[no-untyped-def]
    def make(folder: Path) -> None:
        make_base(folder / "base", base_format, base_options)
        make_overlay(folder / "top.q", ("base", base_format), options, size)

    return make


@pytest.mark.parametrize(("base_format", "base_options", "options", "size"), CHAINS)
def test_the_base_holds_what_the_image_held_and_the_image_is_empty(
    base_format: str, base_options: str, options: str, size: str, tmp_path: Path
) -> None:
    folders = twice(tmp_path, _chain(base_format, base_options, options, size))
    before = content(folders[1] / "top.q")
    run_line("commit top.q", folders)
    for folder in folders:
        assert content(folder / "top.q") == before
    assert content(folders[1] / "base", base_format)[: len(before)] == before
    # Sub-units of zeros and of nothing differ in what they are called; content, soundness and size do not.
    assert content(folders[0] / "base", base_format) == content(folders[1] / "base", base_format)
    assert_sound(folders[1] / "base", base_format)
    assert_alike(folders, "top.q")
    rows = run_real(["map", "--output=json", "top.q"], folders[1]).ok().out
    assert '"depth": 0, "present": true' not in rows


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "refcount_bits=8"]
)
def test_an_emptied_image_is_as_long_as_a_new_one(options: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _chain("raw", "", options, "4M"))
    run_line("commit top.q", folders)
    real, ours = ((folder / "top.q").stat() for folder in folders)
    assert ours.st_size == real.st_size
    assert ours.st_blocks <= real.st_blocks


@pytest.mark.parametrize("flags", ["-d", "-b base", "-b ./base", "-d -b base"])
def test_the_image_can_be_kept_byte_for_byte(flags: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _chain("raw", "", "", "4M"))
    before = (folders[1] / "top.q").read_bytes()
    run_line(f"commit {flags} top.q", folders)
    assert (folders[1] / "top.q").read_bytes() == before
    assert (folders[0] / "base").read_bytes() == (folders[1] / "base").read_bytes()


def _deep(folder: Path) -> None:
    make_base(folder / "base.q", "qcow2", size="5M")
    make_overlay(folder / "low.q", ("base.q", "qcow2"), size="4M")
    # Shorter than what is below and above: from its end on the top image reads as zeros.
    make_overlay(
        folder / "mid.q",
        ("low.q", "qcow2"),
        "cluster_size=4k",
        "2M",
        ("write -q -P 7 64k 200k", "write -q -z 1M 64k"),
    )
    (folder / "sub").mkdir()
    make_overlay(
        folder / "sub" / "top.q",
        ("../mid.q", "qcow2"),
        "",
        "6M",
        ("write -q -P 8 1M 64k", "write -q -P 4 5M 640k"),
    )
    (folder / "link.q").symlink_to("base.q")
    (folder / "hard.q").hardlink_to(folder / "base.q")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("../mid.q", "mid.q"),
        (".././mid.q", "mid.q"),
        ("low.q", "low.q"),
        ("./low.q", "low.q"),
        ("base.q", "base.q"),
        ("link.q", "base.q"),
        ("mid.q", None),
        ("sub/../mid.q", None),
        ("hard.q", None),
        ("file:low.q", None),
        ("top.q", None),
        ("nosuch.q", None),
        ("''", None),
    ],
)
def test_any_image_of_the_chain_can_be_the_base_and_what_lies_between_goes_there_too(
    name: str, found: str | None, tmp_path: Path
) -> None:
    folders = twice(tmp_path, _deep)
    before = content(folders[1] / "sub" / "top.q")
    files = {path.name: path.read_bytes() for path in folders[1].rglob("*.q")}
    run_line(f"commit -b {name} sub/top.q", folders)
    if found is None:
        assert files == {path.name: path.read_bytes() for path in folders[1].rglob("*.q")}
        return
    assert content(folders[1] / "sub" / "top.q") == before
    assert_alike(folders, found)
    assert content(folders[1] / found)[: len(before)] == before
    for path in folders[1].rglob("*.q"):
        assert path.name in (found, "link.q", "hard.q") or path.read_bytes() == files[path.name]


def test_the_immediate_backing_file_of_a_deep_chain_shows_what_is_below_it(tmp_path: Path) -> None:
    folders = twice(tmp_path, _deep)
    before = content(folders[1] / "sub" / "top.q")
    run_line("commit sub/top.q", folders)
    assert content(folders[1] / "sub" / "top.q") == before
    assert_alike(folders, "mid.q")


def test_a_base_that_grows_over_a_longer_one_of_its_own_reads_zeros_there(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        make_base(folder / "base", size="6M")
        io(folder / "base", ["write -q -P 99 4M 2M"], format="raw")
        create(folder / "mid.q", "qcow2", "3000k", "", ("base", "raw"))
        make_overlay(folder / "top.q", ("mid.q", "qcow2"), size="6M", writes=("write -q -P 2 5M 64k",))

    folders = twice(tmp_path, make)
    before = content(folders[1] / "top.q")
    run_line("commit top.q", folders)
    assert content(folders[1] / "top.q") == before
    assert content(folders[0] / "mid.q") == content(folders[1] / "mid.q")
    assert_sound(folders[1] / "mid.q")


def test_snapshots_of_the_image_stay(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _chain("raw", "", "", "4M")(folder)
        run_real(["snapshot", "-c", "one", "top.q"], folder).ok()
        io(folder / "top.q", ["write -q -P 77 0 64k"])

    folders = twice(tmp_path, make)
    run_line("commit top.q", folders)
    assert_alike(folders, "top.q")
    assert "one" in run_real(["snapshot", "-l", "top.q"], folders[1]).ok().out
    for folder in folders:
        run_real(["snapshot", "-a", "one", "top.q"], folder).ok()
    assert content(folders[0] / "top.q") == content(folders[1] / "top.q")


@pytest.mark.parametrize("which", ["top.q", "base"])
def test_bitmaps_stay_and_those_of_the_base_note_what_was_written(which: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _chain("qcow2", "", "", "4M")(folder)
        run_real(["bitmap", "--add", which, "b0"], folder).ok()

    folders = twice(tmp_path, make)
    run_line("commit top.q", folders)
    assert_alike(folders, which)
    for folder in folders:
        create(folder / "bits.q", "qcow2", "4M")
        run_real(["bitmap", "--add", "--disable", "bits.q", "b0"], folder).ok()
        run_real(["bitmap", "--merge", "b0", "-b", which, "-F", "qcow2", "bits.q", "b0"], folder).ok()
    assert_alike(folders, "bits.q")


def test_a_base_with_snapshots_keeps_them(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        make_base(folder / "base.q", "qcow2")
        run_real(["snapshot", "-c", "one", "base.q"], folder).ok()
        make_overlay(folder / "top.q", ("base.q", "qcow2"))

    folders = twice(tmp_path, make)
    run_line("commit top.q", folders)
    assert_alike(folders, "base.q")
    for folder in folders:
        run_real(["snapshot", "-a", "one", "base.q"], folder).ok()
    assert_alike(folders, "base.q")


@pytest.mark.parametrize("cache", ["none", "off", "writeback", "writethrough", "directsync", "unsafe"])
def test_every_cache_mode_gives_the_same(cache: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _chain("qcow2", "cluster_size=4k", "cluster_size=512", "5000k"))
    before = content(folders[1] / "top.q")
    run_line(f"commit -t {cache} top.q", folders)
    assert content(folders[1] / "top.q") == before
    assert content(folders[0] / "base") == content(folders[1] / "base")


REFUSED = """
commit
commit top.q base
commit base
commit -f raw base
commit -f raw top.q
commit lone.q
commit -p lone.q
commit nosuch
commit -p nosuch
commit -f nosuch top.q
commit -t foo top.q
commit -t foo nosuch
commit -t foo -r abc
commit -r abc top.q
commit -r 99E top.q
commit -r '' top.q
commit -U top.q
commit -T none top.q
commit -b x lone.q
commit -b x base
commit -b
commit --image-opts -f qcow2 top.q
commit --image-opts driver=qcow2,file.filename=lone.q
commit --image-opts driver=qcow2,file.filename=top.q,read-only=on
commit --image-opts driver=qcow2,file.filename=top.q,backing=
commit orphan.q
commit deep-orphan.q
"""


@pytest.mark.parametrize("line", [line for line in REFUSED.splitlines() if line])
def test_what_cannot_be_is_refused_in_the_same_words(line: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        _chain("raw", "", "", "4M")(folder)
        create(folder / "lone.q", "qcow2", "1M")
        create(folder / "orphan.q", "qcow2", "1M", "", ("gone", "raw"))
        create(folder / "deep-orphan.q", "qcow2", "1M", "", ("orphan.q", "qcow2"))

    folders = twice(tmp_path, make)
    files = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    assert run_line(line, folders).ours.code == 1
    assert files == {path.name: path.read_bytes() for path in folders[1].iterdir()}


@pytest.mark.parametrize(
    "line",
    [
        "commit -q top.q",
        "commit -q -p -d top.q",
        "commit -dqr 0 top.q",
        "commit --image-opts driver=qcow2,file.filename=top.q",
    ],
)
def test_accepted_words(line: str, tmp_path: Path) -> None:
    folders = twice(tmp_path, _chain("raw", "", "", "4M"))
    run_line(line, folders)
    assert (folders[0] / "base").read_bytes() == (folders[1] / "base").read_bytes()


def test_progress_goes_from_0_to_100_and_the_result_comes_after_it(tmp_path: Path) -> None:
    _chain("raw", "", "", "4M")(tmp_path)
    shown = run_qimg_inprocess(["commit", "-p", "top.q"], tmp_path).ok().out
    records, _, rest = shown.rpartition("\r")
    assert rest == "\nImage committed.\n"
    shares = [float(record.strip()[1:-6]) for record in records.split("\r")]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 100.0)


def test_a_rate_limit_holds_the_work_back(tmp_path: Path) -> None:
    _chain("raw", "", "", "4M")(tmp_path)
    start = time.monotonic()
    qimg.commit(tmp_path / "top.q", rate_limit=8 << 20)
    assert time.monotonic() - start > 0.02
    with qimg.open(tmp_path / "base", format="raw") as disk:
        assert disk.read(100 << 10, 4) == b"\2\2\2\2"


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vpc", "parallels", "vhdx"])
def test_a_base_that_cannot_grow_is_left_alone(format: str, tmp_path: Path) -> None:
    """The real program can make none of these larger; qimg does so where it can resize the format."""

    def make(folder: Path) -> None:
        create(folder / "base", format, "4M")
        make_overlay(folder / "top.q", ("base", format), size="6M")

    make(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = content(tmp_path / "top.q")
    result = run_qimg_inprocess(["commit", "top.q"], tmp_path)
    assert content(tmp_path / "top.q") == before
    if result.code:
        assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert not result.out
    else:
        assert content(tmp_path / "base", format)[: len(before)] == before


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vpc", "qed", "qcow"])
def test_a_base_of_another_format(format: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        create(folder / "base", format, "4M")
        make_overlay(folder / "top.q", ("base", format))

    folders = twice(tmp_path, make)
    before = content(folders[1] / "top.q")
    run_line("commit top.q", folders)
    assert content(folders[1] / "top.q") == before
    assert content(folders[1] / "base", format) == content(folders[0] / "base", format)


def test_a_guest_cannot_turn_a_base_that_passed_for_raw_into_another_format(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        make_base(folder / "base")
        create(folder / "header.q", "qcow2", "1M")
        create(folder / "top.q", "qcow2", "4M", "", ("base", "raw"))
        data = (folder / "header.q").read_bytes()[:512]
        (folder / "piece").write_bytes(data)
        io(folder / "top.q", ["write -q -s piece 0 512"])
        # The name of the backing format goes: the base is probed.
        image = bytearray((folder / "top.q").read_bytes())
        at = image.index(bytes.fromhex("e2792aca"))
        image[at : at + 4] = b"\x12\x34\x56\x78"
        (folder / "top.q").write_bytes(image)

    folders = twice(tmp_path, make)
    result = run_line("commit top.q", folders).ours
    assert "Operation not permitted" in result.err
    assert (folders[1] / "base").read_bytes()[:4] == b"\1\1\1\1"


# -- others who use the images


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("read_only", [False, True], ids=["writer", "reader"])
@pytest.mark.parametrize("held", ["base", "mid.q", "top.q"])
@pytest.mark.parametrize("flags", ["", "-b base"])
def test_who_else_uses_an_image_decides_as_with_the_real_program(
    flags: str, held: str, read_only: bool, base_format: str, tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        make_base(folder / "base", base_format)
        make_overlay(folder / "mid.q", ("base", base_format))
        make_overlay(folder / "top.q", ("mid.q", "qcow2"), writes=("write -q -P 8 1M 64k",))

    folders = twice(tmp_path, make)
    files = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    format = base_format if held == "base" else "qcow2"
    with (
        qemu_io_holding(folders[0] / held, format=format, read_only=read_only),
        qemu_io_holding(folders[1] / held, format=format, read_only=read_only),
    ):
        both = run_line(f"commit {flags} top.q", folders)
        if both.ours.code:
            assert files == {path.name: path.read_bytes() for path in folders[1].iterdir()}


@pytest.mark.peer("qemu-nbd")
def test_an_image_that_a_server_serves_is_not_committed(tmp_path: Path) -> None:
    folders = twice(tmp_path, _chain("raw", "", "", "4M"))
    before = (folders[1] / "base").read_bytes()
    with qemu_nbd_serving(folders[0] / "top.q"), qemu_nbd_serving(folders[1] / "top.q"):
        assert run_line("commit top.q", folders).ours.code == 1
    assert (folders[1] / "base").read_bytes() == before


def test_the_library_commits(tmp_path: Path) -> None:
    _deep(tmp_path)
    shown = content(tmp_path / "sub" / "top.q")
    qimg.commit(tmp_path / "sub" / "top.q", base="base.q")
    assert content(tmp_path / "base.q")[: len(shown)] == shown
    with pytest.raises(qimg.QimgError, match="Did not find 'x' in the backing chain"):
        qimg.commit(tmp_path / "sub" / "top.q", base="x")
    shutil.copy(tmp_path / "low.q", tmp_path / "kept.q")
    qimg.commit(tmp_path / "kept.q", keep=True)
    assert chains.content(tmp_path / "kept.q") == content(tmp_path / "base.q")[: 4 << 20]
