"""bitmap: the same command lines through both programs leave the same bitmaps, bit for bit (bitmap sheet)."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from support import bitmaps, release7
from support.build import assert_real_check_clean
from support.run import Result, run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

#: A line is a command: `bitmap`, `create` and the like go to both programs, `io IMAGE COMMAND...` to the real
#: qemu-io in both folders.
HISTORIES = {
    "a bitmap is added, and records": """
        create -q -f qcow2 a.q 64M
        bitmap --add a.q b0
        io a.q 'write 0 64k' 'write 1M 300k' 'write -z 8M 1M' 'discard 60M 4M'
        bitmap --add --disable a.q b1
        io a.q 'write 5M 64k'
        """,
    "granularities from 512 bytes to 2 GiB": """
        create -q -f qcow2 a.q 8G
        bitmap --add -g 512 a.q fine
        bitmap --add -g 4k a.q four
        bitmap --add -g 0 a.q standard
        bitmap --add -g 2G a.q coarse
        io a.q 'write 511 2' 'write 3G 4k' 'write 8191M 1M'
        """,
    "it is cleared, and stays enabled or disabled": """
        create -q -f qcow2 a.q 64M
        bitmap --add a.q b0
        bitmap --add a.q b1
        io a.q 'write 0 10M'
        bitmap --disable a.q b1
        bitmap --clear a.q b0
        bitmap --clear a.q b1
        io a.q 'write 20M 1M'
        """,
    "it is switched off and on": """
        create -q -f qcow2 a.q 64M
        bitmap --add a.q b0
        bitmap --disable a.q b0
        io a.q 'write 0 1M'
        bitmap --enable a.q b0
        bitmap --enable a.q b0
        io a.q 'write 2M 1M'
        bitmap --disable --enable --disable a.q b0
        """,
    "it is removed, from the middle and the last one": """
        create -q -f qcow2 a.q 64M
        bitmap --add a.q b0
        bitmap --add a.q b1
        bitmap --add a.q b2
        io a.q 'write 0 1M'
        bitmap --remove a.q b1
        bitmap --remove a.q b0
        bitmap --remove a.q b2
        """,
    "the union of others": """
        create -q -f qcow2 a.q 64M
        bitmap --add a.q b0
        io a.q 'write 0 1M'
        bitmap --disable a.q b0
        bitmap --add -g 4k a.q b1
        io a.q 'write 31M 2M' 'write 63M 4k'
        bitmap --disable a.q b1
        bitmap --add --disable --merge b0 --merge b1 a.q both
        bitmap --add -g 1M --merge both a.q coarse
        bitmap --add -g 512 --merge coarse a.q fine
        bitmap --merge fine a.q fine
        """,
    "merged from another image": """
        create -q -f qcow2 a.q 64M
        create -q -f qcow2 -o cluster_size=4k b.q 64M
        bitmap --add a.q b0
        bitmap --add -g 8k b.q other
        io b.q 'write 12345 100' 'write 50M 5M'
        io a.q 'write 0 4k'
        bitmap --merge other -b b.q a.q b0
        bitmap --merge other -b nofile -b b.q -F qcow2 a.q b0
        """,
    "removed and added in one go": """
        create -q -f qcow2 a.q 64M
        bitmap --add a.q b0
        io a.q 'write 0 4k'
        bitmap --remove --add -g 4k a.q b0
        bitmap --add --remove --add a.q b1
        """,
    "clusters of 512 bytes": """
        create -q -f qcow2 -o cluster_size=512 a.q 64M
        bitmap --add a.q b0
        bitmap --add -g 512 a.q b1
        io a.q 'write 1M 3M' 'write 63M 1M'
        bitmap --add -g 1k --merge b1 a.q b2
        bitmap --clear a.q b1
        """,
    "clusters of 2 MiB": """
        create -q -f qcow2 -o cluster_size=2M a.q 64M
        bitmap --add a.q b0
        bitmap --add -g 512 a.q b1
        io a.q 'write 1M 3M'
        bitmap --add -g 1k --merge b1 a.q b2
        """,
    "a disk that ends inside a bit, and inside a byte of bits": """
        create -q -f qcow2 a.q 1049088
        bitmap --add -g 64k a.q b0
        bitmap --add -g 512 a.q b1
        io a.q 'write 1048576 512'
        bitmap --add -g 512 --merge b0 a.q b2
        """,
    "extended L2, one bit counts, a backing file": """
        create -q -f qcow2 base.q 64M
        create -q -f qcow2 -o extended_l2=on,refcount_bits=1 -b base.q -F qcow2 a.q
        bitmap --add a.q b0
        io a.q 'write 2k 2k' 'write 9M 1M'
        bitmap --add --merge b0 a.q b1
        bitmap --remove a.q b0
        """,
    "an image beside internal snapshots and with an external data file": """
        create -q -f qcow2 a.q 64M
        io a.q 'write 0 4M'
        snapshot -c s1 a.q
        bitmap --add a.q b0
        io a.q 'write 1M 1M'
        bitmap --add -g 4k --merge b0 a.q b1
        create -q -f qcow2 -o data_file=d.raw d.q 64M
        bitmap --add d.q b0
        io d.q 'write 1M 1M'
        bitmap --add --merge b0 d.q b1
        """,
    "names": """
        create -q -f qcow2 a.q 1M
        bitmap --add a.q 'two words'
        bitmap --add -- a.q '--looks=like,an option'
        bitmap --add a.q 'ü€'
        bitmap --add a.q .
        bitmap --remove a.q 'two words'
        """,
    "a lot of bitmaps": "create -q -f qcow2 -o cluster_size=512 a.q 1M\n"
    + "".join(f"bitmap --add a.q {'name' * 20}{number}\n" for number in range(30))
    + f"bitmap --remove a.q {'name' * 20}11\nbitmap --clear a.q {'name' * 20}29\n",
}


def carry_out(line: str, folders: tuple[Path, Path]) -> None:
    """One line of a history, by the real program in the first folder and by ours in the second."""
    words = shlex.split(line)
    if words[0] == "io":
        commands = [word for command in words[2:] for word in ("-c", command)]
        for folder in folders:
            done = run_peer("qemu-io", ["-f", "qcow2", *commands, words[1]], folder).ok()
            assert "failed" not in done.out
            assert not done.err
        return
    real = run_real(words, folders[0])
    ours = run_qimg_inprocess(words, folders[1]) if words[0] == "bitmap" else run_real(words, folders[1])
    assert real == ours, line
    assert real == Result(0, "", ""), line


@pytest.mark.parametrize("history", HISTORIES)
def test_both_programs_leave_the_same_bitmaps(history: str, pair: tuple[Path, Path]) -> None:
    for line in filter(None, map(str.strip, HISTORIES[history].splitlines())):
        carry_out(line, pair)
        for path in sorted(pair[1].glob("*.q")):
            assert_real_check_clean(path)
    for path in sorted(pair[1].glob("*.q")):
        real = pair[0] / path.name
        assert told(path) == told(real)
        assert bitmaps.dirty_ranges(path) == bitmaps.dirty_ranges(real)
        assert bitmaps.ours(path) == bitmaps.ours(real)


def told(path: Path) -> object:
    """What the real ``info`` says of the format."""
    return json.loads(run_real(["info", "--output=json", path]).ok().out)["format-specific"]


# -- refusals


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, made by the real program."""
    folder = tmp_path_factory.mktemp("gallery")
    for line in """
        create -q -f qcow2 a.q 8M
        bitmap --add a.q b0
        bitmap --add --disable -g 4k a.q off
        create -q -f qcow2 small.q 1M
        bitmap --add small.q b0
        create -q -f qcow2 -o compat=0.10 two.q 1M
        create -q -f qcow2 huge.q 4T
        create -q -f qcow2 base.q 8M
        create -q -f qcow2 -b base.q -F qcow2 overlay.q
        create -q -f raw r.raw 1M
        create -q -f qcow2 broken.q 8M
        bitmap --add broken.q bad
        """.splitlines():
        if line.strip():
            run_real(shlex.split(line), folder).ok()
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write 0 64k", "-c", "sigraise 9", "broken.q"], folder)
    run_real(["bitmap", "--add", "broken.q", "good"], folder).ok()
    stale = bytearray((folder / "broken.q").read_bytes())
    stale[88:96] = bytes(8)
    (folder / "stale.q").write_bytes(stale)
    (folder / "base.q").unlink()
    return folder


REFUSED = """
    bitmap
    bitmap a.q
    bitmap a.q b0
    bitmap --add
    bitmap --add a.q
    bitmap --add a.q b0 c
    bitmap --remove -g 64k a.q b0
    bitmap --remove -b small.q a.q b0
    bitmap --merge b0 -F qcow2 a.q b0
    bitmap --remove -g 64k -F raw a.q b
    bitmap --remove -g 0 -F raw a.q b
    bitmap --remove -b x -g 64k a.q b
    bitmap --image-opts -f qcow2 --add a.q b
    bitmap --image-opts -f qcow2 --remove -b x a.q b
    bitmap --add -g foo a.q x
    bitmap --add -g '' a.q x
    bitmap --add -g 9E a.q x
    bitmap --add --foo a.q x
    bitmap --add -p a.q x
    bitmap --add -q a.q x
    bitmap --add -U a.q x
    bitmap --merge
    bitmap --add -b
    bitmap --source-f=small.q --merge b0 a.q b0
    bitmap --add nofile b
    bitmap --add -f foo a.q b
    bitmap --add -f raw nofile b
    bitmap --merge b0 -b nofile a.q b0
    bitmap --merge b0 -b small.q -F foo a.q b0
    bitmap --merge b0 -b a.q a.q b0
    bitmap --add a.q b0
    bitmap --add a.q ''
    bitmap --add -g 256 a.q ''
    bitmap --add -g 256 a.q b0
    bitmap --add -g 1000 a.q x
    bitmap --add -g 1.5k a.q x
    bitmap --add -g 4G a.q x
    bitmap --add -g 3G a.q x
    bitmap --remove a.q ''
    bitmap --remove a.q nosuch
    bitmap --clear a.q nosuch
    bitmap --enable a.q nosuch
    bitmap --disable a.q nosuch
    bitmap --disable --add a.q nosuch
    bitmap --merge nosuch a.q b0
    bitmap --merge b0 a.q nosuch
    bitmap --merge nosuch a.q nosuch
    bitmap --merge '' a.q b0
    bitmap --merge b0 -b small.q a.q b0
    bitmap --merge b0 -b small.q a.q nosuch
    bitmap --merge nosuch -b small.q a.q b0
    bitmap --merge b0 -b r.raw a.q b0
    bitmap --merge b0 -b two.q a.q b0
    bitmap --add two.q x
    bitmap --add -g 256 two.q x
    bitmap --remove two.q x
    bitmap --add -g 512 huge.q x
    bitmap --add r.raw x
    bitmap --add -f raw r.raw x
    bitmap --add -f raw -g 100 r.raw x
    bitmap --add -f raw r.raw ''
    bitmap --remove -f raw r.raw x
    bitmap --clear -f raw r.raw x
    bitmap --merge x -f raw r.raw x
    bitmap --clear broken.q bad
    bitmap --enable broken.q bad
    bitmap --disable broken.q bad
    bitmap --add broken.q bad
    bitmap --merge bad broken.q good
    bitmap --merge good broken.q bad
    bitmap --merge bad broken.q bad
    bitmap --merge bad -b broken.q a.q b0
    bitmap --merge bad -b broken.q small.q b0
    bitmap --clear stale.q bad
"""


def reworded(result: Result, words: list[str]) -> Result:
    """The real program names nodes by numbers that mean nothing, ours names the file."""
    err = re.sub(r"#block\d+", words[-2] if len(words) > 2 else "", result.err)
    # It forgets the end of the line behind this hint.
    err = err.replace("to fix.qemu-img", "to fix.\nqemu-img")
    return Result(result.code, result.out, err)


@pytest.mark.parametrize("line", [line.strip() for line in REFUSED.splitlines() if line.strip()])
def test_both_programs_refuse_in_the_same_words(line: str, gallery: Path, pair: tuple[Path, Path]) -> None:
    words = shlex.split(line)
    for folder in pair:
        shutil.copytree(gallery, folder, dirs_exist_ok=True)
    real = reworded(run_real(words, pair[0]), words)
    ours = run_qimg_inprocess(words, pair[1])
    assert Result(ours.code, ours.out, release7.errors(ours.err)) == real
    assert ours.code == 1
    for path in gallery.iterdir():
        assert (pair[1] / path.name).read_bytes() == path.read_bytes(), "refused before anything is written"


def test_a_name_is_too_long_from_1024_bytes_on(gallery: Path, pair: tuple[Path, Path]) -> None:
    for name in ("n" * 1023, "n" * 1024, "ü" * 512):
        words = ["bitmap", "--add", "a.q", name]
        for folder in pair:
            shutil.copyfile(gallery / "a.q", folder / "a.q")
        assert run_qimg_inprocess(words, pair[1]) == reworded(run_real(words, pair[0]), words)
        assert told(pair[1] / "a.q") == told(pair[0] / "a.q")


# -- what the real program does otherwise, or cannot show


def test_a_disk_of_no_bytes_cannot_have_one(work: Path) -> None:
    # 7.2 says that it lost the bitmap, and exits with 0.
    run_real(["create", "-q", "-f", "qcow2", "a.q", "0"], work).ok()
    done = run_qimg_inprocess(["bitmap", "--add", "a.q", "b"], work)
    assert done == Result(
        1,
        "",
        "qemu-img: Operation add on bitmap b failed: Can't make bitmap 'b' persistent in 'a.q':"
        " An image of size 0 cannot store bitmaps\n",
    )


def test_what_was_done_before_a_failure_stays(gallery: Path, work: Path) -> None:
    shutil.copyfile(gallery / "a.q", work / "a.q")
    done = run_qimg_inprocess(
        ["bitmap", "--add", "--disable", "--merge", "nosuch", "--enable", "a.q", "new"], work
    )
    assert done.code == 1
    assert done.err == "qemu-img: Operation merge on bitmap new failed: Dirty bitmap 'nosuch' not found\n"
    assert bitmaps.listed(work / "a.q")[-1] == {"flags": [], "name": "new", "granularity": 65536}
    assert_real_check_clean(work / "a.q")


def test_an_inconsistent_bitmap_can_be_removed(gallery: Path, work: Path) -> None:
    shutil.copyfile(gallery / "broken.q", work / "a.q")
    assert bitmaps.listed(work / "a.q")[0]["flags"] == ["in-use", "auto"]
    run_qimg_inprocess(["bitmap", "--clear", "a.q", "good"], work).ok()
    assert bitmaps.listed(work / "a.q")[0]["flags"] == ["in-use", "auto"], "others leave it alone"
    run_qimg_inprocess(["bitmap", "--remove", "a.q", "bad"], work).ok()
    assert bitmaps.names(work / "a.q") == ["good"]
    assert_real_check_clean(work / "a.q")


def test_bitmaps_that_cannot_be_trusted_go_when_the_image_is_changed(gallery: Path, work: Path) -> None:
    shutil.copyfile(gallery / "stale.q", work / "a.q")
    done = run_qimg_inprocess(["bitmap", "--add", "a.q", "bad"], work).ok()
    assert "a program lacking bitmap support modified this file" in done.err
    assert bitmaps.names(work / "a.q") == ["bad"]
    assert bitmaps.dirty_ranges(work / "a.q") == {"bad": []}
    assert run_real(["check", "a.q"], work).code == 3, "what the old ones held is leaked, as the warning says"


def test_backing_files_are_not_opened(gallery: Path, work: Path) -> None:
    shutil.copyfile(gallery / "overlay.q", work / "overlay.q")
    shutil.copyfile(gallery / "a.q", work / "a.q")
    run_qimg_inprocess(["bitmap", "--add", "overlay.q", "b"], work).ok()
    run_qimg_inprocess(["bitmap", "--merge", "b", "-b", "overlay.q", "a.q", "b0"], work).ok()
    assert bitmaps.names(work / "overlay.q") == ["b"]


def test_the_image_is_locked_meanwhile(gallery: Path, work: Path) -> None:
    from support.holders import qemu_io_holding

    shutil.copyfile(gallery / "a.q", work / "a.q")
    with qemu_io_holding(work / "a.q"):
        words = ["bitmap", "--add", "a.q", "b"]
        assert run_qimg_inprocess(words, work) == run_real(words, work)


def test_a_bitmap_that_shares_its_name_with_another_keeps_the_image_closed(
    gallery: Path, pair: tuple[Path, Path]
) -> None:
    shutil.copyfile(gallery / "a.q", pair[0] / "a.q")
    run_real(["bitmap", "--add", "a.q", "b9"], pair[0]).ok()
    damaged = (pair[0] / "a.q").read_bytes()
    assert damaged.count(b"b9") == 1
    for folder in pair:
        (folder / "a.q").write_bytes(damaged.replace(b"b9", b"b0"))
    words = ["bitmap", "--remove", "a.q", "b0"]
    real = run_real(words, pair[0])
    assert real.err == "qemu-img: Could not open 'a.q': Bitmap already exists: b0\n"
    assert run_qimg_inprocess(words, pair[1]) == real


# -- through other commands


def test_convert_copies_bitmaps_into_an_image_that_has_others(pair: tuple[Path, Path]) -> None:
    for line in """
        create -q -f qcow2 s.q 64M
        bitmap --add -g 4k s.q b0
        io s.q 'write 1M 64k' 'write 60M 1M'
        bitmap --add --disable s.q b1
        create -q -f qcow2 -o cluster_size=4k t.q 64M
        bitmap --add t.q recording
        bitmap --add --disable t.q resting
        """.splitlines():
        if line.strip():
            carry_out(line.strip(), pair)
    words = ["convert", "-n", "--bitmaps", "-O", "qcow2", "s.q", "t.q"]
    assert run_qimg_inprocess(words, pair[1]) == run_real(words, pair[0]) == Result(0, "", "")
    real, ours = pair[0] / "t.q", pair[1] / "t.q"
    assert_real_check_clean(ours)
    assert told(ours) == told(real)
    assert bitmaps.dirty_ranges(ours) == bitmaps.dirty_ranges(real)
    assert run_real(["compare", "s.q", "t.q"], pair[1]).code == 0


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            "create -q -f qcow2 t.q 8M\nbitmap --add t.q b0",
            "Failed to create bitmap b0: Bitmap already exists",
        ),
        (
            "create -q -f qcow2 t.q 16M",
            "(destination size is 16777216, source size is 8388608) and can't be merged",
        ),
        ("create -q -f qcow2 -o compat=0.10 t.q 8M", "Format driver 'qcow2' does not support bitmaps"),
    ],
)
def test_convert_refuses_bitmaps_that_the_target_cannot_take(
    prepare: str, message: str, pair: tuple[Path, Path]
) -> None:
    for (
        line
    ) in f"create -q -f qcow2 s.q 8M\nbitmap --add s.q b0\nio s.q 'write 0 1M'\n{prepare}".splitlines():
        carry_out(line, pair)
    before = (pair[1] / "t.q").read_bytes()
    words = ["convert", "-n", "--bitmaps", "-O", "qcow2", "s.q", "t.q"]
    ours = run_qimg_inprocess(words, pair[1])
    assert ours == run_real(words, pair[0])
    assert message in ours.err
    assert (pair[1] / "t.q").read_bytes() == before, "nothing is copied in vain"


@pytest.mark.parametrize(
    "resize", ["a.q 100M", "a.q +512", "--shrink a.q 33M", "--shrink a.q 1000448", "a.q 20G"]
)
@pytest.mark.parametrize("cluster", ["512", "64k"])
def test_bitmaps_follow_a_resize(resize: str, cluster: str, pair: tuple[Path, Path]) -> None:
    if cluster == "512":
        resize = resize.replace("20G", "200M")  # the real program takes minutes
    for line in f"""
        create -q -f qcow2 -o cluster_size={cluster} a.q 65M
        bitmap --add -g 1M a.q coarse
        bitmap --add -g 4k a.q fine
        io a.q 'write 0 64k' 'write 32M 2M' 'write 64M 1M'
        bitmap --disable a.q fine
        """.splitlines():
        if line.strip():
            carry_out(line.strip(), pair)
    for one in (resize, "a.q 200M" if "shrink" in resize else "--shrink a.q 64M"):
        words = ["resize", "-q", *one.split()]
        assert run_real(words, pair[0]).ok() == run_qimg_inprocess(words, pair[1])
        assert_real_check_clean(pair[1] / "a.q")
        assert told(pair[1] / "a.q") == told(pair[0] / "a.q")
        assert bitmaps.dirty_ranges(pair[1] / "a.q") == bitmaps.dirty_ranges(pair[0] / "a.q")


# -- the library


def test_the_library_does_the_same(work: Path) -> None:
    image, other = work / "a.q", work / "b.q"
    for path in (image, other):
        qimg.create(path, format="qcow2", size=1 << 20)
    qimg.add_bitmap(image, "b0")
    qimg.add_bitmap(image, "b1", granularity=4096, enabled=False)
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write 64k 64k", "a.q"], work).ok()
    qimg.add_bitmap(other, "sum", granularity=512)
    qimg.change_bitmap(other, "sum", merge=["b0", "b1"], source=image, enabled=False)
    qimg.change_bitmap(image, "b0", clear=True)
    qimg.remove_bitmap(image, "b1")
    assert bitmaps.dirty_ranges(image) == {"b0": []}
    assert bitmaps.dirty_ranges(other) == {"sum": [(65536, 131072)]}
    (found,) = qimg.bitmaps(other)
    assert (found.name, found.granularity, found.enabled, found.inconsistent) == ("sum", 512, False, False)
    assert found.bits == bytes(16) + b"\xff" * 16
    with pytest.raises(qimg.QimgError, match="Operation remove on bitmap b1 failed: Dirty bitmap 'b1' not"):
        qimg.remove_bitmap(image, "b1", context=Context())
