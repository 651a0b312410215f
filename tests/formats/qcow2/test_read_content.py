"""Images of the real program, in every feature combination, hold what it says they hold.

Each is read twice: with tables decoded in plain Python and by numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qimg.formats.qcow2.mapping import Mapping
from support import qcow2
from support.build import real_content

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
CLUSTERS = (512, 4096, 65536, 2 * MIB)
OPTIONS = (
    "compat=0.10",
    "compat=1.1",
    "compression_type=zstd",
    "extended_l2=on",
    "refcount_bits=1",
    "refcount_bits=64,lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=metadata,extended_l2=on",
    "preallocation=falloc",
    "preallocation=full",
    "data_file=data.bin",
    "data_file=data.bin,data_file_raw=on",
    "data_file=data.bin,extended_l2=on",
)
MATRIX = [
    (cluster, options)
    for cluster in CLUSTERS
    for options in OPTIONS
    if cluster >= 16384 or "extended_l2" not in options
]


def assert_same(path: Path) -> None:
    """Map and content agree with the real program's, whichever way tables are decoded.

    Maps first: reading brings pages of reserved space into memory, which then no longer count as holes."""
    rows = qcow2.real_map(path)
    for many in (False, True):
        with decoded(many), qcow2.open_chain(path) as disk:
            assert qcow2.map_rows(disk) == rows
    content = real_content(path)
    for many in (False, True):
        with decoded(many), qcow2.open_chain(path) as disk:
            assert qcow2.read_all(disk) == content


@contextmanager
def decoded(many: bool) -> Iterator[None]:
    """Tables are decoded by numpy, or in plain Python, whatever the image."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Mapping, "_many", lambda self, start, length: many)
        yield


@pytest.mark.parametrize(("cluster", "options"), MATRIX)
def test_an_image_reads_as_the_real_program_reads_it(cluster: int, options: str, tmp_path: Path) -> None:
    seed = MATRIX.index((cluster, options))
    size = (MIB, 3 * MIB, 5 * MIB + 7 * 512)[seed % 3]
    path = qcow2.make(tmp_path / "a.qcow2", size, f"cluster_size={cluster},{options}")
    qcow2.scribble(path, size, seed, cluster=0 if "data_file" in options else cluster)
    assert_same(path)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("options", ["cluster_size=4096", "extended_l2=on", "compat=0.10"])
def test_backing_chains_of_any_sizes_read_right(options: str, depth: int, tmp_path: Path) -> None:
    sizes = (2 * MIB + 3 * 512, MIB, 3 * MIB, 2 * MIB)
    below: tuple[str, ...] = ()
    for number in range(depth + 1):
        path = qcow2.make(tmp_path / f"{number}.qcow2", sizes[number], options, *below)
        qcow2.scribble(path, sizes[number], 100 * depth + number, count=6, cluster=65536)
        below = ("-b", path.name, "-F", "qcow2")
    assert_same(path)


def test_a_raw_backing_file_shows_through(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"abcdefgh" * 8192 * 3)
    path = qcow2.make(tmp_path / "top.qcow2", 4 * MIB, "", "-b", "base.raw", "-F", "raw")
    qcow2.io(path, "write -P 7 64k 32k", "write -z 128k 64k")
    assert_same(path)


@pytest.mark.parametrize("written", [0, 10, 200, 250, 256])
def test_holes_of_a_metadata_preallocated_image_are_seen_where_the_real_program_sees_them(
    written: int, tmp_path: Path
) -> None:
    path = qcow2.make(tmp_path / "a.qcow2", 256 * 65536, "preallocation=metadata")
    if written:
        qcow2.io(path, f"write -P 1 0 {written * 65536}")
    assert_same(path)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [512, 65536, 2 * MIB])
def test_compressed_images_of_real_data_read_right(cluster: int, compression: str, tmp_path: Path) -> None:
    data = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[3].glob("src/**/*.py")))
    (tmp_path / "a.raw").write_bytes(data[: 640 * 1024].ljust(700 * 1024 + 512, b"\0"))
    options = f"cluster_size={cluster},compression_type={compression}"
    qcow2.real("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2", cwd=tmp_path)
    assert_same(tmp_path / "a.qcow2")
    content = (tmp_path / "a.raw").read_bytes()
    with qcow2.open_chain(tmp_path / "a.qcow2") as disk:
        for start, length in ((0, 1), (511, 2), (cluster - 1, 3), (1000, 300_001), (cluster, cluster)):
            start, length = start % len(content), min(length, len(content) - start % len(content))
            piece = bytearray(length)
            disk.read_into(piece, start)
            assert piece == content[start : start + length]


def test_a_snapshot_reads_as_the_real_program_reads_it(tmp_path: Path) -> None:
    path = qcow2.rich(tmp_path / "a.qcow2")
    for name in ("s1", "s2"):
        with qcow2.open_image(path) as image:
            image.load_snapshot(name=name)
            disk = qcow2.Disk([qcow2.Layer(image, path.name)])
            assert qcow2.read_all(disk) == real_content(path, snapshot=name)


@pytest.mark.parametrize("size", [0, 512, 1 << 40, (1 << 50) + 512])
def test_an_empty_image_of_any_size_is_one_hole_after_the_other(size: int, tmp_path: Path) -> None:
    path = qcow2.make(tmp_path / "a.qcow2", size)
    with qcow2.open_image(path) as image:
        assert image.size == size
        for start in (0, size // 2 // 512 * 512, max(size - (16 << 30), 0)):
            extents = image.extents(start, min(16 << 30, size - start))
            assert [extent.flags for extent in extents] == [1] * (size > 0)
