"""Filling a fresh image: where data goes, what entries say, what the real program makes of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from qimg.errors import NotSupported, StorageError
from qimg.extent import MAPPED
from qimg.formats.qcow2 import refcounts, tables
from qimg.formats.qcow2.fresh import FreshImage
from qimg.storage.base import Filter, Storage
from support import fresh
from support.build import assert_real_check_clean, assert_real_identical, build, real_content
from support.run import run_peer, run_real

MIB = 1 << 20
GIB = 1 << 30
K64 = 65536


def real_map(path: Path) -> list[tuple[int, int, int | None]]:
    """(start, length, offset) of what the real program calls data."""
    entries = json.loads(run_real(["map", "-f", "qcow2", "--output=json", path]).ok().out)
    return [
        (entry["start"], entry["length"], entry.get("offset"))
        for entry in entries
        if entry["data"] and entry["depth"] == 0
    ]


def l2_words(path: Path, count: int) -> list[int]:
    """The first words of the first L2 table, by hand: header bytes 40..47 name the L1 table."""
    raw = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", raw, 40)
    (entry,) = struct.unpack_from(">Q", raw, l1)
    return list(struct.unpack_from(f">{count}Q", raw, entry & 0x00FFFFFFFFFFFE00))


def finished(image: FreshImage) -> None:
    image.flush()
    image.close()


@pytest.mark.peer("qemu-img")
class TestPlaces:
    def test_a_whole_window_is_one_run_and_the_real_map_shows_it_there(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", 16 * GIB)
        (extent,) = image.allocate(0, 16 * GIB)
        finished(image)
        assert (extent.start, extent.length, extent.flags) == (0, 16 * GIB, MAPPED)
        assert extent.source is image.file
        assert_real_check_clean(tmp_path / "image")
        # 3 clusters of header and counts, then the L1 table.
        assert real_map(tmp_path / "image") == [(0, 16 * GIB, 4 * K64)]
        assert extent.host == 4 * K64

    def test_what_is_allocated_already_keeps_its_place(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB)
        (middle,) = image.allocate(4 * K64, 2 * K64)
        whole = image.allocate(0, MIB)
        finished(image)
        # The pieces on both sides come after it, in guest order.
        assert [(extent.start // K64, extent.host) for extent in whole] == [
            (0, 6 * K64),
            (4, middle.host),
            (6, 10 * K64),
        ]
        assert [extent.length for extent in whole] == [4 * K64, 2 * K64, 10 * K64]
        assert_real_check_clean(tmp_path / "image")

    def test_the_last_cluster_of_a_disk_may_be_cut(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB + 512)
        (extent,) = image.allocate(MIB, 512)
        assert extent.length == 512
        (clipped,) = image.allocate(MIB, K64)
        assert clipped == extent
        fresh.put(image, bytes(MIB) + b"\x77" * 512, MIB, 512)
        finished(image)
        assert_real_check_clean(tmp_path / "image")
        assert real_content(tmp_path / "image", format="qcow2") == bytes(MIB) + b"\x77" * 512

    def test_clusters_never_written_to_lie_inside_the_file(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB)
        image.allocate(0, MIB)
        finished(image)
        assert_real_check_clean(tmp_path / "image")
        assert real_content(tmp_path / "image", format="qcow2") == bytes(MIB)

    def test_preallocated_clusters_are_used_where_they_are(self, tmp_path: Path) -> None:
        content = fresh.mixed_content(MIB)
        image = fresh.make(tmp_path / "image", MIB, "preallocation=metadata")
        fresh.put(image, content, 0, MIB)
        finished(image)
        assert real_map(tmp_path / "image") == [(0, MIB, 4 * K64)]
        assert real_content(tmp_path / "image", format="qcow2") == content
        assert_real_check_clean(tmp_path / "image")

    def test_a_data_file_holds_each_byte_at_its_guest_offset(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        content = fresh.mixed_content(MIB)
        image = fresh.make(tmp_path / "image", MIB, "data_file=df")
        extents = image.allocate(0, MIB)
        assert [(extent.host, extent.length) for extent in extents] == [(0, MIB)]
        assert extents[0].source is not image.file
        fresh.put(image, content, 0, MIB)
        finished(image)
        assert (tmp_path / "df").read_bytes() == content
        assert real_content(tmp_path / "image", format="qcow2") == content
        assert l2_words(tmp_path / "image", 2) == [1 << 63, 1 << 63 | K64]
        assert_real_check_clean(tmp_path / "image")

    def test_it_can_be_read_once_it_is_flushed(self, tmp_path: Path) -> None:
        content = fresh.mixed_content(MIB)
        with fresh.make(tmp_path / "image", MIB) as image:
            fresh.put(image, content, 0, 4 * K64)
            image.flush()
            first = image.extents(0, MIB)[0]
            assert (first.start, first.length, first.host) == (0, 4 * K64, 4 * K64)
            image.flush()  # a second one has nothing to do
        assert_real_check_clean(tmp_path / "image")


@pytest.mark.peer("qemu-img")
class TestZeros:
    def test_over_a_backing_file_they_become_plain_zero_clusters(self, tmp_path: Path) -> None:
        (tmp_path / "base").write_bytes(b"\x22" * MIB)
        image = fresh.make(tmp_path / "image", MIB, f"backing_file={tmp_path}/base,backing_fmt=raw")
        image.mark_zero(0, 2 * K64)
        finished(image)
        assert l2_words(tmp_path / "image", 3) == [1, 1, 0]
        assert real_content(tmp_path / "image") == bytes(2 * K64) + b"\x22" * (MIB - 2 * K64)

    def test_without_a_backing_file_they_take_no_table(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", 1 << 50)
        image.mark_zero(0, 1 << 50)
        finished(image)
        assert (tmp_path / "image").stat().st_size < 18 * MIB  # the L1 table
        assert_real_check_clean(tmp_path / "image")

    def test_over_data_they_keep_the_place(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB)
        fresh.put(image, b"\x33" * MIB, 0, 2 * K64)
        image.mark_zero(0, K64)
        finished(image)
        assert l2_words(tmp_path / "image", 2) == [1 << 63 | 4 * K64 | 1, 1 << 63 | 5 * K64]
        assert real_content(tmp_path / "image") == bytes(K64) + b"\x33" * K64 + bytes(MIB - 2 * K64)

    def test_data_that_was_zeroed_does_not_come_back(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB)
        assert image.zero_init
        fresh.put(image, b"\x33" * MIB, 0, K64)
        image.mark_zero(0, K64)
        image.allocate(0, K64)  # and nothing written, as `zero_init` allows
        finished(image)
        assert real_content(tmp_path / "image") == bytes(MIB)

    def test_version_2_writes_them_where_nothing_shows_through(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB, "compat=0.10")
        assert not image.can_mark_zero
        fresh.put(image, b"\x33" * MIB, 0, 2 * K64)
        image.mark_zero(0, K64)
        finished(image)
        assert real_content(tmp_path / "image") == bytes(K64) + b"\x33" * K64 + bytes(MIB - 2 * K64)

    def test_version_2_cannot_hide_a_backing_file(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB, "compat=0.10,backing_file=b,backing_fmt=raw")
        with image, pytest.raises(NotSupported):
            image.mark_zero(0, K64)

    def test_a_raw_data_file_gets_them_as_bytes_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # sheet, section 6: both to the data file and the L2 flag, 0x8000000000010001
        monkeypatch.chdir(tmp_path)
        image = fresh.make(tmp_path / "image", MIB + 512, "data_file=df,data_file_raw=on")
        fresh.put(image, b"\x44" * (MIB + 512), 0, MIB + 512)
        image.mark_zero(K64, MIB + 512 - K64)
        finished(image)
        assert l2_words(tmp_path / "image", 2) == [1 << 63, 0x8000000000010001]
        assert (tmp_path / "df").read_bytes() == b"\x44" * K64 + bytes(MIB + 512 - K64)
        assert_real_check_clean(tmp_path / "image")


@pytest.mark.peer("qemu-img")
class TestSubclusters:
    OPTIONS = "extended_l2=on"
    SUB = 2048

    def test_only_those_allocated_have_their_bit(self, tmp_path: Path) -> None:
        # sheet, section 5: 2 KiB at 0 and a write at 5 KiB make 0x5
        (tmp_path / "base").write_bytes(b"\x22" * MIB)
        image = fresh.make(
            tmp_path / "image", MIB, f"{self.OPTIONS},backing_file={tmp_path}/base,backing_fmt=raw"
        )
        assert image.granularity == self.SUB
        fresh.put(image, b"\x11" * MIB, 0, self.SUB)
        fresh.put(image, b"\x11" * MIB, 2 * self.SUB, self.SUB)
        finished(image)
        assert l2_words(tmp_path / "image", 2) == [1 << 63 | 4 * K64, 0x5]
        want = b"\x11" * 2048 + b"\x22" * 2048 + b"\x11" * 2048
        assert real_content(tmp_path / "image")[:6144] == want
        assert_real_check_clean(tmp_path / "image")

    def test_zero_bits_are_those_of_the_sheet(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB, f"{self.OPTIONS},backing_file=b,backing_fmt=raw")
        image.mark_zero(0, K64)
        image.mark_zero(K64, 2 * self.SUB)
        finished(image)
        assert l2_words(tmp_path / "image", 4) == [0, 0xFFFFFFFF00000000, 0, 0x0000000300000000]

    def test_data_over_zeros_and_zeros_over_data_swap_the_bits(self, tmp_path: Path) -> None:
        (tmp_path / "base").write_bytes(b"\x22" * MIB)
        image = fresh.make(
            tmp_path / "image", MIB, f"{self.OPTIONS},backing_file={tmp_path}/base,backing_fmt=raw"
        )
        image.mark_zero(0, K64)
        fresh.put(image, b"\x11" * MIB, self.SUB, 2 * self.SUB)
        image.mark_zero(2 * self.SUB, self.SUB)
        finished(image)
        assert l2_words(tmp_path / "image", 2) == [1 << 63 | 4 * K64, 0xFFFFFFFD00000002]
        content = real_content(tmp_path / "image")
        assert content[:K64] == bytes(2048) + b"\x11" * 2048 + bytes(K64 - 4096)
        assert_real_check_clean(tmp_path / "image")

    def test_a_run_across_clusters_is_cut_at_subclusters(self, tmp_path: Path) -> None:
        content = fresh.mixed_content(4 * K64)
        image = fresh.make(tmp_path / "image", 4 * K64, self.OPTIONS)
        start, length = K64 - 3 * self.SUB, 2 * K64
        (extent,) = image.allocate(start, length)
        assert (extent.start, extent.length) == (start, length)
        assert extent.host == 4 * K64 + start
        fresh.put(image, content, start, length)
        finished(image)
        words = l2_words(tmp_path / "image", 6)
        assert words[1::2] == [0xE0000000, 0xFFFFFFFF, 0x1FFFFFFF]
        assert_real_check_clean(tmp_path / "image")
        want = bytes(start) + content[start : start + length] + bytes(4 * K64 - start - length)
        assert real_content(tmp_path / "image") == want


@pytest.mark.peer("qemu-img")
class TestLimits:
    def test_tables_leave_memory_and_come_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "STAGE_LIMIT", 4 * K64)
        image = fresh.make(tmp_path / "image", 4 * GIB, "cluster_size=4k")
        content = fresh.mixed_content(MIB)
        for again in range(2):
            for index in range(0, 4 * GIB, 64 * MIB):
                extents = image.allocate(index + 8192 * again, 8192)
                for extent in extents:
                    image.file.write(content[extent.start % MIB :][: extent.length], extent.host or 0)
        finished(image)
        assert_real_check_clean(tmp_path / "image")
        for index in range(0, 4 * GIB, 64 * MIB):
            assert (index, 16384) in [(start, length) for start, length, _ in real_map_joined(tmp_path)]

    def test_the_refcount_table_bounds_the_file(self, tmp_path: Path) -> None:
        # sheet, section 10: 8 MiB of table; 512-byte clusters with 64-bit counts end at 32 GiB.
        image = fresh.make(tmp_path / "image", 33 * GIB, "cluster_size=512,refcount_bits=64")
        with pytest.raises(StorageError, match="File too large"):
            for start in range(0, 33 * GIB, GIB):
                # One table of every eighth: what counts is the space handed out.
                image._space.take(GIB // 512)
                image.allocate(start, 512)
        image.abandon()
        image.close()

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
    def test_counts_of_every_width_are_right_to_the_last_cluster(self, bits: int, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", 64 * MIB, f"cluster_size=512,refcount_bits={bits}")
        image.allocate(0, 3 * MIB)
        image.allocate(40 * MIB, 512 * 17)
        finished(image)
        # Leaks are counts past the last cluster in use too, as far as the file reaches.
        assert_real_check_clean(tmp_path / "image")

    @pytest.mark.parametrize("clusters", range(120, 140))
    def test_the_last_refcount_block_counts_itself(self, clusters: int, tmp_path: Path) -> None:
        # 64-bit counts in 512-byte clusters: a block for 64 clusters, a table cluster for 64 blocks.
        image = fresh.make(tmp_path / "image", 64 * MIB, "cluster_size=512,refcount_bits=64")
        image.allocate(0, 512 * clusters)
        finished(image)
        assert_real_check_clean(tmp_path / "image")

    @pytest.mark.parametrize("clusters", range(3900, 3990, 6))
    def test_the_refcount_table_counts_itself_when_it_has_to_move(
        self, clusters: int, tmp_path: Path
    ) -> None:
        image = fresh.make(tmp_path / "image", 64 * MIB, "cluster_size=512,refcount_bits=64")
        for start in range(0, 512 * clusters, 64 * 512):
            image.allocate(start, min(64 * 512, 512 * clusters - start))
        finished(image)
        assert_real_check_clean(tmp_path / "image")


def real_map_joined(folder: Path) -> list[tuple[int, int, int]]:
    """Data runs of the real map with guest neighbours joined, wherever they lie."""
    joined: list[tuple[int, int, int]] = []
    for start, length, _ in real_map(folder / "image"):
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, 0)
        else:
            joined.append((start, length, 0))
    return joined


class OldBytes(Filter):
    """A place of fixed size full of old bytes, like a block device."""

    def __init__(self, child: Storage) -> None:
        child.write(b"\xaa" * 4 * MIB, 0)
        super().__init__(child)
        self.zero_init = False
        self.fixed_size = True


@pytest.mark.peer("qemu-img")
class TestReusedSpace:
    def test_nothing_is_promised_to_read_as_zeros(self, tmp_path: Path) -> None:
        with fresh.make(tmp_path / "image", MIB, wrap=OldBytes) as image:
            assert not image.zero_init

    def test_preallocated_clusters_read_as_zeros(self, tmp_path: Path) -> None:
        finished(fresh.make(tmp_path / "image", MIB, "preallocation=metadata", wrap=OldBytes))
        assert real_content(tmp_path / "image", format="qcow2") == bytes(MIB)
        assert_real_check_clean(tmp_path / "image")

    @pytest.mark.peer("qemu-io")
    def test_the_rest_of_the_last_cluster_is_zeroed(self, tmp_path: Path) -> None:
        image = fresh.make(tmp_path / "image", MIB + 512, wrap=OldBytes)
        fresh.put(image, b"\x11" * (MIB + 512), 0, MIB + 512)
        finished(image)
        run_real(["resize", "-q", "-f", "qcow2", tmp_path / "image", str(2 * MIB)]).ok()
        content = real_content(tmp_path / "image", format="qcow2")
        assert content == b"\x11" * (MIB + 512) + bytes(MIB - 512)


@pytest.mark.peer("qemu-img", "qemu-io")
def test_the_real_program_goes_on_writing_where_we_stopped(tmp_path: Path) -> None:
    content = fresh.mixed_content(MIB)
    image = fresh.make(tmp_path / "image", MIB, "cluster_size=4k,lazy_refcounts=on")
    fresh.fill(image, content, [(fresh.PACK, 0, MIB // 2), (fresh.DATA, MIB // 2, MIB // 4)])
    finished(image)
    words = ["-f", "qcow2", "-c", "write -q -P 0x5a 100k 300k", "-c", "write -q -P 0x5b 900k 10k"]
    run_peer("qemu-io", [*words, tmp_path / "image"]).ok()
    assert_real_check_clean(tmp_path / "image")
    want = bytearray(content[: MIB * 3 // 4] + bytes(MIB // 4))
    want[100 << 10 : 400 << 10] = b"\x5a" * (300 << 10)
    want[900 << 10 : 910 << 10] = b"\x5b" * (10 << 10)
    assert real_content(tmp_path / "image") == bytes(want)


@pytest.mark.peer("qemu-img")
def test_the_same_clusters_as_the_real_program_writes(tmp_path: Path) -> None:
    """An image of the real program and one of ours with the same content are identical to it, strictly:
    what is allocated in one is allocated in the other."""
    layout = "A-BC--0D"
    real = build(tmp_path / "real", layout)
    content = real_content(real)
    image = fresh.make(tmp_path / "ours", len(content), "backing_file=base,backing_fmt=raw")
    (tmp_path / "base").write_bytes(bytes(len(content)))
    for number, letter in enumerate(layout):
        if letter == "0":
            image.mark_zero(number * K64, K64)
        elif letter != "-":
            fresh.put(image, content, number * K64, K64)
    finished(image)
    assert_real_identical(real, tmp_path / "ours")


def test_packing_and_unpacking_counts_are_each_others_reverse_and_big_endian() -> None:
    from array import array

    # sheet, section 4: below 8 bits from the least significant bits upward
    assert refcounts.pack_counts(1, array("B", [1, 0, 0, 0, 0, 0, 0, 1])) == b"\x81"
    assert refcounts.pack_counts(2, array("B", [1, 2, 3, 0])) == b"\x39"
    assert refcounts.pack_counts(4, array("B", [1, 15])) == b"\xf1"
    assert refcounts.pack_counts(8, array("B", [1, 255])) == b"\x01\xff"
    assert refcounts.pack_counts(16, array("H", [1, 0x1234])) == b"\0\x01\x12\x34"
    assert refcounts.pack_counts(32, array("I", [1])) == b"\0\0\0\x01"
    assert refcounts.pack_counts(64, array("Q", [1])) == b"\0\0\0\0\0\0\0\x01"
    for bits in (1, 2, 4, 8, 16, 32, 64):
        block = bytes(range(256)) * 2
        assert refcounts.pack_counts(bits, refcounts.unpack_counts(bits, block)) == block


def test_both_ways_of_making_neighbouring_words_agree() -> None:
    from array import array

    from qimg.vec.build import arithmetic

    for first, count, step in [(0, 0, 512), (1 << 63, 1, 65536), (1 << 63 | 12345 << 9, 5000, 1 << 21)]:
        assert arithmetic(first, count, step) == array("Q", range(first, first + count * step, step))
