"""``iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET/LUN`` and ``iser:``: a disk of an iSCSI target (protocols
sheet 2), through the library libiscsi, whose calls come one at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
from _thread import allocate_lock
from ctypes import POINTER, c_char_p, c_int, c_ubyte, c_uint32, c_uint64, c_void_p

from qimg.errors import LocationError, NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.options import NUM, SIZE, STR, Option
from qimg.storage import clibrary
from qimg.storage.base import Limits, Storage
from qimg.units import INT64_MAX, MIB, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes

#: Bytes of one command.
_STEP = MIB
#: Blocks that one command clears at most.
_CLEAR = 65536
#: Seconds to wait for an answer.
TIMEOUT = 30
_INITIATOR = "iqn.2008-11.org.linux-kvm"
#: What stands before ``://`` -> the transport.
_PREFIXES = {"iscsi": "tcp", "iser": "iser"}
_NORMAL_SESSION = 2
_TRANSPORTS = {"tcp": 0, "iser": 1}
_DIGESTS = {"none": 0, "none-crc32c": 1, "crc32c-none": 2, "crc32c": 3}
_CHECK_CONDITION, _UNIT_ATTENTION, _PROTECTED = 2, 6, 7
#: A target has something to tell about itself before it does anything, at times several things.
_ATTENTIONS = 8
#: A block of an answer about allocation: header and one descriptor.
_STATUS_LENGTH = 24


class _Task(ctypes.Structure):
    """The first fields of a command that was answered."""

    _fields_ = [
        ("status", c_int),
        ("_command", c_ubyte * 28),
        ("_residual", c_uint64 * 2),
        ("error_type", c_ubyte),
        ("sense_key", c_int),
    ]


class _Capacity(ctypes.Structure):
    _fields_ = [
        ("last_block", c_uint64),
        ("block_length", c_uint32),
        ("_protection", c_ubyte * 4),
        ("thin", c_ubyte),
        ("unmapped_is_zero", c_ubyte),
    ]


class _Status(ctypes.Structure):
    """A run of blocks: `state` 0 is data."""

    _fields_ = [("start", c_uint64), ("count", c_uint32), ("state", c_int)]


class _StatusList(ctypes.Structure):
    _fields_ = [("count", c_uint32), ("runs", POINTER(_Status))]


class _Range(ctypes.Structure):
    _fields_ = [("start", c_uint64), ("count", c_uint32)]


class _Vector(ctypes.Structure):
    _fields_ = [("base", c_void_p), ("length", ctypes.c_size_t)]


_TASK = POINTER(_Task)
_FLAGS = (c_int,) * 5
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "iscsi_create_context": (c_void_p, c_char_p),
    "iscsi_destroy_context": (c_int, c_void_p),
    "iscsi_init_transport": (c_int, c_void_p, c_int),
    "iscsi_set_targetname": (c_int, c_void_p, c_char_p),
    "iscsi_set_session_type": (c_int, c_void_p, c_int),
    "iscsi_set_header_digest": (c_int, c_void_p, c_int),
    "iscsi_set_initiator_username_pwd": (c_int, c_void_p, c_char_p, c_char_p),
    "iscsi_set_timeout": (c_int, c_void_p, c_int),
    "iscsi_set_noautoreconnect": (None, c_void_p, c_int),
    "iscsi_full_connect_sync": (c_int, c_void_p, c_char_p, c_int),
    "iscsi_logout_sync": (c_int, c_void_p),
    "iscsi_get_error": (c_char_p, c_void_p),
    "iscsi_readcapacity16_sync": (_TASK, c_void_p, c_int),
    "iscsi_get_lba_status_sync": (_TASK, c_void_p, c_int, c_uint64, c_uint32),
    "iscsi_read16_iov_sync": (
        *(_TASK, c_void_p, c_int, c_uint64, c_uint32, c_int),
        *(*_FLAGS, POINTER(_Vector), c_int),
    ),
    "iscsi_write16_iov_sync": (
        *(_TASK, c_void_p, c_int, c_uint64, c_void_p, c_uint32, c_int),
        *(*_FLAGS, POINTER(_Vector), c_int),
    ),
    "iscsi_writesame16_sync": (_TASK, c_void_p, c_int, c_uint64, c_char_p, c_uint32, c_uint32, *_FLAGS[:4]),
    "iscsi_unmap_sync": (_TASK, c_void_p, c_int, c_int, c_int, POINTER(_Range), c_int),
    "iscsi_synchronizecache16_sync": (_TASK, c_void_p, c_int, c_uint64, c_uint32, c_int, c_int),
    "scsi_datain_unmarshall": (c_void_p, _TASK),
    "scsi_free_scsi_task": (None, _TASK),
}


class Iscsi(Storage):
    """A disk (logical unit) of a target."""

    driver = "iscsi"
    fixed_size = True
    named = False
    plural = "iSCSI devices"
    must_exist: ClassVar[bool] = True
    can_create: ClassVar[bool] = True
    has_directory: ClassVar[bool] = False
    identity: ClassVar[tuple[str, ...]] = (
        *("lun", "portal", "driver", "transport", "target"),
        *("header-digest", "initiator-name"),
    )
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("transport", STR, None, "tcp or iser"),
        Option("portal", STR, None, "Host and port"),
        Option("target", STR, None, "Name of the target"),
        Option("lun", STR, "0", "Number of the disk"),
        Option("user", STR, None, "User for the login"),
        Option("password", STR, None, "Password for the login"),
        Option("password-secret", STR, None, "ID of the secret that is the password"),
        Option("initiator-name", STR, _INITIATOR, "Name of this side"),
        Option("header-digest", STR, "none-crc32c", "crc32c, none, crc32c-none or none-crc32c"),
        Option("timeout", NUM, TIMEOUT, "Seconds to wait for an answer"),
    )
    create_options: ClassVar[tuple[Option, ...]] = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("preallocation", STR, None, "Preallocation mode (allowed values: off)"),
    )

    def __init__(self, library: ctypes.CDLL, session: int, lun: int, name: str, *, writable: bool) -> None:
        """A disk of `session`, which is logged in and belongs to it from now on. Raises StorageError."""
        self.name = name
        self.writable = writable
        self._library = library
        self._session: int | None = session
        self._lun = lun
        self._block = self._size = 0
        self._thin = self._zeros = False
        self._calling = allocate_lock()
        self._changing = allocate_lock()
        self._read_capacity()
        self.limits = Limits(fast_zero=self._thin, parallel=1, remote=True)

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        refused = LocationError(f"Failed to parse URL : {name}")
        scheme, _, rest = name.partition("://")
        parts = rest.split("/")
        if scheme not in _PREFIXES or len(parts) != 3 or not all(parts):
            raise refused
        login, _, portal = parts[0].rpartition("@")
        if not parts[2].isdecimal() or not portal:
            raise refused
        values: dict[str, Value] = {"transport": _PREFIXES[scheme], "portal": portal}
        values |= {"target": parts[1], "lun": parts[2]}
        if login:
            user, _, password = login.partition("%")
            values["user"] = user
            if password:
                values["password"] = password
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
        context: Context | None = None,
    ) -> Self:
        if not all(values.get(name) for name in ("transport", "portal", "target")):
            raise LocationError("Need all of transport, portal and target options")
        transport, digest = str(values["transport"]), str(values.get("header-digest", "none-crc32c"))
        if transport not in _TRANSPORTS:
            raise OptionError(f"Unknown transport: {transport}", option="transport")
        if digest not in _DIGESTS:
            raise OptionError(f"Invalid header-digest setting : {digest}", option="header-digest")
        lun = int(Option("lun", NUM, 0, "").parse(str(values.get("lun", "0"))))
        login = _login(values, context)
        library = clibrary.load("iscsi", "7", "libiscsi7", _FUNCTIONS)
        session = library.iscsi_create_context(str(values.get("initiator-name", _INITIATOR)).encode())
        try:
            library.iscsi_init_transport(session, _TRANSPORTS[transport])
            library.iscsi_set_targetname(session, str(values["target"]).encode())
            library.iscsi_set_session_type(session, _NORMAL_SESSION)
            library.iscsi_set_header_digest(session, _DIGESTS[digest])
            library.iscsi_set_timeout(session, int(values.get("timeout", TIMEOUT)))
            library.iscsi_set_noautoreconnect(session, 1)
            if login is not None:
                library.iscsi_set_initiator_username_pwd(session, *login)
            if library.iscsi_full_connect_sync(session, str(values["portal"]).encode(), lun) != 0:
                reason = _error(library, session)
                raise StorageError(f"iSCSI: Failed to connect to LUN : {reason}", errno=errno.EINVAL)
            name = f"iscsi://{values['portal']}/{values['target']}/{lun}"
            return cls(library, session, lun, name, writable=writable or create)
        except BaseException:
            library.iscsi_destroy_context(session)
            raise

    @property
    def size(self) -> int:
        return self._size

    # -- commands

    def _call(self, function: str, *arguments: object) -> ctypes._Pointer[_Task]:
        """Send a command, again as long as the target has to tell something of itself first. The caller frees
        the answer. Raises StorageError."""
        send = getattr(self._library, f"iscsi_{function}")
        reason, number = "", errno.EIO
        for _ in range(_ATTENTIONS):
            if self._session is None:
                raise StorageError("The session is closed", errno=errno.EBADF)
            task: ctypes._Pointer[_Task] = send(self._session, self._lun, *arguments)
            if task and task.contents.status == 0:
                return task
            reason = _error(self._library, self._session)
            if not task:
                break
            status, key = task.contents.status, task.contents.sense_key
            self._library.scsi_free_scsi_task(task)
            if status != _CHECK_CONDITION or key != _UNIT_ATTENTION:
                number = errno.EPERM if status == _CHECK_CONDITION and key == _PROTECTED else errno.EIO
                break
        raise StorageError(f"iSCSI: {reason}", errno=number)

    def _run(self, function: str, *arguments: object) -> None:
        """Send a command that answers nothing. Raises StorageError."""
        with self._calling:
            self._library.scsi_free_scsi_task(self._call(function, *arguments))

    def _read_capacity(self) -> None:
        with self._calling:
            task = self._call("readcapacity16_sync")
            try:
                place = self._library.scsi_datain_unmarshall(task)
                if not place:
                    raise StorageError("iSCSI: the disk does not tell its size", errno=errno.EIO)
                found = ctypes.cast(place, POINTER(_Capacity)).contents
                self._block = found.block_length
                self._size = (found.last_block + 1) * self._block
                self._thin, self._zeros = bool(found.thin), bool(found.unmapped_is_zero)
            finally:
                self._library.scsi_free_scsi_task(task)
        if self._block < 512 or self._block & (self._block - 1) or self._size > INT64_MAX:
            raise StorageError("iSCSI: the disk tells an impossible size", errno=errno.EINVAL)

    def _transfer(self, function: str, view: memoryview, offset: int) -> None:
        """Move whole blocks, all inside the disk; `view` is writable."""
        for done in range(0, len(view), _STEP):
            piece = view[done : done + _STEP]
            place = (ctypes.c_char * len(piece)).from_buffer(piece)
            vector = _Vector(ctypes.addressof(place), len(piece))
            block = (offset + done) // self._block
            data = () if function.startswith("read") else (None,)
            self._run(function, block, *data, len(piece), self._block, 0, 0, 0, 0, 0, vector, 1)

    # -- reading

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        inside = max(0, min(len(view), self._size - offset))
        view[inside:] = bytes(len(view) - inside)
        start, end = round_down(offset, self._block), round_up(offset + inside, self._block)
        if not inside:
            return
        if (start, end) == (offset, offset + inside):
            self._transfer("read16_iov_sync", view[:inside], offset)
            return
        whole = memoryview(bytearray(end - start))
        self._transfer("read16_iov_sync", whole, start)
        view[:inside] = whole[offset - start : offset - start + inside]

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = max(start, min(end, self._size))
        while start < inside:
            step, flags = self._status(start)
            step = min(step, inside - start)
            yield Extent(start, step, flags, 0, start, self)
            start += step
        if start < end:
            yield Extent(start, end - start, ZERO, 0, start, self)

    def _status(self, start: int) -> tuple[int, int]:
        """How many bytes from `start` on are data (MAPPED), or read as zeros (ZERO)."""
        rest = self._size - start
        if not self._thin or not self._zeros:
            return rest, MAPPED
        block = start // self._block
        with self._calling:
            task = self._call("get_lba_status_sync", block, _STATUS_LENGTH)
            try:
                place = self._library.scsi_datain_unmarshall(task)
                found = ctypes.cast(place, POINTER(_StatusList)).contents if place else None
                if (
                    found is None
                    or not found.count
                    or found.runs[0].start != block
                    or not found.runs[0].count
                ):
                    return rest, MAPPED
                run = found.runs[0]
                length = (block + run.count) * self._block - start
                return length, MAPPED if run.state == 0 else ZERO
            finally:
                self._library.scsi_free_scsi_task(task)

    # -- writing

    def _check_range(self, offset: int, length: int) -> None:
        if offset + length > self._size:
            raise StorageError(os.strerror(errno.ENOSPC), errno=errno.ENOSPC, offset=offset)

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf)
        if not view:
            return
        self._check_range(offset, len(view))
        start, end = round_down(offset, self._block), round_up(offset + len(view), self._block)
        if (start, end) == (offset, offset + len(view)):
            self._transfer("write16_iov_sync", memoryview(bytearray(view)) if view.readonly else view, offset)
            return
        with self._changing:  # blocks that are only partly written keep the rest
            whole = memoryview(self.read(start, end - start))
            whole[offset - start : offset - start + len(view)] = view
            self._transfer("write16_iov_sync", whole, start)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if length <= 0:
            return
        self._check_range(offset, length)
        low, high = round_up(offset, self._block), round_down(offset + length, self._block)
        if low >= high or not (unmap and self._thin and self._zeros):
            super().zero(offset, length, unmap)
            return
        super().zero(offset, low - offset)
        self._clear(low, high)
        super().zero(high, offset + length - high)

    def _clear(self, low: int, high: int) -> None:
        """Whole blocks by the target, which writes none; where it refuses, by writing."""
        empty = bytes(self._block)
        try:
            for start in range(low, high, _CLEAR * self._block):
                count = min(_CLEAR, (high - start) // self._block)
                self._run("writesame16_sync", start // self._block, empty, len(empty), count, 0, 1, 0, 0)
        except StorageError:
            super().zero(low, high - low)

    def discard(self, offset: int, length: int) -> None:
        low = round_up(offset, self._block)
        high = round_down(min(offset + length, self._size), self._block)
        if not self._thin:
            return
        try:
            for start in range(low, high, _CLEAR * self._block):
                run = _Range(start // self._block, min(_CLEAR, (high - start) // self._block))
                self._run("unmap_sync", 0, 0, run, 1)
        except StorageError:
            self._thin = False  # it is a wish, and this target does not grant it

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}' for iSCSI devices")
        if size > self._size:
            raise NotSupported("Cannot grow iSCSI devices")

    def flush(self) -> None:
        if self.writable:
            self._run("synchronizecache16_sync", 0, 0, 0, 0)

    def close(self) -> None:
        with self._calling:
            session, self._session = self._session, None
            if session is not None:
                self._library.iscsi_logout_sync(session)
                self._library.iscsi_destroy_context(session)


class Iser(Iscsi):
    """The same over RDMA."""

    driver = "iser"


def _error(library: ctypes.CDLL, session: int) -> str:
    text: bytes = library.iscsi_get_error(session) or b""
    return " ".join(text.decode("utf-8", "replace").split())[:200]


def _login(values: dict[str, Value], context: Context | None) -> tuple[bytes, bytes] | None:
    """User and password, None: nobody asks. Raises OptionError."""
    if not values.get("user"):
        return None
    if "password" in values and "password-secret" in values:
        message = "'password' and 'password-secret' properties are mutually exclusive"
        raise OptionError(message, option="password")
    if "password-secret" in values and context is not None:
        password = context.secret(str(values["password-secret"]))
    elif "password" in values:
        password = str(values["password"]).encode()
    else:
        raise OptionError("CHAP username specified but no password was given", option="password")
    return str(values["user"]).encode(), password
