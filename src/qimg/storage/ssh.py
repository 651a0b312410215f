"""Images behind SSH: the protocol ``ssh``, by SFTP (protocols sheet 2; draft-ietf-secsh-filexfer-02).

Host keys are checked against known_hosts unless the user gives a fingerprint or says otherwise. What the
user logs in with are the keys of the agent and of ``~/.ssh``.
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

import os
from _thread import allocate_lock

from qimg.context import Notice
from qimg.errors import LocationError, NotSupported, OptionError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.options import NUM, SIZE, STR, Option
from qimg.storage.base import Limits, Storage
from qimg.storage.posix import CACHE_MODES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes
    from qimg.storage.sftp import RemoteFile

_PORT = 22
_MAX_PORT = 65535
NONE, HASH, KNOWN_HOSTS = "none", "hash", "known_hosts"
_MODES = (NONE, HASH, KNOWN_HOSTS)
HASHES = ("md5", "sha1", "sha256")


class HostKeyCheck:
    """How the server proves that it is the right one: `mode` (none, hash, known_hosts), and for hash the
    `type` (md5, sha1, sha256) and the hexadecimal `digest` of its public key."""

    __slots__ = ("digest", "mode", "type")

    def __init__(self, mode: str, type: str = "", digest: str = "") -> None:
        self.mode = mode
        self.type = type
        self.digest = digest

    def accepts(self, fingerprint: str) -> bool:
        """Whether a fingerprint of this `type` is the one wanted; colons that the user gave do not count."""
        return self.digest.replace(":", "").lower() == fingerprint


class Place:
    """What to connect to, and which file: host, port, user, path, and the check of the host's key."""

    __slots__ = ("check", "host", "path", "port", "user")

    def __init__(self, host: str, port: int, user: str, path: str, check: HostKeyCheck) -> None:
        self.host = host
        self.port = port
        self.user = user
        self.path = path
        self.check = check

    @classmethod
    def from_options(cls, values: dict[str, Value]) -> Self:
        """Raises OptionError."""
        host, port = _server(values)
        if "path" not in values:
            raise OptionError("Parameter 'path' is missing", option="path")
        return cls(host, port, str(values.get("user") or _local_user()), str(values["path"]), _check(values))


class SshFile(Storage):
    """A file on another machine, read and written by SFTP."""

    driver = "ssh"
    can_create: ClassVar[bool] = True
    zero_init = True
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("server.*", STR, None, "Host and port of the server"),
        Option("host", STR, None, "Host name of the server"),
        Option("port", NUM, _PORT, "Port of the server"),
        Option("path", STR, None, "Path of the file on the server"),
        Option("user", STR, None, "User name on the server"),
        Option("host_key_check", STR, None, "Check of the host key: yes, no, md5:HEX, sha1:HEX, sha256:HEX"),
        Option("host-key-check.*", STR, None, "Check of the host key: mode, type, hash"),
    )
    identity: ClassVar[tuple[str, ...]] = ("driver", *(option.name for option in open_options))
    create_options: ClassVar[tuple[Option, ...]] = (Option("size", SIZE, None, "Virtual disk size"),)

    def __init__(
        self, file: RemoteFile, name: str, *, writable: bool, cache: str, context: Context | None
    ) -> None:
        """Own `file`. Use `from_options`."""
        self.name = name
        self.writable = writable
        self.created = file.created
        self.limits = Limits(fast_zero=False, remote=True)
        self._file = file
        self._size = file.size
        self._growing = allocate_lock()
        self._context = context
        # The server's cache is what there is; ours has no part in it.
        _, self._sync, self._no_flush = CACHE_MODES[cache]

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        from urllib.parse import parse_qsl, unquote, urlsplit

        try:
            url = urlsplit(name)
            port = url.port or _PORT
        except ValueError:
            raise LocationError("invalid host or port in URI") from None
        if not url.hostname:
            raise LocationError("missing hostname in URI")
        if not url.path:
            raise LocationError("missing remote path in URI")
        values: dict[str, Value] = {"host": url.hostname, "port": port, "path": unquote(url.path)}
        if url.username:
            values["user"] = unquote(url.username)
        query = dict(parse_qsl(url.query))
        if "host_key_check" in query:
            values["host_key_check"] = query["host_key_check"]
        return values

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        place = Place.from_options(values)
        name = f"ssh://{place.user}@{place.host}:{place.port}{place.path}"
        if values.get("host_key_check"):
            name += f"?host_key_check={values['host_key_check']}"
        file = _client().RemoteFile(place, writable=writable, create=create)
        return cls(file, name, writable=writable, cache=cache, context=context)

    @classmethod
    def remove(cls, values: dict[str, Value], *, context: Context) -> None:
        _client().remove_file(Place.from_options(values))

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        inside = max(0, min(len(view), self._size - offset))
        self._file.read_into(view[:inside], offset)
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf).cast("B")
        self._file.write(view, offset)
        if view:
            self._grew(offset + len(view))
        if self._sync:
            self.flush()

    def _grew(self, end: int) -> None:
        with self._growing:
            self._size = max(self._size, end)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        inside = max(0, min(length, self._size - offset))
        super().zero(offset, inside)
        if inside < length:
            # What the file did not have reads as zeros; a change of its length might cut what others write.
            self.write(b"\0", offset + length - 1)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        inside = max(0, min(length, self._size - start))
        if inside:
            yield Extent(start, inside, MAPPED, 0, start, self)
        if inside < length:
            yield Extent(start + inside, length - inside, ZERO, 0, start + inside, self)

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'")
        self._file.truncate(size)
        self._size = size

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        self.resize(0)

    def flush(self) -> None:
        if not self.writable or self._no_flush:
            return
        if not self._file.sync() and self._context is not None:
            self._context.warn(Notice("The SSH server cannot say when data is on its disk (no fsync)"))
            self._context = None

    def close(self) -> None:
        self._file.close()


def _client() -> ModuleType:
    """The module that does the work, which needs a package that not everybody has."""
    try:
        from qimg.storage import sftp
    except ImportError as error:
        message = "The protocol 'ssh' needs the package asyncssh: pip install 'qimg[ssh]'"
        raise NotSupported(message) from error
    return sftp


def _server(values: dict[str, Value]) -> tuple[str, int]:
    """Host and port, the old options before the new ones. Raises OptionError."""
    for name in values:
        if name.startswith("server.") and name not in ("server.host", "server.port"):
            raise OptionError(f"Parameter '{name}' is unexpected", option=name)
    if "host" in values:
        return str(values["host"]), _port(values.get("port", _PORT))
    if "server.host" not in values and "server.port" not in values:
        raise OptionError("Parameter 'server' is missing", option="server")
    for name in ("server.host", "server.port"):
        if name not in values:
            raise OptionError(f"Parameter '{name}' is missing", option=name)
    return str(values["server.host"]), _port(values["server.port"])


def _port(value: Value) -> int:
    text = str(value)
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= _MAX_PORT):
        raise OptionError(f"'{text}' is no port", option="port")
    return int(text)


def _check(values: dict[str, Value]) -> HostKeyCheck:
    """The check of the host key, the old option before the new ones. Raises OptionError."""
    old = values.get("host_key_check")
    if old is not None:
        return _old_check(str(old))
    given = {name[15:]: str(value) for name, value in values.items() if name.startswith("host-key-check.")}
    mode = given.pop("mode", None)
    if mode is None:
        if given:
            raise OptionError("Parameter 'host-key-check.mode' is missing", option="host-key-check.mode")
        return HostKeyCheck(KNOWN_HOSTS)
    if mode not in _MODES:
        raise OptionError(f"Parameter 'mode' does not accept value '{mode}'", option="host-key-check.mode")
    wanted = ("type", "hash") if mode == HASH else ()
    for name in wanted:
        if name not in given:
            raise OptionError(
                f"Parameter 'host-key-check.{name}' is missing", option=f"host-key-check.{name}"
            )
    for name in given:
        if name not in wanted:
            raise OptionError(f"Parameter 'host-key-check.{name}' is unexpected", option=name)
    kind = given.get("type", "")
    if mode == HASH and kind not in HASHES:
        raise OptionError(f"Parameter 'type' does not accept value '{kind}'", option="host-key-check.type")
    return HostKeyCheck(mode, kind, given.get("hash", ""))


def _old_check(text: str) -> HostKeyCheck:
    if text in ("no", "yes"):
        return HostKeyCheck(NONE if text == "no" else KNOWN_HOSTS)
    kind, colon, digest = text.partition(":")
    if not colon or kind not in HASHES:
        raise OptionError(f"unknown host_key_check setting ({text})", option="host_key_check")
    return HostKeyCheck(HASH, kind, digest)


def _local_user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise OptionError("Parameter 'user' is missing", option="user") from None
