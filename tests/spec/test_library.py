"""The library: values, errors, progress, cancellation, threads; nothing is printed (docs/library.md)."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, current_thread

import pytest

import qimg
from qimg.context import Context, Notice, QimgWarning
from spec import gallery
from support.build import CLUSTER, content, real_content, write_raw
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
LAYOUT = "A-0BB--C"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """source.raw of `LAYOUT` in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_raw(tmp_path / "source.raw", LAYOUT)
    return tmp_path


def to_qcow2(**more: object) -> None:
    qimg.convert("source.raw", "disk.q", source_format="raw", format="qcow2", **more)  # type: ignore[arg-type]


# -- create


def test_create_makes_what_the_real_program_makes(folder: Path) -> None:
    qimg.create(
        folder / "ours.q",
        format="qcow2",
        size=5 * MIB,
        options={"cluster_size": 4096, "lazy_refcounts": True, "refcount_bits": "32"},
    )
    words = "create -q -f qcow2 -o cluster_size=4096,lazy_refcounts=on,refcount_bits=32 theirs.q 5M"
    run_real(words.split()).ok()
    assert Path("ours.q").read_bytes() == Path("theirs.q").read_bytes()


def test_create_takes_the_size_of_the_backing_file(folder: Path) -> None:
    qimg.create("base.q", format="qcow2", size=3 * MIB)
    qimg.create("ov.q", format="qcow2", backing="base.q", backing_format="qcow2")
    found = qimg.info("ov.q")
    assert (found.virtual_size, found.backing_filename, found.backing_format) == (3 * MIB, "base.q", "qcow2")
    assert found.full_backing_filename == "base.q"


def test_a_missing_backing_format_is_a_warning(folder: Path) -> None:
    qimg.create("base.q", format="qcow2", size=MIB)
    with pytest.warns(QimgWarning, match="detected format of qcow2"):
        qimg.create("ov.q", format="qcow2", backing="base.q")
    told: list[Notice] = []
    qimg.create("ov.q", format="qcow2", backing="base.q", context=Context(warn=told.append))
    assert [notice.text for notice in told] == [
        "Deprecated use of backing file without explicit backing format (detected format of qcow2)"
    ]


# -- open, read


@pytest.mark.parametrize(
    "name",
    ["ov.q", "ext-ov2.q", "long.q", "short.q", "zlib.q", "zstd.q", "df.q", "chain12.q", "odd.q", "v2z.q"],
)
def test_a_disk_shows_what_the_guest_sees(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)  # data files are looked for in the working directory
    with qimg.open(name) as disk:
        whole = disk.read(0, disk.size)
        assert disk.format == "qcow2"
    run_real(["convert", "-O", "raw", name, tmp_path / "theirs.raw"]).ok()
    assert whole == (tmp_path / "theirs.raw").read_bytes()


def test_reading_stops_at_the_end(folder: Path) -> None:
    size = len(LAYOUT) * CLUSTER
    with qimg.open("source.raw", format="raw") as disk:
        assert disk.size == size
        assert disk.read(size, 1) == disk.read(size + 5, 100) == disk.read(0, 0) == b""
        assert len(disk.read(size - 10, 100)) == 10
        assert len(disk.read(0, 1 << 60)) == size
        buf = bytearray(b"\xff" * 20)
        assert disk.read_into(buf, size - 10) == 10
        assert buf[10:] == b"\xff" * 10
        assert disk.read_into(buf, size) == 0
        assert disk.read_into(memoryview(buf)[5:10], 0) == 5
        with pytest.raises(ValueError, match="negative"):
            disk.read(-1, 1)


def test_extents_are_those_of_map(images: Path) -> None:
    for name in ("ov.q", "zlib.q", "holes.raw", "zero.q", "ext.q"):
        with qimg.open(images / name) as disk:
            found = list(disk.extents())
            assert sum(row.length for row in found) == disk.size
        mapped = list(qimg.map(images / name))
        assert found == [row for row in mapped if row.length]
    with qimg.open(images / "ov.q") as disk:
        part = list(disk.extents(100_000, 50_000))
        assert (part[0].start, sum(row.length for row in part)) == (100_000, 50_000)
        assert part == list(qimg.map(images / "ov.q", start=100_000, length=50_000))


def test_a_file_object_reads_and_seeks(folder: Path) -> None:
    to_qcow2(compress=True)
    expected = content(LAYOUT)
    with qimg.open("disk.q") as disk:
        with io.BufferedReader(disk.file()) as file:
            assert file.read() == expected
            assert file.tell() == len(expected)
            assert file.seek(-100, os.SEEK_END) == len(expected) - 100
            assert file.read(7) == expected[-100:-93]
            assert file.seek(3, os.SEEK_CUR) == len(expected) - 90
            assert file.seek(65530) == 65530
            assert file.read(20) == expected[65530:65550]
        raw = disk.file()
        assert (raw.readable(), raw.seekable(), raw.writable()) == (True, True, False)
        with pytest.raises(ValueError, match="negative"):
            raw.seek(-1)
        raw.close()
        assert disk.read(0, 8) == expected[:8]


def test_leaving_the_block_closes_the_files(folder: Path) -> None:
    to_qcow2()
    qimg.create("ov.q", format="qcow2", backing="disk.q", backing_format="qcow2")
    before = len(os.listdir("/proc/self/fd"))
    with qimg.open("ov.q") as disk:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    disk.close()
    with pytest.raises(qimg.QimgError):
        qimg.open("nosuch")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "name", ["gonedeep.q", "c-l2far.q", "loop1.q", "p-l1far.q", "wrongformat.q", "dfgone.q"]
)
def test_an_open_that_fails_leaves_no_file_open(name: str, images: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for function in (qimg.open, qimg.check, lambda where: list(qimg.map(where)), qimg.measure):
        try:
            found = function(images / name)
        except qimg.QimgError:
            continue
        if isinstance(found, qimg.Disk):
            found.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_map_that_is_not_read_to_its_end_closes_the_file(images: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    rows = qimg.map(images / "ov.q")
    next(rows)
    assert len(os.listdir("/proc/self/fd")) > before
    rows.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["ov.q", "zlib.q", "zstd.q", "ext-ov2.q", "full.raw", "df.q", "packed4k.q"])
def test_many_threads_read_one_disk(name: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    wrong: list[str] = []
    with qimg.open(name) as disk:
        expected = disk.read(0, disk.size)

        def work(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(100):
                    start, length = chance.randrange(disk.size), chance.randrange(1, 200_000)
                    if disk.read(start, length) != expected[start : start + length]:
                        wrong.append(f"{start}+{length}")
                if sum(row.length for row in disk.extents()) != disk.size:
                    wrong.append("extents")
            except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
                wrong.append(repr(error))

        threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# -- convert


def test_convert_writes_what_the_real_program_reads(folder: Path) -> None:
    to_qcow2(options={"cluster_size": "4k"}, compress=True)
    assert real_content(folder / "disk.q") == content(LAYOUT)
    assert {row.compressed for row in qimg.map("disk.q") if row.data} == {True}


def test_several_sources_become_one_disk(folder: Path) -> None:
    qimg.convert(["source.raw", folder / "source.raw"], "two.raw", source_format="raw")
    assert Path("two.raw").read_bytes() == content(LAYOUT) * 2


def test_a_snapshot_is_converted_by_name_or_id(images: Path, folder: Path) -> None:
    for snapshot in ("one", "two words", "1"):
        qimg.convert(images / "snap.q", "ours.raw", snapshot=snapshot)
        run_real(["convert", "-O", "raw", "-l", snapshot, images / "snap.q", "theirs.raw"]).ok()
        assert Path("ours.raw").read_bytes() == Path("theirs.raw").read_bytes()
    with pytest.raises(qimg.QimgError, match="snapshot"):
        qimg.convert(images / "snap.q", "ours.raw", snapshot="nosuch")


def test_progress_ascends_to_the_end_in_the_callers_thread(folder: Path) -> None:
    write_raw(folder / "big.raw", "ABCD" * 64)
    seen: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(current_thread())

    qimg.convert("big.raw", "big.q", source_format="raw", format="qcow2", progress=progress)
    assert seen[-1] == (16 * MIB, 16 * MIB)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for done, total in seen if done} == {16 * MIB}
    assert threads == {current_thread()}
    seen.clear()
    assert qimg.compare("big.raw", "big.q", progress=progress).verdict == "identical"
    assert seen[0] == (0, 16 * MIB)
    assert seen[-1] == (16 * MIB, 16 * MIB)


def test_an_error_in_the_callback_stops_the_work_and_comes_out(folder: Path) -> None:
    class Mine(Exception):
        pass

    def progress(done: int, total: int) -> None:
        raise Mine

    with pytest.raises(Mine):
        to_qcow2(progress=progress)
    with pytest.raises(Mine):
        qimg.compare("source.raw", "source.raw", progress=progress)
    to_qcow2()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_convert_leaves_no_target_that_claims_to_be_whole(
    folder: Path, format: str, compress: bool, after: int
) -> None:
    if compress and format == "raw":
        return
    write_raw(folder / "big.raw", "ABCD" * 100)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(qimg.Cancelled, match="Cancelled"):
        qimg.convert(
            "big.raw", "t", source_format="raw", format=format, compress=compress, cancelled=cancelled
        )
    if Path("t").exists():
        words = ["compare", "-f", "raw", "-F", format, "big.raw", "t"]
        assert run_real(words).code != 0, "the target passes for a copy"
    qimg.convert("big.raw", "t", source_format="raw", format=format, compress=compress)
    assert run_real(["compare", "-f", "raw", "-F", format, "big.raw", "t"]).code == 0


def test_a_compare_can_be_cancelled(folder: Path) -> None:
    write_raw(folder / "big.raw", "ABCD" * 100)
    asked = Event()

    def cancelled() -> bool:
        found = asked.is_set()
        asked.set()
        return found

    with pytest.raises(qimg.Cancelled):
        qimg.compare("big.raw", "big.raw", first_format="raw", second_format="raw", cancelled=cancelled)


def test_convert_without_create_writes_into_what_is_there(folder: Path) -> None:
    run_real(["create", "-q", "-f", "raw", "old.raw", "1M"]).ok()
    qimg.convert("source.raw", "old.raw", source_format="raw", create=False)
    assert Path("old.raw").read_bytes() == content(LAYOUT, size=MIB)
    with pytest.raises(qimg.QimgError):
        qimg.convert("source.raw", "nosuch.raw", source_format="raw", create=False)


def test_nothing_to_convert_is_an_error(folder: Path) -> None:
    with pytest.raises(qimg.QimgError, match="Must specify image file name"):
        qimg.convert([], "t")
    with pytest.raises(qimg.OptionError):
        to_qcow2(options={"bogus": 1})
    with pytest.raises(qimg.QimgError, match="Unknown file format 'nosuch'"):
        qimg.convert("source.raw", "t", format="nosuch")


# -- info, map, check, compare, measure


def test_info_has_what_the_header_says(images: Path) -> None:
    found = qimg.info(images / "bitmaps.q")
    assert (found.format, found.virtual_size, found.cluster_size) == ("qcow2", 10 * MIB, 65536)
    assert found.format_specific is not None
    assert found.format_specific["bitmaps"] == [
        {"flags": ["auto"], "name": "b0", "granularity": 65536},
        {"flags": [], "name": "b1", "granularity": 65536},
        {"flags": ["auto"], "name": "b2", "granularity": 32768},
    ]
    assert (found.encrypted, found.dirty, found.snapshots) == (False, False, [])
    assert qimg.info(images / "dirty.q").dirty is True
    assert [snapshot.name for snapshot in qimg.info(images / "snap.q").snapshots] == ["one", "two words"]
    assert qimg.info(images / "gone.q").backing_filename == "nosuch.q"
    (child,) = qimg.info(images / "holes.raw").children
    assert (child[0], child[1].format, child[1].is_protocol) == ("file", "file", True)


def test_a_description_instead_of_a_name(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    where = 'json:{"driver":"raw","offset":65536,"size":4096,"file":{"driver":"file","filename":"holes.raw"}}'
    with qimg.open(where) as disk:
        assert disk.read(0, disk.size) == b"\1" * 4096
    assert qimg.info(where).virtual_size == 4096


def test_check_counts_and_reports(images: Path) -> None:
    lines: list[str] = []
    found = qimg.check(images / "c-leak.q", report=lines.append)
    assert (found.corruptions, found.leaks, found.check_errors) == (0, 1, 0)
    assert lines == ["Leaked cluster 9 refcount=1 reference=0"]
    sound = qimg.check(images / "a.q")
    assert (sound.allocated_clusters, sound.total_clusters, sound.image_end_offset) == (4, 16, 589824)
    with pytest.raises(qimg.NotSupported, match="does not support checks"):
        qimg.check(images / "full.raw")


def test_compare_gives_verdict_and_offset(images: Path) -> None:
    def verdict(first: str, second: str, **more: object) -> tuple[str, int | None, bool]:
        found = qimg.compare(images / first, images / second, **more)  # type: ignore[arg-type]
        return found.verdict, found.offset, found.sizes_differ

    assert verdict("a.q", "a.q") == ("identical", None, False)
    assert verdict("full.raw", "full2.raw") == ("content", 69632, False)
    assert verdict("full.raw", "long.raw") == ("identical", None, True)
    assert verdict("full.raw", "ld.raw") == ("content", 2560000, True)
    assert verdict("full.raw", "long.raw", strict=True) == ("size", None, True)
    assert verdict("empty.q", "onezero.q", strict=True) == ("status", 0, False)


def test_measure_predicts(images: Path) -> None:
    found = qimg.measure(images / "ov.q", output_format="qcow2")
    words = ["measure", "-O", "qcow2", images / "ov.q"]
    assert run_real(words).ok().lines == [
        f"required size: {found.required}",
        f"fully allocated size: {found.fully_allocated}",
        f"bitmaps size: {found.bitmaps}",
    ]
    assert qimg.measure(size=1000).required == 1024
    with pytest.raises(qimg.QimgError):
        qimg.measure()
    with pytest.raises(qimg.QimgError):
        qimg.measure(images / "ov.q", size=5)


# -- errors


@pytest.mark.parametrize(
    "call",
    [
        qimg.info,
        lambda where: qimg.open(where).close(),
        lambda where: list(qimg.map(where)),
        qimg.check,
        lambda where: qimg.compare(where, where),
        lambda where: qimg.measure(where, output_format="qcow2"),
        lambda where: qimg.convert(where, os.devnull, create=False),
    ],
    ids=["info", "open", "map", "check", "compare", "measure", "convert"],
)
def test_only_errors_of_qimg_come_out(call: Callable[[Path], object], images: Path) -> None:
    """Whatever the image: sound, damaged, cut off, in a loop, no image at all."""
    for path in sorted(images.rglob("*")):
        if path.name in ("huge.q", "big.q", "fifo"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QimgWarning)
            try:
                call(path)
            except qimg.QimgError as error:
                assert str(error)
                assert "\n" not in str(error).replace("new\nline.raw", "")


@pytest.mark.parametrize(
    "name", ["", "nosuch", "nosuch:x", "json:{", "/", "a\0b", "x" * 5000, "json:{}", "nbd://x/y"]
)
def test_a_name_that_leads_nowhere_is_an_open_error(name: str, folder: Path) -> None:
    for call in (qimg.info, qimg.open, lambda where: list(qimg.map(where)), qimg.check, qimg.measure):
        with pytest.raises(qimg.QimgError):
            call(name)
    with pytest.raises(qimg.QimgError):
        qimg.convert(name, "t")
    if name != "nosuch":
        with pytest.raises(qimg.QimgError):
            qimg.create(name, size=512)


def test_errors_keep_what_they_know(folder: Path) -> None:
    with pytest.raises(qimg.OpenError) as caught:
        qimg.open("nosuch")
    assert caught.value.name == "nosuch"
    with pytest.raises(qimg.QimgError) as option:
        qimg.create("x", format="qcow2", size=MIB, options={"cluster_size": 1000})
    assert "power of two" in str(option.value)


# -- nothing is printed


def test_nothing_is_printed_whatever_is_done(images: Path, tmp_path: Path) -> None:
    """In a process of its own, so that the descriptors tell the truth."""
    program = f"""
import os, warnings
warnings.simplefilter("ignore")
import qimg
os.chdir({str(images)!r})
for name in sorted(os.listdir(".")):
    if name in ("huge.q", "fifo"):
        continue
    for call in (
        lambda: qimg.info(name), lambda: list(qimg.map(name)), lambda: qimg.check(name),
        lambda: qimg.compare(name, "a.q"), lambda: qimg.measure(name),
        lambda: qimg.convert(name, {str(tmp_path / "t")!r}, format="qcow2"),
    ):
        try:
            call()
        except qimg.QimgError:
            pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_images_of_these_tests_are_whole(images: Path) -> None:
    """The gallery was built: nothing above passes because a file is missing."""
    assert len(gallery.digest(images)) > 180
