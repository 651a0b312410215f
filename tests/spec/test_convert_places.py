"""convert: what surrounds the copy. Files that are there already, devices, full disks, images in use, old
spellings, progress, cache modes, unreadable sectors."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from conformance.loop_devices import loop_device
from qimg.errors import StorageError
from qimg.storage.base import Filter
from qimg.storage.posix import PosixFile
from support.build import (
    assert_real_check_clean,
    assert_real_identical,
    build,
    content,
    pattern,
    real_content,
    write_raw,
)
from support.faults import opened_through
from support.holders import qemu_io_holding, qemu_nbd_serving
from support.run import Result, run_both, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20


def qimg(folder: Path, *words: str | Path) -> Result:
    return run_qimg_inprocess(words, folder)


def info(path: Path) -> dict[str, object]:
    answer: dict[str, object] = json.loads(run_real(["info", "--output=json", path]).ok().out)
    return answer


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "mixed.raw", "A0B--CC-")


# -- the file that is there, or comes to be


def test_a_target_that_exists_is_written_in_place(tmp_path: Path, mixed: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"x" * 100)
    old.chmod(0o640)
    (tmp_path / "link").hardlink_to(old)
    (tmp_path / "name").symlink_to("old")
    before = old.stat()
    qimg(tmp_path, "convert", "-O", "qcow2", mixed, "name").ok()
    after = old.stat()
    assert (after.st_ino, after.st_mode, after.st_nlink) == (before.st_ino, before.st_mode, 2)
    assert (tmp_path / "name").is_symlink()
    assert_real_identical(mixed, tmp_path / "link", formats=("raw", "qcow2"))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o644)])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_new_target_is_as_private_as_the_umask_says(
    tmp_path: Path, mixed: Path, mask: int, mode: int, format: str
) -> None:
    previous = os.umask(mask)
    try:
        qimg(tmp_path, "convert", "-O", format, mixed, "out").ok()
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_fifo_is_refused_and_nobody_waits_for_it(tmp_path: Path, mixed: Path) -> None:
    # The real program waits for a writer where the FIFO is a source, and cannot resize it as a target.
    os.mkfifo(tmp_path / "fifo")
    reason = "'file' driver requires 'fifo' to be a regular file\n"
    assert qimg(tmp_path, "convert", "fifo", "out").err == f"qemu-img: Could not open 'fifo': {reason}"
    for format in ("raw", "qcow2"):
        shown = qimg(tmp_path, "convert", "-O", format, "mixed.raw", "fifo")
        assert (shown.code, shown.err) == (1, f"qemu-img: fifo: error while converting {format}: {reason}")


# -- old spellings


def test_s_means_l(tmp_path: Path) -> None:
    image = build(tmp_path / "a.q", "A-B-")
    run_real(["snapshot", "-c", "one", image]).ok()
    build(tmp_path / "b.q", "----")
    expected = real_content(image, snapshot="one")
    run_real(["snapshot", "-c", "two", image]).ok()
    for word in ("one", "1"):
        qimg(tmp_path, "convert", "-s", word, "a.q", "out").ok()
        assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.parametrize(("format", "layout"), [("raw", "RR-R"), ("qcow2", "RR-R")])
def test_a_backing_format_that_is_not_given_is_found_out_and_recorded(
    tmp_path: Path, format: str, layout: str
) -> None:
    base = tmp_path / "base"
    if format == "raw":
        write_raw(base, layout)
    else:
        build(base, layout)
    build(tmp_path / "top.q", "-T-0", backing=base, backing_format=format)
    shown = qimg(tmp_path, "convert", "-O", "qcow2", "-B", "base", "top.q", "out").ok()
    assert shown.out == ""
    assert shown.err == (
        "qemu-img: warning: Deprecated use of backing file without explicit backing format"
        f" (detected format of {format})\n"
    )
    assert info(tmp_path / "out")["backing-filename-format"] == format
    assert real_content(tmp_path / "out") == real_content(tmp_path / "top.q")
    assert_real_check_clean(tmp_path / "out")


def test_a_question_mark_is_help(tmp_path: Path) -> None:
    both = run_both(["convert", "-O", "qcow2", "-o", "?"], tmp_path, tmp_path)
    names = [re.findall(r"(?m)^  (\S+=<[^>]*>)", result.out) for result in (both.real, both.ours)]
    assert names[0] == names[1]
    assert both.ours.code == 0


# -- progress

RECORD = r"    \((\d{1,3}\.\d\d)/100%\)\r"


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "mixed.raw", "out"],
        ["-p", "big.raw", "out"],
        ["-p", "-O", "qcow2", "big.raw", "out"],
        ["-p", "-c", "-O", "qcow2", "big.raw", "out"],
        ["-p", "-m", "1", "-S", "0", "big.raw", "out"],
        ["-p", "-n", "mixed.raw", "old.raw"],
        ["-p", "-C", "big.raw", "out"],
    ],
    ids=" ".join,
)
def test_progress_goes_from_0_to_100_in_steps_of_more_than_1(
    tmp_path: Path, mixed: Path, words: list[str]
) -> None:
    write_raw(tmp_path / "big.raw", "ABCD--EFGH" * 36)  # 22.5 MiB
    (tmp_path / "old.raw").write_bytes(bytes(MIB))
    shown = qimg(tmp_path, "convert", *words).ok()
    assert re.fullmatch(f"(?:{RECORD})+\n", shown.out)
    values = [float(value) for value in re.findall(RECORD, shown.out)]
    assert values[0] == 0
    assert values[-2:] == [100, 100]
    rising = values[:-1]
    assert all(later - earlier > 1 for earlier, later in pairwise(rising))
    if "big.raw" in words and "-C" not in words:
        assert len(values) > 5


# -- images in use


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "held.q", "out"],
        ["convert", "-O", "qcow2", "held.q", "out"],
        ["convert", "over.q", "out"],
        ["convert", "mixed.raw", "held.q"],
        ["convert", "-O", "qcow2", "mixed.raw", "held.q"],
        ["convert", "-n", "-O", "raw", "mixed.raw", "held.q"],
        ["convert", "-O", "qcow2", "-o", "data_file=held.q", "mixed.raw", "out"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("holder", ["qemu-io", "qemu-nbd"])
def test_an_image_that_a_writer_has_is_neither_read_nor_written(
    tmp_path: Path, mixed: Path, words: list[str], holder: str
) -> None:
    held = build(tmp_path / "held.q", "A-B-")
    build(tmp_path / "over.q", "-O--", backing="held.q")
    before = held.read_bytes()
    holding = qemu_io_holding(held) if holder == "qemu-io" else qemu_nbd_serving(held)
    with holding:
        both = run_both(words, tmp_path, tmp_path)
        assert (both.ours.code, both.ours.err) == (both.real.code, both.real.err)
        assert both.ours.code == 1
        assert held.read_bytes() == before


def test_a_backing_file_that_a_writer_has_is_refused_before_the_target_is_made(
    tmp_path: Path, mixed: Path
) -> None:
    held = build(tmp_path / "held.q", "A-B-")
    with qemu_io_holding(held):
        words = ["convert", "-O", "qcow2", "-B", "held.q", "-F", "qcow2", "mixed.raw", "out"]
        ours = qimg(tmp_path, *words)
        assert not (tmp_path / "out").exists()
        assert ours == run_real(words, tmp_path)


def test_with_U_an_image_in_use_can_be_read(tmp_path: Path) -> None:
    held = build(tmp_path / "held.q", "A-B-")
    with qemu_io_holding(held):
        qimg(tmp_path, "convert", "-U", "held.q", "out").ok()
    assert (tmp_path / "out").read_bytes() == content("A-B-")


def test_an_image_that_others_read_can_be_read(tmp_path: Path) -> None:
    held = build(tmp_path / "held.q", "A-B-")
    with qemu_io_holding(held, read_only=True):
        qimg(tmp_path, "convert", "held.q", "out").ok()
        refused = qimg(tmp_path, "convert", "-O", "qcow2", "out", "held.q")
    assert refused.code == 1
    assert refused.err == (
        'qemu-img: held.q: error while converting qcow2: Failed to get "write" lock\n'
        "Is another process using the image [held.q]?\n"
    )
    assert real_content(held) == content("A-B-")


# -- full disks


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("no small disk: mounting is refused (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ["-O", "raw"],
        ["-O", "raw", "-S", "0"],
        ["-O", "raw", "-C"],
        ["-O", "qcow2"],
        ["-O", "qcow2", "-c"],
        ["-O", "qcow2", "-o", "compression_type=zstd,cluster_size=2M", "-c"],
        ["-O", "qcow2", "-o", "extended_l2=on"],
        ["-O", "qcow2", "-o", "preallocation=metadata"],
        ["-O", "qcow2", "-o", "data_file=full/data"],
    ],
    ids=" ".join,
)
def test_a_full_disk_ends_it_with_one_line(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "noise.raw").write_bytes(os.urandom(4 * MIB))
    with small_disk(tmp_path / "full", "2m"):
        shown = qimg(tmp_path, "convert", *words, "noise.raw", "full/out")
        assert shown.code == 1
        assert shown.out == ""
        assert re.fullmatch(
            r"qemu-img: (error while writing at byte \d+|full/out: error while completing the image):"
            r" No space left on device\n",
            shown.err,
        )
        out = tmp_path / "full" / "out"
        if words[1] == "raw":
            assert out.stat().st_size < 4 * MIB
        else:
            refused = run_real(["check", "-f", "qcow2", out])
            assert refused.code == 1
            assert "incomplete image" in refused.err


@pytest.mark.parametrize("options", ["preallocation=falloc", "preallocation=full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_preallocation_that_does_not_fit_is_refused_in_the_real_words(
    tmp_path: Path, format: str, options: str
) -> None:
    write_raw(tmp_path / "mixed.raw", "AB" * 40)
    with small_disk(tmp_path / "full", "2m"):
        answers = []
        for program in (run_real, run_qimg_inprocess):
            answers.append(
                program(["convert", "-O", format, "-o", options, "mixed.raw", "full/out"], tmp_path)
            )
            (tmp_path / "full" / "out").unlink(missing_ok=True)
        # A creation of qcow2 names the steps that led there (difference 39).
        real = answers[0].err.replace("Could not resize image: Failed to resize underlying file: ", "")
        assert (answers[1].code, answers[1].err) == (answers[0].code, real)


# -- devices

DEVICE = 2 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A block device of DEVICE bytes full of old data, and the file below it."""
    below = tmp_path / "below"
    below.write_bytes(b"\xee" * DEVICE)
    with loop_device(below) as name:
        yield name, below


def _device_bytes(name: str) -> bytes:
    subprocess.run(["blockdev", "--flushbufs", name], check=False, capture_output=True)
    return Path(name).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["mixed.raw", "DEV"],
        ["-O", "raw", "full.raw", "DEV"],
        ["-S", "0", "mixed.raw", "DEV"],
        ["-n", "mixed.raw", "DEV"],
        ["-n", "full.raw", "DEV"],
        ["-n", "--target-is-zero", "mixed.raw", "DEV"],
        ["-n", "-S", "0", "mixed.raw", "DEV"],
        ["-n", "-t", "none", "mixed.raw", "DEV"],
        ["-t", "none", "mixed.raw", "DEV"],
        ["-C", "mixed.raw", "DEV"],
        ["mixed.q", "DEV"],
        ["large.raw", "DEV"],
        ["-n", "large.raw", "DEV"],
        ["-o", "preallocation=full", "mixed.raw", "DEV"],
        [
            "-n",
            "--target-image-opts",
            "mixed.raw",
            "driver=raw,offset=1M,file.driver=host_device,file.filename=DEV",
        ],
    ],
    ids=" ".join,
)
def test_a_device_holds_afterwards_what_the_real_program_puts_there(
    tmp_path: Path, device: tuple[str, Path], mixed: Path, words: list[str]
) -> None:
    write_raw(tmp_path / "full.raw", "A-B-" * 8)
    write_raw(tmp_path / "large.raw", "A-B-" * 9)
    build(tmp_path / "mixed.q", "A0b-#C--")
    found = []
    for program in (run_real, run_qimg_inprocess):
        Path(device[0]).write_bytes(b"\xee" * DEVICE)
        shown = program(["convert", *(word.replace("DEV", device[0]) for word in words)], tmp_path)
        found.append((shown.code, shown.out, shown.err, _device_bytes(device[0])))
    assert found[1] == found[0]


@pytest.mark.parametrize(
    "more", [[], ["-c"], ["-o", "extended_l2=on"], ["-t", "none"], ["-o", "cluster_size=512"]]
)
def test_qcow2_on_a_device_is_whole(
    tmp_path: Path, device: tuple[str, Path], mixed: Path, more: list[str]
) -> None:
    sources = [mixed, write_raw(tmp_path / "odd.raw", "A-B", size=150_000)]
    for source in sources:
        qimg(tmp_path, "convert", *more, "-O", "qcow2", source, device[0]).ok()
        run_real(["check", "-f", "qcow2", device[0]]).ok()
        run_real(["compare", "-f", "raw", "-F", "qcow2", source, device[0]]).ok()


def test_qcow2_that_does_not_fit_on_a_device_says_so(tmp_path: Path, device: tuple[str, Path]) -> None:
    (tmp_path / "noise.raw").write_bytes(os.urandom(4 * MIB))
    shown = qimg(tmp_path, "convert", "-O", "qcow2", "noise.raw", device[0])
    assert shown.code == 1
    assert re.fullmatch(r"qemu-img: error while writing at byte \d+: No space left on device\n", shown.err)
    assert "incomplete image" in run_real(["info", "-f", "qcow2", device[0]]).err


def test_a_device_is_a_source(tmp_path: Path, device: tuple[str, Path]) -> None:
    Path(device[0]).write_bytes(content("A-B0", size=DEVICE))
    for words in (["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c"]):
        qimg(tmp_path, "convert", *words, device[0], "out").ok()
        run_real(["compare", "-f", "raw", "-F", words[1], device[0], tmp_path / "out"]).ok()


def test_a_device_is_not_converted_onto_itself(tmp_path: Path, device: tuple[str, Path]) -> None:
    before = _device_bytes(device[0])
    for more in ([], ["-U"]):
        shown = qimg(tmp_path, "convert", *more, "-O", "qcow2", device[0], device[0])
        assert shown.code == 1
        assert 'Failed to get "write" lock' in shown.err
        assert _device_bytes(device[0]) == before


# -- cache modes and rates


@pytest.mark.parametrize(
    ("words", "source", "target"),
    [
        ([], "writeback", "unsafe"),
        (["-t", "none"], "writeback", "none"),
        (["-t", "off"], "writeback", "none"),
        (["-T", "none", "-t", "writethrough"], "none", "writethrough"),
        (["-T", "unsafe", "-t", "directsync"], "unsafe", "directsync"),
        (["-n", "-T", "directsync", "-t", "writeback"], "directsync", "writeback"),
    ],
)
def test_cache_modes_reach_the_files(
    tmp_path: Path,
    mixed: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    source: str,
    target: str,
) -> None:
    seen: dict[str, str] = {}
    real_open = PosixFile.open.__func__  # type: ignore[attr-defined]

    def watched(
        cls: type[PosixFile], filename: str, *, cache: str = "writeback", **more: object
    ) -> PosixFile:
        seen[os.path.basename(filename)] = "none" if cache == "off" else cache
        opened: PosixFile = real_open(cls, filename, cache=cache, **more)
        return opened

    monkeypatch.setattr(PosixFile, "open", classmethod(watched))
    (tmp_path / "out").write_bytes(bytes(MIB))
    qimg(tmp_path, "convert", *words, "mixed.raw", "out").ok()
    assert seen == {"mixed.raw": source, "out": target}
    assert (tmp_path / "out").read_bytes()[: MIB // 2] == mixed.read_bytes()


def test_a_rate_is_kept(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "big.raw", "A" * 16 * 8)  # 8 MiB
    began = time.monotonic()
    qimg(tmp_path, "convert", "-r", "16M", source, "out").ok()
    # The first 2 MiB are free; the others take a second for each 16 MiB.
    assert 0.3 < time.monotonic() - began < 10
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


# -- unreadable sectors


class BadSectors(Filter):
    """Reading any of these sectors fails."""

    sectors: tuple[int, ...] = ()

    def read_into(self, buf: bytearray | memoryview, offset: int) -> None:
        end = offset + len(buf)
        if any(offset < (sector + 1) * 512 and sector * 512 < end for sector in self.sectors):
            raise StorageError("Input/output error", errno=5, offset=offset)
        super().read_into(buf, offset)


def blkdebug(name: str, *sectors: int) -> str:
    """The real program's description of a raw file with these bad sectors."""
    rules = [
        {"event": "read_aio", "sector": sector, "immediately": True, "once": False} for sector in sectors
    ]
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": name}, "inject-error": rules}
    return "json:" + json.dumps({"driver": "raw", "file": file})


@pytest.mark.parametrize(
    "more", [[], ["-O", "qcow2"], ["-c", "-O", "qcow2"], ["-q"], ["-m", "1"], ["-S", "0"]], ids=" ".join
)
def test_salvaging_replaces_unreadable_sectors_by_zeros(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    bad = (0, 9, 10, 300)
    real = run_real(["convert", "--salvage", *more, blkdebug("mixed.raw", *bad), "real"], tmp_path).ok()
    monkeypatch.setattr(BadSectors, "sectors", bad)
    with opened_through(BadSectors, "mixed.raw"):
        ours = qimg(tmp_path, "convert", "--salvage", *more, "-f", "raw", "mixed.raw", "ours").ok()
    # The real program reads several places at once and so tells of them in any order.
    assert (ours.code, ours.out) == (real.code, real.out)
    assert ours.err.splitlines() == sorted(real.err.splitlines(), key=lambda text: (len(text), text))
    format = "qcow2" if "qcow2" in more else "raw"
    assert_real_identical(tmp_path / "real", tmp_path / "ours", formats=(format, format))
    expected = bytearray(mixed.read_bytes())
    for sector in bad:
        expected[sector * 512 : sector * 512 + 512] = bytes(512)
    assert real_content(tmp_path / "ours", format=format) == expected


def test_without_salvaging_the_first_unreadable_request_ends_it(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = (300,)
    real = run_real(["convert", blkdebug("mixed.raw", *bad), "real"], tmp_path)
    monkeypatch.setattr(BadSectors, "sectors", bad)
    with opened_through(BadSectors, "mixed.raw"):
        ours = qimg(tmp_path, "convert", "mixed.raw", "ours")
    assert (ours.code, ours.out) == (real.code, real.out) == (1, "")
    assert ours.err == real.err == "qemu-img: error while reading at byte 131072: Input/output error\n"
    assert (tmp_path / "ours").stat().st_size < mixed.stat().st_size


def test_a_backing_file_that_cannot_be_read_to_fill_up_a_cluster_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path / "base.raw", "RRRR")
    build(tmp_path / "top.q", "-T--", backing="base.raw", backing_format="raw")
    monkeypatch.setattr(BadSectors, "sectors", (2,))
    with opened_through(BadSectors, "base.raw"):
        words = ["-B", "base.raw", "-F", "raw", "-O", "qcow2", "-o", "cluster_size=256k"]
        shown = qimg(tmp_path, "convert", *words, "top.q", "out")
    assert shown.code == 1
    assert shown.err == "qemu-img: error while writing at byte 0: Input/output error\n"
    assert run_real(["check", "-f", "qcow2", tmp_path / "out"]).code == 1


# -- big disks stay quick


@pytest.mark.parametrize("words", [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c"]], ids=" ".join)
def test_a_nearly_empty_disk_of_a_tebibyte_takes_no_time(tmp_path: Path, words: list[str]) -> None:
    source = tmp_path / "huge.q"
    run_real(["create", "-q", "-f", "qcow2", source, "1T"]).ok()
    script = f"write -P 7 {(1 << 39) + 4096} 8k"
    subprocess.run(["qemu-io", "-c", script, str(source)], check=True, capture_output=True)
    began = time.monotonic()
    qimg(tmp_path, "convert", *words, "huge.q", "out").ok()
    assert time.monotonic() - began < 20
    assert_real_identical(source, tmp_path / "out", formats=("qcow2", words[1]))
    assert (tmp_path / "out").stat().st_blocks * 512 < 2 * MIB


def test_data_is_not_lost_where_the_target_lies_on_another_file_system(tmp_path: Path, mixed: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    folder = memory / f"qimg-test-{os.getpid()}"
    folder.mkdir()
    try:
        for more in (["-C"], [], ["-t", "none"]):
            qimg(tmp_path, "convert", *more, "mixed.raw", folder / "out").ok()
            assert (folder / "out").read_bytes() == mixed.read_bytes()
    finally:
        shutil.rmtree(folder)


def test_the_pattern_says_where_each_byte_belongs() -> None:
    assert pattern("A", 8, 16) == b"A\0\0\0\0\0\0\x08A\0\0\0\0\0\0\x10"
