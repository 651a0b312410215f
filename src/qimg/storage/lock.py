"""Image locks: the byte-range locks by which QEMU programs and qimg see each other.

Permission i is *held* through byte 100 + i and *refused to others* through byte 200 + i. Every lock is a
shared one, so equal holders coexist; a conflict is found by asking whether an exclusive lock would be
possible (protocols sheet 4, common sheet 11). Open-file-description locks belong to one opened
descriptor: they also hold against the same process and end when that descriptor is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from qimg.context import Notice
from qimg.errors import LockError
from qimg.storage.base import USE_ALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context

NAMES = ("consistent read", "write", "write unchanged", "resize")

_HELD = 100
_REFUSED = 200
# struct flock: type, whence, start, length, process id
_FLOCK = struct.Struct("@hhqqi4x")


def _bytes_of(first: int, bits: int) -> list[int]:
    return [first + index for index in range(len(NAMES)) if bits >> index & 1]


def _commands() -> tuple[int, int] | None:
    """The set and get commands of open-file-description locks, None where the system has none."""
    commands = getattr(fcntl, "F_OFD_SETLK", None), getattr(fcntl, "F_OFD_GETLK", None)
    return commands if None not in commands else None  # type: ignore[return-value]


class ImageLock:
    """The lock bytes that one open descriptor holds."""

    def __init__(self, fd: int, name: str) -> None:
        """For the file open as `fd`, called `name` in messages. Nothing is locked yet."""
        self._fd = fd
        self._name = name
        self._taken: list[int] = []
        found = _commands()
        self.available = found is not None
        self._set, self._get = found if found is not None else (fcntl.F_SETLK, fcntl.F_GETLK)

    def change(self, use: int, share: int) -> None:
        """Hold what the USE_ bits `use` need and refuse what is not in `share`, instead of what is held now.

        New bytes are added first and bytes no longer wanted dropped last, so nobody slips in between. On
        conflict the former state is restored. Raises LockError.
        """
        refuse = USE_ALL & ~share
        wanted = _bytes_of(_HELD, use) + _bytes_of(_REFUSED, refuse)
        added: list[int] = []
        try:
            for byte in wanted:
                if byte not in self._taken:
                    self._take(byte)
                    added.append(byte)
            self._test(use, refuse)
        except LockError:
            for byte in added:
                self._drop(byte)
            raise
        for byte in self._taken:
            if byte not in wanted:
                self._drop(byte)
        self._taken = wanted

    def _take(self, byte: int) -> None:
        try:
            fcntl.fcntl(self._fd, self._set, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            raise LockError(f"Failed to lock byte {byte}", errno=error.errno or errno.EIO) from error

    def _drop(self, byte: int) -> None:
        try:
            fcntl.fcntl(self._fd, self._set, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
        except OSError:
            pass  # Closing the descriptor drops it; holding a byte too long harms nobody's data.

    def _free(self, byte: int) -> bool:
        """Whether nobody else holds any lock on `byte`."""
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        try:
            answer: bytes = fcntl.fcntl(self._fd, self._get, question)
        except OSError as error:
            raise LockError(f"Failed to lock byte {byte}", errno=error.errno or errno.EIO) from error
        return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)

    def _test(self, use: int, refuse: int) -> None:
        for index, name in enumerate(NAMES):
            if use >> index & 1 and not self._free(_REFUSED + index):
                raise self._conflict(f'Failed to get "{name}" lock')
        for index, name in enumerate(NAMES):
            if refuse >> index & 1 and not self._free(_HELD + index):
                raise self._conflict(f'Failed to get shared "{name}" lock')

    def _conflict(self, message: str) -> LockError:
        hint = f"Is another process using the image [{self._name}]?"
        return LockError(message, errno=errno.EAGAIN, hint=hint)


def for_file(fd: int, name: str, locking: str, context: Context) -> ImageLock | None:
    """The lock of a file opened with ``locking=`` `locking` (on, off, auto); None: it takes no locks.

    Without open-file-description locks, `auto` takes none and `on` falls back to process locks, which
    any other close of the same file in this process drops.
    """
    if locking == "off":
        return None
    lock = ImageLock(fd, name)
    if lock.available:
        return lock
    if locking == "auto":
        return None
    hint = "They can be lost when this process opens the file a second time."
    context.warn(Notice("No open file description locks on this system; using process locks", hint=hint))
    return lock
