"""bench: every option, by qimg and by the real qemu-img, with the same words and the same image afterwards.

A line is one invocation, in shell syntax, in a folder with the files of `support.disks` and, as ``t-NAME.q``,
images of every kind to write to. The seconds of ``Run completed`` are the only thing that may differ; what
differs on purpose stands in `DIFFERENT`, with the number of its row in docs/differences.md.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from support import release7
from support.build import build
from support.disks import disks
from support.run import Result, run_qimg, run_qimg_inprocess, run_real
from support.twins import Different, Inputs, copy_sparse, image_differences, lines

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20

KINDS = "plain packed zstd v2 c512 c4k c2m ext rc1 rc64 lazy pre marked snaps odd mid top short long"
KINDS += " packed-over c512-over c2m-over ext-over"

READS = r"""
bench -c 100 mixed.raw
bench -c 0 mixed.raw
bench -c 1 mixed.raw
bench mixed.raw -c 10
bench -c 10 -d 1 mixed.raw
bench -c 10 -d 3 mixed.raw
bench -c 300 -d 200 mixed.raw
bench -c 2 -d 100000 mixed.raw
bench -c 0x10 -d 010 mixed.raw
bench -c +10 mixed.raw
bench -c ' 10' mixed.raw
bench -c -0 mixed.raw
bench -c 010 mixed.raw
bench -c 10 -q mixed.raw
bench -q -c 10 -f raw -U mixed.raw
bench -c 10 -s 0 mixed.raw
bench -c 10 -s 1 mixed.raw
bench -c 10 -s 100 mixed.raw
bench -c 10 -s 1M mixed.raw
bench -c 100 -s 777 -S 4099 mixed.raw
bench -c 3 -s 512k -S 512k mixed.raw
bench -c 10 -s 64k -S 1k mixed.raw
bench -c 10 -S 0 mixed.raw
bench -c 10 -S 0x10 -s 1 mixed.raw
bench -c 10 -s 1.5k -S 2b mixed.raw
bench -c 10 -o 4k mixed.raw
bench -c 10 -o 1020k mixed.raw
bench -c 300 -o 1020k -S 64k mixed.raw
bench -c 10 -s 512 -S 2147483647 mixed.raw
bench -c 1 -s 0 -o 1M mixed.raw
bench -c 1 -s 0 -S 4k -o 1M mixed.raw
bench -c 3 -s 0 -S 1M -o 1M mixed.raw
bench -c 300 sectors.raw
bench -c 3 -s 512 -o 127k sectors.raw
bench -c 50 holes.raw
bench -c 50 odd.raw
bench -c 1 -s 512 tiny.raw
bench -c 20 -s 3 -S 25 tiny.raw
bench -c 0 empty.raw
bench -c 0 -o 1G mixed.raw
bench --pattern=65 -c 10 mixed.raw
bench --pattern=0x41 --no-drain -c 10 mixed.raw
bench --pattern=0377 -c 10 mixed.raw
bench --flush-interval=0 -c 10 mixed.raw
bench --no-drain -c 10 mixed.raw
bench --no-d -c 10 mixed.raw
bench -t none -c 10 mixed.raw
bench -t off -c 10 mixed.raw
bench -t directsync -c 10 mixed.raw
bench -t writethrough -c 10 mixed.raw
bench -t unsafe -c 10 mixed.raw
bench -t writeback -c 10 mixed.raw
bench -t none -s 100 -c 30 mixed.raw
bench -t none -s 4097 -c 30 odd.raw
bench -n -t none -c 10 mixed.raw
bench -n -t directsync -c 10 mixed.raw
bench -i threads -c 10 mixed.raw
bench -i io_uring -c 10 mixed.raw
bench -i native -t none -c 10 plain.q
bench -i native -t none -c 10 top.q
bench -i io_uring -t none -c 10 top.q
bench -fraw -c10 mixed.raw
bench -nqc10 -tnone mixed.raw
bench --image-opts -c 10 driver=raw,file.filename=mixed.raw
bench --image-opts -c 10 driver=raw,offset=64k,size=128k,file.filename=mixed.raw
bench --image-opts -c 10 driver=qcow2,file.filename=top.q
bench --image-opts -c 10 -n driver=raw,cache.direct=on,file.filename=mixed.raw
bench --image-opts -c 10 -n driver=raw,file.filename=mixed.raw,file.aio=threads
bench --image-opts -c 10 driver=raw,cache.direct=on,file.filename=mixed.raw,file.aio=native
bench --image-opts -U -c 10 driver=qcow2,file.filename=plain.q
bench -c 10 'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"sectors.raw"}}'
bench -c 10 null-co://
bench -n -c 10 null-co://
bench -c 10 -s 1M null-co://
bench -c 10 file:mixed.raw
bench -c 10 sub/over.q
bench -c 500 data.q
bench -c 500 dataraw.q
bench -c 10 -- mixed.raw
"""

FAILING_READS = r"""
bench -c 10 -o 1G mixed.raw
bench -c 10 -o 1M mixed.raw
bench -c 3 -s 0 -o 1G mixed.raw
bench -c 3 -s 0 -o 1048577 mixed.raw
bench -c 300 -s 10000 mixed.raw
bench -c 3 -s 2M mixed.raw
bench -c 3 -s 1025k mixed.raw
bench -d 1 -c 1 -s 1G mixed.raw
bench -c 1 -s 513 -o 1048064 mixed.raw
bench -c 1 tiny.raw
bench -c 1000 odd.raw
bench -c 1 -o 0x7fffffffffffffff mixed.raw
bench -c 3 -S 2147483647 -o 9223372036854775807 mixed.raw
bench -d 1 -c 2147483647 -s 3 -S 1M -o 2M mixed.raw
bench -c 1000 torn.q
"""

REFUSED = r"""
bench
bench -c 10
bench mixed.raw plain.q
bench -c 10 mixed.raw x y
bench -c -1 mixed.raw
bench -c 1k mixed.raw
bench -c '' mixed.raw
bench -c 2147483648 mixed.raw
bench -c 99999999999999999999 mixed.raw
bench -c '3 ' mixed.raw
bench -c 3.0 mixed.raw
bench -c 08 mixed.raw
bench -c 0x mixed.raw
bench -c 0xg mixed.raw
bench -c 0b1 mixed.raw
bench -c 0o7 mixed.raw
bench -c 1_0 mixed.raw
bench -c + mixed.raw
bench -c --1 mixed.raw
bench -c x mixed.raw
bench -c x -d x mixed.raw
bench -d -1 mixed.raw
bench -d 2147483648 mixed.raw
bench -d x mixed.raw
bench -d '' mixed.raw
bench -d 1k mixed.raw
bench -s x mixed.raw
bench -s '' mixed.raw
bench -s 2147483648 mixed.raw
bench -s 2G mixed.raw
bench -s 4kB mixed.raw
bench -s 1.5 mixed.raw
bench -s -1k mixed.raw
bench -S x mixed.raw
bench -S 2147483648 mixed.raw
bench -o x mixed.raw
bench -o 8E mixed.raw
bench -o 18446744073709551616 mixed.raw
bench -o -1k mixed.raw
bench --pattern=256 mixed.raw
bench --pattern=-1 mixed.raw
bench --pattern=x mixed.raw
bench --pattern= mixed.raw
bench --pattern=1k mixed.raw
bench --pattern mixed.raw
bench --flush-interval=x mixed.raw
bench --flush-interval=-1 mixed.raw
bench --flush-interval=1 mixed.raw
bench --flush-interval=1 -d 4 missing
bench -w --flush-interval=1 mixed.raw
bench -w --flush-interval=63 t-same.raw
bench -w --flush-interval=63 --no-drain t-same.raw
bench -w --flush-interval=4 -d 5 missing
bench --flush-interval=1 mixed.raw x
bench -w --flush-interval=2147483648 t-same.raw
bench -n mixed.raw
bench -n -w t-same.raw
bench -i native mixed.raw
bench -i native -t writethrough mixed.raw
bench -n -t unsafe mixed.raw
bench -n -i threads mixed.raw
bench -i threads -n mixed.raw
bench -n top.q
bench -n missing
bench -n -t none missing
bench -n /dev/null
bench -i foo mixed.raw
bench -i '' mixed.raw
bench -i Threads mixed.raw
bench -i foo -t foo mixed.raw
bench -t foo -i foo mixed.raw
bench -t foo mixed.raw
bench -t '' mixed.raw
bench -t foo x y
bench -t NONE mixed.raw
bench -U -w t-same.raw
bench -U -w -f raw t-same.raw
bench -U -w t-old.q
bench -f nosuch mixed.raw
bench -f '' mixed.raw
bench -f qcow2 mixed.raw
bench missing
bench ''
bench .
bench nosuch:x
bench lost.q
bench future.q
bench --image-opts -f raw driver=raw,file.filename=mixed.raw
bench --image-opts mixed.raw
bench --image-opts driver=raw,file.filename=mixed.raw,bogus=1
bench --image-opts driver=raw,file.filename=mixed.raw,file.aio=foo
bench --image-opts driver=raw,file.filename=mixed.raw,file.aio=native
bench --image-opts -w driver=raw,file.filename=mixed.raw,read-only=on
bench -U --image-opts driver=raw,force-share=off,file.filename=mixed.raw
bench --object secret,id=s,data=x mixed.raw
bench -p mixed.raw
bench -z mixed.raw
bench --bogus mixed.raw
bench --no-drain=1 mixed.raw
bench -c
bench mixed.raw -c
bench mixed.raw --pattern
"""

#: What is written where: every request by itself, several in a cluster, across clusters, one over the other.
WRITES = r"""
-c 20
-c 20 --pattern=65
-c 20 -d 1 --pattern=255
-c 5 -s 100 -S 70000 -o 65500 --pattern=1
-c 300 -s 512 -S 4099 --pattern=2
-c 3 -s 64k --pattern=3
-c 2 -s 150000 -o 1000 --pattern=4
-c 4 -s 3 -S 65535 -o 131070 --pattern=5 --flush-interval=64
"""

RAW_WRITES = r"""
bench -w -c 10 -f raw t-same.raw
bench -w -c 10 t-same.raw
bench -w -c 10 --pattern=81 t-same.raw
bench -w -c 0 t-same.raw
bench -w -c 10 -f raw --pattern=0x41 t-same.raw
bench -w -c 300 -f raw --pattern=1 t-same.raw
bench -w -c 300 -f raw --pattern=1 -s 1000 -S 3000 t-same.raw
bench -w -c 3 -f raw --pattern=1 -s 1M t-big.raw
bench -w -c 2 -f raw --pattern=1 -s 1M -o 1M t-big.raw
bench -w -c 1 -f raw --pattern=1 -s 2M t-big.raw
bench -w -c 10 -f raw --pattern=1 -s 0 t-same.raw
bench -w -c 10 -f raw -t none --pattern=7 t-same.raw
bench -w -c 10 -f raw -t none -n --pattern=7 t-same.raw
bench -w -c 30 -d 1 -f raw -t none -s 1000 --pattern=7 t-same.raw
bench -w -c 10 -f raw -t directsync --pattern=7 t-same.raw
bench -w -c 10 -f raw -t writethrough --pattern=7 t-same.raw
bench -w -c 10 -f raw -t unsafe --pattern=7 t-same.raw
bench -w -c 100 -f raw --flush-interval=64 --pattern=7 t-same.raw
bench -w -c 100 -f raw --flush-interval=64 --no-drain --pattern=7 t-same.raw
bench -w -c 100 -d 4 -f raw --flush-interval=7 --pattern=7 t-same.raw
bench -w -c 100 -d 1 -f raw --flush-interval=1 --pattern=7 t-same.raw
bench -w -c 1 -f raw -s 512 --pattern=9 -o 1M t-odd.raw
bench -w -c 1 -f raw -s 10 --pattern=9 -o 1049270 t-odd.raw
bench -w -c 1 -f raw -s 1024 --pattern=9 -o 1M t-odd.raw
bench -w -c 10 --pattern=3 --image-opts driver=raw,offset=512k,size=256k,file.filename=t-same.raw
bench -w -c 300 --pattern=3 --image-opts driver=raw,offset=512k,size=256k,file.filename=t-same.raw
bench -w -c 10 --image-opts file.filename=t-same.raw
bench -w -c 10 null-co://
"""

RAW_TARGETS = lines(RAW_WRITES)
#: Images too small for these: what a failing run has written is a matter of chance.
TOO_SMALL = {
    ("c512", "-c 3 -s 64k"),
    ("c512", "-c 4 -s 3"),
    ("rc1", "-c 2 -s 150000"),
    ("rc64", "-c 2 -s 150000"),
    ("lazy", "-c 2 -s 150000"),
    ("long", "-c 300"),
}
QCOW2_TARGETS = [
    f"bench -w {more} t-{kind}.q"
    for kind in (*KINDS.split(), "data")
    for more in lines(WRITES)
    if not any(kind == small and more.startswith(words) for small, words in TOO_SMALL)
]

FAILING_WRITES = r"""
bench -w -c 1000 -f raw t-odd.raw
bench -w -c 10 -o 1M -f raw t-same.raw
bench -w -c 300 -s 10000 -f raw t-same.raw
bench -w -c 10 -o 1G t-plain.q
bench -w -c 1000 -s 5000 t-plain.q
bench -w -c 10 -s 1G t-plain.q
"""

#: Rows of docs/differences.md.
NEGATIVE, NOTHING_TO_DO, NEVER_ENDS = 103, 104, 105

DIFFERENT = {
    "bench -c 1 empty.raw": Different(
        NOTHING_TO_DO,
        "the real program dies of a division by zero",
        1,
        "qemu-img: The image has no bytes that requests could be for\n",
        "",
    ),
    "bench -c 3 -s 0 zero.q": Different(
        NOTHING_TO_DO,
        "the real program dies of a division by zero",
        1,
        "qemu-img: The image has no bytes that requests could be for\n",
        "",
    ),
    "bench -o -1 mixed.raw": Different(
        NEGATIVE,
        "the words of 10.0",
        err="qemu-img: Invalid offset specified. Must be between 0 and 9223372036854775807.\n",
    ),
    "bench -s -1 mixed.raw": Different(
        NEGATIVE,
        "the words of 10.0",
        err="qemu-img: Invalid buffer size specified. Must be between 0 and 2147483647.\n",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("targets")
    made = disks(tmp_path_factory)
    for entry in os.scandir(made):
        if entry.name.startswith("t-"):  # some get other content here
            copy_sparse(Path(entry.path), folder / entry.name)
        elif entry.is_file():
            os.link(entry.path, folder / entry.name)
    (folder / "sub").mkdir()
    os.link(made / "sub" / "over.q", folder / "sub" / "over.q")
    for kind in KINDS.split():
        copy_sparse(folder / f"{kind}.q", folder / f"t-{kind}.q")
    build(folder / "t-data.q", "A0-#BB--", options="data_file=t-data.data")
    return Inputs(folder, tmp_path_factory.mktemp("bench"))


def timeless(shown: Result) -> Result:
    """What was shown, without the seconds."""
    return Result(
        shown.code, re.sub(r"in \d+\.\d{3} seconds", "in T seconds", shown.out), release7.errors(shown.err)
    )


def both(line: str, inputs: Inputs) -> tuple[Path, Path]:
    """Run a line through both programs, and hold the answers against each other; the folders."""
    words = shlex.split(line)
    real_dir, our_dir = inputs.pair([*words, "t-data.data"] if "t-data.q" in line else words)
    real, ours = timeless(run_real(words, real_dir)), timeless(run_qimg_inprocess(words, our_dir))
    assert ours == real, line
    assert not inputs.changed()
    return real_dir, our_dir


@pytest.mark.parametrize("line", lines(READS + FAILING_READS + REFUSED))
def test_a_read_test_answers_as_the_real_program(line: str, inputs: Inputs) -> None:
    _, our_dir = both(line, inputs)
    assert not inputs.lost(our_dir)


@pytest.mark.parametrize("kind", [*KINDS.split(), "mixed", "zeros", "big"])
@pytest.mark.parametrize(
    "more", ["-c 700", "-c 100 -s 100000 -S 65600", "-c 99 -s 512 -S 11111 -o 1000 -d 3"]
)
def test_every_kind_of_image_can_be_read(kind: str, more: str, inputs: Inputs) -> None:
    name = next(name for name in (f"{kind}.q", f"{kind}.raw") if (inputs.folder / name).exists())
    both(f"bench {more} {name}", inputs)


@pytest.mark.parametrize("line", RAW_TARGETS + QCOW2_TARGETS)
def test_a_write_test_leaves_the_image_of_the_real_program(line: str, inputs: Inputs) -> None:
    real_dir, our_dir = both(line, inputs)
    made = sorted(entry.name for entry in os.scandir(real_dir) if entry.name.startswith("t-"))
    assert made == sorted(entry.name for entry in os.scandir(our_dir) if entry.name.startswith("t-"))
    for name in made:
        if not name.endswith(".data"):
            format = "qcow2" if name.endswith(".q") else "raw"
            found = image_differences(real_dir / name, our_dir / name, format)
            if name == "t-marked.q":
                # Bitmaps are written anew, beside the old ones, which are given up only then.
                found = [text for text in found if "bytes of disk" not in text]
            assert not found


@pytest.mark.parametrize("line", lines(FAILING_WRITES))
def test_a_write_test_that_fails_says_so_and_leaves_a_sound_image(line: str, inputs: Inputs) -> None:
    _, our_dir = both(line, inputs)
    if line.endswith(".q"):
        run_real(["check", "t-plain.q"], our_dir).ok()


@pytest.mark.parametrize("line", DIFFERENT)
def test_what_differs_on_purpose(line: str, inputs: Inputs) -> None:
    words = shlex.split(line)
    real_dir, our_dir = inputs.pair(words)
    real, ours = timeless(run_real(words, real_dir)), timeless(run_qimg_inprocess(words, our_dir))
    known = DIFFERENT[line]
    expected = Result(
        real.code if known.code is None else known.code,
        real.out if known.out is None else known.out,
        real.err if known.err is None else known.err,
    )
    assert ours == expected
    assert ours != real, "no difference any more: take it from the list"


def test_a_depth_of_nothing_is_refused_where_the_real_program_never_ends(inputs: Inputs) -> None:
    """Row 105."""
    folder, _ = inputs.pair([])
    shown = run_qimg_inprocess(["bench", "-d", "0", "-c", "1", "mixed.raw"], folder)
    assert shown == Result(1, "", "qemu-img: Invalid queue depth specified\n")


def test_a_buffer_larger_than_memory_is_no_trouble(inputs: Inputs) -> None:
    """The real program wants a buffer for each request in flight, and aborts. Row 106."""
    folder, _ = inputs.pair([])
    shown = run_qimg(
        ["bench", "-s", "2147483647", "-c", "2", "null-co://"], folder, env={"PYTHONMALLOC": "malloc"}
    )
    assert shown.code == 1  # null-co has 1 GiB
    words = ["bench", "-s", "2147483647", "-S", "1k", "-c", "2", "-d", "2", "--image-opts"]
    shown = run_qimg([*words, "driver=null-co,size=4G"], folder)
    assert shown.code == 0
