"""Names of NBD exports: the forms that users write, and the one that is shown (protocols sheet 2)."""

from __future__ import annotations

from qimg.errors import LocationError
from qimg.storage.address import Address, inet, unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.options import Value

DEFAULT_PORT = "10809"
#: scheme -> whether it names a socket in the file system, whether TLS is to be used.
SCHEMES = {
    "nbd": (False, False),
    "nbd+tcp": (False, False),
    "nbd+unix": (True, False),
    "nbds": (False, True),
    "nbds+unix": (True, True),
}
_EXPORT = ":exportname="
#: What the query of a name with TLS may say, as libnbd has it.
TLS_WORDS = ("tls-certificates", "tls-hostname")


def parse(name: str) -> dict[str, Value]:
    """The options that a name means: ``server.*``, ``export``, and ``tls`` for a scheme that says so.

    Raises LocationError."""
    scheme, separator, rest = name.partition("://")
    if separator and scheme in SCHEMES:
        return _parse_url(scheme, rest)
    if not name.startswith("nbd:"):
        raise LocationError("File name string for NBD must start with 'nbd:'")
    return _parse_old(name[4:])


def _parse_old(text: str) -> dict[str, Value]:
    """``HOST:PORT[:exportname=EXPORT]``, ``unix:PATH[:exportname=EXPORT]``."""
    where, named, export = text.partition(_EXPORT)
    if not where or (named and not export):
        return {}  # The real program takes nothing from such a name either.
    if where.startswith("unix:"):
        address = unix(where[5:])
    elif where.startswith("["):
        host, _, port = where[1:].partition("]:")
        address = inet(host, port)
    else:
        host, _, port = where.partition(":")
        address = inet(host, port)
    if address.host is not None and not address.properties["port"]:
        raise LocationError(f"error parsing address '{where}'")
    return _options(address, export)


def _parse_url(scheme: str, rest: str) -> dict[str, Value]:
    from urllib.parse import parse_qsl, unquote

    local, tls = SCHEMES[scheme]
    rest = rest.partition("#")[0]
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    words = parse_qsl(query, keep_blank_values=True)
    more = {key: value for key, value in words if tls and key in TLS_WORDS}
    sockets = [value for key, value in words if local and key == "socket"]
    host, port = ("", "") if local else _host_and_port(authority)
    valid = not authority and len(sockets) == 1 if local else bool(host)
    if not valid or len(words) != len(sockets) + len(more):
        raise LocationError("No valid URL specified")
    address = unix(sockets[0]) if local else inet(unquote(host), port)
    options = _options(address, unquote(path))
    if tls:
        options.update(tls=True, **more)
    return options


def _host_and_port(authority: str) -> tuple[str, str]:
    """The parts of ``USER@HOST:PORT``; the user is passed over. An empty host is what cannot be right."""
    place = authority.rpartition("@")[2]
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return "", ""
        port = port[1:]
    else:
        host, _, port = place.partition(":")
    port = port or DEFAULT_PORT
    return (host, port) if port.isascii() and port.isdecimal() else ("", "")


def _options(address: Address, export: str) -> dict[str, Value]:
    options: dict[str, Value] = {"server.type": address.kind}
    options.update((f"server.{name}", text) for name, text in address.properties.items())
    if export:
        options["export"] = export
    return options


def shown(address: Address, export: str, *, tls: bool) -> str | None:
    """What the export is called; None: no name leads there."""
    more = f"/{export}" if export else ""
    if address.kind == "inet":
        scheme = "nbds" if tls else "nbd"
        host, port = address.properties["host"], address.properties["port"]
        host = f"[{host}]" if ":" in host else host
        name = f"{scheme}://{host}:{port}{more}"
    elif address.kind == "unix":
        scheme = "nbds+unix" if tls else "nbd+unix"
        name = f"{scheme}://{more}?socket={address.path}"
    else:
        return None
    meant = _options(address, export)
    if tls:
        meant["tls"] = True
    try:
        return name if parse(name) == meant else None
    except LocationError:
        return None
