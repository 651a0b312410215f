"""Block and character devices of this machine: the protocol ``host_device`` (raw sheet 5, 7)."""

from __future__ import annotations

import errno
import os
import stat

from qimg.errors import NotSupported, StorageError
from qimg.extent import MAPPED, Extent
from qimg.options import SIZE, STR, Option
from qimg.storage import hostcalls
from qimg.storage.base import Storage
from qimg.storage.hostio import failed, probe_alignment
from qimg.storage.posix import PosixFile
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value


class HostDevice(PosixFile):
    """A block or character device: fixed length, holes unknown."""

    driver = "host_device"
    create_options: ClassVar[tuple[Option, ...]] = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("preallocation", STR, None, "Not available for devices"),
    )
    zero_init = False
    fixed_size = True
    must_exist: ClassVar[bool] = True
    plural = "device files"

    @classmethod
    def open(
        cls,
        filename: str,
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        locking: str = "auto",
        aio: str = "threads",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        return super().open(
            filename,
            writable=writable or create,
            cache=cache,
            locking=locking,
            aio=aio,
            discard=discard,
            context=context,
        )

    @classmethod
    def _check_mode(cls, filename: str, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            message = f"'host_device' driver requires '{filename}' to be either a character or block device"
            raise StorageError(message, errno=errno.EINVAL)

    def _check_device(self) -> None:
        self._is_block = stat.S_ISBLK(os.fstat(self._fd).st_mode)
        if not self._is_block:
            return
        try:
            protected = hostcalls.device_read_only(self._fd)
        except OSError:
            return
        if self.writable and protected:
            number = errno.EACCES
            raise StorageError(f"The device is not writable: {os.strerror(number)}", errno=number)

    def _direct_alignment(self) -> int:
        try:
            return max(512, hostcalls.device_block(self._fd))
        except OSError:
            return probe_alignment(self._fd)

    @property
    def size(self) -> int:
        try:
            return hostcalls.device_size(self._fd) if self._is_block else os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise failed(error) from error

    def _zero_inside(self, offset: int, length: int, unmap: bool) -> None:
        """Whole logical blocks by the device, the edges by writing."""
        low, high = self._whole_blocks(offset, length)
        way = hostcalls.punch_device if unmap else hostcalls.zero_device
        try:
            if low < high:
                way(self._fd, low, high - low)
        except OSError as error:
            if error.errno not in hostcalls.UNSUPPORTED:
                raise failed(error, offset) from error
            high = low
        if low >= high:
            low = high = offset
        Storage.zero(self, offset, low - offset)
        Storage.zero(self, high, offset + length - high)

    def _grow_to(self, start: int, end: int) -> None:
        number = errno.ENOSPC
        raise StorageError(os.strerror(number), errno=number, offset=start)

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        try:
            block = hostcalls.device_block(self._fd)
        except OSError:
            return offset, offset
        return round_up(offset, block), round_down(offset + length, block)

    def discard(self, offset: int, length: int) -> None:
        if not self._discard:
            return
        low, high = self._whole_blocks(offset, length)
        try:
            if low < high:
                hostcalls.discard_device(self._fd, low, high - low)
        except OSError as error:
            if error.errno not in hostcalls.UNSUPPORTED:
                raise failed(error, offset) from error

    def _inside_extents(self, start: int, end: int) -> Iterator[Extent]:
        if start < end:
            yield Extent(start, end - start, MAPPED, 0, start, self)

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off":
            raise NotSupported(f"Preallocation mode '{preallocation}' unsupported for this non-regular file")
        if size > self.size:
            raise NotSupported("Cannot grow device files")

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        Storage.start_new(self, values, context)

    def flush(self) -> None:
        if self._is_block:
            super().flush()

    def extent_size_hint(self) -> int | None:
        return None

    def allocated_bytes(self) -> int | None:
        return 0
