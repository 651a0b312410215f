"""``rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][:KEY=VALUE...]``: an image of a Ceph cluster (protocols sheet 2),
through the libraries librados and librbd. A backslash takes the meaning from ``/ @ : =``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from _thread import allocate_lock
from ctypes import CFUNCTYPE, POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_ssize_t, c_ubyte, c_uint64
from ctypes import c_void_p as handle

from qimg.errors import LocationError, NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.options import SIZE, STR, Option
from qimg.storage import clibrary
from qimg.storage.base import Limits, Storage
from qimg.units import INT64_MAX, MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes

#: Bytes of one request.
_STEP = 4 * MIB
#: Bytes whose allocation is asked for at once.
_WINDOW = 1 << 34
#: Snapshots that an image may have here.
_MAX_SNAPSHOTS = 65536
#: What a client waits for without end, unless told otherwise; in seconds.
_PATIENCE = {"client_mount_timeout": "30", "rados_mon_op_timeout": "30", "rados_osd_op_timeout": "60"}
#: Options of the cluster in a name, kept as they stand.
_CONFIGURATION = "=keyvalue-pairs"

_CALLBACK = CFUNCTYPE(c_int, c_uint64, c_size_t, c_int, handle)


class _Information(ctypes.Structure):
    _fields_ = [
        *(("size", c_uint64), ("object_size", c_uint64), ("objects", c_uint64), ("order", c_int)),
        *(("prefix", c_char * 24), ("parent_pool", c_uint64), ("parent", c_char * 96)),
    ]


class _Snapshot(ctypes.Structure):
    _fields_ = [("id", c_uint64), ("size", c_uint64), ("name", c_char_p)]


_RADOS: dict[str, tuple[Any, ...]] = {
    "rados_create": (c_int, POINTER(handle), c_char_p),
    "rados_conf_read_file": (c_int, handle, c_char_p),
    "rados_conf_set": (c_int, handle, c_char_p, c_char_p),
    "rados_connect": (c_int, handle),
    "rados_shutdown": (None, handle),
    "rados_ioctx_create": (c_int, handle, c_char_p, POINTER(handle)),
    "rados_ioctx_set_namespace": (None, handle, c_char_p),
    "rados_ioctx_destroy": (None, handle),
}
_RBD: dict[str, tuple[Any, ...]] = {
    "rbd_open": (c_int, handle, c_char_p, POINTER(handle), c_char_p),
    "rbd_open_read_only": (c_int, handle, c_char_p, POINTER(handle), c_char_p),
    "rbd_close": (c_int, handle),
    "rbd_create": (c_int, handle, c_char_p, c_uint64, POINTER(c_int)),
    "rbd_remove": (c_int, handle, c_char_p),
    "rbd_stat": (c_int, handle, POINTER(_Information), c_size_t),
    "rbd_resize": (c_int, handle, c_uint64),
    "rbd_read": (c_ssize_t, handle, c_uint64, c_size_t, handle),
    "rbd_write": (c_ssize_t, handle, c_uint64, c_size_t, handle),
    "rbd_write_zeroes": (c_ssize_t, handle, c_uint64, c_size_t, c_int, c_int),
    "rbd_discard": (c_int, handle, c_uint64, c_uint64),
    "rbd_flush": (c_int, handle),
    "rbd_diff_iterate2": (
        *(c_int, handle, c_char_p, c_uint64, c_uint64),
        *(c_ubyte, c_ubyte, _CALLBACK, handle),
    ),
    "rbd_snap_list": (c_int, handle, POINTER(_Snapshot), POINTER(c_int)),
    "rbd_snap_list_end": (None, POINTER(_Snapshot)),
    "rbd_snap_create": (c_int, handle, c_char_p),
    "rbd_snap_remove": (c_int, handle, c_char_p),
    "rbd_snap_rollback": (c_int, handle, c_char_p),
}


def _check(result: int, doing: str) -> int:
    """`result` of a call. Raises StorageError where it is an error."""
    if result >= 0:
        return result
    number = -result
    raise StorageError(f"{doing}: {os.strerror(number)}", errno=number)


class _Pool:
    """A connection to the cluster, and a pool of it."""

    def __init__(self, values: dict[str, Value], context: Context | None) -> None:
        """Connect. Raises NotSupported, OptionError, StorageError."""
        self._rados = clibrary.load("rados", "2", "librados2", _RADOS)
        self.library = clibrary.load("rbd", "1", "librbd1", _RBD)
        self._cluster, self.place = handle(), handle()
        user = values.get("user")
        _check(
            self._rados.rados_create(byref(self._cluster), None if user is None else str(user).encode()),
            "error initializing",
        )
        try:
            self._configure(values, context)
            _check(self._rados.rados_connect(self._cluster), "error connecting")
            pool = str(values["pool"])
            _check(
                self._rados.rados_ioctx_create(self._cluster, pool.encode(), byref(self.place)),
                f"error opening pool {pool}",
            )
        except BaseException:
            self.close()
            raise
        if values.get("namespace"):
            self._rados.rados_ioctx_set_namespace(self.place, str(values["namespace"]).encode())

    def _configure(self, values: dict[str, Value], context: Context | None) -> None:
        file = values.get("conf")
        for name, text in _PATIENCE.items():
            self._rados.rados_conf_set(self._cluster, name.encode(), text.encode())
        found = self._rados.rados_conf_read_file(
            self._cluster, None if file is None else os.fsencode(str(file))
        )
        if file is not None:
            _check(found, f"error reading conf file {file}")
        for name, text in _settings(values, context).items():
            _check(
                self._rados.rados_conf_set(self._cluster, name.encode(), text.encode()),
                f"invalid conf option {name}",
            )

    def close(self) -> None:
        """Disconnect."""
        place, self.place = self.place, handle()
        cluster, self._cluster = self._cluster, handle()
        if place:
            self._rados.rados_ioctx_destroy(place)
        if cluster:
            self._rados.rados_shutdown(cluster)


class Rbd(Storage):
    """An image of a cluster, or a snapshot of one."""

    driver = "rbd"
    zero_init = True
    named = False
    can_create: ClassVar[bool] = True
    has_directory: ClassVar[bool] = False
    identity: ClassVar[tuple[str, ...]] = (
        *("pool", "image", "conf", "snapshot", "driver", "namespace"),
        *("user", "server.*"),
    )
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("pool", STR, None, "Pool of the image"),
        Option("namespace", STR, None, "Namespace in the pool"),
        Option("image", STR, None, "Name of the image"),
        Option("snapshot", STR, None, "Snapshot of the image"),
        Option("conf", STR, None, "File of configuration"),
        Option("user", STR, None, "Name of the client, without the word client"),
        Option("key-secret", STR, None, "ID of the secret that is the client's key"),
        Option("auth-client-required.*", STR, None, "Ways to log in"),
        Option("server.*", STR, None, "Addresses of monitors"),
        Option(_CONFIGURATION, STR, None, "Further configuration, as in a name"),
    )
    create_options: ClassVar[tuple[Option, ...]] = (
        Option("cluster_size", SIZE, None, "RBD object size"),
        Option("size", SIZE, None, "Virtual disk size"),
    )

    def __init__(self, pool: _Pool, values: dict[str, Value], *, writable: bool, create: bool) -> None:
        """Open an image of `pool`, which belongs to it from now on; `create`: one that is not there yet.
        Raises StorageError."""
        self._image_name = str(values["image"])
        self._snapshot = values.get("snapshot")
        space = f"{values['namespace']}/" if values.get("namespace") else ""
        self.name = f"rbd:{values['pool']}/{space}{self._image_name}"
        self.writable = writable
        self.limits = Limits(remote=True)
        self._pool = pool
        self._library = pool.library
        self._image = handle()
        self._growing = allocate_lock()
        self._size = 0
        if not create:
            self._open()
            return
        try:
            self._open()
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            self.created = True
            return
        self._library.rbd_close(self._image)
        raise StorageError(f"error rbd create: {os.strerror(errno.EEXIST)}", errno=errno.EEXIST)

    def _open(self) -> None:
        way = self._library.rbd_open if self.writable else self._library.rbd_open_read_only
        snapshot = None if self._snapshot is None else str(self._snapshot).encode()
        result = way(self._pool.place, self._image_name.encode(), byref(self._image), snapshot)
        _check(result, f"error reading header from {self._image_name}")
        self._look()

    def _look(self) -> None:
        found = _Information()
        _check(
            self._library.rbd_stat(self._image, byref(found), ctypes.sizeof(found)), "error reading the size"
        )
        self._size = min(found.size, INT64_MAX)

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        place, colon, settings = _cut(name.removeprefix("rbd:"), ":")
        pool, slash, rest = _cut(place, "/")
        if not pool:
            raise LocationError("Pool name is required")
        namespace, slash, image = _cut(rest, "/")
        if not slash:
            namespace, image = "", rest
        image, _, snapshot = _cut(image, "@")
        values: dict[str, Value] = {
            "pool": _plain(pool),
            "image": _plain(image),
            "namespace": _plain(namespace),
        }
        if snapshot:
            values["snapshot"] = _plain(snapshot)
        others = []
        for key, text in _pairs(settings if colon else ""):
            if key in ("id", "conf"):
                values["user" if key == "id" else "conf"] = _plain(text)
            else:
                others.append(f"{key}={text}")
        if others:
            values[_CONFIGURATION] = ":".join(others)
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
        for name in ("pool", "image"):
            if not values.get(name):
                raise OptionError(f"Parameter '{name}' is missing", option=name)
        pool = _Pool(values, context)
        try:
            return cls(pool, values, writable=writable or create, create=create)
        except BaseException:
            pool.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    # -- reading

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        inside = max(0, min(len(view), self._size - offset))
        for done in range(0, inside, _STEP):
            piece = view[done : min(done + _STEP, inside)]
            place = (c_char * len(piece)).from_buffer(piece)
            count = _check(self._library.rbd_read(self._image, offset + done, len(piece), place), "rbd")
            if count != len(piece):
                raise StorageError("rbd: a read was cut short", errno=errno.EIO, offset=offset + done)
        view[inside:] = bytes(len(view) - inside)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        while start < min(end, self._size):
            step = min(_WINDOW, min(end, self._size) - start)
            for low, high in self._data(start, step):
                if low > start:
                    yield Extent(start, low - start, ZERO, 0, start, self)
                yield Extent(low, high - low, MAPPED, 0, low, self)
                step -= high - start
                start = high
            if step:
                yield Extent(start, step, ZERO, 0, start, self)
            start += step
        if start < end:
            yield Extent(start, end - start, ZERO, 0, start, self)

    def _data(self, start: int, length: int) -> list[tuple[int, int]]:
        """(start, end) of the runs that hold data."""
        runs: list[tuple[int, int]] = []

        def found(offset: int, count: int, exists: int, _: object) -> int:
            low, high = max(offset, start), min(offset + count, start + length)
            if exists and high > low:
                runs.append((low, high))
            return 0

        result = self._library.rbd_diff_iterate2(
            self._image, None, start, length, 1, 0, _CALLBACK(found), None
        )
        _check(result, "rbd: error reading what is allocated")
        return _joined(sorted(runs))

    # -- writing

    def _grow(self, end: int) -> None:
        with self._growing:  # or a smaller growth could cut a larger one off
            if end > self._size:
                self.resize(end)

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf)
        if view:
            self._grow(offset + len(view))
        for done in range(0, len(view), _STEP):
            piece = view[done : done + _STEP]
            place = clibrary.address(piece)
            _check(self._library.rbd_write(self._image, offset + done, len(piece), place), "rbd")

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if length <= 0:
            return
        self._grow(offset + length)
        flags = 0 if unmap else 1  # thick: keep the space
        for start in range(offset, offset + length, 1 << 30):
            step = min(1 << 30, offset + length - start)
            _check(self._library.rbd_write_zeroes(self._image, start, step, flags, 0), "rbd")

    def discard(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if length > 0:
            _check(self._library.rbd_discard(self._image, offset, length), "rbd")

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'")
        _check(self._library.rbd_resize(self._image, size), "failed to resize")
        self._size = size

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        unit = int(values.get("cluster_size", 0))
        if unit & (unit - 1):
            raise OptionError("obj size needs to be power of 2", option="cluster_size")
        if 0 < unit < 4096:
            raise OptionError("obj size too small", option="cluster_size")
        order = c_int(unit.bit_length() - 1 if unit else 0)
        _check(
            self._library.rbd_create(self._pool.place, self._image_name.encode(), 0, byref(order)),
            "error rbd create",
        )
        self._open()

    @classmethod
    def remove(cls, values: dict[str, Value], *, context: Context) -> None:
        pool = _Pool(values, context)
        try:
            _check(pool.library.rbd_remove(pool.place, str(values["image"]).encode()), "rbd remove")
        finally:
            pool.close()

    def flush(self) -> None:
        if self.writable:
            _check(self._library.rbd_flush(self._image), "rbd")

    # -- snapshots

    def snapshots(self) -> list[tuple[str, int]]:
        count = c_int(64)
        while True:
            rows = (_Snapshot * count.value)()
            result = self._library.rbd_snap_list(self._image, rows, byref(count))
            if result != -errno.ERANGE or count.value > _MAX_SNAPSHOTS:
                break
        _check(result, "failed to list snapshots")
        found = [(rows[n].name.decode("utf-8", "replace"), rows[n].size) for n in range(result)]
        if result:
            self._library.rbd_snap_list_end(rows)
        return found

    def create_snapshot(self, name: str) -> None:
        _check(self._library.rbd_snap_create(self._image, name.encode()), "failed to create snap")

    def apply_snapshot(self, name: str) -> None:
        _check(self._library.rbd_snap_rollback(self._image, name.encode()), "failed to rollback")
        self._look()

    def delete_snapshot(self, name: str) -> None:
        _check(self._library.rbd_snap_remove(self._image, name.encode()), "failed to remove snap")

    def close(self) -> None:
        image, self._image = self._image, handle()
        if image:
            self._library.rbd_close(image)
        self._pool.close()


# -- names


def _cut(text: str, mark: str) -> tuple[str, str, str]:
    """`text` up to the first `mark` that is not escaped, the mark, and what follows."""
    at = 0
    while at < len(text) and text[at] != mark:
        at += 2 if text[at] == "\\" else 1
    return text[:at], text[at : at + 1], text[at + 1 :]


def _plain(text: str) -> str:
    """`text` without the backslashes that escape."""
    plain, at = "", 0
    while at < len(text):
        at += text[at] == "\\" and at + 1 < len(text)
        plain += text[at]
        at += 1
    return plain


def _pairs(text: str) -> list[tuple[str, str]]:
    """``a=1:b=2`` as pairs, still escaped. Raises LocationError."""
    pairs = []
    while text:
        pair, _, text = _cut(text, ":")
        key, equals, value = _cut(pair, "=")
        if not equals:
            raise LocationError(f"conf option {_plain(key)} has no value")
        pairs.append((_plain(key), value))
    return pairs


def _settings(values: dict[str, Value], context: Context | None) -> dict[str, str]:
    """What the options say about the cluster's configuration."""
    found = {key: _plain(text) for key, text in _pairs(str(values.get(_CONFIGURATION, "")))}
    hosts = [
        name[: -len(".host")] for name in values if name.startswith("server.") and name.endswith(".host")
    ]
    if hosts:
        places = [f"{values[name + '.host']}:{values.get(name + '.port', 6789)}" for name in hosts]
        found["mon_host"] = ",".join(places)
    ways = [str(values[name]) for name in values if name.startswith("auth-client-required.")]
    if ways:
        found["auth_client_required"] = ";".join(ways)
    if "key-secret" in values and context is not None:
        from base64 import b64encode

        found["key"] = b64encode(context.secret(str(values["key-secret"]))).decode()
    return found


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending `runs`, neighbours put together."""
    joined: list[tuple[int, int]] = []
    for low, high in runs:
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined
