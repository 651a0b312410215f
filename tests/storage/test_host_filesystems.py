"""Images on the file systems that people have: ext4, XFS, btrfs, each really mounted, on a loop device.

Holes, shared extents, O_DIRECT and attributes are theirs and not ours, so what the real program makes of the
same files on the same file system is what is expected.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.loop_devices import loop_device
from support import peers
from support.run import run_qimg, run_real

pytestmark = pytest.mark.peer("qemu-img", "filefrag")

MIB = 1 << 20
#: File system -> whether files in it can share their blocks.
SHARES = {"ext4": False, "xfs": True, "btrfs": True}
MAKE = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


@pytest.fixture(scope="module", params=SHARES)
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a file system of its own, with `source.raw`: data, a hole, data, a hole."""
    kind: str = request.param
    make = MAKE[kind]
    program = peers.need(make[0])
    folder = tmp_path_factory.mktemp(kind)
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(320 * MIB)  # the least that XFS takes is 300 MiB
    subprocess.run([program, *make[1:], disk], check=True, stdout=subprocess.DEVNULL)
    place = folder / "mounted"
    place.mkdir()
    with loop_device(disk) as device:
        if subprocess.run(["mount", device, place], capture_output=True, check=False).returncode:
            pytest.skip(f"{kind} cannot be mounted here")
        try:
            fill(place / "source.raw")
            yield place
        finally:
            subprocess.run(["umount", place], check=True)


def fill(path: Path) -> None:
    noise = random.Random(1).randbytes(MIB)
    with path.open("wb") as file:
        for start in (0, 1, 2, 8, 9):
            file.seek(start * MIB)
            file.write(noise)
        file.truncate(16 * MIB + 512)
    subprocess.run(["sync", path], check=True)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.node.callspec.params["mounted"]
    return found


def shares_blocks(path: Path) -> bool:
    """Whether any block of the file belongs to another one too."""
    subprocess.run(["sync", path], check=True)
    answer = subprocess.run([peers.need("filefrag"), "-v", path], capture_output=True, text=True, check=True)
    return "shared" in answer.stdout


def used(path: Path) -> int:
    subprocess.run(["sync", path], check=True)
    return path.stat().st_blocks * 512


def converted(program: str, folder: Path, name: str, *words: str) -> Path:
    target = folder / f"{program}-{name}"
    target.unlink(missing_ok=True)
    run = run_real if program == "real" else run_qimg
    run(["convert", *words, "source.raw", target.name], folder).ok()
    return target


@pytest.mark.parametrize("words", [(), ("-C",), ("-t", "none", "-T", "none"), ("-S", "0"), ("-W", "-m", "4")])
def test_a_copy_is_right_and_takes_no_more_than_the_real_programs(
    words: tuple[str, ...], mounted: Path
) -> None:
    real, ours = (
        converted(program, mounted, "copy.raw", "-f", "raw", "-O", "raw", *words)
        for program in ("real", "ours")
    )
    assert ours.read_bytes() == (mounted / "source.raw").read_bytes()
    assert used(ours) <= used(real) + 4096


def test_a_copy_by_the_kernel_shares_blocks_where_the_file_system_can(mounted: Path, kind: str) -> None:
    for program in ("real", "ours"):
        copy = converted(program, mounted, "offload.raw", "-C", "-f", "raw", "-O", "raw")
        assert shares_blocks(copy) == SHARES[kind]
        copy.unlink()


def test_a_write_into_a_copy_that_shares_blocks_leaves_the_source_alone(mounted: Path) -> None:
    before = (mounted / "source.raw").read_bytes()
    copy = converted("ours", mounted, "written.raw", "-C", "-f", "raw", "-O", "raw")
    run_qimg(["bench", "-w", "-f", "raw", "-c", "16", "--pattern=7", copy.name], mounted).ok()
    assert copy.read_bytes()[:65536] == b"\7" * 65536
    assert (mounted / "source.raw").read_bytes() == before


@pytest.mark.parametrize("cache", ["none", "directsync", "writeback"])
def test_qcow2_past_the_page_cache_holds_the_same(cache: str, mounted: Path) -> None:
    image = converted("ours", mounted, f"{cache}.q", "-T", cache, "-t", cache, "-f", "raw", "-O", "qcow2")
    run_real(["check", image]).ok()
    run_real(["compare", "-f", "raw", "-F", "qcow2", "source.raw", image.name], mounted).ok()
    back = mounted / "back.raw"
    run_qimg(["convert", "-T", cache, "-t", cache, "-O", "raw", image.name, back.name], mounted).ok()
    assert back.read_bytes()[: 16 * MIB + 512] == (mounted / "source.raw").read_bytes()


def test_holes_are_found_as_the_real_program_finds_them(mounted: Path) -> None:
    real = run_real(["map", "-f", "raw", "--output=json", "source.raw"], mounted).ok()
    ours = run_qimg(["map", "-f", "raw", "--output=json", "source.raw"], mounted).ok()
    rows = json.loads(ours.out)
    for row in rows:
        del row["compressed"]
    assert rows == json.loads(real.out)


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_a_new_file_has_the_space_that_was_asked_for(mode: str, mounted: Path) -> None:
    sizes = []
    for program, run in (("real", run_real), ("ours", run_qimg)):
        name = f"{program}-{mode}.raw"
        run(["create", "-q", "-f", "raw", "-o", f"preallocation={mode}", name, "4M"], mounted).ok()
        sizes.append(used(mounted / name))
    assert sizes[0] == sizes[1]


@pytest.mark.peer("lsattr")
def test_copy_on_write_is_switched_off_where_there_is_any(mounted: Path, kind: str) -> None:
    attributes = []
    for program, run in (("real", run_real), ("ours", run_qimg)):
        name = f"{program}-nocow.raw"
        run(["create", "-q", "-f", "raw", "-o", "nocow=on", name, "1M"], mounted).ok()
        shown = subprocess.run(["lsattr", mounted / name], capture_output=True, text=True, check=True)
        attributes.append(shown.stdout.split()[0])
    assert attributes[0] == attributes[1]
    assert ("C" in attributes[1]) == (kind == "btrfs")
