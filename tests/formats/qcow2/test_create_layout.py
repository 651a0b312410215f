"""Fresh qcow2 images: clean, described as the real program's own, and as long as those."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.formats.qcow2.fresh import INCOMPLETE_NAME
from qimg.options import parse_values
from support import fresh
from support.build import assert_real_check_clean, real_content
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img")

MIB = 1 << 20
GIB = 1 << 30

LAYOUTS = [
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=2M",
    "refcount_bits=8",
    "lazy_refcounts=on",
    "compression_type=zstd",
    "extended_l2=on",
    "data_file=df",
    "data_file=df,data_file_raw=on",
    "data_file=df,preallocation=falloc,extended_l2=on",
    "backing_file=base,backing_fmt=raw",
    "backing_file=base,backing_fmt=raw,compat=0.10,cluster_size=512",
    "preallocation=metadata",
    "preallocation=metadata,cluster_size=512",
    "preallocation=falloc,cluster_size=4k",
    "preallocation=full",
    "preallocation=metadata,extended_l2=on",
]
SIZES = [0, 512, MIB, 64 * MIB + 7 * 512, GIB]


def info(path: Path) -> dict[str, object]:
    told = json.loads(run_real(["info", "-f", "qcow2", "--output=json", path], path.parent).ok().out)
    assert isinstance(told, dict)
    # Space on disk: ours is packed a little tighter where tables are preallocated.
    del told["actual-size"]
    del told["filename"]
    told.pop("full-backing-filename", None)
    return told


def both(folder: Path, options: str, size: int) -> tuple[Path, Path]:
    """The same image made by us and by the real program."""
    for name in ("ours", "real"):
        (folder / name).mkdir()
        (folder / name / "base").write_bytes(bytes(512))
    ours, real = folder / "ours" / "image", folder / "real" / "image"
    with fresh.make(ours, size, options) as image:
        image.flush()
    words = ["create", "-q", "-f", "qcow2", *(["-o", options] if options else []), real.name, str(size)]
    run_real(words, real.parent).ok()
    return ours, real


#: What takes the real program long.
SLOW = {
    ("preallocation=full", GIB),
    ("preallocation=metadata,cluster_size=512", 64 * MIB + 7 * 512),
    ("preallocation=metadata,cluster_size=512", GIB),
}
TWINS = [(options, size) for options in LAYOUTS for size in SIZES if (options, size) not in SLOW]


@pytest.mark.parametrize(("options", "size"), TWINS)
def test_a_fresh_image_is_the_real_programs_twin(
    options: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, real = both(tmp_path, options, size)
    monkeypatch.chdir(ours.parent)  # where the name of a data file counts from
    assert_real_check_clean(ours)
    assert info(ours) == info(real)
    if "preallocation" not in options:
        assert ours.stat().st_size == real.stat().st_size
        # Where the refcount table does not fit into its first cluster, the two choose different places.
        if (options, size) != ("cluster_size=512,refcount_bits=64", GIB):
            assert ours.read_bytes() == real.read_bytes()
    else:
        # Tables lie elsewhere; a last cluster may be cut after its last byte in use.
        assert ours.stat().st_size <= real.stat().st_size + 65536
    if size == MIB:
        assert real_content(ours, format="qcow2") == bytes(size)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_space_is_taken_on_disk(mode: str, tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", 8 * MIB, f"preallocation={mode}") as image:
        image.flush()
    assert (tmp_path / "image").stat().st_blocks * 512 >= 8 * MIB


def test_preallocation_of_a_data_file_is_passed_on(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", 4 * MIB, "data_file=df,preallocation=full") as image:
        image.flush()
    told = (tmp_path / "df").stat()
    assert told.st_size == 4 * MIB
    assert told.st_blocks * 512 >= 4 * MIB


def test_the_map_of_a_preallocated_image_is_one_run(tmp_path: Path) -> None:
    with fresh.make(tmp_path / "image", 3 * GIB, "preallocation=metadata") as image:
        image.flush()
    path = tmp_path / "image"
    entries = json.loads(run_real(["map", "-f", "qcow2", "--output=json", path]).ok().out)
    assert [(entry["start"], entry["length"], entry["offset"]) for entry in entries] == [
        (0, 3 * GIB, 4 * 65536)
    ]


_TERABYTE = """
import sys, time
from pathlib import Path
from support import fresh
start = time.monotonic()
with fresh.make(Path(sys.argv[1]), 1 << 40, sys.argv[2]) as image:
    image.flush()
# Not ru_maxrss: that counts the parent's memory from before the program was started.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.monotonic() - start, peak, "numpy" in sys.modules)
"""


def run_terabyte(path: Path, options: str) -> tuple[float, int, bool]:
    """Seconds, KiB of peak memory, whether numpy was loaded, of creating 1 TiB in a process of its own."""
    script = subprocess.run(
        [sys.executable, "-c", _TERABYTE, str(path), options],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    seconds, peak, loaded = script.stdout.split()
    return float(seconds), int(peak), loaded == "True"


def test_a_terabyte_of_metadata_is_quick_and_takes_little_memory(tmp_path: Path) -> None:
    seconds, peak, _ = run_terabyte(tmp_path / "image", "preallocation=metadata")
    assert seconds < 20
    assert peak < 150 << 10
    assert_real_check_clean(tmp_path / "image")


def test_a_large_image_without_preallocation_needs_no_numpy(tmp_path: Path) -> None:
    _, peak, loaded = run_terabyte(tmp_path / "image", "")
    assert not loaded
    assert peak < 60 << 10


def test_an_image_larger_than_one_refcount_table_cluster_is_clean(tmp_path: Path) -> None:
    # The L1 table of 1 GiB in 512-byte clusters alone needs more blocks than one table cluster names.
    with fresh.make(tmp_path / "image", 32 * GIB, "cluster_size=512,refcount_bits=64") as image:
        image.flush()
    assert_real_check_clean(tmp_path / "image")


def test_the_feature_name_of_a_provisional_header_is_what_readers_say(tmp_path: Path) -> None:
    image = fresh.make(tmp_path / "image", MIB, "compat=0.10")
    image.allocate(0, 65536)
    image.close()
    refused = run_real(["info", tmp_path / "image"])
    assert refused.code == 1
    assert refused.err.rstrip().endswith(
        "Unsupported qcow2 feature(s): incomplete image (interrupted conversion)"
    )
    assert INCOMPLETE_NAME == b"incomplete image (interrupted conversion)"


def test_options_come_typed_from_text() -> None:
    values = parse_values(CREATE_OPTIONS, [("cluster_size", "4k"), ("extended_l2", "on"), ("compat", "v3")])
    assert values == {"cluster_size": 4096, "extended_l2": True, "compat": "v3"}
