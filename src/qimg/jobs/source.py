"""What a job reads from: one disk, or several one after the other."""

from __future__ import annotations

from qimg.errors import CorruptImage, StorageError
from qimg.extent import HOLE, ZERO, Extent
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.graph.disk import Disk
    from qimg.storage.base import Buffer

    #: Called with the offset and the error of each sector of which nothing is known.
    Unknown = Callable[[int, StorageError | CorruptImage], None]


class Source:
    """Disks put one after the other; offsets and `size` in bytes of the whole."""

    def __init__(self, disks: list[Disk]) -> None:
        self.disks = disks
        self._starts: list[int] = []
        size = 0
        for disk in disks:
            self._starts.append(size)
            size += disk.size
        self.size = size

    def windows(self, unknown: Unknown | None = None) -> Iterator[list[Extent]]:
        """The extents of the whole, in windows. `start` counts from the first disk's beginning.

        With `unknown`, sectors whose extents cannot be found out are reported to it and given as data that
        only the image can read; without, StorageError and CorruptImage are raised."""
        for base, disk in zip(self._starts, self.disks, strict=True):
            for window in disk.windows(0, disk.size) if unknown is None else _salvaged(disk, base, unknown):
                yield [extent._replace(start=extent.start + base) for extent in window] if base else window

    def read_extent(self, extent: Extent, buf: Buffer) -> None:
        """Fill `buf` with the first bytes of `extent`, one that `windows` gave or a clipped part of it."""
        number = len(self.disks) - 1
        while self._starts[number] > extent.start:
            number -= 1
        base = self._starts[number]
        self.disks[number].read_extent(extent._replace(start=extent.start - base) if base else extent, buf)


def _salvaged(disk: Disk, base: int, unknown: Unknown) -> Iterator[list[Extent]]:
    """Windows of `disk`, which begins at `base`, with the sectors of which nothing is known as data."""
    for start in range(0, disk.size, disk.window):
        yield _by_halves(disk, start, min(disk.window, disk.size - start), base, unknown)


def _by_halves(disk: Disk, start: int, length: int, base: int, unknown: Unknown) -> list[Extent]:
    try:
        return disk.extents(start, length)
    except (StorageError, CorruptImage) as error:
        if length <= SECTOR:
            unknown(base + start, error)
            return [Extent(start, length, 0)]
    half = round_up(length // 2, SECTOR)
    return [
        *_by_halves(disk, start, half, base, unknown),
        *_by_halves(disk, start + half, length - half, base, unknown),
    ]


def data_runs(source: Source) -> Iterator[tuple[int, int]]:
    """(start, length) of every run that is not known to read as zeros, ascending."""
    for window in source.windows():
        for extent in window:
            if not extent.flags & (ZERO | HOLE):
                yield extent.start, extent.length
