"""measure: the numbers and words of the real qemu-img for every kind of source, size and option.

A line is one invocation, in shell syntax, in a folder with the files of `support.disks`. Nothing is written.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from support.build import build, io
from support.disks import disks
from support.holders import qemu_io_holding
from support.run import run_both, run_qimg_inprocess, run_real
from support.twins import Different, Inputs, compare_line, lines

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZES = r"""
measure --size 1M
measure --size 0
measure --size 1
measure --size 511
measure --size 1000
measure --size 1.5k
measure --size 0x1000
measure --size=1G
measure --size 7E
measure -O raw --size 1000
measure -O raw --size 8E
measure -O qcow2 --size 0
measure -O qcow2 --size 1
measure -O qcow2 --size 1000
measure -O qcow2 --size 64k
measure -O qcow2 --size 65537
measure -O qcow2 --size 1M
measure -O qcow2 --size 1G
measure -O qcow2 --size 100G
measure -O qcow2 --size 2T
measure -O qcow2 --size 63T
measure -O qcow2 --size 2P
measure -O qcow2 --size 3P
measure -O qcow2 --size 7E
measure --output=json --size 1M
measure --output=human --size 1M
measure --output=json -O qcow2 --size 1G
measure --output json -O raw --size 0
measure --size 1G -O qcow2 --size 1M
measure --siz 1M
"""

OPTIONS = r"""
measure -O qcow2 -o cluster_size=512 --size 1G
measure -O qcow2 -o cluster_size=1k --size 10M
measure -O qcow2 -o cluster_size=4k --size 1G
measure -O qcow2 -o cluster_size=2M --size 1G
measure -O qcow2 -o cluster_size=2M --size 64T
measure -O qcow2 -o cluster_size=512 --size 1000G
measure -O qcow2 -o extended_l2=on --size 1G
measure -O qcow2 -o extended_l2=on,cluster_size=16k --size 1G
measure -O qcow2 -o extended_l2=on,cluster_size=2M --size 1T
measure -O qcow2 -o extended_l2=on,cluster_size=4k --size 1G
measure -O qcow2 -o refcount_bits=1 --size 1G
measure -O qcow2 -o refcount_bits=8 --size 1T
measure -O qcow2 -o refcount_bits=64 --size 1T
measure -O qcow2 -o refcount_bits=64,cluster_size=512 --size 10G
measure -O qcow2 -o refcount_bits=3 --size 1G
measure -O qcow2 -o refcount_bits=128 --size 1G
measure -O qcow2 -o compat=0.10 --size 1G
measure -O qcow2 -o compat=v3 --size 1G
measure -O qcow2 -o compat=1.2 --size 1G
measure -O qcow2 -o compat=0.10,refcount_bits=1 --size 1G
measure -O qcow2 -o compat=0.10,extended_l2=on --size 1G
measure -O qcow2 -o compat=0.10,lazy_refcounts=on --size 1G
measure -O qcow2 -o lazy_refcounts=on --size 1G
measure -O qcow2 -o lazy_refcounts=maybe --size 1G
measure -O qcow2 -o compression_type=zstd --size 1G
measure -O qcow2 -o compression_type=foo --size 1G
measure -O qcow2 -o preallocation=off --size 1G
measure -O qcow2 -o preallocation=metadata --size 1G
measure -O qcow2 -o preallocation=falloc --size 1G
measure -O qcow2 -o preallocation=full --size 1G
measure -O qcow2 -o preallocation=foo --size 1G
measure -O qcow2 -o data_file=x --size 1G
measure -O qcow2 -o data_file_raw=on --size 1G
measure -O qcow2 -o data_file=x,data_file_raw=on mixed.raw
measure -O qcow2 -o backing_file=x --size 1G
measure -O qcow2 -o backing_file=x,backing_fmt=raw mixed.raw
measure -O qcow2 -o backing_fmt=raw --size 1G
measure -O qcow2 -o size=5G --size 1G
measure -O qcow2 -o size=foo --size 1G
measure -O qcow2 -o cluster_size=1000 --size 1G
measure -O qcow2 -o cluster_size=4M --size 1G
measure -O qcow2 -o nocow=on --size 1G
measure -O raw -o preallocation=full --size 1G
measure -O raw -o preallocation=foo --size 1G
measure -O raw -o nocow=maybe --size 1G
measure -O qcow2 -o extent_size_hint=foo --size 1G
measure -O raw -o size=5G --size 1G
measure -O raw -o cluster_size=4k --size 1G
measure -O qcow2 -o cluster_size=4k -o refcount_bits=8 --size 1G
measure -O qcow2 -o cluster_size=4k,cluster_size=64k --size 1G
measure -O qcow2 -o encryption=on --size 1G
measure -O qcow2 -o encrypt.format=luks --size 1G
measure -O qcow2 -o encrypt.format=aes --size 1G
measure -O luks --size 1G
measure -O vmdk --size 1G
measure -O vdi --size 1G
measure -O file --size 1G
"""

SOURCES = r"""
measure mixed.raw
measure -O qcow2 mixed.raw
measure -f raw -O qcow2 mixed.raw
measure -O qcow2 sectors.raw
measure -O qcow2 -o cluster_size=512 sectors.raw
measure -O qcow2 -o cluster_size=4k sectors.raw
measure -O qcow2 zeros.raw
measure -O qcow2 holes.raw
measure -O qcow2 odd.raw
measure -O qcow2 tiny.raw
measure -O qcow2 empty.raw
measure -O qcow2 big.raw
measure empty.raw
measure odd.raw
measure plain.q
measure -O qcow2 plain.q
measure --output=json -O qcow2 plain.q
measure --output=json plain.q
measure -O qcow2 packed.q
measure -O qcow2 v2.q
measure -O qcow2 c512.q
measure -O qcow2 c4k.q
measure -O qcow2 c2m.q
measure -O qcow2 -o cluster_size=2M c512.q
measure -O qcow2 -o cluster_size=512 c2m.q
measure -O qcow2 ext.q
measure -O qcow2 -o extended_l2=on ext.q
measure -O qcow2 -o cluster_size=4k ext.q
measure -O qcow2 pre.q
measure -O qcow2 data.q
measure -O qcow2 dataraw.q
measure -O qcow2 odd.q
measure -O qcow2 zero.q
measure -O qcow2 top.q
measure -O qcow2 mid.q
measure -O qcow2 short.q
measure -O qcow2 long.q
measure -O qcow2 ext-over.q
measure -O qcow2 c2m-over.q
measure -O qcow2 sub/over.q
measure -O qcow2 -o preallocation=full mixed.raw
measure -O qcow2 -o preallocation=metadata mixed.raw
measure -O qcow2 -o compat=0.10 mixed.raw
measure -O qcow2 -o backing_file=base.raw short.q
measure -f raw -O qcow2 plain.q
measure -U -O qcow2 plain.q
measure -O qcow2 marked.q
measure --output=json -O qcow2 marked.q
measure -O raw marked.q
measure -O qcow2 -o compat=0.10 marked.q
measure -O qcow2 -o cluster_size=4k marked.q
measure -O qcow2 stale.q
measure -O qcow2 snaps.q
measure -O qcow2 -l one snaps.q
measure -O qcow2 -l 1 snaps.q
measure -O qcow2 -l snapshot.name=three snaps.q
measure -O qcow2 -l snapshot.id=2,snapshot.name=1 snaps.q
measure -l nosuch snaps.q
measure -l one mixed.raw
measure -O qcow2 --image-opts driver=qcow2,file.filename=plain.q
measure -O qcow2 --image-opts driver=raw,offset=64k,size=128k,file.filename=mixed.raw
measure -O qcow2 'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"sectors.raw"}}'
measure -O qcow2 lost.q
measure -O qcow2 future.q
measure -O qcow2 torn.q
measure torn.q
measure -f qcow2 mixed.raw
measure -f nosuch mixed.raw
measure missing
measure .
measure ''
measure -O qcow2 -o cluster_size=1000 missing
measure /dev/null
measure -O qcow2 /dev/zero
measure --output=json missing
measure plain.q -O qcow2 -f qcow2
measure -fqcow2 -Oqcow2 plain.q
"""

CASES = [line for table in (SIZES, OPTIONS, SOURCES) for line in lines(table)]


def _refused(row: int, reason: str, line: str) -> Different:
    return Different(row, reason, 1, f"qemu-img: {line}\n", "")


DIFFERENT: dict[str, Different] = {
    "measure -O vdi --size 1G": Different(
        0,
        "every format that can be written can be measured",
        0,
        "",
        "required size: 4608\nfully allocated size: 1073746432\n",
    ),
    "measure -O vmdk --size 1G": Different(
        0,
        "every format that can be written can be measured",
        0,
        "",
        "required size: 196608\nfully allocated size: 1073938432\n",
    ),
    "measure -O file --size 1G": _refused(40, "a storage is no format", "Unknown file format 'file'"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(disks(tmp_path_factory), tmp_path_factory.mktemp("measure"))


@pytest.mark.parametrize("line", CASES)
def test_it_measures_what_the_real_program_measures(line: str, inputs: Inputs) -> None:
    compare_line(line, inputs, DIFFERENT, format=None)


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(CASES)


# -- what the numbers promise


@pytest.mark.parametrize(
    "line",
    [
        "-O qcow2 mixed.raw",
        "-O qcow2 zeros.raw",
        "-O qcow2 big.raw",
        "-O qcow2 odd.raw",
        "-O qcow2 top.q",
        "-O qcow2 ext-over.q",
        "-O qcow2 -o cluster_size=512 c512.q",
        "-O qcow2 -o cluster_size=2M c512.q",
        "-O qcow2 -o extended_l2=on ext.q",
        "-O qcow2 -o refcount_bits=64,cluster_size=512 big.raw",
        "-O qcow2 -o preallocation=full big.raw",
        "-O raw top.q",
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_a_conversion_needs_no_more_than_was_measured(
    line: str, dense: bool, inputs: Inputs, tmp_path: Path
) -> None:
    words = shlex.split(line)
    for name in os.listdir(inputs.folder):
        os.symlink(inputs.folder / name, tmp_path / name)
    shown = run_qimg_inprocess(["measure", *words], tmp_path).ok().out
    required, allocated = (int(number) for number in re.findall(r"size: (\d+)", shown)[:2])
    run_qimg_inprocess(["convert", *(["-S", "0"] if dense else []), *words, "out"], tmp_path).ok()
    size = (tmp_path / "out").stat().st_size
    assert size <= (allocated if dense else required)


def test_an_image_in_use_is_measured_as_the_real_program_does(tmp_path: Path) -> None:
    build(tmp_path / "held.q", "A-B-")
    with qemu_io_holding(tmp_path / "held.q"):
        for words in (["held.q"], ["-U", "held.q"], ["-O", "qcow2", "held.q"], ["-f", "raw", "held.q"]):
            both = run_both(["measure", *words], tmp_path, tmp_path)
            assert both.ours == both.real, words


@pytest.mark.parametrize("count", [0, 1, 2, 11])
@pytest.mark.parametrize("granularity", ["512", "64k", "1M"])
@pytest.mark.parametrize("cluster", ["512", "64k"])
def test_bitmaps_are_measured(tmp_path: Path, count: int, granularity: str, cluster: str) -> None:
    image = tmp_path / "a.q"
    run_real(["create", "-q", "-f", "qcow2", image, "10M"]).ok()
    for number in range(count):
        run_real(["bitmap", "--add", "-g", granularity, image, "b" * (number * 20 + 1)]).ok()
    io(image, ["write -q 1M 64k"])
    words = ["measure", "-O", "qcow2", "-o", f"cluster_size={cluster}", "a.q"]
    both = run_both(words, tmp_path, tmp_path)
    assert both.ours == both.real
