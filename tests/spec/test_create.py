"""create: every format, option and refusal, by qimg and by the real qemu-img, with the same outcome.

A line is one invocation, in shell syntax, in a folder with the files of `support.disks`. See test_convert.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path

import pytest

from support.build import assert_real_check_clean, build, write_raw
from support.disks import disks
from support.holders import qemu_io_holding
from support.run import run_both, run_qimg_inprocess, run_real
from support.twins import CONTENT, Different, Inputs, compare_line, lines

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

RAW = r"""
create out 1M
create -f raw out 1M
create -f raw out 0
create -f raw out 1
create -f raw out 511
create -f raw out 512
create -f raw out 513
create -f raw out 1000
create -f raw out 4096
create -f raw out 5000
create -f raw out 1.5k
create -f raw out 0.1k
create -f raw out 010
create -f raw out 0x1000
create -f raw out 100b
create -f raw out 1G
create -f raw out 8T
create -f raw out ' 4096'
create -f raw out +4096
create -q -f raw out 1M
create -f raw -o size=1M out
create -f raw -o size=1000 out
create -f raw -o size=18446744073709551615 out 1M
create -f raw -o preallocation=off out 1M
create -f raw -o preallocation=falloc out 1M
create -f raw -o preallocation=full out 1M
create -f raw -o preallocation=full out 1000
create -f raw -o preallocation=falloc out 0
create -f raw -o nocow=on out 1M
create -f raw -o nocow out 1M
create -f raw -o nonocow out 1M
create -f raw -o extent_size_hint=64k out 1M
create -f raw -o extent_size_hint=0 out 1M
create -f raw -o preallocation=falloc,nocow=on,extent_size_hint=1M out 1M
create -f file out 1M
create -f raw file:out 1M
create -f raw ./a:b 1M
create -f raw -- -out 1M
create -f raw out -o size=1M
create -fraw -q out 1M
create -f raw sub/out 1M
create -f raw sub/../out 1M
create -f raw t-junk 1M
create -f raw t-junk 0
create -f raw t-old.q 64k
create -f raw t-big.raw 1M
"""

QCOW2 = r"""
create -f qcow2 out 1M
create -f qcow2 out 0
create -f qcow2 out 1
create -f qcow2 out 1000
create -f qcow2 out 64k
create -f qcow2 out 65537
create -f qcow2 out 1G
create -f qcow2 out 10T
create -q -f qcow2 out 1M
create -f qcow2 -o size=1M out
create -f qcow2 -o cluster_size=512 out 1M
create -f qcow2 -o cluster_size=1k out 10M
create -f qcow2 -o cluster_size=4096 out 1G
create -f qcow2 -o cluster_size=128K out 1G
create -f qcow2 -o cluster_size=2M out 1G
create -f qcow2 -o cluster_size=2M out 1
create -f qcow2 -o cluster_size=512 out 128G
create -f qcow2 -o compat=0.10 out 1M
create -f qcow2 -o compat=v2 out 1M
create -f qcow2 -o compat=1.1 out 1M
create -f qcow2 -o compat=v3 out 1M
create -f qcow2 -o refcount_bits=1 out 1M
create -f qcow2 -o refcount_bits=2 out 1M
create -f qcow2 -o refcount_bits=4 out 1M
create -f qcow2 -o refcount_bits=8 out 1M
create -f qcow2 -o refcount_bits=16,compat=0.10 out 1M
create -f qcow2 -o refcount_bits=32 out 1M
create -f qcow2 -o refcount_bits=64 out 1M
create -f qcow2 -o refcount_bits=64,cluster_size=512 out 100M
create -f qcow2 -o extended_l2=on out 1M
create -f qcow2 -o extended_l2=on,cluster_size=16k out 1G
create -f qcow2 -o extended_l2=on,cluster_size=2M out 1G
create -f qcow2 -o extended_l2=off out 1M
create -f qcow2 -o extended_l2 out 1M
create -f qcow2 -o lazy_refcounts=on out 1M
create -f qcow2 -o lazy_refcounts=yes out 1M
create -f qcow2 -o lazy_refcounts=true out 1M
create -f qcow2 -o lazy_refcounts out 1M
create -f qcow2 -o nolazy_refcounts out 1M
create -f qcow2 -o lazy_refcounts=n out 1M
create -f qcow2 -o compression_type=zlib out 1M
create -f qcow2 -o compression_type=zstd out 1M
create -f qcow2 -o compression_type=zlib,compat=0.10 out 1M
create -f qcow2 -o preallocation=off out 1M
create -f qcow2 -o preallocation=metadata out 1M
create -f qcow2 -o preallocation=metadata out 1G
create -f qcow2 -o preallocation=metadata out 100000
create -f qcow2 -o preallocation=metadata,cluster_size=512 out 1M
create -f qcow2 -o preallocation=metadata,cluster_size=2M out 100M
create -f qcow2 -o preallocation=metadata,compat=0.10 out 10M
create -f qcow2 -o preallocation=metadata,extended_l2=on out 10M
create -f qcow2 -o preallocation=metadata,refcount_bits=1 out 10M
create -f qcow2 -o preallocation=falloc out 1M
create -f qcow2 -o preallocation=falloc,extended_l2=on out 1M
create -f qcow2 -o preallocation=full out 1M
create -f qcow2 -o preallocation=full,cluster_size=4k out 1M
create -f qcow2 -o preallocation=full out 100000
create -f qcow2 -o preallocation=metadata out 0
create -f qcow2 -o data_file=out.data out 1M
create -f qcow2 -o data_file=out.data,data_file_raw=on out 1M
create -f qcow2 -o data_file=out.data,data_file_raw=off out 1M
create -f qcow2 -o data_file=out.data,preallocation=metadata out 1M
create -f qcow2 -o data_file=out.data,preallocation=falloc out 1M
create -f qcow2 -o data_file=out.data,preallocation=full,data_file_raw=on out 1M
create -f qcow2 -o data_file=out.data,extended_l2=on out 1M
create -f qcow2 -o data_file=a,,b.data out 1M
create -f qcow2 -o data_file=t-other.data out 1M
create -f qcow2 -o cluster_size=4k -o lazy_refcounts=on -o refcount_bits=8 out 1M
create -f qcow2 -o cluster_size=4k,cluster_size=8k out 1M
create -f qcow2 -o nocow=on out 1M
create -f qcow2 -o extent_size_hint=1M out 1M
create -f qcow2 -o encryption=off out 1M
create -f qcow2 t-junk 1M
create -f qcow2 t-old.q 64k
create -f qcow2 file:out 1M
create out 1M -f qcow2
"""

BACKING = r"""
create -f qcow2 -b base.raw -F raw out
create -f qcow2 -b base.raw -F raw out 1M
create -f qcow2 -b base.raw -F raw out 10M
create -f qcow2 -b odd.raw -F raw out
create -f qcow2 -b tiny.raw -F raw out
create -f qcow2 -b empty.raw -F raw out
create -f qcow2 -b plain.q -F qcow2 out
create -f qcow2 -b top.q -F qcow2 out
create -f qcow2 -b odd.q -F qcow2 out
create -f qcow2 -b zero.q -F qcow2 out
create -f qcow2 -b plain.q -F raw out
create -f qcow2 -o backing_file=base.raw,backing_fmt=raw out
create -f qcow2 -b base.raw -o backing_file=x,backing_fmt=raw out
create -f qcow2 -F raw -o backing_file=base.raw,backing_fmt=qcow2 out
create -f qcow2 -b base.raw -F raw -o cluster_size=4k,extended_l2=off,refcount_bits=1 out
create -f qcow2 -b base.raw -F raw -o extended_l2=on out
create -f qcow2 -b base.raw -F raw -o extended_l2=on,preallocation=metadata out
create -f qcow2 -b base.raw -F raw -o extended_l2=on,preallocation=full out
create -f qcow2 -b base.raw -F raw -o compat=0.10 out
create -f qcow2 -b base.raw -F raw -o data_file=out.data out
create -f qcow2 -b base.raw -F file out
create -u -f qcow2 -b base.raw -F raw out 1M
create -u -f qcow2 -b missing -F raw out 1M
create -u -f qcow2 -b missing -F qcow2 out 1M
create -u -f qcow2 -b nbd://localhost/x -F raw out 1M
create -u -f qcow2 -b 'json:{"driver":"raw"}' -F raw out 1M
create -f qcow2 -b ../base.raw -F raw sub/out
create -f qcow2 -b 'json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}' -F raw out
create -f qcow2 -b file:base.raw -F raw out
create -f qcow2 -b sub/over.q -F qcow2 out
create -f qcow2 -b base.raw -F raw t-old.q
create -q -f qcow2 -b base.raw -F raw out
"""

REFUSED = r"""
create -f qcow2 -b missing -F raw out
create -f qcow2 -b missing -F raw out 1M
create -f qcow2 -b missing out 1M
create -f qcow2 -b base.raw -F qcow2 out
create -f qcow2 -b base.raw -F nosuch out
create -f qcow2 -b base.raw -F nosuch -u out 1M
create -f qcow2 -b lost.q -F qcow2 out
create -f qcow2 -b future.q -F qcow2 out
create -f qcow2 -b '' -F raw out
create -f qcow2 -b out -F qcow2 out 1M
create -f qcow2 -b t-old.q -F qcow2 t-old.q
create -f qcow2 -b base.raw -F raw -u out
create -f qcow2 -b base.raw -u out 1M
create -f qcow2 -F raw out 1M
create -f qcow2 -F raw out
create -f qcow2 -o backing_fmt=raw out 1M
create -f raw -b base.raw -F raw out 1M
create -f raw -F raw out 1M
create -f qcow2 -b base.raw -F raw -o preallocation=metadata out
create -f qcow2 -b base.raw -F raw -o preallocation=full t-old.q
create -f qcow2 -b base.raw -F raw -o data_file=out.data,data_file_raw=on out
create -f qcow2 -o cluster_size=256 out 1M
create -f qcow2 -o cluster_size=0 out 1M
create -f qcow2 -o cluster_size=1000 out 1M
create -f qcow2 -o cluster_size=4M out 1M
create -f qcow2 -o cluster_size=1000 t-old.q 1M
create -f qcow2 -o cluster_size=-1k out 1M
create -f qcow2 -o cluster_size=1e99 out 1M
create -f qcow2 -o compat=1.2 out 1M
create -f qcow2 -o compat= out 1M
create -f qcow2 -o compat=0.10,lazy_refcounts=on out 1M
create -f qcow2 -o compat=0.10,refcount_bits=1 out 1M
create -f qcow2 -o compat=0.10,extended_l2=on out 1M
create -f qcow2 -o compat=0.10,compression_type=zstd out 1M
create -f qcow2 -o compat=0.10,data_file=out.data out 1M
create -f qcow2 -o refcount_bits=0 out 1M
create -f qcow2 -o refcount_bits=3 out 1M
create -f qcow2 -o refcount_bits=128 out 1M
create -f qcow2 -o refcount_bits=-1 out 1M
create -f qcow2 -o refcount_bits=1k out 1M
create -f qcow2 -o refcount_bits=18446744073709551616 out 1M
create -f qcow2 -o preallocation=foo out 1M
create -f qcow2 -o compression_type=lzma out 1M
create -f qcow2 -o extended_l2=on,cluster_size=8k out 1M
create -f qcow2 -o extended_l2=maybe out 1M
create -f qcow2 -o data_file_raw=on out 1M
create -f qcow2 -o data_file=nodir/x out 1M
create -f qcow2 -o data_file=sub out 1M
create -f qcow2 -o data_file=out out 1M
create -f qcow2 -o encryption=on out 1M
create -f qcow2 -o encrypt.format=luks out 1M
create -f qcow2 -o encrypt.format=foo out 1M
create -f qcow2 -o encrypt.cipher-alg=aes-256 out 1M
create -f qcow2 -o encryption=on,encrypt.format=luks out 1M
create -f qcow2 -o nosuch=1 out 1M
create -f qcow2 out
create -f qcow2 out 8E
create -f qcow2 out 7E
create -f qcow2 out 3E
create -f qcow2 -o cluster_size=512 out 1P
create -f qcow2 -o cluster_size=512 out 129G
create -f qcow2 -o extended_l2=on,cluster_size=2M out 4E
create -f qcow2 -o size=8E out
create -f qcow2 -o size=16E out
create -f qcow2 -o size=18446744073709551615 out
create -f qcow2 -o size=18446744073709551614 out
create -f qcow2 -o refcount_bits=0x20 out 1M
create -f qcow2 -o refcount_bits=010 out 1M
create -f qcow2 -o refcount_bits=+8 out 1M
create -f qcow2 -o refcount_bits=08 out 1M
create -f qcow2 -o refcount_bits=1_6 out 1M
create -f qcow2 -o refcount_bits= out 1M
create -f qcow2 -o size=1M out 1M
create -f qcow2 nodir/out 1M
create -f qcow2 sub 1M
create -f qcow2 t-junk/out 1M
create -f qcow2 '' 1M
create -f raw '' 1M
create -f raw nodir/out 1M
create -f raw sub 1M
create -f raw out 7E
create -f raw -o size=8E out
create -f raw t-old.q 7E
create -f raw -o preallocation=metadata out 1M
create -f raw -o preallocation=foo out 1M
create -f raw -o preallocation=foo t-junk 1M
create -f raw -o preallocation=metadata t-junk 1M
create -f raw -o extent_size_hint=4G out 1M
create -f raw -o extent_size_hint=foo out 1M
create -f raw -o cluster_size=4k out 1M
create -f raw /dev/null 1M
create -f raw /dev/null 0
create -f qcow2 /dev/null 1M
create -f qcow2 /dev/full 1M
create -f raw nbd://localhost:1/x 1M
create -f qcow2 http://localhost:1/x 1M
create -f host_device out 1M
create -f vhd out 1M
create -f nosuch t-junk 1M
"""

CASES = [line for table in (RAW, QCOW2, BACKING, REFUSED) for line in lines(table)]

EARLY = "a creation that fails leaves an existing file as it was, and no new one"
WORDS = "another order of checks: the words are about what is found first"
SHOWN = "Formatting 'out', fmt={} {}\n"
OPTIONS = (
    "cluster_size=65536 extended_l2=off compression_type=zlib size={}{} lazy_refcounts=off refcount_bits=16"
)
LOCKED = "Is another process using the image [out]?\n"


def _refused(row: int, reason: str, line: str | None = None, out: str | None = None) -> Different:
    return Different(row, reason, 1, None if line is None else f"qemu-img: {line}\n", out)


DIFFERENT: dict[str, Different] = {
    "create -f qcow2 -b base.raw -F raw -o preallocation=full t-old.q": _refused(1, EARLY),
    "create -f qcow2 -o cluster_size=1000 t-old.q 1M": _refused(1, EARLY),
    "create -f raw out 7E": _refused(1, EARLY),
    "create -f raw -o preallocation=metadata out 1M": _refused(1, EARLY),
    "create -f qcow2 -b base.raw -u out 1M": Different(
        4,
        "without a format, and without looking, none is recorded",
        0,
        "",
        SHOWN.format("qcow2", OPTIONS.format(1048576, " backing_file=base.raw")),
    ),
    "create -f vhd out 1M": Different(
        6,
        "vhd is another name of vpc",
        0,
        "",
        SHOWN.format("vpc", "size=1048576"),
    ),
    "create -f qcow2 -o preallocation=metadata,cluster_size=512 out 1M": Different(
        35, "clusters lie elsewhere, so that others share a block of the file system", files=CONTENT
    ),
    "create -f qcow2 -o data_file=out out 1M": _refused(
        37, WORDS, f'out: Failed to get "write" lock\n{LOCKED}'.rstrip("\n")
    ),
    "create -f qcow2 /dev/full 1M": _refused(37, WORDS, "/dev/full: Image is not in qcow2 format"),
    "create -f file out 1M": _refused(40, "a storage is no format", "out: Unknown file format 'file'", ""),
    "create -f host_device out 1M": _refused(
        40, "a storage is no format", "out: Unknown file format 'host_device'", ""
    ),
    "create -f qcow2 -o size=8E out": _refused(
        41, "the size does not turn negative", None, SHOWN.format("qcow2", OPTIONS.format(1 << 63, ""))
    ),
    "create -f qcow2 -o size=18446744073709551614 out": _refused(
        41,
        "the size does not turn negative",
        "out: Could not resize image: Image size cannot be negative",
        SHOWN.format("qcow2", OPTIONS.format((1 << 64) - 2, "")),
    ),
    "create -f raw -o size=8E out": _refused(
        41,
        "the size does not turn negative",
        "out: The image size is too large for file format 'raw'",
        SHOWN.format("raw", f"size={1 << 63}"),
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(disks(tmp_path_factory), tmp_path_factory.mktemp("create"))


def created_format(line: str) -> str:
    """Format of what a line makes."""
    words = shlex.split(line)
    for number, word in enumerate(words):
        if word == "-f":
            return words[number + 1]
        if word.startswith("-f"):
            return word[2:]
    return "raw"


@pytest.mark.parametrize("line", CASES)
def test_an_image_is_created_as_the_real_program_does_it(line: str, inputs: Inputs) -> None:
    compare_line(line, inputs, DIFFERENT, format=created_format(line))


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(CASES)


# -- what surrounds it


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_file_that_exists_is_made_anew_in_place(tmp_path: Path, format: str) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"x" * 300_000)
    old.chmod(0o640)
    (tmp_path / "link").hardlink_to(old)
    (tmp_path / "name").symlink_to("old")
    before = old.stat()
    run_qimg_inprocess(["create", "-f", format, "name", "100k"], tmp_path).ok()
    after = old.stat()
    assert (after.st_ino, after.st_mode, after.st_nlink) == (before.st_ino, before.st_mode, 2)
    assert (tmp_path / "name").is_symlink()
    read = run_real(["convert", "-f", format, "-O", "raw", "link", "content"], tmp_path)
    assert read.code == 0
    assert (tmp_path / "content").read_bytes() == bytes(102400), "nothing of the old content shows"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_new_image_is_as_private_as_the_umask_says(
    tmp_path: Path, mask: int, mode: int, format: str
) -> None:
    previous = os.umask(mask)
    try:
        run_qimg_inprocess(["create", "-f", format, "out", "1M"], tmp_path).ok()
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_image_in_use_is_not_created_anew(tmp_path: Path, format: str) -> None:
    held = build(tmp_path / "held.q", "A-B-")
    before = held.read_bytes()
    with qemu_io_holding(held):
        both = run_both(["create", "-f", format, "held.q", "1M"], tmp_path, tmp_path)
        assert both.ours == both.real
        assert held.read_bytes() == before


def test_a_backing_file_in_use_can_be_named(tmp_path: Path) -> None:
    held = build(tmp_path / "held.q", "A-B-")
    with qemu_io_holding(held):
        for words in (["-F", "qcow2", "out"], ["out", "1M"]):
            run_qimg_inprocess(["create", "-q", "-f", "qcow2", "-b", "held.q", *words], tmp_path).ok()
            run_real(["info", "-f", "qcow2", "out"], tmp_path).ok()
    assert_real_check_clean(tmp_path / "out")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [[], ["8M"]])
def test_a_backing_format_that_is_not_given_is_found_out_and_recorded(
    tmp_path: Path, format: str, size: list[str]
) -> None:
    (write_raw if format == "raw" else build)(tmp_path / "base", "A-B-")
    ours = run_qimg_inprocess(["create", "-f", "qcow2", "-b", "base", "ours", *size], tmp_path)
    real = run_real(["create", "-f", "qcow2", "-b", "base", "-F", format, "real", *size], tmp_path)
    assert ours.code == 0
    assert ours.out == real.out.replace("'real'", "'ours'")
    assert ours.err == (
        "qemu-img: warning: Deprecated use of backing file without explicit backing format"
        f" (detected format of {format})\n"
    )
    told = [run_real(["info", name], tmp_path).ok().out for name in ("real", "ours")]
    assert told[1].replace("ours", "real") == told[0]


@pytest.mark.parametrize(
    "words", [["-f", "raw"], ["-f", "qcow2"], ["-f", "raw", "x"], ["-f", "qcow2", "x", "y", "z"]]
)
@pytest.mark.parametrize("spelling", ["help", "?", "cluster_size=4k,help", "bogus,?"])
def test_help_lists_the_options_of_the_real_program(tmp_path: Path, words: list[str], spelling: str) -> None:
    both = run_both(["create", *words, "-o", spelling], tmp_path, tmp_path)
    shown = [
        re.findall(r"(?m)^(?:Supported.*|  \S+=<[^>]*>)", result.out) for result in (both.real, both.ours)
    ]
    assert shown[1] == shown[0]
    assert (both.ours.code, both.ours.err) == (both.real.code, both.real.err)


def test_a_full_disk_leaves_no_new_image(tmp_path: Path) -> None:
    """ENOSPC by a limit on the length of files: no mount is needed."""
    import resource
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "old").write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        for words in (
            ["-f", "raw", "out", "2M"],
            ["-f", "raw", "-o", "preallocation=falloc", "out", "2M"],
            ["-f", "raw", "-o", "preallocation=full", "out", "2M"],
            ["-f", "qcow2", "-o", "preallocation=full", "out", "2M"],
            ["-f", "qcow2", "-o", "preallocation=metadata", "out", "2M"],
            ["-f", "raw", "old", "2M"],
        ):
            shown = run_qimg_inprocess(["create", "-q", *words], tmp_path)
            assert shown.code == 1, words
            assert re.fullmatch(r"qemu-img: (out|old): [^\n]+\n", shown.err), shown.err
            assert "Internal" not in shown.err
            assert not (tmp_path / "out").exists(), words
        assert (tmp_path / "old").read_bytes() == b"old"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
