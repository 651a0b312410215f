"""An image as a storage: what lets a format stand on another one (raw's window over qcow2, for example)."""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from qimg.errors import StorageError
from qimg.extent import MAPPED, ZERO, Extent, is_data
from qimg.formats import registry as formats
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

    An image stages what is written until its flush and until then reads as before; so reading something
    back flushes first. Writers come one at a time.
    """

    fixed_size = True

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.driver = disk.top.format_name
        self.name = disk.top.file.name
        self.writable = disk.top.file.writable
        self.limits = Limits(fast_zero=disk.top.can_mark_zero, parallel=1)
        self._staged = False
        #: Unit of compressed writes, None: they are stored as they are.
        self._compressed: int | None = None
        self._writing = allocate_lock()

    @property
    def size(self) -> int:
        return self.disk.size

    def read_into(self, buf: Buffer, offset: int) -> None:
        with self._writing:
            self._read(memoryview(buf), offset)

    def _settle(self) -> None:
        if self._staged:
            self.disk.top.flush()
            self._staged = False

    def _read(self, view: memoryview, offset: int) -> None:
        self._settle()
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
        with self._writing:
            self._write(view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        end = offset + len(view)
        top = self.disk.top
        unit = top.granularity if self._compressed is None else self._compressed
        start = round_down(offset, unit)
        stop = min(round_up(end, unit), self.size)
        if (start, stop) != (offset, end):
            # Units that are only partly written keep the rest of what they show now.
            whole = memoryview(bytearray(stop - start))
            self._read(whole, start)
            whole[offset - start : end - start] = view
            view = whole
        self._staged = True
        if self._compressed is None:
            self._store(view, start)
            return
        for at in range(0, len(view), unit):
            part = view[at : at + unit]
            encoded = top.encode(bytes(part).ljust(unit, b"\0"))
            if encoded is None:
                self._store(part, start + at)
            else:
                top.write_encoded(start + at, encoded)

    def _store(self, view: memoryview, start: int) -> None:
        for extent in self.disk.top.allocate(start, len(view)):
            assert extent.source is not None and extent.host is not None
            at = extent.start - start
            extent.source.write(view[at : at + extent.length], extent.host)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        top = self.disk.top
        end = min(offset + length, self.size)
        start, stop = round_up(offset, top.granularity), round_down(end, top.granularity)
        stop = end if end == self.size else stop
        if not top.can_mark_zero or stop <= start:
            super().zero(offset, length, unmap)
            return
        super().zero(offset, start - offset, unmap)
        with self._writing:
            self._staged = True
            top.mark_zero(start, stop - start)
        super().zero(stop, end - stop, unmap)

    def copy_up(self, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        if length <= 0:
            return
        with self._writing:
            self._settle()
            below = [
                extent for extent in self.disk.extents(offset, length) if extent.depth and is_data(extent)
            ]
            for extent in below:
                data = memoryview(bytearray(extent.length))
                self._read(data, extent.start)
                self._write(data, extent.start)

    def compress_writes(self) -> None:
        top = self.disk.top
        if not formats.get(top.format_name).can_compress:
            super().compress_writes()
        self._compressed = top.cluster_size

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        with self._writing:
            self._settle()
        inside = max(start, min(start + length, self.size))
        if inside > start:
            for window in self.disk.windows(start, inside - start):
                for extent in window:
                    flags = ZERO if extent.flags & ZERO else MAPPED
                    yield Extent(extent.start, extent.length, flags, 0, extent.start, self)
        if start + length > inside:
            yield Extent(inside, start + length - inside, ZERO, 0, inside, self)

    def lock(self, use: int, share: int) -> None:
        # Raw is transparent; other formats have locked their file for themselves.
        if self.driver == "raw":
            self.disk.top.file.lock(use, share)

    def flush(self) -> None:
        with self._writing:
            self.disk.top.flush()
            self._staged = False

    def publish(self) -> None:
        self.disk.publish()

    def allocated_bytes(self) -> int | None:
        return self.disk.top.file.allocated_bytes()

    def close(self) -> None:
        self.disk.close()
