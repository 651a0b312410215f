"""``nfs://HOST/EXPORT/FILE[?uid=...]``: a file of an NFS server (protocols sheet 2), through the library
libnfs, whose calls come one at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from _thread import allocate_lock
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p

from qimg.errors import LocationError, NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.options import NUM, SIZE, STR, Option
from qimg.storage import clibrary
from qimg.storage.base import Limits, Storage
from qimg.units import MIB, SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes

#: Bytes of one request, where the server takes so many.
_STEP = MIB
#: Milliseconds to wait for an answer.
_TIMEOUT = 30_000

# Parameter of a name -> our option, and the library's function that sets it.
_PARAMETERS = {
    "uid": ("user", "nfs_set_uid"),
    "gid": ("group", "nfs_set_gid"),
    "tcp-syncnt": ("tcp-syn-count", "nfs_set_tcp_syncnt"),
    "readahead": ("readahead-size", "nfs_set_readahead"),
    "pagecache": ("page-cache-size", "nfs_set_pagecache"),
    "debug": ("debug", "nfs_set_debug"),
}


# What the library says of an answer of the server, and not of its lack.
_ANSWERS = ("NFS3ERR_", "MNT3ERR_", "ACCESS denied")


class _Stat(ctypes.Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("dev", "ino", "mode", "links", "uid", "gid", "rdev", "size", "block", "blocks"),
            *("atime", "mtime", "ctime", "atime_nsec", "mtime_nsec", "ctime_nsec", "used"),
        )
    ]


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "nfs_init_context": (c_void_p,),
    "nfs_destroy_context": (None, c_void_p),
    "nfs_get_error": (c_char_p, c_void_p),
    "nfs_set_uid": (None, c_void_p, c_int),
    "nfs_set_gid": (None, c_void_p, c_int),
    "nfs_set_tcp_syncnt": (None, c_void_p, c_int),
    "nfs_set_readahead": (None, c_void_p, c_uint32),
    "nfs_set_pagecache": (None, c_void_p, c_uint32),
    "nfs_set_debug": (None, c_void_p, c_int),
    "nfs_set_timeout": (None, c_void_p, c_int),
    "nfs_set_autoreconnect": (None, c_void_p, c_int),
    "nfs_mount": (c_int, c_void_p, c_char_p, c_char_p),
    "nfs_get_readmax": (c_uint64, c_void_p),
    "nfs_get_writemax": (c_uint64, c_void_p),
    "nfs_open": (c_int, c_void_p, c_char_p, c_int, POINTER(c_void_p)),
    "nfs_creat": (c_int, c_void_p, c_char_p, c_int, POINTER(c_void_p)),
    "nfs_close": (c_int, c_void_p, c_void_p),
    "nfs_fstat64": (c_int, c_void_p, c_void_p, POINTER(_Stat)),
    "nfs_ftruncate": (c_int, c_void_p, c_void_p, c_uint64),
    "nfs_fsync": (c_int, c_void_p, c_void_p),
    "nfs_pread": (c_int, c_void_p, c_void_p, c_uint64, c_uint64, c_void_p),
    "nfs_pwrite": (c_int, c_void_p, c_void_p, c_uint64, c_uint64, c_void_p),
    "nfs_unlink": (c_int, c_void_p, c_char_p),
}


class _Mount:
    """The folder of a file, mounted; one call at a time."""

    def __init__(self, values: dict[str, Value]) -> None:
        """Mount the folder of ``path``. Raises NotSupported, StorageError."""
        folder, _, name = str(values["path"]).rpartition("/")
        self.name = b"/" + os.fsencode(name)
        self.lock = allocate_lock()
        self._lost = False
        self._library = clibrary.load("nfs", "13", "libnfs13", _FUNCTIONS)
        self._context: int | None = self._library.nfs_init_context()
        for option, setter in _PARAMETERS.values():
            if option in values:
                getattr(self._library, setter)(self._context, int(values[option]))
        self._library.nfs_set_timeout(self._context, _TIMEOUT)
        self._library.nfs_set_autoreconnect(self._context, 0)
        try:
            host = str(values["server.host"]).encode()
            self.call("mount", host, os.fsencode(folder or "/"), failing="Failed to mount nfs share: {}")
        except BaseException:
            self.close()
            raise

    def call(self, function: str, *arguments: object, failing: str = "NFS: {}") -> int:
        """Call a function and give its result, which is no error. Raises StorageError: `failing` with the
        library's words."""
        with self.lock:
            if self._context is None or self._lost:
                raise StorageError("NFS: the connection is lost", errno=errno.ENOTCONN)
            result: int = getattr(self._library, f"nfs_{function}")(self._context, *arguments)
            if result >= 0:
                return result
            said: bytes = self._library.nfs_get_error(self._context) or b""
            text = " ".join(said.decode("utf-8", "replace").split())[:200]
            self._lost = not any(sign in text for sign in _ANSWERS)
        number = -result if -result in errno.errorcode else errno.EIO
        raise StorageError(failing.format(text), errno=number)

    def most(self, function: str) -> int:
        """Bytes of one request."""
        with self.lock:
            return min(_STEP, int(getattr(self._library, f"nfs_get_{function}")(self._context)) or _STEP)

    def close(self) -> None:
        """Unmount. Never raises."""
        with self.lock:
            context, self._context = self._context, None
            # With requests that nobody has answered the library may crash here: leave it to the system.
            if context is not None and not self._lost:
                self._library.nfs_destroy_context(context)


class Nfs(Storage):
    """A file of an NFS server. The protocol tells nothing of holes."""

    driver = "nfs"
    zero_init = True
    can_create: ClassVar[bool] = True
    identity: ClassVar[tuple[str, ...]] = ("server.*", "path", "driver")
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("server.*", STR, None, "Address of the server"),
        Option("path", STR, None, "Path of the file, with that of the export"),
        Option("user", NUM, None, "User ID to act as"),
        Option("group", NUM, None, "Group ID to act as"),
        Option("tcp-syn-count", NUM, None, "How often connecting is tried"),
        Option("readahead-size", NUM, None, "Bytes to read ahead"),
        Option("page-cache-size", NUM, None, "Pages to keep"),
        Option("debug", NUM, None, "How much the library tells"),
    )
    create_options: ClassVar[tuple[Option, ...]] = (Option("size", SIZE, None, "Virtual disk size"),)

    def __init__(self, mount: _Mount, name: str, *, writable: bool, create: bool) -> None:
        """Open the file of `mount`, which belongs to it from now on. Raises StorageError."""
        self.name = name
        self.writable = writable
        self.limits = Limits(fast_zero=False, parallel=1, remote=True)
        self._mount = mount
        self._handle = c_void_p()
        self._growing = allocate_lock()
        self._open(create)
        status = self._status()
        if not stat.S_ISREG(status.mode):
            raise StorageError(f"'{name}' is not a regular file", errno=errno.EINVAL)
        self._size: int = status.size
        self._read_step, self._write_step = mount.most("readmax"), mount.most("writemax")

    def _open(self, create: bool) -> None:
        flags = os.O_RDWR if self.writable else os.O_RDONLY
        name, handle = self._mount.name, byref(self._handle)
        failing = "Failed to open file : {}"
        try:
            self._mount.call("open", name, flags, handle, failing=failing)
        except StorageError as error:
            if not create or error.errno != errno.ENOENT:
                raise
            failing = "Failed to create file: {}"
            self._mount.call("creat", name, 0o600, handle, failing=failing)
            self.created = True

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        from urllib.parse import unquote

        place, _, query = name.partition("?")
        scheme, _, rest = place.partition("://")
        host, slash, path = rest.partition("/")
        if scheme != "nfs" or not host:
            raise LocationError("missing hostname in URI")
        if not slash:
            raise LocationError("missing file path in URI")
        values: dict[str, Value] = {"server.host": host, "server.type": "inet", "path": "/" + unquote(path)}
        for pair in query.split("&") if query else ():
            key, _, text = pair.partition("=")
            if not text:
                raise LocationError(f"Value for NFS parameter expected: {key}")
            if key not in _PARAMETERS:
                raise LocationError(f"Unknown NFS parameter name: {key}")
            if not text.isdecimal():
                raise LocationError(f"Invalid value for NFS parameter: {key}")
            values[_PARAMETERS[key][0]] = int(text)
        return values

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",  # noqa: ARG003
        discard: bool = True,  # noqa: ARG003
        context: Context | None = None,  # noqa: ARG003
    ) -> Self:
        mount = _Mount(_checked(values))
        try:
            name = f"nfs://{values['server.host']}{values['path']}"
            return cls(mount, name, writable=writable or create, create=create)
        except BaseException:
            mount.close()
            raise

    def _status(self) -> _Stat:
        status = _Stat()
        self._mount.call("fstat64", self._handle, byref(status))
        return status

    @property
    def size(self) -> int:
        return self._size

    def allocated_bytes(self) -> int | None:
        blocks: int = self._status().blocks
        return blocks * 512

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = max(start, min(end, round_up(self._size, SECTOR)))
        if inside > start:
            yield Extent(start, inside - start, MAPPED, 0, start, self)
        if inside < end:
            yield Extent(inside, end - inside, ZERO, 0, inside, self)

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        done = 0
        inside = max(0, min(len(view), self._size - offset))
        while done < inside:
            piece = view[done : min(done + self._read_step, inside)]
            place = (ctypes.c_char * len(piece)).from_buffer(piece)
            count = self._mount.call("pread", self._handle, offset + done, len(piece), place)
            if count == 0:
                raise StorageError("NFS: the file became shorter", errno=errno.EIO, offset=offset + done)
            done += count
        view[inside:] = bytes(len(view) - inside)

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf)
        done = 0
        while done < len(view):
            piece = view[done : done + self._write_step]
            done += self._mount.call(
                "pwrite", self._handle, offset + done, len(piece), clibrary.address(piece)
            )
        if view:
            with self._growing:
                self._size = max(self._size, offset + done)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        end = offset + length
        inside = max(0, min(end, self._size) - offset)
        super().zero(offset, inside, unmap)
        if length > inside:
            # Not by setting the length, which would cut off what others have just written behind it.
            self.write(b"\0", end - 1)

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'")
        with self._growing:
            self._mount.call("ftruncate", self._handle, size)
            self._size = size

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        self.resize(0)

    @classmethod
    def remove(cls, values: dict[str, Value], *, context: Context) -> None:  # noqa: ARG003
        mount = _Mount(values)
        try:
            mount.call("unlink", mount.name)
        finally:
            mount.close()

    def flush(self) -> None:
        if self.writable:
            self._mount.call("fsync", self._handle)

    def close(self) -> None:
        handle, self._handle = self._handle, c_void_p()
        try:
            if handle:
                self._mount.call("close", handle)
        except StorageError:
            pass  # Whoever needs to know has called flush.
        self._mount.close()


def _checked(values: dict[str, Value]) -> dict[str, Value]:
    """`values`, of which nothing is missing. Raises OptionError."""
    if not any(name.startswith("server.") for name in values):
        raise OptionError("Parameter 'server' is missing", option="server")
    for name in ("server.type", "server.host", "path"):
        if not values.get(name):
            raise OptionError(f"Parameter '{name}' is missing", option=name)
    if values["server.type"] != "inet":
        message = f"Parameter 'server.type' does not accept value '{values['server.type']}'"
        raise OptionError(message, option="server.type")
    return values
