"""convert: every option and every kind of source, by qimg and by the real qemu-img, with the same outcome.

A line is one invocation, in shell syntax, in a folder with the files of `support.disks`. What it leaves in
the folder is compared: guest content, structure, allocation, space. A line that is to differ stands in
`DIFFERENT`, with the number of its row in docs/differences.md.
"""

from __future__ import annotations

import shlex

import pytest

from spec.convert_lines import CASES
from support.disks import disks
from support.twins import CONTENT, SAME, Different, Inputs, compare_line

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

ITSELF = "a conversion onto its own source costs the source"
EARLY = "what can be refused before the target is touched is refused then"
WORDS = "another order of checks: the words are about what is found first"
STATUS = "warning: error while reading block status at offset"
READING = "warning: error while reading offset"


def _error(*lines: str) -> str:
    return "".join(f"{line if line.startswith('Is ') else 'qemu-img: ' + line}\n" for line in lines)


def _refused(row: int, reason: str, *lines: str) -> Different:
    return Different(row, reason, 1, _error(*lines) if lines else None)


def _itself(name: str, format: str) -> Different:
    return _refused(
        30,
        ITSELF,
        f'{name}: error while converting {format}: Failed to get "write" lock',
        f"Is another process using the image [{name}]?",
    )


DIFFERENT: dict[str, Different] = {
    "convert -U t-old.q t-old.q": _itself("t-old.q", "raw"),
    "convert -U -O qcow2 t-old.q t-old.q": _itself("t-old.q", "qcow2"),
    "convert -U t-same.raw t-same.raw": _itself("t-same.raw", "raw"),
    "convert -U t-same.raw ./t-same.raw": _itself("./t-same.raw", "raw"),
    "convert -U -O qcow2 -o data_file=t-same.raw t-same.raw out": _refused(
        30,
        ITSELF,
        'out: error while converting qcow2: Failed to get "write" lock',
        "Is another process using the image [t-same.raw]?",
    ),
    "convert -U t-top.q t-under.raw": _itself("t-under.raw", "raw"),
    "convert -U -O qcow2 t-top.q t-under.raw": _itself("t-under.raw", "qcow2"),
    "convert --image-opts driver=raw,file.filename=t-same.raw,file.locking=off t-same.raw": _itself(
        "t-same.raw", "raw"
    ),
    "convert --bitmaps -O qcow2 -o compat=0.10 marked.q out": _refused(1, EARLY),
    "convert --bitmaps -O raw marked.q out": _refused(1, EARLY),
    "convert -o preallocation=metadata mixed.raw out": _refused(1, EARLY),
    "convert -O qcow2 -B missing -F raw mixed.raw out": _refused(1, EARLY),
    "convert -O qcow2 -B base.raw -F qcow2 mixed.raw out": _refused(1, EARLY),
    "convert -O qcow2 -B lost.q -F qcow2 mixed.raw out": _refused(1, EARLY),
    "convert -O qcow2 -B out -F qcow2 mixed.raw out": _refused(
        1,
        EARLY,
        "Could not open 'out': Could not open backing file: Could not open 'out': No such file or directory",
    ),
    "convert -O qcow2 -B t-old.q -F qcow2 mixed.raw t-old.q": _refused(
        1,
        EARLY,
        't-old.q: error while converting qcow2: Failed to get "write" lock',
        "Is another process using the image [t-old.q]?",
    ),
    "convert -O qcow2 -B missing mixed.raw out": _refused(
        4,
        "the detection of the format fails, and says so",
        "Could not open 'out': Could not open backing file:"
        " Could not open 'missing': No such file or directory",
    ),
    "convert -c -O qcow2 -o data_file=out.data mixed.raw out": _refused(
        31,
        "the real program creates the image, then fails, with or without a message",
        "Compression and an external data file not supported at the same time",
    ),
    "convert -c -O qcow2 -B base.raw -F raw -o cluster_size=256k c512-over.q out": Different(
        32, "clusters of which the source's top image has nothing stay unallocated", files=CONTENT
    ),
    "convert -c -O qcow2 -B base.raw -F raw -o extended_l2=on c512-over.q out": Different(
        32, "clusters of which the source's top image has nothing stay unallocated", files=CONTENT
    ),
    "convert -O qcow2 -o data_file=out.data odd.raw out": Different(
        33, "the data file ends with the disk, not with its last cluster", files=CONTENT
    ),
    "convert -S 1536 -O qcow2 -o cluster_size=512 sectors.raw out": Different(
        34, "blocks of zeros begin at multiples of S, also if S is no power of two", files=CONTENT
    ),
    "convert -O qcow2 -o preallocation=metadata,cluster_size=512 sectors.raw out": Different(
        35, "clusters lie elsewhere, so that others share a block of the file system", files=CONTENT
    ),
    "convert -O qcow2 -B '' -F raw mixed.raw out": _refused(
        36, "the real program crashes", "Expected backing file name, got empty string"
    ),
    "convert -n -O nosuch mixed.raw t-same.raw": _refused(37, WORDS, "Unknown file format 'nosuch'"),
    "convert -O qcow2 -o data_file=out,data_file_raw=on mixed.raw out": _refused(
        37,
        WORDS,
        'out: error while converting qcow2: Failed to get "write" lock',
        "Is another process using the image [out]?",
    ),
    "convert --salvage torn.q out": Different(
        38,
        "each sector is told of once when its place is not known, and once when it cannot be read",
        err=(
            "qcow2: Image is corrupt: L2 table offset 0x200 unaligned (L1 index: 0);"
            " further non-fatal corruption events will be suppressed\n"
            + "".join(_error(f"{STATUS} {at}: Input/output error") for at in range(0, 4 << 16, 512))
            + "".join(_error(f"{READING} {at}: Input/output error") for at in range(0, 4 << 16, 512))
        ),
        files=SAME,
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(disks(tmp_path_factory), tmp_path_factory.mktemp("convert"))


@pytest.mark.parametrize("line", CASES)
def test_a_conversion_comes_out_as_the_real_programs(line: str, inputs: Inputs) -> None:
    compare_line(line, inputs, DIFFERENT, format=target_format(line))


def target_format(line: str) -> str:
    """Format of what a line leaves: its -O, or raw."""
    words = shlex.split(line)
    for number, word in enumerate(words):
        if word == "-O":
            return words[number + 1]
        if word.startswith("-O"):
            return word[2:]
    return "raw"


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(CASES)
