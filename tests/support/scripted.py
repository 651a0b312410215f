"""A web server that answers each request as a script says: faults that no real server makes on demand."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


class Request:
    """One GET: the bytes `first` .. `last` of the server's `content` are asked for."""

    def __init__(self, handler: BaseHTTPRequestHandler, content: bytes, ended: Event) -> None:
        self.handler = handler
        self.content = content
        self.ended = ended
        first, _, last = handler.headers["Range"].removeprefix("bytes=").partition("-")
        self.first = int(first)
        self.last = min(int(last), len(content) - 1)
        self.body = content[self.first : self.last + 1]

    def head(self, status: int, **headers: object) -> None:
        """Send a status line and headers (``Content_Range`` for Content-Range)."""
        self.handler.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.handler.send_header(name.replace("_", "-"), str(value))
        self.handler.end_headers()

    def partial(self, **other: object) -> None:
        """The head of an honest answer, but for the headers `other`."""
        honest = {
            "Content_Range": f"bytes {self.first}-{self.last}/{len(self.content)}",
            "Content_Length": len(self.body),
            "ETag": '"1"',
        }
        self.head(206, **{**honest, **other})

    def send(self, body: bytes) -> None:
        """Send bytes of the body."""
        self.handler.wfile.write(body)

    def hang_up(self, *, hard: bool = False) -> None:
        """Close the connection; `hard`: by a reset."""
        if hard:
            linger = struct.pack("ii", 1, 0)
            self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.handler.connection.close()
        self.handler.close_connection = True


Act = Callable[[Request], None]


def honest(request: Request) -> None:
    """The bytes asked for."""
    request.partial()
    request.send(request.body)


def status(code: int, **headers: object) -> Act:
    """An answer without content."""
    return lambda request: request.head(code, **{"Content_Length": 0, **headers})


def headers(**changed: object) -> Act:
    """An honest answer with other headers; None leaves one out."""

    def act(request: Request) -> None:
        request.partial(**changed)
        request.send(request.body)
        request.hang_up()

    return act


def cut(after: int, *, hard: bool = False) -> Act:
    """The connection breaks after so many bytes of the body."""

    def act(request: Request) -> None:
        request.partial()
        request.send(request.body[:after])
        request.hang_up(hard=hard)

    return act


def silence(after: int = 0) -> Act:
    """Nothing comes any more after so many bytes of the body; the connection stays."""

    def act(request: Request) -> None:
        request.partial()
        request.send(request.body[:after])
        request.handler.wfile.flush()
        request.ended.wait(30)
        request.hang_up()

    return act


def trickle(request: Request) -> None:
    """A byte now and then."""
    request.partial()
    for byte in request.body:
        request.send(bytes((byte,)))
        if request.ended.wait(0.05):
            return


def trickling_head(request: Request) -> None:
    """A head that never ends."""
    request.send(b"HTTP/1.1 206 Partial\r\n")
    while not request.ended.wait(0.05):
        request.send(b"X: y\r\n"[:1])


def nothing(request: Request) -> None:
    """The connection is closed without an answer."""
    request.hang_up()


def garbage(request: Request) -> None:
    """Something that is no HTTP."""
    request.send(b"\x00\x16\x03 no http \x1b[31m at all\r\n\r\n")
    request.hang_up()


def chunked(request: Request) -> None:
    """An honest answer whose body comes in chunks."""
    request.partial(Content_Length=None, Transfer_Encoding="chunked")
    for start in range(0, len(request.body), 1000):
        piece = request.body[start : start + 1000]
        request.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    request.send(b"0\r\n\r\n")


def short_range(request: Request) -> None:
    """An honest answer to half of the range asked for, which RFC 9110 allows."""
    half = max(1, len(request.body) // 2)
    content_range = f"bytes {request.first}-{request.first + half - 1}/{len(request.content)}"
    request.partial(Content_Range=content_range, Content_Length=half)
    request.send(request.body[:half])


def redirect(target: str) -> Act:
    """Elsewhere."""
    return status(302, Location=target)


class ScriptedWeb:
    """The server: `content` is every file's; each request takes the next act of `script`, if any."""

    def __init__(self, content: bytes, keep: float | None = None) -> None:
        """`keep`: seconds after which a connection without requests is closed."""
        self.content = content
        self.script: list[Act] = []
        #: Of every request: the path, the Range header, and the Authorization and Cookie headers.
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.connections = 0
        self._ended = Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = keep

            def setup(self) -> None:
                web.connections += 1
                super().setup()

            def do_GET(self) -> None:
                seen = self.headers
                web.requests.append((self.path, seen["Range"], seen["Authorization"], seen["Cookie"]))
                act = web.script.pop(0) if web.script else honest
                try:
                    act(Request(self, web.content, web._ended))
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Connections that break are what it is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self) -> list[str]:
        """The ranges asked for so far."""
        return [request[1] for request in self.requests]

    @contextmanager
    def running(self) -> Iterator[ScriptedWeb]:
        """Serves until the end of the block."""
        thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()
