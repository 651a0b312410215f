"""How bytes get in and out of an open descriptor: through the page cache, or past it (O_DIRECT).

Both ways loop over short transfers and turn operating system errors into StorageError with the offset.
Offsets and lengths in bytes. Safe for several threads at once.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from qimg.errors import StorageError
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from qimg.storage.base import Buffer, Bytes

#: Alignment of memory that every device accepts: a page.
PAGE = 4096
_BOUNCE = 1 << 20
_ZEROS = bytes(1 << 16)


def failed(error: OSError, offset: int | None = None) -> StorageError:
    """`error` as a StorageError whose text is the operating system's words."""
    number = error.errno or errno.EIO
    return StorageError(os.strerror(number), errno=number, offset=offset)


def _clear(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROS)):
        piece = view[start : start + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def _flat(buf: Bytes) -> memoryview:
    view = memoryview(buf)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class BufferedIO:
    """Through the page cache: any offset, any length."""

    alignment = 1

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def size(self) -> int:
        """Length of a regular file."""
        return os.fstat(self._fd).st_size

    def trim(self) -> None:
        """Cut what padding added to the end of the file. Nobody may be writing meanwhile."""

    def grew(self, end: int) -> None:
        """Somebody else has written up to `end`."""

    def read_into(self, buf: Buffer, offset: int) -> None:
        """Fill `buf`; past the end, zeros. Raises StorageError."""
        view = _flat(buf)
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, (view[done:],), offset + done)
                if count == 0:
                    _clear(view[done:])
                    return
                done += count
        except OSError as error:
            raise failed(error, offset + done) from error

    def write(self, buf: Bytes, offset: int) -> None:
        """Write all of `buf`. Raises StorageError."""
        view = _flat(buf)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise failed(error, offset + done) from error


class DirectIO:
    """Past the page cache. Requests that the device would refuse go through an aligned buffer of ours.

    A write that ends inside the last block of a file makes the file longer than it should be until
    `trim`; `size` never shows that.
    """

    def __init__(self, fd: int, alignment: int, *, device: bool) -> None:
        """`alignment`: of offsets and lengths, as `probe_alignment` found it."""
        self._fd = fd
        self.alignment = alignment
        self._device = device
        self._edges = allocate_lock()
        self._pool: list[mmap] = []
        # While the file ends at `_padded`, its true end is `_true_end`.
        self._padded = -1
        self._true_end = 0

    def size(self) -> int:
        """Length of a regular file, without padding."""
        length = os.fstat(self._fd).st_size
        return self._true_end if length == self._padded else length

    def trim(self) -> None:
        """Cut what padding added to the end of the file. Nobody may be writing meanwhile.

        Raises StorageError."""
        try:
            if self._padded >= 0 and os.fstat(self._fd).st_size == self._padded:
                os.ftruncate(self._fd, self._true_end)
        except OSError as error:
            raise failed(error) from error
        self._padded = -1

    def grew(self, end: int) -> None:
        """Somebody else has written up to `end`."""
        with self._edges:
            if end >= self._padded:
                self._padded = -1
            self._true_end = max(self._true_end, end)

    def _borrow(self) -> mmap:
        try:
            return self._pool.pop()
        except IndexError:
            from mmap import mmap

            return mmap(-1, _BOUNCE)

    def _aligned(self, offset: int, length: int) -> bool:
        return not (offset | length) & (self.alignment - 1)

    def read_into(self, buf: Buffer, offset: int) -> None:
        """Fill `buf`; past the end, zeros. Raises StorageError."""
        view = _flat(buf)
        done = 0
        try:
            if self._aligned(offset, len(view)):
                done = self._read_straight(view, offset)
            if done < len(view):
                self._read_bounced(view[done:], offset + done)
        except OSError as error:
            raise failed(error, offset) from error

    def _read_straight(self, view: memoryview, offset: int) -> int:
        """Read into the caller's memory; how far that went before the kernel refused its address."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, (view[done:],), offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return done
                raise
            done += count
            if count == 0 or count & (self.alignment - 1):
                _clear(view[done:])
                return len(view)
        return done

    def _read_bounced(self, view: memoryview, offset: int) -> None:
        bounce = self._borrow()
        with memoryview(bounce) as block:
            done = 0
            while done < len(view):
                low = round_down(offset + done, self.alignment)
                high = min(round_up(offset + len(view), self.alignment), low + _BOUNCE)
                self._fill(block[: high - low], low)
                step = min(high, offset + len(view)) - offset - done
                skip = offset + done - low
                view[done : done + step] = block[skip : skip + step]
                done += step
        self._pool.append(bounce)

    def _fill(self, block: memoryview, offset: int) -> None:
        """Read whole aligned blocks into aligned memory; past the end, zeros."""
        done = 0
        while done < len(block):
            count = os.preadv(self._fd, (block[done:],), offset + done)
            done += count
            if count == 0 or count & (self.alignment - 1):
                _clear(block[done:])
                return

    def write(self, buf: Bytes, offset: int) -> None:
        """Write all of `buf`. Raises StorageError."""
        view = _flat(buf)
        try:
            if self._aligned(offset, len(view)):
                done = self._write_straight(view, offset)
                if done < len(view):
                    self._write_bounced(view[done:], offset + done)
                if offset + len(view) == self._padded:
                    self._padded = -1
            elif len(view):
                self._write_edges(view, offset)
        except OSError as error:
            raise failed(error, offset) from error

    def _write_straight(self, view: memoryview, offset: int) -> int:
        """Write from the caller's memory; how far that went before the kernel refused its address."""
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return done
                raise
        return done

    def _write_bounced(self, view: memoryview, offset: int) -> None:
        bounce = self._borrow()
        with memoryview(bounce) as block:
            for start in range(0, len(view), _BOUNCE):
                piece = view[start : start + _BOUNCE]
                block[: len(piece)] = piece
                self._drain(block[: len(piece)], offset + start)
        self._pool.append(bounce)

    def _write_edges(self, view: memoryview, offset: int) -> None:
        """Write what begins or ends inside a block: read that block first. One writer at a time."""
        end = offset + len(view)
        bounce = self._borrow()
        with self._edges, memoryview(bounce) as block:
            old_end = 0 if self._device else self.size()
            done = 0
            while done < len(view):
                low = round_down(offset + done, self.alignment)
                high = min(round_up(end, self.alignment), low + _BOUNCE)
                self._fill(block[: high - low], low)
                step = min(high, end) - offset - done
                skip = offset + done - low
                block[skip : skip + step] = view[done : done + step]
                self._drain(block[: high - low], low)
                done += step
            if not self._device and round_up(end, self.alignment) == os.fstat(self._fd).st_size:
                self._padded = round_up(end, self.alignment)
                self._true_end = max(old_end, end)
        self._pool.append(bounce)

    def _drain(self, block: memoryview, offset: int) -> None:
        done = 0
        while done < len(block):
            done += os.pwrite(self._fd, block[done:], offset + done)


def probe_alignment(fd: int) -> int:
    """The smallest block in which `fd`, open with O_DIRECT, can be read: 512 .. 4096.

    An empty file, or a file system that checks nothing, does not tell: then 4096, which all accept.
    """
    from mmap import mmap

    page = mmap(-1, PAGE)
    view = memoryview(page)
    for size in (1, 512, 1024, 2048):
        try:
            os.preadv(fd, (view[:size],), 0)
        except OSError:
            continue
        return PAGE if size == 1 else size
    return PAGE
