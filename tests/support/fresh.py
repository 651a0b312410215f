"""Fresh qcow2 images made through the format layer alone: no engine, no command line.

`fill` is a naive copy: it takes what the image allocates, encodes or marks, and writes the bytes itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

from qimg.context import Context
from qimg.formats.base import CreateHelp
from qimg.formats.qcow2.create import create
from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.formats.qcow2.fresh import FreshImage
from qimg.options import parse_values, split_pairs
from qimg.storage.base import Storage
from qimg.storage.posix import PosixFile

#: What `fill` does with a run: DATA through `allocate`, PACK through `encode`, ZERO through `mark_zero`.
DATA, PACK, ZERO = "data", "pack", "zero"
Run = tuple[str, int, int]


def new_file(path: Path) -> PosixFile:
    """An empty file open for writing."""
    path.unlink(missing_ok=True)
    return PosixFile.open(str(path), create=True)


def make(
    path: Path,
    size: int,
    options: str = "",
    *,
    wrap: Callable[[Storage], Storage] = lambda storage: storage,
) -> FreshImage:
    """A fresh image of `size` bytes with these ``-o`` options, not flushed. `wrap` puts a filter around the
    image's storage and around the data file's."""
    pairs = (
        [(name, "on" if value is None else value) for name, value in split_pairs(options)] if options else []
    )
    values = parse_values(CREATE_OPTIONS, pairs)

    def open_data_file(name: str, length: int, preallocation: str) -> Storage:
        data = new_file(path.parent / name)
        data.resize(length, preallocation)
        return wrap(data)

    file = wrap(new_file(path))
    image = create(file, size, values, CreateHelp(Context(), open_data_file))
    assert isinstance(image, FreshImage)
    return image


def fill(image: FreshImage, content: bytes, runs: Iterable[Run]) -> None:
    """Bring `content` into the image, in these runs (whole units of the image, in any order)."""
    for kind, start, length in runs:
        if kind == ZERO:
            image.mark_zero(start, length)
        elif kind == PACK:
            pack(image, content, start, length)
        else:
            put(image, content, start, length)


def put(image: FreshImage, content: bytes, start: int, length: int) -> None:
    """Allocate a range and write what `content` has there."""
    covered = start
    for extent in image.allocate(start, length):
        assert extent.start == covered, "extents ascend without gaps"
        covered += extent.length
        assert extent.source is not None
        assert extent.host is not None
        extent.source.write(content[extent.start : extent.start + extent.length], extent.host)
    assert covered == min(start + length, image.size)


def pack(image: FreshImage, content: bytes, start: int, length: int) -> None:
    """Store a range compressed, cluster by cluster; plain where that does not pay."""
    assert image.cluster_size is not None
    for guest in range(start, min(start + length, image.size), image.cluster_size):
        data = content[guest : min(guest + image.cluster_size, image.size)]
        packed = image.encode(data)
        if packed is None:
            put(image, content, guest, len(data))
        else:
            image.write_encoded(guest, packed)


def mixed_content(size: int, seed: int = 1) -> bytes:
    """Reproducible bytes that compress to about a third, with stretches that do not."""
    source = random.Random(seed)
    parts = []
    left = size
    while left > 0:
        piece = source.randbytes(source.randrange(1, 3000))
        part = piece if source.random() < 0.2 else piece[:40] * source.randrange(1, 100)
        parts.append(part[:left])
        left -= len(parts[-1])
    return b"".join(parts)
