"""dd: blocks of every kind of disk, by qimg and by the real qemu-img, with the same outcome.

A line is one invocation, in shell syntax, in a folder with the files of `support.disks`. What it leaves in
the folder is compared: guest content, structure, allocation, space. A line that is to differ stands in
`DIFFERENT`, with the number of its row in docs/differences.md.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import qimg
from qimg.storage.base import Storage
from qimg.storage.fault import CHANGE, READ, FaultStorage, Rule
from support.build import build, real_content, write_raw
from support.disks import disks
from support.faults import opened_through
from support.holders import qemu_io_holding
from support.run import Result, run_qimg_inprocess, run_real
from support.twins import Different, Inputs, compare_line, lines

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20

#: Each of these through every entry of ARITHMETIC: whole sectors, a length that is none, less than a sector.
SOURCES = ("sectors.raw", "odd.raw", "tiny.raw", "empty.raw", "odd.q", "zero.q")
ARITHMETIC = r"""
bs=64k
bs=1000
bs=64k count=1
bs=64k count=2 skip=1
bs=64k count=2 skip=2
bs=64k count=2 skip=3
bs=64k skip=1
bs=64k skip=2
bs=64k skip=3
bs=1000 count=3
bs=1000 skip=1
bs=1000 count=3 skip=1
bs=1000 skip=131
bs=1000 skip=132
bs=513 count=250 skip=3
bs=1 count=100
bs=1 count=600 skip=511
bs=3 count=171
bs=7 count=300 skip=5
bs=511 count=2 skip=1
bs=512 skip=1
bs=100k skip=1
bs=1M
bs=1M count=1 skip=0
bs=1M skip=1
bs=2147483647
bs=2147483647 skip=1
bs=2147483647 count=9223372036854775807
count=0
count=0 skip=1
count=1
count=256 skip=256 bs=512
count=257 skip=256 bs=512
count=9223372036854775807
skip=9223372036854775807
skip=256
skip=257
"""

#: Every kind of source, whole and a part that begins and ends in the middle of everything.
KINDS = [
    "mixed.raw",
    "zeros.raw",
    "holes.raw",
    "big.raw",
    "plain.q",
    "packed.q",
    "zstd.q",
    "v2.q",
    "c512.q",
    "c4k.q",
    "c2m.q",
    "ext.q",
    "rc1.q",
    "lazy.q",
    "pre.q",
    "data.q",
    "dataraw.q",
    "marked.q",
    "snaps.q",
    "mid.q",
    "top.q",
    "short.q",
    "long.q",
    "packed-over.q",
    "c512-over.q",
    "c2m-over.q",
    "ext-over.q",
    "sub/over.q",
]
PARTS = ("bs=64k", "bs=1000 skip=70 count=190", "-O qcow2 bs=2M", "-O qcow2 bs=900 count=300 skip=111")

WORDS = r"""
dd if=mixed.raw of=out
dd of=out if=mixed.raw
dd of=out bs=4k if=mixed.raw count=3
dd if=odd.raw if=mixed.raw of=nodir/out of=out bs=1 bs=64k count=1 count=2 skip=5 skip=1
dd -fraw -Oqcow2 if=mixed.raw of=out
dd if=mixed.raw -O qcow2 of=out -f raw bs=1M
dd -O qcow2 -O raw if=mixed.raw of=out
dd -f qcow2 -f raw if=plain.q of=out
dd -f raw if=plain.q of=out bs=64k
dd -f raw if=zero.q of=out
dd -U if=plain.q of=out
dd --force-share if=mixed.raw of=out
dd --force if=mixed.raw of=out
dd --image-opts if=driver=raw,file.filename=mixed.raw of=out
dd --image-opts if=driver=raw,offset=64k,size=128k,file.filename=mixed.raw of=out bs=1000 skip=3
dd --image-opts if=driver=qcow2,file.filename=plain.q of=out
dd --image-opts if=file.filename=packed.q of=out bs=64k
dd --image if=file.filename=packed.q of=out bs=64k
dd --image-opts if=driver=qcow2,file.filename=plain.q of=driver=x
dd --image-opts if=file.filename=short.q,backing.driver=raw,backing.file.filename=mixed.raw of=out
dd -U --image-opts if=driver=qcow2,force-share=on,file.filename=plain.q of=out
dd --object secret,id=s,data=x if=mixed.raw of=out
dd 'if=json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"sectors.raw"}}' of=out
dd if=file:mixed.raw of=file:out
dd if=mixed.raw of=./-out
dd if=mixed.raw of=a=b
dd if=mixed.raw of=out,x
dd -- if=mixed.raw of=out
dd -- if=mixed.raw of=-out
dd if=mixed.raw of=out bs=0x1000
dd if=mixed.raw of=out bs=010 count=0x10
dd if=mixed.raw of=out bs=2b count=5
dd if=mixed.raw of=out bs=1B count=5
dd if=mixed.raw of=out bs=1.5k count=3
dd if=mixed.raw of=out bs=0.5k count=1K
dd if=mixed.raw of=out bs=1K count=0.
dd if=mixed.raw of=out bs=1g
dd if=mixed.raw of=out 'bs= 1k'
dd if=mixed.raw of=out bs=+1k count=+2 skip=+1
dd if=mixed.raw of=out bs=1m skip=1
dd if=mixed.raw of=out bs=2G
dd if=mixed.raw of=out bs=1k count=1E
dd if=mixed.raw of=out bs=1k skip=1P
dd if=/dev/null of=out
dd if=/dev/null of=out skip=1
## an old file is made anew
dd if=mixed.raw of=t-junk
dd if=tiny.raw of=t-big.raw
dd -O qcow2 if=mixed.raw of=t-old.q
dd if=mixed.raw of=t-old.q
dd count=0 if=mixed.raw of=t-big.raw
dd skip=9999 if=mixed.raw of=t-big.raw
dd skip=9999 -O qcow2 if=mixed.raw of=t-big.raw
"""

REFUSED = r"""
dd
dd if=mixed.raw
dd of=out
dd bs=1k
dd -U
dd mixed.raw out
dd if=mixed.raw of=out out
dd if=mixed.raw of=out ''
dd if=mixed.raw of=out =
dd if=mixed.raw of=out =x
dd if=mixed.raw of=out seek=1
dd if=mixed.raw of=out conv=notrunc
dd if=mixed.raw of=out status=none
dd if=mixed.raw of=out ibs=512
dd if=mixed.raw of=out bs
dd if=mixed.raw of=out BS=512
dd IF=mixed.raw of=out
dd ifs=mixed.raw of=out
dd if=mixed.raw of=out -- -O
dd if=mixed.raw of=out seek
dd nosuch=1 bs=foo
dd bs=foo nosuch=1
dd if=mixed.raw of=out bs=
dd if=mixed.raw of=out bs=0
dd if=mixed.raw of=out bs=0x
dd if=mixed.raw of=out bs=foo
dd if=mixed.raw of=out bs=1kB
dd if=mixed.raw of=out bs=1KiB
dd if=mixed.raw of=out bs=1w
dd if=mixed.raw of=out bs=1c
dd if=mixed.raw of=out bs=1x512
dd if=mixed.raw of=out bs=1.5
dd if=mixed.raw of=out 'bs=1k '
dd if=mixed.raw of=out bs=1k=2
dd if=mixed.raw of=out bs=2147483648
dd if=mixed.raw of=out bs=4G
dd if=mixed.raw of=out bs=18446744073709551616
dd if=mixed.raw of=out bs=-1
dd if=mixed.raw of=out bs=-1k
dd if=mixed.raw of=out bs=inf
dd if=mixed.raw of=out count=
dd if=mixed.raw of=out count=-1
dd if=mixed.raw of=out count=foo
dd if=mixed.raw of=out count=1_0
dd if=mixed.raw of=out count=8E
dd if=mixed.raw of=out count=9223372036854775808
dd if=mixed.raw of=out count=18446744073709551616
dd if=mixed.raw of=out skip=
dd if=mixed.raw of=out skip=-1
dd if=mixed.raw of=out skip=1e3
dd if=mixed.raw of=out skip=9223372036854775808
dd count=foo bs=foo skip=foo
dd skip=foo count=foo
dd -q if=mixed.raw of=out
dd -n if=mixed.raw of=out
dd -p if=mixed.raw of=out
dd -o cluster_size=4k if=mixed.raw of=out
dd --bogus if=mixed.raw of=out
dd --force-share=1 if=mixed.raw of=out
dd if=mixed.raw of=out -f
dd if=mixed.raw of=out -O
dd if=mixed.raw of=out --object
dd if=mixed.raw -zU of=out
dd nosuch -z
dd -f nosuch if=mixed.raw of=out
dd -f '' if=mixed.raw of=out
dd -f qcow2 if=mixed.raw of=out
dd -O nosuch if=mixed.raw of=out
dd -O '' if=mixed.raw of=out
dd -O bochs if=mixed.raw of=out
dd -O dmg if=mixed.raw of=out
dd -O nosuch if=missing of=out
dd -O nosuch if=mixed.raw of=out skip=9999
dd -f nosuch -O nosuch if=missing of=out
dd -O nosuch of=out
dd if=missing of=out
dd if= of=out
dd if=. of=out
dd if=sub of=out
dd if=nosuch:x of=out
dd if=mixed.raw,x of=out
dd if=lost.q of=out
dd if=future.q of=out
dd if=torn.q of=out
dd -O qcow2 if=torn.q of=out
dd if=torn.q of=out count=0
dd if=mixed.raw of=
dd if=mixed.raw of=.
dd if=mixed.raw of=sub
dd if=mixed.raw of=nodir/out
dd -O qcow2 if=mixed.raw of=nodir/out
dd if=mixed.raw of=nodir/out skip=9999
dd -O qcow2 if=mixed.raw of=nodir/out skip=9999
dd if=mixed.raw of=nosuch:x
dd if=mixed.raw of=json:{}
dd if=mixed.raw 'of=json:{"driver":"raw"}'
dd if=mixed.raw of=/dev/null
dd if=mixed.raw of=/dev/full
dd if=empty.raw of=/dev/null
dd -O qcow2 if=mixed.raw of=/dev/null
dd --image-opts if=mixed.raw of=out
dd --image-opts -f raw if=driver=raw,file.filename=mixed.raw of=out
dd --image-opts -f raw if=driver=raw,file.filename=mixed.raw of=nodir/out
dd --image-opts -f raw of=out
dd --image-opts if=filename=mixed.raw of=out
dd --image-opts if=driver=qcow2,file.filename=missing of=out
dd --image-opts if=driver=raw,bogus=1,file.filename=mixed.raw of=out
dd --image-opts if=driver=raw,offset=64k,size=1000,file.filename=mixed.raw of=out
dd --image-opts file.filename=mixed.raw of=out
dd -U --image-opts if=driver=raw,force-share=off,file.filename=mixed.raw of=out
dd --object secret,id=s if=mixed.raw of=out
dd --object nosuch,id=s if=mixed.raw of=out
dd --object secret,data=x if=mixed.raw of=out
dd if=t-old.q of=t-old.q
dd -O qcow2 if=t-old.q of=t-old.q
dd if=t-old.q of=./t-old.q
dd if=t-over.q of=t-over.q count=0
dd -U if=t-old.q of=t-old.q
dd -U -O qcow2 if=t-old.q of=t-old.q skip=9999
dd if=t-same.raw of=t-same.raw
dd if=t-same.raw of=./t-same.raw bs=1M
dd -O qcow2 if=t-same.raw of=t-same.raw
dd if=t-same.raw of=t-same.raw skip=9999
dd if=t-same.raw of=t-same.raw count=0
dd if=t-top.q of=t-under.raw
dd -O qcow2 if=t-top.q of=t-under.raw
dd --image-opts if=driver=raw,file.filename=t-same.raw,file.locking=off of=t-same.raw
"""

TABLE = [
    *(f"dd if={source} of=out {more}" for source in SOURCES for more in lines(ARITHMETIC)),
    *(f"dd -O qcow2 if=odd.raw of=out {more}" for more in lines(ARITHMETIC)),
    *(f"dd {more} if={source} of=out" for source in KINDS for more in PARTS),
    *lines(WORDS),
    *lines(REFUSED),
]

ITSELF = "a copy onto its own source costs the source"


def _itself(line: str) -> Different:
    name = re.findall(r"of=(\S+)", line)[0]
    return Different(
        30,
        ITSELF,
        1,
        f'qemu-img: {name}: error while creating output image: Failed to get "write" lock\n'
        f"Is another process using the image [{name}]?\n",
    )


RANGE = "Must be between 0 and 9223372036854775807."
#: Rows of docs/differences.md.
NEGATIVE = 103
TOLD = "the words of 10.0"
LATER = "comes later, and the message says so"

DIFFERENT = {
    "dd if=mixed.raw of=out bs=-1": Different(
        NEGATIVE, TOLD, err="qemu-img: Invalid bs specified. Must be between 1 and 2147483647.\n"
    ),
    "dd if=mixed.raw of=out count=-1": Different(
        NEGATIVE, TOLD, err=f"qemu-img: Invalid count specified. {RANGE}\n"
    ),
    "dd if=mixed.raw of=out skip=-1": Different(
        NEGATIVE, TOLD, err=f"qemu-img: Invalid skip specified. {RANGE}\n"
    ),
} | {
    line: _itself(line)
    for line in (
        "dd -U if=t-old.q of=t-old.q",
        "dd -U -O qcow2 if=t-old.q of=t-old.q skip=9999",
        "dd if=t-same.raw of=t-same.raw",
        "dd if=t-same.raw of=./t-same.raw bs=1M",
        "dd -O qcow2 if=t-same.raw of=t-same.raw",
        "dd if=t-same.raw of=t-same.raw skip=9999",
        "dd if=t-same.raw of=t-same.raw count=0",
        "dd if=t-top.q of=t-under.raw",
        "dd -O qcow2 if=t-top.q of=t-under.raw",
        "dd --image-opts if=driver=raw,file.filename=t-same.raw,file.locking=off of=t-same.raw",
    )
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(disks(tmp_path_factory), tmp_path_factory.mktemp("dd"))


@pytest.mark.parametrize("line", TABLE)
def test_a_copy_comes_out_as_the_real_programs(line: str, inputs: Inputs) -> None:
    compare_line(line, inputs, DIFFERENT, format=target_format(line))


def target_format(line: str) -> str:
    """Format of what a line leaves: its last -O, or raw."""
    return next(reversed(re.findall(r"-O ?(\w+)", line)), "raw")


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(TABLE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a source of 9 MiB (several workers) and a small one."""
    monkeypatch.chdir(tmp_path)
    write_raw(tmp_path / "big.raw", "AB-C--DDDDDD--EF" * 9)
    write_raw(tmp_path / "small.raw", "A0B-")
    build(tmp_path / "small.q", "Ab0-#C--")
    return tmp_path


@pytest.mark.parametrize("name", ["big.raw", "small.raw", "small.q"])
def test_every_byte_is_written_zeros_too(name: str, folder: Path) -> None:
    for program, out in ((run_real, "real"), (run_qimg_inprocess, "ours")):
        program(["dd", f"if={name}", f"of={out}", "bs=64k"], folder).ok()  # type: ignore[operator]
    assert os.stat("ours").st_blocks == os.stat("real").st_blocks
    assert os.stat("ours").st_blocks * 512 >= os.stat("ours").st_size


def test_the_size_of_a_block_is_not_the_size_of_a_step(folder: Path) -> None:
    """9 MiB in blocks of a byte take the real program minutes."""
    run_qimg_inprocess(["dd", "if=big.raw", "of=one", "bs=1"]).ok()
    run_real(["dd", "if=big.raw", "of=two", "bs=1M"]).ok()
    assert Path("one").read_bytes() == Path("two").read_bytes()


def test_a_copy_onto_its_own_source_leaves_it_as_it_is(folder: Path) -> None:
    """The real program empties a raw file that it copies onto itself."""
    os.link("small.raw", "other-name.raw")
    os.symlink("small.raw", "link.raw")
    content = Path("small.raw").read_bytes()
    for target in ("small.raw", "./small.raw", "other-name.raw", "link.raw"):
        for more in ([], ["-U"], ["-O", "qcow2"], ["count=0"], ["skip=10000"]):
            shown = run_qimg_inprocess(["dd", *more, "if=small.raw", f"of={target}"])
            assert shown == Result(
                1,
                "",
                f'qemu-img: {target}: error while creating output image: Failed to get "write" lock\n'
                f"Is another process using the image [{target}]?\n",
            )
            assert Path("small.raw").read_bytes() == content


# -- errors while it runs


@pytest.mark.parametrize("name", ["big.raw", "small.q"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_unreadable_source_is_told_of_and_the_target_is_not_whole(
    name: str, format: str, folder: Path
) -> None:
    seen: list[FaultStorage] = []

    def failing(nth: int) -> Result:
        def wrap(file: Storage) -> Storage:
            seen[:] = [FaultStorage(file, [Rule(READ, nth)])]
            return seen[0]

        with opened_through(wrap, name):
            return run_qimg_inprocess(["dd", "-O", format, f"if={name}", "of=out"])

    failures = 0
    for nth in range(1, 60):
        shown = failing(nth)
        if seen[0].counts.get(READ, 0) < nth:
            break
        assert shown.code == 1
        assert shown.out == ""
        if shown.err.startswith("qemu-img: Could not open"):
            continue
        failures += 1
        assert shown.err == "qemu-img: error while reading from input image file: Input/output error\n"
        assert not _whole(format, name)
    assert shown.code == 0
    assert _whole(format, name)
    assert failures > 1


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_target_that_cannot_be_written_is_told_of_and_never_taken_for_a_copy(
    format: str, folder: Path
) -> None:
    made: list[FaultStorage] = []
    messages = set()
    for nth in range(1, 100):

        def wrap(file: Storage, nth: int = nth) -> Storage:
            made[:] = [FaultStorage(file, [Rule(CHANGE, nth)])]
            return made[0]

        Path("out").unlink(missing_ok=True)
        with opened_through(wrap, "out"):
            shown = run_qimg_inprocess(["dd", "-O", format, "if=small.q", "of=out"])
        if made[0].counts.get(CHANGE, 0) < nth:
            break
        if _claims_to_be_whole(format):
            assert _whole(format, "small.q"), nth  # what failed was a favour, or came after everything
        if shown.code:
            assert (shown.code, shown.out) == (1, "")
            messages.add(shown.err)
    assert shown.code == 0
    assert _whole(format, "small.q")
    assert "qemu-img: error while writing to output image file: Input/output error\n" in messages
    for message in messages:
        assert re.fullmatch(
            r"qemu-img: (out: error while creating output image: (Could not [^:]*: )*"
            r"|error while writing to output image file: )Input/output error\n",
            message,
        )


def _claims_to_be_whole(format: str) -> bool:
    if not Path("out").exists():
        return False
    if format == "raw":
        return Path("out").stat().st_size >= 8 * 65536
    return run_real(["map", "-f", "qcow2", "out"]).code == 0


def _whole(format: str, source: str) -> bool:
    """Whether the real program takes `out` for a copy of `source`."""
    if not Path("out").exists():
        return False
    of_source = "raw" if source.endswith(".raw") else "qcow2"
    if format == "raw":
        return Path("out").read_bytes() == real_content(Path(source), format=of_source)
    return run_real(["compare", "-f", of_source, "-F", "qcow2", source, "out"]).code == 0


# -- locks


@pytest.mark.parametrize(("name", "format"), [("small.raw", "raw"), ("small.q", "qcow2")])
@pytest.mark.parametrize("read_only", [False, True], ids=["writer", "reader"])
def test_a_source_in_use_is_read_where_the_real_program_reads_it(
    name: str, format: str, read_only: bool, folder: Path
) -> None:
    """A raw source lets others write, other formats do not, unless -U says so."""
    with qemu_io_holding(folder / name, format=format, read_only=read_only):
        for more in ([], ["-U"]):
            words = ["dd", *more, f"if={name}", "of=out"]
            real, ours = run_real(words), run_qimg_inprocess(words)
            assert ours == real
            assert bool(ours.code) == (format == "qcow2" and not read_only and not more)


# -- the library


def test_the_library_copies_as_the_command_does(folder: Path) -> None:
    assert qimg.dd("small.q", "one", block_size=1000, count=300, skip=70, source_format="qcow2") is True
    run_real(["dd", "-f", "qcow2", "bs=1000", "count=300", "skip=70", "if=small.q", "of=two"]).ok()
    assert Path("one").read_bytes() == Path("two").read_bytes()
    assert qimg.dd("small.raw", "three", skip=10**9) is False
    assert Path("three").read_bytes() == b""
    assert qimg.dd("small.raw", "four.q", format="qcow2") is True
    assert run_real(["compare", "small.raw", "four.q"]).ok()
    with pytest.raises(qimg.QimgError, match="error while creating output image"):
        qimg.dd("small.raw", "nodir/out")
    with pytest.raises(qimg.OptionError, match="block size"):
        qimg.dd("small.raw", "out", block_size=0)
    with pytest.raises(qimg.Cancelled):
        qimg.dd("big.raw", "out", cancelled=lambda: True)
    assert not _whole("raw", "big.raw")
