"""Images from strings, made by the real programs, in which every offset reads as its own address.

A layout has one letter for a cluster::

    "A0-c"    A-Z  data            a-z  compressed data
              0    zero cluster    #    zero cluster that keeps its space    -  nothing (a hole)

The letter of data is its layer's mark: guest bytes are 8-byte words, first the letter, then the guest
offset as a 7-byte big-endian number. Data that lands in the wrong place, or comes from the wrong layer,
shows itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from support.run import run_peer, run_real

CLUSTER = 65536


def pattern(letter: str, start: int, length: int) -> bytes:
    """`length` bytes of the letter's address pattern from guest offset `start` (both multiples of 8)."""
    first = (ord(letter.upper()) << 56) + start
    words = range(first, first + length, 8)
    return struct.pack(f">{len(words)}Q", *words)


def content(layout: str, *, cluster: int = CLUSTER, size: int | None = None, below: bytes = b"") -> bytes:
    """What a guest reads of `layout` over the content `below` of its backing image, `size` bytes in all
    (default: the layout's). Clusters past the layout are holes."""
    size = len(layout) * cluster if size is None else size
    below = below[:size].ljust(size, b"\0")
    parts = []
    for number in range(-(-size // cluster)):
        letter = layout[number : number + 1] or "-"
        start = number * cluster
        length = min(cluster, size - start)
        if letter == "-":
            parts.append(below[start : start + length])
        elif letter in "0#":
            parts.append(bytes(length))
        else:
            parts.append(pattern(letter, start, length))
    return b"".join(parts)


def write_raw(path: Path, layout: str, *, cluster: int = CLUSTER, size: int | None = None) -> Path:
    """A raw file of this layout without the help of any program; zero and hole clusters are holes."""
    size = len(layout) * cluster if size is None else size
    with path.open("wb") as file:
        file.truncate(size)
        for start, length, letter in runs(layout, cluster, size):
            if letter not in "0#-":
                file.seek(start)
                file.write(pattern(letter, start, length))
    return path


def runs(layout: str, cluster: int, size: int) -> Iterator[tuple[int, int, str]]:
    """(start, length, letter) of every run of one letter, clipped to `size`."""
    number = 0
    for letter, group in groupby(layout):
        count = sum(1 for _ in group)
        start, end = number * cluster, min((number + count) * cluster, size)
        number += count
        if start < end:
            yield start, end - start, letter


def build(
    path: Path,
    layout: str,
    *,
    format: str = "qcow2",
    options: str = "",
    cluster: int = CLUSTER,
    size: int | None = None,
    backing: Path | str | None = None,
    backing_format: str = "qcow2",
) -> Path:
    """Create `path` through the real qemu-img and fill it through the real qemu-io.

    `options` is a ``-o`` string without ``cluster_size`` (taken from `cluster` where the format is qcow2).
    """
    size = len(layout) * cluster if size is None else size
    create: list[str | Path] = ["create", "-q", "-f", format]
    if format == "qcow2":
        options = f"cluster_size={cluster}" + ("," + options if options else "")
    if options:
        create += ["-o", options]
    if backing is not None:
        create += ["-b", str(backing), "-F", backing_format]
    run_real([*create, path, str(size)], path.parent).ok()
    fill(path, layout, format=format, cluster=cluster, size=size)
    return path


def fill(
    path: Path,
    layout: str,
    *,
    format: str = "qcow2",
    cluster: int = CLUSTER,
    size: int | None = None,
) -> Path:
    """Write a layout into an existing image through the real qemu-io, cluster by cluster from the left."""
    size = len(layout) * cluster if size is None else size
    commands: list[str] = []
    # qemu-io reads its pattern file from the start: one small file for every run of data.
    pieces: list[Path] = []
    for start, length, letter in runs(layout, cluster, size):
        if letter == "-":
            continue
        if letter in "0#":
            if letter == "#":
                commands.append(f"write -q -P 0xee {start} {length}")
            commands.append(f"write -q -z {start} {length}")
            continue
        step = cluster if letter.islower() else length
        for at in range(start, start + length, step):
            piece = path.with_name(f"{path.name}.{at}.pattern")
            piece.write_bytes(pattern(letter, at, min(step, start + length - at)))
            pieces.append(piece)
            flag = "-c " if letter.islower() else ""
            commands.append(f"write -q {flag}-s {piece.name} {at} {piece.stat().st_size}")
    io(path, commands, format=format)
    for piece in pieces:
        piece.unlink()
    return path


def io(path: Path, commands: Sequence[str], *, format: str = "qcow2", options: Sequence[str] = ()) -> str:
    """Run qemu-io commands on an image, in its folder; fails the test where one of them complains."""
    words: list[str | Path] = ["-f", format, *options]
    for command in commands:
        words += ["-c", command]
    result = run_peer("qemu-io", [*words, path.name], path.parent).ok()
    assert not result.err, result.err
    assert "failed" not in result.out, result.out
    return result.out


def real_content(path: Path, *, format: str | None = None, snapshot: str | None = None) -> bytes:
    """The guest bytes of an image as the real qemu-img reads them. Holds them in memory: small images."""
    target = path.with_name(path.name + ".content")
    chosen = [] if format is None else ["-f", format]
    chosen += [] if snapshot is None else ["-l", snapshot]
    run_real(["convert", *chosen, "-O", "raw", path, target], path.parent).ok()
    data = target.read_bytes()
    target.unlink()
    return data


def assert_real_check_clean(path: Path, *, format: str = "qcow2") -> None:
    """The real ``check`` finds neither corruptions nor leaks."""
    result = run_real(["check", "-f", format, path], path.parent)
    assert result.code == 0, result.out + result.err


def assert_real_identical(
    first: Path, second: Path, *, formats: tuple[str | None, str | None] = (None, None), strict: bool = False
) -> None:
    """The real ``compare`` finds the two images identical."""
    words: list[str | Path] = ["compare", *(["-s"] if strict else [])]
    if formats[0] is not None:
        words += ["-f", formats[0]]
    if formats[1] is not None:
        words += ["-F", formats[1]]
    result = run_real([*words, first, second], first.parent)
    assert result.code == 0, result.out + result.err
