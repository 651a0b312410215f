"""Images on web servers: the protocols ``http`` and ``https`` (protocols sheet 2; RFC 9110, 14 and 15).

Every read is a GET of a byte range, the first one too: it tells the file's length, and whether the server has
ranges at all. One session per reading thread keeps its connections open.
"""

from __future__ import annotations

import time

from qimg.storage import webproxy
from qimg.storage.webfile import Facts, Interrupted, Session, WebFile, failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse
    from urllib.parse import SplitResult

    from qimg.storage.webfile import Access

    # What a connection leads to: scheme, host, port.
    Origin = tuple[str, str, int]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 20
#: What a server answers that may do better in a moment (RFC 9110 15.5.9, 15.6; RFC 6585 4).
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_PARTIAL, _NOT_SATISFIABLE = 206, 416
#: Bytes of an unwanted answer that are read so that its connection can be used again.
_MAX_UNWANTED = 1 << 16
#: Characters that stay as they are in the path and query of a URL; what is quoted already stays so.
_PLAIN = "/?%:@!$&'()*+,;=-._~[]|^`{}\\\"<>#"
_BAD_URL = "URL using bad/illegal format or missing URL"
_NO_RANGES = "Server does not support 'range' (byte ranges)."


class HttpFile(WebFile):
    """A file behind ``http://``."""

    driver = "http"

    def _session(self) -> Session:
        return HttpSession(self.access)


class HttpsFile(HttpFile):
    """A file behind ``https://``."""

    driver = "https"


class HttpSession(Session):
    """The connections of one reading thread: to the server, and to where it redirects."""

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self._connections: dict[Origin, HTTPConnection] = {}
        self._url = _split(access.url)
        self._headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "qimg"}

    def read(self, view: memoryview, offset: int) -> int:
        import http.client
        import ssl

        try:
            return self._read(view, offset)
        except ssl.SSLCertVerificationError as error:
            raise failed(f"SSL certificate problem: {error.verify_message}") from error
        except TimeoutError as error:
            raise Interrupted("Operation timed out") from error
        except http.client.RemoteDisconnected as error:
            raise Interrupted("Empty reply from server") from error
        except (http.client.HTTPException, ValueError) as error:
            raise failed(f"The server's answer makes no sense ({type(error).__name__})") from error
        except OSError as error:
            raise Interrupted(f"Recv failure: {error.strerror or type(error).__name__}") from error

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _read(self, view: memoryview, offset: int) -> int:
        response = self._get(offset, offset + len(view) - 1)
        with response:
            expected = self._accept(response, offset, len(view))
            done = self._receive(response, view[:expected])
        # What is left of an answer would be taken for the next one.
        self.alive = done == expected > 0 and not (response.will_close or response.chunked)
        if expected and not done:
            raise Interrupted("The server closed the connection")
        return done

    # -- asking

    def _get(self, first: int, last: int) -> HTTPResponse:
        """The answer to a GET of the bytes from `first` to `last`, wherever it is redirected."""
        url = self._url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._send(url, {**self._headers, "Range": f"bytes={first}-{last}"})
            target = response.getheader("Location")
            if response.status not in _REDIRECTS or target is None:
                return response
            url = self._redirected(url, target)
            self._drop(response)
        raise failed(f"Maximum ({_MAX_REDIRECTS}) redirects followed")

    def _redirected(self, url: SplitResult, target: str) -> SplitResult:
        from urllib.parse import urljoin

        try:
            new = _split(urljoin(url.geturl(), target))
        except ValueError:
            raise failed(_BAD_URL) from None
        if new.scheme not in _PORTS:
            raise failed(f"Protocol '{new.scheme}' not supported in a redirect")
        if url.scheme == "https" and new.scheme == "http":
            raise failed("The server redirects from https to http")
        return new

    def _send(self, url: SplitResult, headers: dict[str, str]) -> HTTPResponse:
        origin = _origin(url)
        if origin == _origin(self._url):
            headers |= self._credentials()
        proxy = webproxy.find(*origin, self.access.proxy_login)
        connection = self._connections.get(origin)
        if connection is None:
            connection = self._connect(origin, proxy)
            self._connections[origin] = connection
        place = _target(url)
        if proxy is not None and origin[0] == "http":
            place = f"http://{_host_port(origin)}{place}"
            headers |= proxy.headers
        connection.request("GET", place, headers=headers)
        return connection.getresponse()

    def _credentials(self) -> dict[str, str]:
        """What only the server that the user named gets to see."""
        headers = {}
        login = self.access.login or _login_of(self._url)
        if login is not None:
            headers["Authorization"] = webproxy.basic(*login)
        if self.access.cookie is not None:
            headers["Cookie"] = self.access.cookie
        return headers

    def _connect(self, origin: Origin, proxy: webproxy.Proxy | None) -> HTTPConnection:
        import http.client
        import ssl

        from qimg.storage.webresponse import Response

        scheme, host, port = origin
        near = (host, port) if proxy is None else (proxy.host, proxy.port)
        timeout = self.access.timeout
        connection: HTTPConnection
        if scheme == "http":
            connection = http.client.HTTPConnection(*near, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(*near, timeout=timeout, context=self.access.tls())
            if proxy is not None:
                connection.set_tunnel(host, port, proxy.headers)
        connection.response_class = Response
        began = time.monotonic()
        try:
            connection.connect()
        except (TimeoutError, ssl.SSLError):
            raise
        except OSError as error:
            took = int(1000 * (time.monotonic() - began))
            raise Interrupted(connect_words(*near, error, took), connected=False) from error
        return connection

    # -- answers

    def _accept(self, response: HTTPResponse, offset: int, length: int) -> int:
        """Set `facts` from the head of an answer; how many of the bytes asked for its body has."""
        status = response.status
        tag = response.getheader("ETag") or response.getheader("Last-Modified")
        if status == _PARTIAL:
            first, last, size = _content_range(response.getheader("Content-Range"))
            if first != offset or not first <= last < min(size, offset + length):
                raise failed("The server sent another range than the one asked for")
            if response.getheader("Content-Encoding", "identity") != "identity":
                raise failed("The server sent an encoded range")
            if response.length not in (None, last - first + 1):
                raise failed("The server's Content-Length contradicts its Content-Range")
            self.facts = Facts(size, tag)
            return last - first + 1
        empty = response.getheader("Content-Range") == "bytes */0" or (status, response.length) == (200, 0)
        if empty and status in (200, _NOT_SATISFIABLE):
            self.facts = Facts(0, tag)
            return 0
        raise self._refusal(response)

    def _refusal(self, response: HTTPResponse) -> Exception:
        status = response.status
        words = f"The requested URL returned error: {status}"
        if status in _TRY_AGAIN:
            wait = response.getheader("Retry-After", "")
            return Interrupted(words, wait=int(wait) if wait.isdecimal() and len(wait) < 6 else 0)
        if status == _NOT_SATISFIABLE and self.facts is not None:
            return failed("The file changed while it was read: it has become shorter")
        return failed(words if status >= 400 else _NO_RANGES)

    def _receive(self, response: HTTPResponse, view: memoryview) -> int:
        """Read the body into `view`; fewer bytes where the connection breaks."""
        # Straight from the socket into the caller's memory, unless the body comes in pieces with lengths.
        receive = response.readinto if response.chunked else response.fp.readinto1
        done = 0
        try:
            while done < len(view) and (count := receive(view[done:])):
                done += count
        except OSError:
            if not done:
                raise
        return done

    def _drop(self, response: HTTPResponse) -> None:
        """Be done with an answer; the connections stay if that costs little."""
        length = response.length
        keep = not response.will_close and length is not None and length <= _MAX_UNWANTED
        with response:
            if keep:
                response.read()
        if not keep:
            self.close()


def connect_words(host: str, port: int, error: OSError, took: int) -> str:
    """Why there is no connection, after `took` milliseconds, as curl puts it."""
    import socket

    if isinstance(error, socket.gaierror):
        return f"Could not resolve host: {host}"
    return f"Failed to connect to {host} port {port} after {took} ms: Couldn't connect to server"


def _split(url: str) -> SplitResult:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        valid = parts.port != 0 and not any(letter <= " " or letter == "\x7f" for letter in url)
    except ValueError:
        valid = False
    if not valid:
        raise failed(_BAD_URL)
    return parts


def _origin(url: SplitResult) -> Origin:
    if not url.hostname:
        raise failed(_BAD_URL)
    return url.scheme, url.hostname, url.port or _PORTS[url.scheme]


def _host_port(origin: Origin) -> str:
    host = f"[{origin[1]}]" if ":" in origin[1] else origin[1]
    return f"{host}:{origin[2]}"


def _target(url: SplitResult) -> str:
    """Path and query as they go into a request."""
    from urllib.parse import quote

    query = f"?{url.query}" if url.query else ""
    return quote((url.path or "/") + query, safe=_PLAIN)


def _login_of(url: SplitResult) -> tuple[bytes, bytes] | None:
    """User and password that stand in a URL."""
    from urllib.parse import unquote_to_bytes

    if url.username is None:
        return None
    return unquote_to_bytes(url.username), unquote_to_bytes(url.password or "")


def _content_range(text: str | None) -> tuple[int, int, int]:
    """First byte, last byte and length of the whole file, of a Content-Range header (RFC 9110 14.4)."""
    unit, _, rest = (text or "").partition(" ")
    span, _, size = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (_is_count(first) and _is_count(last)):
        raise failed("The server did not say which range it sent")
    if not _is_count(size):
        raise failed("Server didn't report file size.")
    return int(first), int(last), int(size)


def _is_count(text: str) -> bool:
    """Decimal digits, not more than a length of 64 bits has."""
    return text.isascii() and text.isdecimal() and len(text) <= 18
