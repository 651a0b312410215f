"""Addresses of servers, as options (``server.type`` ...) say them, and connecting to them.

What a structure takes and how it is refused is the real program's (its type SocketAddress).
"""

from __future__ import annotations

import errno
import os

from qimg.errors import NotSupported, OptionError, StorageError
from qimg.options import parse_bool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket
    from typing import Any

    from qimg.options import Value

# type -> the properties it needs, and those it may have.
_PROPERTIES = {
    "inet": (("host", "port"), ("numeric", "to", "ipv4", "ipv6", "keep-alive", "mptcp")),
    "unix": (("path",), ("abstract", "tight")),
    "vsock": (("cid", "port"), ()),
    "fd": (("str",), ()),
}


class Address:
    """Where a server listens: `kind` (inet, unix, vsock) and the typed texts of its `properties`."""

    __slots__ = ("kind", "properties")

    def __init__(self, kind: str, **properties: str) -> None:
        self.kind = kind
        self.properties = properties

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and (self.kind, self.properties) == (other.kind, other.properties)

    __hash__ = None  # type: ignore[assignment]

    @property
    def host(self) -> str | None:
        """The name or number of the machine, None for another kind of address."""
        return self.properties.get("host")

    @property
    def path(self) -> str | None:
        """The name of the socket's file, None for another kind of address."""
        return self.properties.get("path")

    def __str__(self) -> str:
        names = {"inet": ("host", "port"), "unix": ("path",), "vsock": ("cid", "port")}[self.kind]
        return ":".join(self.properties[name] for name in names)

    def connect(self, timeout: float) -> socket:
        """A connected socket, blocking; `timeout` in seconds for each address that the host has.

        Raises StorageError."""
        import socket

        failure: OSError | None = None
        for family, place in self._places():
            made = None
            try:
                made = socket.socket(family, socket.SOCK_STREAM)
                made.settimeout(timeout)
                made.connect(place)
                made.settimeout(None)
                return made
            except OSError as error:
                failure = error
                if made is not None:
                    made.close()
        assert failure is not None
        number = errno.ETIMEDOUT if isinstance(failure, TimeoutError) else failure.errno or errno.EIO
        raise StorageError(f"Failed to connect to '{self}': {os.strerror(number)}", errno=number) from failure

    def _places(self) -> list[tuple[int, Any]]:
        """(family, address) for the socket calls, one at least. Raises StorageError."""
        import socket

        if self.kind == "unix":
            return [(socket.AF_UNIX, self._unix_name())]
        if self.kind == "vsock":
            return [(socket.AF_VSOCK, (int(self.properties["cid"]), int(self.properties["port"])))]
        try:
            found = socket.getaddrinfo(
                self.properties["host"],
                self.properties["port"],
                type=socket.SOCK_STREAM,
                family=self._family(),
                flags=socket.AI_ADDRCONFIG,
            )
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            message = f"address resolution failed for {self}: {reason}"
            raise StorageError(message, errno=errno.EHOSTUNREACH) from error
        return [(row[0], row[4]) for row in found]

    def _unix_name(self) -> bytes:
        name = os.fsencode(self.properties["path"])
        limit = 108
        if len(name) >= limit:
            text = f"UNIX socket path '{self.properties['path']}' is too long"
            raise StorageError(text, errno=errno.ENAMETOOLONG, hint=f"Path must be less than {limit} bytes")
        if not self._is_on("abstract"):
            return name
        return b"\0" + name if self._is_on("tight", True) else (b"\0" + name).ljust(limit, b"\0")

    def _family(self) -> int:
        """The family that ``ipv4`` and ``ipv6`` leave, 0 for both."""
        import socket

        four, six = self._is_on("ipv4"), self._is_on("ipv6")
        if four == six:
            return 0
        return int(socket.AF_INET if four else socket.AF_INET6)

    def _is_on(self, name: str, default: bool = False) -> bool:
        text = self.properties.get(name)
        return default if text is None else parse_bool(name, text)


def inet(host: str, port: str) -> Address:
    """A machine's name or number and a port's number or name."""
    return Address("inet", host=host, port=port)


def unix(path: str) -> Address:
    """A socket in the file system."""
    return Address("unix", path=path)


def from_options(values: dict[str, Value], prefix: str, kind: str | None = None) -> Address | None:
    """The address that the options ``PREFIXtype``, ``PREFIXhost`` ... describe, None where there are none.
    `kind`: the only one there is where ``type`` may be left out.

    Raises OptionError with the real program's words, NotSupported."""
    given = {name[len(prefix) :]: _text(values[name]) for name in values if name.startswith(prefix)}
    if not given:
        return None
    kind = given.pop("type", kind)
    if kind is None:
        raise OptionError("Parameter 'type' is missing", option="type")
    if kind not in _PROPERTIES:
        raise OptionError(f"Parameter 'type' does not accept value '{kind}'", option="type")
    needed, possible = _PROPERTIES[kind]
    for name in needed:
        if name not in given:
            raise OptionError(f"Parameter '{name}' is missing", option=name)
    for name, text in given.items():
        if name not in needed and name not in possible:
            raise OptionError(f"Parameter '{name}' is unexpected", option=name)
        if name in possible and name != "to":
            parse_bool(name, text)
    if kind == "fd":
        raise NotSupported("Servers on a passed file descriptor are not supported")
    if kind == "vsock" and not all(given[name].isdecimal() for name in needed):
        raise OptionError("Parameter 'cid' and 'port' expect numbers", option="cid")
    return Address(kind, **given)


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
