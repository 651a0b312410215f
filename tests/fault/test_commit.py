"""What a power cut or a failing disk leaves of a commit, an emptied image, and a convert into an image.

Commit in chains of qcow2 is in `test_living_chain`; here are other bases, and every way to empty an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.graph.open import ImageSpec, open_disk
from qimg.storage.base import Storage
from qimg.storage.fault import FLUSH, FaultStorage, Rule
from support import crash
from support.build import io
from support.faults import opened_through
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

K = 1 << 10
WRITES = ("write -q -P 2 10k 30k", "write -q -z 64k 64k", "write -q -P 5 300k 70k", "write -q -P 6 200k 4k")


def chain(folder: Path, options: str, size: str = "512k") -> None:
    """A full raw base, and an overlay of it."""
    (folder / "base").write_bytes((bytes(range(1, 251)) * (448 * K // 250 + 1))[: 448 * K])
    words = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw"]
    run_real([*words, *(["-o", options] if options else []), "top.q", size], folder).ok()
    io(folder / "top.q", WRITES)


OPTIONS = [
    "",
    "cluster_size=512",
    "cluster_size=4k",
    "compat=0.10",
    "refcount_bits=1,cluster_size=1k",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_power_cut_while_a_raw_base_is_written(options: str, tmp_path: Path) -> None:
    chain(tmp_path, options)
    shown = crash.guest_content(tmp_path / "top.q")

    def run() -> None:
        qimg.commit(tmp_path / "top.q")

    crash.assert_survives(tmp_path, ["top.q"], run, files=["base"], after=shown, atomic=True)


@pytest.mark.parametrize("options", ["", "cluster_size=512"])
def test_a_commit_to_raw_that_fails_leaves_the_image_as_it_reads_and_can_be_repeated(
    options: str, tmp_path: Path
) -> None:
    chain(tmp_path, options)
    crash.assert_survives_errors(
        tmp_path, ["top.q"], lambda: qimg.commit(tmp_path / "top.q"), files=["base"], atomic=True, again=True
    )


def test_the_image_is_emptied_only_after_the_base_is_durable(tmp_path: Path) -> None:
    chain(tmp_path, "")
    before = (tmp_path / "top.q").read_bytes()

    def wrap(storage: Storage) -> Storage:
        return FaultStorage(storage, [Rule(FLUSH, number) for number in range(1, 50)])

    with opened_through(wrap, "base"):
        result = run_qimg_inprocess(["commit", "top.q"], tmp_path)
    assert (result.code, result.out) == (1, "")
    assert result.err == "qemu-img: Block job failed: Input/output error\n"
    assert (tmp_path / "top.q").read_bytes() == before


def test_a_full_disk_is_told_in_the_same_words(tmp_path: Path) -> None:
    chain(tmp_path, "")
    before = (tmp_path / "top.q").read_bytes()
    with opened_through(lambda storage: FaultStorage(storage, ["-wN"]), "base"):
        result = run_qimg_inprocess(["commit", "top.q"], tmp_path)
    assert result.err == "qemu-img: Block job failed: No space left on device\n"
    assert (tmp_path / "top.q").read_bytes() == before


# -- emptying


def plain(folder: Path) -> None:
    """As the real program lays images out: everything is in its place but data."""
    chain(folder, "cluster_size=4k")


def grown(folder: Path) -> None:
    """Refcount blocks beyond the first, and an L1 table that moved."""
    chain(folder, "cluster_size=512", "512k")
    run_real(["resize", "-q", "top.q", "8M"], folder).ok()
    io(folder / "top.q", ["write -q -P 7 0 1M", "write -q -P 7 7M 256k"])


def moved(folder: Path) -> None:
    """A refcount table that moved, with blocks that count one cluster each 4 bits."""
    chain(folder, "cluster_size=512,refcount_bits=64", "4M")
    io(folder / "top.q", ["write -q -P 7 0 2500k"])


def shrunk(folder: Path) -> None:
    """An L1 table that is longer than it has to be."""
    chain(folder, "cluster_size=512", "8M")
    io(folder / "top.q", ["write -q -P 7 1M 100k"])
    run_real(["resize", "-q", "--shrink", "top.q", "2M"], folder).ok()


def with_snapshots(folder: Path) -> None:
    chain(folder, "cluster_size=4k")
    run_real(["snapshot", "-c", "one", "top.q"], folder).ok()
    io(folder / "top.q", ["write -q -P 7 0 40k"])


def with_bitmaps(folder: Path) -> None:
    chain(folder, "cluster_size=4k")
    run_real(["bitmap", "--add", "top.q", "b0"], folder).ok()


def compressed(folder: Path) -> None:
    chain(folder, "cluster_size=4k")
    io(folder / "top.q", [f"write -q -c -P {at + 1} {400 + 4 * at}k 4k" for at in range(10)])


def subclusters(folder: Path) -> None:
    chain(folder, "extended_l2=on,cluster_size=16k")


LAYOUTS = [plain, grown, moved, shrunk, with_snapshots, with_bitmaps, compressed, subclusters]


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_emptying_shows_what_is_below_at_every_moment(make: Callable[[Path], None], tmp_path: Path) -> None:
    """What is below is what the image holds, as after a commit; so nobody sees a difference."""
    make(tmp_path)
    shown = crash.guest_content(tmp_path / "top.q")
    (tmp_path / "base").write_bytes(shown)

    def run() -> None:
        with open_disk(ImageSpec(str(tmp_path / "top.q")), context=Context(), writable=True) as disk:
            disk.top.make_empty()

    crash.assert_survives_errors(tmp_path, ["top.q"], run, atomic=True, again=True, limit=60)
    crash.assert_survives(tmp_path, ["top.q"], run, after=shown, atomic=True)
    assert crash.guest_content(tmp_path / "top.q") == shown
    assert run_real(["check", "top.q"], tmp_path).code == 0
    assert '"depth": 0, "present": true' not in run_real(["map", "--output=json", "top.q"], tmp_path).ok().out


@pytest.mark.parametrize(
    "make", [plain, grown, moved, compressed, subclusters], ids=lambda make: make.__name__
)
def test_an_emptied_image_has_the_layout_of_a_new_one(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    qimg.commit(tmp_path / "top.q")
    length = (tmp_path / "top.q").stat().st_size
    (tmp_path / "again").mkdir()
    make(tmp_path / "again")
    run_real(["commit", "-q", "top.q"], tmp_path / "again").ok()
    assert length <= (tmp_path / "again" / "top.q").stat().st_size


# -- convert -n


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "compat=0.10", "extended_l2=on,cluster_size=16k"]
)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_a_power_cut_while_an_image_is_written_over(compress: bool, options: str, tmp_path: Path) -> None:
    """Each sector is the old or the new one, and the image is sound."""
    chain(tmp_path, options)
    content = bytearray(b"\7" * (400 * K))
    content[50 * K : 90 * K] = bytes(40 * K)
    (tmp_path / "source").write_bytes(content)

    def run() -> None:
        qimg.convert(
            tmp_path / "source",
            tmp_path / "top.q",
            format="qcow2",
            source_format="raw",
            create=False,
            compress=compress,
            cache="writeback",
        )

    crash.assert_survives(tmp_path, ["top.q"], run, limit=80)
