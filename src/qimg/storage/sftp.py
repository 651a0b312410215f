"""Files on other machines by SFTP, over one SSH connection each.

asyncssh is asynchronous; a thread of each file runs its event loop, and callers wait for what they ask of it.
A large request goes out as many small ones, several of them under way at once: servers take 255 KiB at most.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import asyncssh

from qimg.errors import StorageError
from qimg.storage.sshlogin import connect, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import TypeVar

    from qimg.storage.ssh import Place

    Result = TypeVar("Result")

#: Requests under way at once; the server's answers to them fill the pipe for some 50 ms at 1 Gbit/s.
_IN_FLIGHT = 24
#: A request of a server that names no limits (draft-ietf-secsh-filexfer-02 3: at least so much).
_LEAST_REQUEST = 32 << 10
_MOST_REQUEST = 1 << 20
#: Seconds for one request whose answer does not come.
_REQUEST_TIMEOUT = 120
_GOODBYE = 2
_NEW_FILE_MODE = 0o644
# Status code (draft-ietf-secsh-filexfer-02 7) -> what it means here.
_ERRORS = {2: errno.ENOENT, 3: errno.EACCES, 8: errno.ENOTSUP}
_WORDS = {2: "No such file", 3: "Permission denied", 4: "Failure", 8: "Operation unsupported"}


class RemoteFile:
    """An open file. `size` is its length when it was opened, `created`: opening made it."""

    def __init__(self, place: Place, *, writable: bool, create: bool) -> None:
        """Connect and open. Raises StorageError."""
        self.created = False
        self.size = 0
        self._unsynced = False
        self._loop = asyncio.new_event_loop()
        # What asyncio would print about is raised where somebody waits for it.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._loop.run_forever, name="qimg-ssh", daemon=True)
        self._thread.start()
        self._connection: asyncssh.SSHClientConnection | None = None
        try:
            self._call(self._open(place, writable=writable, create=create))
        except BaseException:
            self.close()
            raise

    def _call(self, work: Coroutine[None, None, Result]) -> Result:
        """Have the loop do `work` and wait for it. Raises StorageError."""
        if self._loop.is_closed():
            work.close()
            raise StorageError(os.strerror(errno.EBADF), errno=errno.EBADF)
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except asyncssh.SFTPError as error:
            raise _failed(error) from error
        except (asyncssh.Error, TimeoutError, OSError) as error:
            message = f"The connection to the SSH server broke: {printable(error)}"
            raise StorageError(message, errno=errno.EIO) from error

    async def _open(self, place: Place, *, writable: bool, create: bool) -> None:
        self._connection = connection = await connect(place)
        self._sftp = sftp = await connection.start_sftp_client()
        path = os.fsencode(place.path)
        flags = asyncssh.FXF_READ
        if writable:
            flags |= asyncssh.FXF_WRITE
        if create:
            flags |= asyncssh.FXF_CREAT
            self.created = not await sftp.exists(path)
        try:
            attributes = asyncssh.SFTPAttrs(permissions=_NEW_FILE_MODE) if create else asyncssh.SFTPAttrs()
            self._file = await sftp.open(path, flags, attributes, encoding=None, block_size=0)
            status = await self._file.stat()
        except asyncssh.SFTPError as error:
            self.created = False
            words = f"SFTP server: {_WORDS.get(error.code, 'Failure')} (sftp error code: {error.code})"
            message = f"failed to open remote file '{place.path}': {words}"
            raise StorageError(message, errno=_failed(error).errno) from error
        self.size = status.size or 0
        self._most_read = _bounded(sftp.limits.max_read_len)
        self._most_write = _bounded(sftp.limits.max_write_len)

    # -- requests

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`. Raises StorageError, also where the file ends before that."""
        self._in_pieces(self._read, view, offset, self._most_read)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view`; a file that was shorter grows. Raises StorageError."""
        self._unsynced = True
        self._in_pieces(self._write, view, offset, self._most_write)

    def _in_pieces(
        self,
        request: Callable[[memoryview, int], Coroutine[None, None, None]],
        view: memoryview,
        offset: int,
        most: int,
    ) -> None:
        batch = _IN_FLIGHT * most
        for start in range(0, len(view), batch):
            self._call(_together(request, view[start : start + batch], offset + start, most))

    async def _read(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                data: bytes | str = await self._file.read(len(view) - done, offset + done)
            assert isinstance(data, bytes)
            if not data or len(data) > len(view) - done:
                message = "The remote file is shorter than it was"
                raise StorageError(message, errno=errno.EIO, offset=offset + done)
            view[done : done + len(data)] = data
            done += len(data)

    async def _write(self, view: memoryview, offset: int) -> None:
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            await self._file.write(bytes(view), offset)

    def truncate(self, size: int) -> None:
        """Set its length."""
        self._unsynced = True
        self._call(self._file.truncate(size))

    def sync(self) -> bool:
        """Have what was written put on the server's disk; False: the server cannot say that it did."""
        if not self._unsynced:
            return True
        try:
            self._call(self._file.fsync())
        except StorageError as error:
            if error.errno == errno.ENOTSUP:
                return False
            raise
        self._unsynced = False
        return True

    def close(self) -> None:
        """Hang up. Never raises; a second call does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _hang_up(self) -> None:
        """End what runs; what was written has been acknowledged."""
        try:
            if self._connection is not None:
                self._connection.abort()
                async with asyncio.timeout(_GOODBYE):
                    await self._connection.wait_closed()
        except (asyncssh.Error, OSError):
            pass


async def _together(
    request: Callable[[memoryview, int], Coroutine[None, None, None]],
    view: memoryview,
    offset: int,
    most: int,
) -> None:
    """Make one request of at most `most` bytes for every piece of `view`, all at once. When one fails, none
    is under way any more."""
    tasks = [
        asyncio.ensure_future(request(view[start : start + most], offset + start))
        for start in range(0, len(view), most)
    ]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _bounded(limit: int) -> int:
    return min(max(limit, _LEAST_REQUEST), _MOST_REQUEST)


def _failed(error: asyncssh.SFTPError) -> StorageError:
    number = _ERRORS.get(error.code, errno.EIO)
    return StorageError(os.strerror(number), errno=number)


def remove_file(place: Place) -> None:
    """Delete a file. Raises StorageError."""

    async def remove() -> None:
        connection = await connect(place)
        try:
            sftp = await connection.start_sftp_client()
            await sftp.remove(os.fsencode(place.path))
        finally:
            connection.abort()

    try:
        asyncio.run(remove())
    except (asyncssh.Error, asyncssh.SFTPError, OSError) as error:
        raise StorageError(f"Could not delete: {printable(error)}", errno=errno.EIO) from error
