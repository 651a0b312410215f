"""Proxies for web servers: which one, by the environment variables that curl reads, and the login there."""

from __future__ import annotations

import os

from qimg.errors import LocationError

TYPE_CHECKING = False

_DEFAULT_PORT = 1080  # curl's


class Proxy:
    """An HTTP proxy at `host`, `port`; `headers` for what is asked of the proxy itself."""

    __slots__ = ("headers", "host", "port")

    def __init__(self, host: str, port: int, login: tuple[bytes, bytes] | None) -> None:
        self.host = host
        self.port = port
        self.headers = {} if login is None else {"Proxy-Authorization": basic(*login)}


def basic(user: bytes, password: bytes) -> str:
    """The value of an Authorization header (RFC 7617)."""
    import binascii

    return "Basic " + binascii.b2a_base64(user + b":" + password, newline=False).decode("ascii")


def find(scheme: str, host: str, port: int, login: tuple[bytes, bytes] | None) -> Proxy | None:
    """The proxy for a server, None: go there directly. `login` goes before what its URL says.

    Raises LocationError for a proxy of another kind."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib.parse import unquote_to_bytes, urlsplit
    from urllib.request import getproxies_environment, proxy_bypass

    proxies = getproxies_environment()
    text = proxies.get(scheme) or proxies.get("all")
    if not text or proxy_bypass(f"{host}:{port}", proxies):
        return None
    url = urlsplit(text if "://" in text else f"http://{text}")
    if url.scheme != "http" or not url.hostname:
        raise LocationError(f"Proxies are supported as http://HOST:PORT only, not as {url.scheme}://")
    if login is None and url.username is not None:
        login = unquote_to_bytes(url.username), unquote_to_bytes(url.password or "")
    return Proxy(url.hostname, url.port or _DEFAULT_PORT, login)
