"""Linux calls on open files that the `os` module lacks: holes, device sizes, inode flags.

All go through `fcntl.ioctl`, which costs no import; only where a kernel or a device knows `fallocate`
alone is ctypes loaded. Numbers are of the kernel's user interface (linux/fs.h, linux/falloc.h), for the
architectures that share the common ioctl encoding. Offsets and lengths in bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: errno values with which a host says "not here": try the next way.
UNSUPPORTED = frozenset(
    (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
)

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16

# struct space_resv: type, whence, start, length, system id, process id, padding
_RANGE = struct.Struct("@hhqqiI16x")
_LONG = struct.calcsize("@l")
_XATTR = struct.Struct("@IIIII8x")

_WRITE, _READ = 1, 2


def _request(direction: int, group: str, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord(group) << 8 | number


_FS_UNRESERVE = _request(_WRITE, "X", 43, _RANGE.size)
_FS_ZERO_RANGE = _request(_WRITE, "X", 57, _RANGE.size)
_FS_GET_FLAGS = _request(_READ, "f", 1, _LONG)
_FS_SET_FLAGS = _request(_WRITE, "f", 2, _LONG)
_FS_GET_XATTR = _request(_READ, "X", 31, _XATTR.size)
_FS_SET_XATTR = _request(_WRITE, "X", 32, _XATTR.size)
_BLK_GET_SIZE64 = _request(_READ, "\x12", 114, struct.calcsize("@N"))
_BLK_RO_GET = 0x125E
_BLK_SECTOR_SIZE = 0x1268
_BLK_DISCARD = 0x1277
_BLK_ZERO_OUT = 0x127F

_NO_COW = 0x00800000
_EXTENT_SIZE = 0x00000800

_libc_fallocate: Callable[[int, int, int, int], None] | None = None


def _load_fallocate() -> Callable[[int, int, int, int], None]:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        while call(fd, mode, offset, length):
            error = ctypes.get_errno()
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error))

    return fallocate


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    global _libc_fallocate
    if _libc_fallocate is None:
        try:
            _libc_fallocate = _load_fallocate()
        except (ImportError, AttributeError, OSError):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
    _libc_fallocate(fd, mode, offset, length)


def _range_call(fd: int, request: int, mode: int, offset: int, length: int) -> None:
    try:
        fcntl.ioctl(fd, request, _RANGE.pack(0, os.SEEK_SET, offset, length, 0, 0))
    except OSError as error:
        # Kernels before 5.8 know these requests on few file systems, and block devices not at all.
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        _fallocate(fd, mode | _KEEP_SIZE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the space of a range back; it reads as zeros, the length stays. Raises OSError."""
    _range_call(fd, _FS_UNRESERVE, _PUNCH_HOLE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros and keep its space; the length stays. Raises OSError."""
    _range_call(fd, _FS_ZERO_RANGE, _ZERO_RANGE, offset, length)


def punch_device(fd: int, offset: int, length: int) -> None:
    """Zero a range of a block device, giving its space back where that reads as zeros. Raises OSError."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_device(fd: int, offset: int, length: int) -> None:
    """Zero a range (whole logical blocks) of a block device without giving space back. Raises OSError."""
    fcntl.ioctl(fd, _BLK_ZERO_OUT, struct.pack("@QQ", offset, length))


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tell a block device that a range (whole logical blocks) is not needed. Raises OSError."""
    fcntl.ioctl(fd, _BLK_DISCARD, struct.pack("@QQ", offset, length))


def device_size(fd: int) -> int:
    """Length of a block device. Raises OSError."""
    answer: bytes = fcntl.ioctl(fd, _BLK_GET_SIZE64, bytes(8))
    return int.from_bytes(answer, "little" if struct.pack("@H", 1)[0] else "big")


def device_block(fd: int) -> int:
    """Logical block size of a block device. Raises OSError."""
    return int(struct.unpack("@i", fcntl.ioctl(fd, _BLK_SECTOR_SIZE, bytes(4)))[0])


def device_read_only(fd: int) -> bool:
    """Whether a block device is write protected. Raises OSError."""
    return bool(struct.unpack("@i", fcntl.ioctl(fd, _BLK_RO_GET, bytes(4)))[0])


def set_no_cow(fd: int) -> None:
    """Switch copy-on-write off for an empty file (btrfs). Raises OSError."""
    (flags,) = struct.unpack("@l", fcntl.ioctl(fd, _FS_GET_FLAGS, bytes(_LONG)))
    fcntl.ioctl(fd, _FS_SET_FLAGS, struct.pack("@l", flags | _NO_COW))


def set_extent_size_hint(fd: int, size: int) -> None:
    """Ask for allocation in pieces of `size` (below 4 GiB). Raises OSError."""
    flags, _, extents, project, cow = _XATTR.unpack(fcntl.ioctl(fd, _FS_GET_XATTR, bytes(_XATTR.size)))
    fcntl.ioctl(fd, _FS_SET_XATTR, _XATTR.pack(flags | _EXTENT_SIZE, size, extents, project, cow))


def get_extent_size_hint(fd: int) -> int:
    """The hint set, 0 for none. Raises OSError."""
    flags, size, *_ = _XATTR.unpack(fcntl.ioctl(fd, _FS_GET_XATTR, bytes(_XATTR.size)))
    return int(size) if flags & _EXTENT_SIZE else 0
