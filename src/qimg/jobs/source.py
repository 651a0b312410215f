"""What a job reads from: one disk, or several one after the other."""

from __future__ import annotations

from qimg.extent import HOLE, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.extent import Extent
    from qimg.graph.disk import Disk
    from qimg.storage.base import Buffer


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

    def windows(self) -> Iterator[list[Extent]]:
        """The extents of the whole, in windows. `start` counts from the first disk's beginning."""
        for base, disk in zip(self._starts, self.disks, strict=True):
            for window in disk.windows(0, disk.size):
                if base:
                    yield [extent._replace(start=extent.start + base) for extent in window]
                else:
                    yield window

    def read_extent(self, extent: Extent, buf: Buffer) -> None:
        """Fill `buf` with the first bytes of `extent`, one that `windows` gave or a clipped part of it."""
        number = len(self.disks) - 1
        while self._starts[number] > extent.start:
            number -= 1
        base = self._starts[number]
        self.disks[number].read_extent(extent._replace(start=extent.start - base) if base else extent, buf)


def data_runs(source: Source) -> Iterator[tuple[int, int]]:
    """(start, length) of every run that is not known to read as zeros, ascending."""
    for window in source.windows():
        for extent in window:
            if not extent.flags & (ZERO | HOLE):
                yield extent.start, extent.length
