"""A disk with real content, made from files of this machine: an ext4 file system, or the files with holes.

Random or constant data would flatter or punish compression; programs, text and libraries are what disks hold.
Used by the demo and the benchmarks; standard library only.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

#: Where files are taken from, in this order; what is missing is passed over.
FOLDERS = ("/usr/lib", "/usr/share", "/usr/bin", "/usr/libexec", "/opt", "/usr/local", "/usr/include")

#: Larger files would fill the disk with one kind of content.
LARGEST = 32 << 20


def files(wanted: int, largest: int = LARGEST) -> Iterator[tuple[Path, int]]:
    """(path, size) of regular files, `wanted` bytes in all or what there is; the same on every call."""
    for folder in FOLDERS:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= largest:
                    continue
                if not os.access(path, os.R_OK):
                    continue
                yield path, status.st_size
                wanted -= status.st_size
                if wanted <= 0:
                    return


def build(path: Path, size: int, content: int) -> str:
    """Make the raw disk `path` of `size` bytes with about `content` bytes of files; says what it made."""
    mkfs = shutil.which("mkfs.ext4", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if mkfs is not None and _ext4(mkfs, path, size, content):
        return "an ext4 file system"
    _concatenation(path, size, content)
    return "files with holes between them"


def _ext4(mkfs: str, path: Path, size: int, content: int) -> bool:
    """An ext4 file system filled by mkfs itself (no mount, no root); False where this mkfs cannot."""
    staging = path.with_name(path.name + ".files")
    staging.mkdir()
    try:
        for number, (source, _) in enumerate(files(content)):
            folder = staging / f"{number // 500:03d}"
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / f"{number}-{source.name}"[:200], follow_symlinks=False)
        with path.open("wb") as disk:
            disk.truncate(size)
        # Fixed identity: the same files give the same disk.
        identity = "6f6d6967-0000-4000-8000-000000000001"
        command = [
            mkfs,
            "-q",
            "-F",
            "-U",
            identity,
            "-E",
            f"hash_seed={identity}",
            "-d",
            str(staging),
            str(path),
        ]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return run.returncode == 0
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _concatenation(path: Path, size: int, content: int) -> None:
    """The files one after another on 64 KiB borders, with holes that fill the disk up."""
    chosen = list(files(min(content, size)))
    total = sum(length for _, length in chosen) + len(chosen) * 65536
    hole = max(0, size - total) // max(1, len(chosen)) // 65536 * 65536
    with path.open("wb") as disk:
        disk.truncate(size)
        at = 0
        for source, length in chosen:
            if at + length > size:
                break
            disk.seek(at)
            disk.write(source.read_bytes())
            at += -(-length // 65536) * 65536 + hole
