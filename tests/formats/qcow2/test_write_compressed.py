"""Compressed clusters of a fresh image: packing, descriptors, counts (sheet, section 5)."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qimg.errors import NotSupported
from qimg.formats.qcow2 import alloc
from qimg.storage.base import Filter, Storage
from support import fresh
from support.build import assert_real_check_clean, assert_real_identical, real_content
from support.run import run_real

if TYPE_CHECKING:
    from qimg.storage.base import Bytes

pytestmark = pytest.mark.peer("qemu-img")

MIB = 1 << 20
K64 = 65536


def refcount(path: Path, cluster: int) -> int:
    """The count of a host cluster below 32768, read by hand: 64 KiB clusters, 16-bit counts, block in
    cluster 2."""
    raw = path.read_bytes()
    (count,) = struct.unpack_from(">H", raw, 2 * K64 + 2 * cluster)
    assert isinstance(count, int)
    return count


def descriptors(path: Path, count: int) -> list[tuple[int, int]]:
    """(host offset, bytes to read) of the first entries of the first table, 64 KiB clusters."""
    raw = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", raw, 40)
    (table,) = struct.unpack_from(">Q", raw, l1)
    found = []
    for word in struct.unpack_from(f">{count}Q", raw, table & 0x00FFFFFFFFFFFE00):
        assert word >> 62 == 1, "compressed, and never COPIED"
        offset, sectors = word & (1 << 54) - 1, word >> 54 & 0xFF
        found.append((offset, (sectors + 1) * 512 - offset % 512))
    return found


def squeezed(length: int) -> bytes:
    """Data of `length` bytes in place of a compressed cluster; only its length matters."""
    return bytes(range(256)) * (length // 256) + bytes(length % 256)


def test_clusters_lie_byte_after_byte_and_each_host_cluster_counts_all_that_touch_it(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        for number, length in enumerate([1000, 30000, 40000, 60000]):
            image.write_encoded(number * K64, squeezed(length))
        image.flush()
    start = 4 * K64  # behind header, counts and the L1 table
    places = [offset - start for offset, _ in descriptors(tmp_path / "image", 4)]
    assert places == [0, 1000, 31000, 71000]
    # 0, 1000 and 31000 lie in the first; 31000 .. 71000 goes on into the second, where 71000 starts;
    # that ends in the third.
    assert [refcount(tmp_path / "image", 4 + cluster) for cluster in range(3)] == [3, 2, 1]
    assert_real_check_clean(tmp_path / "image")


def test_what_a_reader_fetches_covers_the_data_by_whole_sectors(tmp_path: Path) -> None:
    lengths = [1, 511, 512, 513, 5000]
    with fresh.make(tmp_path / "image", MIB) as image:
        for number, length in enumerate(lengths):
            image.write_encoded(number * K64, squeezed(length))
        image.flush()
    for (offset, fetched), length in zip(descriptors(tmp_path / "image", 5), lengths, strict=True):
        assert fetched >= length
        assert (offset + length - 1) // 512 == (offset + fetched - 1) // 512
    assert (tmp_path / "image").stat().st_size % 512 == 0


def test_a_cluster_that_does_not_fit_starts_anew_where_the_next_host_cluster_is_taken(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        image.write_encoded(0, squeezed(60000))
        image.allocate(8 * K64, K64)
        image.write_encoded(K64, squeezed(10000))
        image.write_encoded(2 * K64, squeezed(5000))
        image.flush()
    places = [offset // K64 for offset, _ in descriptors(tmp_path / "image", 3)]
    # The third follows the second, not the first, although it would fit there.
    assert places == [4, 6, 6]
    assert [refcount(tmp_path / "image", cluster) for cluster in (4, 5, 6)] == [1, 1, 2]
    assert_real_check_clean(tmp_path / "image")


@pytest.mark.parametrize(("bits", "shared"), [(1, 1), (2, 3), (4, 15)])
def test_a_count_at_its_maximum_takes_no_more(bits: int, shared: int, tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", 4 * MIB, f"refcount_bits={bits}") as image:
        for number in range(64):
            image.write_encoded(number * K64, squeezed(100))
        image.flush()
    found = [offset // K64 for offset, _ in descriptors(tmp_path / "image", 64)]
    assert max(found.count(cluster) for cluster in found) == shared
    assert_real_check_clean(tmp_path / "image")


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, K64, 2 * MIB])
@pytest.mark.parametrize("bits", [1, 2, 16, 64])
def test_every_cluster_size_and_width_reads_back(
    kind: str, cluster_size: int, bits: int, tmp_path: Path
) -> None:
    size = 3 * MIB + 512
    content = fresh.mixed_content(size, bits)
    options = f"cluster_size={cluster_size},refcount_bits={bits},compression_type={kind}"
    with fresh.make(tmp_path / "image", size, options) as image:
        fresh.fill(image, content, [(fresh.PACK, 0, size)])
        image.flush()
    (tmp_path / "raw").write_bytes(content)
    assert_real_check_clean(tmp_path / "image")
    assert_real_identical(tmp_path / "image", tmp_path / "raw", formats=("qcow2", "raw"))


@pytest.mark.parametrize("options", ["compat=0.10", "extended_l2=on", "extended_l2=on,cluster_size=16k"])
def test_other_layouts_read_back(options: str, tmp_path: Path) -> None:
    size = 3 * MIB + 512
    content = fresh.mixed_content(size)
    with fresh.make(tmp_path / "image", size, options) as image:
        fresh.fill(image, content, [(fresh.PACK, 0, size)])
        image.flush()
    assert real_content(tmp_path / "image", format="qcow2") == content
    assert_real_check_clean(tmp_path / "image")


def test_encoding_is_raw_deflate_and_pads_the_last_cluster(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        packed = image.encode(b"ab" * 1000)
        assert packed is not None
        assert zlib.decompressobj(-15).decompress(packed) == b"ab" * 1000 + bytes(K64 - 2000)
        assert image.encode(fresh.random.Random(0).randbytes(K64)) is None


def test_encoding_follows_the_compression_type(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB, "compression_type=zstd") as image:
        packed = image.encode(bytes(K64))
        assert packed is not None
        assert packed[:4] == b"\x28\xb5\x2f\xfd"  # magic of a zstd frame, RFC 8878


def test_a_data_file_takes_no_compressed_clusters(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB, "data_file=df") as image:
        assert not image.can_compress
        with pytest.raises(NotSupported, match="Operation not supported"):
            image.encode(bytes(K64))


def test_overwriting_gives_the_space_back(tmp_path: Path) -> None:
    content = fresh.mixed_content(MIB)
    with fresh.make(tmp_path / "image", MIB) as image:
        fresh.fill(
            image,
            content,
            [
                (fresh.PACK, 0, MIB),
                (fresh.DATA, 3 * K64, 4 * K64),
                (fresh.PACK, 0, 8 * K64),
                (fresh.DATA, 10 * K64, K64),
                (fresh.ZERO, 12 * K64, 4 * K64),
            ],
        )
        image.flush()
    assert_real_check_clean(tmp_path / "image")
    assert real_content(tmp_path / "image") == content[: 12 * K64] + bytes(4 * K64)


class Counting(Filter):
    """Remembers the length of every write."""

    def __init__(self, child: Storage) -> None:
        super().__init__(child)
        self.lengths: list[int] = []

    def write(self, buf: Bytes, offset: int) -> None:
        self.lengths.append(len(buf))
        super().write(buf, offset)


def test_small_pieces_reach_the_file_in_large_writes(tmp_path: Path) -> None:
    counters: list[Counting] = []

    def wrap(storage: Storage) -> Storage:
        counters.append(Counting(storage))
        return counters[-1]

    with fresh.make(tmp_path / "image", 64 * MIB, wrap=wrap) as image:
        before = len(counters[0].lengths)
        for number in range(1024):
            image.write_encoded(number * K64, squeezed(9000 + number))
        lengths = counters[0].lengths[before + 1 :]  # without the provisional header
        assert len(lengths) >= 8
        assert min(lengths) >= alloc.BATCH
        image.flush()
    assert_real_check_clean(tmp_path / "image")


def test_the_real_map_calls_them_compressed(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", MIB) as image:
        fresh.fill(image, b"\x01" * MIB, [(fresh.PACK, 0, 2 * K64)])
        image.flush()
    told = json.loads(run_real(["check", "--output=json", tmp_path / "image"]).ok().out)
    assert told["compressed-clusters"] == 2
    assert told["allocated-clusters"] == 2
