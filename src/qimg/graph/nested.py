"""An image as a storage: what lets a format stand on another one (raw's window over qcow2, for example)."""

from __future__ import annotations

import errno
import os

from qimg.errors import StorageError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.storage.base import Limits, Storage
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.graph.disk import Disk
    from qimg.storage.base import Buffer, Bytes


class DiskStorage(Storage):
    """The guest's bytes of a disk as a place of fixed length. It owns the disk.

    `name` is the file's below all images, so that relative backing names still have a directory.
    """

    fixed_size = True

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.driver = disk.top.format_name
        self.name = disk.top.file.name
        self.writable = disk.top.file.writable
        self.limits = Limits(fast_zero=False, parallel=1)

    @property
    def size(self) -> int:
        return self.disk.size

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        inside = max(0, min(len(view), self.size - offset))
        if inside:
            self.disk.read_into(view[:inside], offset)
        view[inside:] = bytes(len(view) - inside)

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf)
        end = offset + len(view)
        if end > self.size:
            number = errno.ENOSPC
            raise StorageError(os.strerror(number), errno=number, offset=offset)
        image = self.disk.top
        # Units that are only partly written keep the rest of what they show now.
        start = round_down(offset, image.granularity)
        whole = bytearray(min(round_up(end, image.granularity), self.size) - start)
        self.read_into(whole, start)
        whole[offset - start : end - start] = view
        for extent in image.allocate(start, len(whole)):
            assert extent.source is not None and extent.host is not None
            at = extent.start - start
            extent.source.write(memoryview(whole)[at : at + extent.length], extent.host)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        inside = max(start, min(start + length, self.size))
        if inside > start:
            for window in self.disk.windows(start, inside - start):
                for extent in window:
                    flags = ZERO if extent.flags & ZERO else MAPPED
                    yield Extent(extent.start, extent.length, flags, 0, extent.start, self)
        if start + length > inside:
            yield Extent(inside, start + length - inside, ZERO, 0, inside, self)

    def flush(self) -> None:
        self.disk.top.flush()

    def allocated_bytes(self) -> int | None:
        return self.disk.top.file.allocated_bytes()

    def close(self) -> None:
        self.disk.close()
