"""Chains of images for both programs: made once, copied to two folders, changed by the same words."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from support import release7
from support.build import io
from support.run import Both, Result, run_both, run_real
from support.twins import _overlaid, map_rows

#: Writes into a base, as qemu-io commands: data, zeros inside data, compressed data where the format has it.
BASE_WRITES = ("write -q -P 1 0 3M", "write -q -z 1M 256k", "write -q -P 3 3500k 100k")
#: Writes into an overlay of 4 MiB or more: ragged data, zeros over data and over nothing, compressed data.
OVERLAY_WRITES = (
    "write -q -P 2 100k 300k",
    "write -q -z 640k 64k",
    "write -q -z 1088k 64k",
    "write -q -z 3200k 128k",
    "write -q -c -P 6 2M 64k",
    "write -q -P 9 2600k 4k",
    "write -q -P 5 3000k 700k",
)


def create(
    path: Path, format: str, size: str, options: str = "", backing: tuple[str, str] | None = None
) -> None:
    """A new image by the real program; `backing` is (name, format)."""
    words = ["create", "-q", "-f", format, *(["-o", options] if options else [])]
    if backing is not None:
        words += ["-u", "-b", backing[0], "-F", backing[1]]
    run_real([*words, path.name, size], path.parent).ok()


def make_base(path: Path, format: str = "raw", options: str = "", size: str = "4M") -> None:
    """A base with `BASE_WRITES`."""
    create(path, format, size, options)
    io(path, BASE_WRITES, format=format)


def make_overlay(
    path: Path,
    backing: tuple[str, str],
    options: str = "",
    size: str = "4M",
    writes: tuple[str, ...] = OVERLAY_WRITES,
) -> None:
    """An overlay with `OVERLAY_WRITES`."""
    create(path, "qcow2", size, options, backing)
    whole_clusters = "cluster_size=2M" not in options  # what is compressed must be clusters
    io(path, [write for write in writes if whole_clusters or "-c" not in write])


def twice(folder: Path, make: Callable[[Path], object]) -> tuple[Path, Path]:
    """Two folders with what `make` puts into one, byte for byte the same."""
    real, ours = folder / "real", folder / "ours"
    real.mkdir()
    make(real)
    subprocess.run(["cp", "-a", "--sparse=always", real, ours], check=True)
    return real, ours


def run_line(line: str, folders: tuple[Path, Path]) -> Both:
    """`line` through both programs; their answers must be the same."""
    both = run_both(shlex.split(line), *folders)
    ours = Result(both.ours.code, both.ours.out, release7.errors(both.ours.err))
    assert ours == both.real, line
    return both


def content(path: Path, format: str = "qcow2") -> bytes:
    """What the real program reads of an image, in its folder."""
    target = path.with_name(path.name + ".content")
    run_real(["convert", "-f", format, "-O", "raw", path.name, target.name], path.parent).ok()
    data = target.read_bytes()
    target.unlink()
    return data


def assert_sound(path: Path, format: str = "qcow2") -> None:
    """The real program finds neither corruptions nor leaks."""
    if format == "qcow2":
        result = run_real(["check", "-f", "qcow2", path.name], path.parent)
        assert result.code == 0, result.out + result.err


def assert_alike(folders: tuple[Path, Path], name: str, format: str = "qcow2") -> None:
    """The image that each program left: same content, sound, same `info`; and what ours knows not to be zeros
    `map` says the same of."""
    real, ours = (folder / name for folder in folders)
    assert content(real, format) == content(ours, format)
    assert_sound(ours, format)
    seen = []
    for path in (real, ours):
        asked = ["-f", format, "--output=json", path.name]
        info = json.loads(run_real(["info", *asked], path.parent).ok().out)
        info.pop("actual-size")
        seen.append((info, map_rows(run_real(["map", *asked], path.parent).ok().out)))
    assert seen[0][0] == seen[1][0]
    different = [row for row in _overlaid(seen[0][1], seen[1][1]) if row[2] != row[3] and not row[3][1]]
    assert not different
