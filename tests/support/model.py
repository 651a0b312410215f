"""Disks of plain bytes beside images that change: what a guest must read after any sequence of changes.

`Guest` changes an image by the least that a job has to do: it asks where bytes may be overwritten, makes
room for the rest, fills whole units up from what the disk showed before, writes, flushes. It copies
nothing from `qimg.jobs`, and its idea of the content is a bytearray that knows no formats. `assert_holds`
lets the real program say whether the image is sound and holds that content.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from qimg.context import Notice
from qimg.extent import MAPPED
from qimg.formats.base import Image
from qimg.graph.disk import Disk
from qimg.graph.open import open_disk
from support import crash, secrets
from support.qcow2 import io as refusing_io
from support.qcow2 import make
from support.run import run_real


class Guest:
    """An image with its chain, open for changes. `content` is what has to be read, all the time.

    Files are opened through the storage registry, so that `support.crash` can put filters around them."""

    def __init__(self, path: Path, content: bytes | None = None, *, format: str = "qcow2") -> None:
        """`content`: what the disk holds, else (qcow2) as the real program reads it."""
        self.content = bytearray(crash.guest_content(path) if content is None else content)
        self.notices: list[Notice] = []
        context = secrets.context(warn=self.notices.append)
        self.disk: Disk = open_disk(secrets.spec(path, format), context=context, writable=True)
        self.image: Image = self.disk.top
        assert self.image.can_write

    # -- what a guest does. Bytes, any alignment.

    def write(self, offset: int, data: bytes) -> None:
        """Bytes of the guest, written where they belong."""
        low, high = self._units(offset, len(data))
        new = bytearray(high - low)
        pieces: list[tuple[int, int]] = []
        for part in self.image.in_place(low, high - low):
            start, end = part.start, part.start + part.length
            if part.flags & MAPPED:
                start, end = max(start, offset), min(end, offset + len(data))
            else:
                self._read(memoryview(new)[start - low : end - low], start)
            if start < end:
                pieces.append((start, end))
        new[offset - low : offset - low + len(data)] = data
        places = self.image.allocate(low, high - low)
        assert sum(place.length for place in places) == high - low, "just the range"
        assert (places[0].start, places[-1].start + places[-1].length) == (low, high), "all of it"
        for start, end in pieces:
            self._put(memoryview(new)[start - low : end - low], start, places)
        self.content[offset : offset + len(data)] = data

    def _units(self, offset: int, length: int) -> tuple[int, int]:
        unit = self.image.granularity
        return offset // unit * unit, min(-(-(offset + length) // unit) * unit, self.image.size)

    def _read(self, view: memoryview, offset: int) -> None:
        if len(view):
            self.disk.read_into(view, offset)

    def _put(self, data: memoryview, offset: int, places: list) -> None:  # type: ignore[type-arg]
        """Write guest bytes to the places that `allocate` gave."""
        done = 0
        for place in places:
            low = max(place.start, offset)
            high = min(place.start + place.length, offset + len(data))
            if low < high:
                assert place.flags & MAPPED, place
                place.source.write(data[low - offset : high - offset], place.host + low - place.start)
                done += high - low
        assert done == len(data), "every byte has a place"

    def zero(self, offset: int, length: int) -> None:
        """Zeros: whole units by a mark, where the format has one, the rest written."""
        self._whole_units(offset, length, self.image.mark_zero if self.image.can_mark_zero else None)

    def discard(self, offset: int, length: int) -> None:
        """Whole units are given back and read as zeros; over a backing file that needs version 3."""
        low, high = self._inside(offset, length)
        if low < high and self.image.can_mark_zero:
            self.content[low:high] = bytes(high - low)
        self.image.discard(offset, length)

    def _inside(self, offset: int, length: int) -> tuple[int, int]:
        """The whole units inside a range; the disk's end counts as a border."""
        unit, end = self.image.granularity, offset + length
        return -(-offset // unit) * unit, end if end == self.image.size else end // unit * unit

    def _whole_units(self, offset: int, length: int, mark: Callable[[int, int], None] | None) -> None:
        low, high = self._inside(offset, length)
        if mark is None or low >= high:
            self.write(offset, bytes(length))
            return
        if offset < low:
            self.write(offset, bytes(low - offset))
        mark(low, high - low)
        self.content[low:high] = bytes(high - low)
        if high < offset + length:
            self.write(high, bytes(offset + length - high))

    def pack(self, offset: int, data: bytes) -> None:
        """One whole cluster, compressed where that saves space."""
        encoded = self.image.encode(data)
        if encoded is None:
            self.write(offset, data)
            return
        self.image.write_encoded(offset, encoded)
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Make it durable."""
        self.image.flush()

    def read(self) -> bytes:
        """What our own side shows of the disk."""
        found = bytearray(self.image.size)
        if found:
            self.disk.read_into(found, 0)
        return bytes(found)

    # -- the end

    def close(self) -> None:
        """Close without a flush."""
        self.disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.flush()
            else:
                self.image.abandon()
        finally:
            self.close()


# -- random changes


def change(guest: Guest, chance: random.Random, kinds: str = "wwwzdp", *, step: int = 1) -> None:
    """One random change: a letter of `kinds` (w write, z zeros, d discard, p compressed, f flush), in units
    of `step` bytes."""
    size = guest.image.size
    cluster = guest.image.cluster_size or 65536
    kind = chance.choice(kinds)
    # Most requests begin or end at a border, or just beside one.
    unit = chance.choice([1, 512, guest.image.granularity, cluster])
    offset = chance.randrange(size) // max(unit, step) * max(unit, step)
    length = chance.choice(
        [1, 511, 512, cluster // 2, cluster, 3 * cluster, chance.randrange(1, 8 * cluster)]
    )
    length = min(-(-length // step) * step, size - offset, 1 << 21)
    if kind == "f":
        guest.flush()
    elif kind == "z":
        guest.zero(offset, length)
    elif kind == "d":
        guest.discard(offset, length)
    elif kind == "p" and guest.image.can_compress:
        start = offset // cluster * cluster
        guest.pack(start, mixed(chance, min(cluster, size - start)))
    else:
        guest.write(offset, mixed(chance, length))


def mixed(chance: random.Random, length: int) -> bytes:
    """Bytes that are easy or hard to compress."""
    if chance.random() < 0.3:
        return chance.randbytes(length)
    word = chance.randbytes(8)
    return (word * (length // 8 + 1))[:length]


# -- images of the real program


class Kind(NamedTuple):
    """How an image is made: creation options, size in bytes; `below`: bytes of a raw backing file, or None;
    `snapshots` taken on the way; `packed`: some clusters are compressed."""

    options: str
    size: int
    below: int | None = None
    snapshots: int = 0
    packed: bool = False

    @property
    def cluster(self) -> int:
        """Cluster size in bytes."""
        pairs = dict(pair.split("=") for pair in self.options.split(",") if pair)
        return int(pairs.get("cluster_size", 65536))


K = 1024
KINDS = {
    "default": Kind("", 1024 * K),
    "version 2": Kind("compat=0.10", 1024 * K, packed=True),
    "odd size": Kind("", 1000 * K + 512, packed=True),
    "snapshots": Kind("", 1024 * K, snapshots=2, packed=True),
    "version 2, snapshots": Kind("compat=0.10", 1024 * K, snapshots=2, packed=True),
    "clusters of 512": Kind("cluster_size=512", 300 * K, packed=True),
    "clusters of 512, snapshots": Kind("cluster_size=512", 200 * K, snapshots=3, packed=True),
    "clusters of 4096": Kind("cluster_size=4096", 800 * K, snapshots=1, packed=True),
    "clusters of 2 MiB": Kind("cluster_size=2097152", 6144 * K, snapshots=1),
    "counts of 1 bit": Kind("refcount_bits=1,cluster_size=512", 300 * K),
    "counts of 1 bit, compressed": Kind("refcount_bits=1,cluster_size=4096", 300 * K, packed=True),
    "counts of 2 bits": Kind("refcount_bits=2,cluster_size=1024", 300 * K, snapshots=2),
    "counts of 4 bits": Kind("refcount_bits=4,cluster_size=1024", 300 * K, snapshots=2),
    "counts of 8 bits": Kind("refcount_bits=8", 1024 * K, snapshots=1, packed=True),
    "counts of 32 bits": Kind("refcount_bits=32,cluster_size=2048", 400 * K, snapshots=1, packed=True),
    "counts of 64 bits": Kind("refcount_bits=64,cluster_size=512", 400 * K, snapshots=1),
    "lazy counts": Kind("lazy_refcounts=on", 1024 * K, snapshots=1),
    "zstd": Kind("compression_type=zstd", 1024 * K, packed=True),
    "subclusters": Kind("extended_l2=on", 1024 * K, packed=True),
    "subclusters, snapshots": Kind("extended_l2=on,cluster_size=16384", 500 * K, snapshots=2, packed=True),
    "subclusters over a file": Kind("extended_l2=on", 1024 * K, below=700 * K, snapshots=1, packed=True),
    "subclusters, preallocated": Kind("extended_l2=on,preallocation=metadata", 600 * K),
    "over a file": Kind("", 1024 * K, below=1024 * K, packed=True),
    "over a short file": Kind("", 1024 * K, below=300 * K + 512, snapshots=1, packed=True),
    "over a long file": Kind("", 1000 * K + 512, below=2048 * K, snapshots=1),
    "version 2 over a file": Kind("compat=0.10", 1024 * K, below=500 * K, snapshots=1, packed=True),
    "small clusters over a file": Kind("cluster_size=512", 200 * K, below=200 * K, snapshots=1, packed=True),
    "preallocated": Kind("preallocation=metadata", 1024 * K),
    "preallocated, snapshots": Kind("preallocation=full,cluster_size=4096", 400 * K, snapshots=1),
    "data file": Kind("data_file=image.data", 1024 * K),
    "raw data file": Kind("data_file=image.data,data_file_raw=on", 1000 * K + 512),
    "data file, subclusters": Kind("data_file=image.data,extended_l2=on", 1024 * K),
    "data file over a file": Kind("data_file=image.data,cluster_size=4096", 500 * K, below=400 * K),
}


def prepare(folder: Path, name: str, seed: int = 0) -> Path:
    """The image called ``image`` of this kind, made and filled by the real programs."""
    kind = KINDS[name]
    chance = random.Random(f"{name} {seed}")
    more: list[str] = []
    if kind.below is not None:
        (folder / "below").write_bytes(mixed_stretches(kind.below, chance))
        more = ["-b", "below", "-F", "raw"]
    path = folder / "image"
    options = kind.options.replace("image.data", str(folder / "image.data"))
    make(path, kind.size, options, *more)
    for number in range(kind.snapshots + 1):
        scribble(path, kind, chance)
        if number < kind.snapshots:
            run_real(["snapshot", "-c", f"s{number}", path.name], folder).ok()
    return path


def mixed_stretches(length: int, chance: random.Random) -> bytes:
    """Data and zeros in turns."""
    parts = []
    left = length
    while left > 0:
        step = chance.choice([512, 4096, 65536, 70000])
        parts.append(chance.choice([bytes(step), mixed(chance, step)])[:left])
        left -= len(parts[-1])
    return b"".join(parts)


def scribble(path: Path, kind: Kind, chance: random.Random, count: int = 8) -> None:
    """Random writes, zeros and discards by the real program; compressed clusters where none is yet.

    These are written by a run of their own: the real program goes on packing into a host cluster that it
    gave up and handed out again meanwhile, and so spoils its own images."""
    plain: list[str] = []
    packed: list[str] = []
    size, cluster = kind.size, kind.cluster
    for _ in range(count):
        offset = chance.randrange(size // 512) * 512
        length = min(size - offset, chance.choice([512, cluster, 3 * cluster, 10 * cluster]), 3 << 20)
        pattern = chance.randrange(1, 255)
        verb = chance.choice(["write", "write", "write", "write -z", "write -zu", "discard"])
        if kind.packed and chance.random() < 0.5:
            start = offset // cluster * cluster
            length = min(cluster, size - start)
            plain.append(f"discard -q {start} {length}")
            packed.append(f"write -q -c -P {pattern} {start} {length}")
        else:
            more = f"-P {pattern} " if verb == "write" else ""
            plain.append(f"{verb} -q {more}{offset} {length}")
    for commands in (plain, packed):
        # A compressed write over data, and a discard over a backing file in version 2, are refused.
        refusing_io(path, *commands)


def assert_holds(path: Path, content: bytes, *, leaks: bool = False) -> None:
    """The real program finds the image sound, and this in it."""
    checked = run_real(["check", *secrets.words(path)], path.parent)
    assert checked.code in ((0, 3) if leaks else (0,)), checked.out + checked.err
    wrong = crash.difference(crash.guest_content(path), [bytes(content)], atomic=True)
    assert wrong is None, wrong
