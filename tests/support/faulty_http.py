"""A proxy in front of an HTTP server that misbehaves as it is told."""

from __future__ import annotations

import http.client
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple


class Fault(NamedTuple):
    """What happens to `times` requests for which `hits(method, path)`: one of the others, in this order.

    status  answered with it instead of being passed on.
    delay   seconds before the answer.
    cut     bytes of the answer's body after which the connection breaks; 0: before any answer.
    short   bytes that the answer's body lacks, and says so: a whole answer, of another length.
    """

    hits: Callable[[str, str], bool]
    times: int = 1 << 30
    status: int | None = None
    delay: float = 0.0
    cut: int | None = None
    short: int = 0


class FaultyProxy:
    """Passes requests on to `endpoint` (``http://host:port``); `url` is its own."""

    def __init__(self, endpoint: str) -> None:
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.answer(self, endpoint.removeprefix("http://"))

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _fault(self, method: str, path: str) -> Fault | None:
        for number, fault in enumerate(self.faults):
            if fault.times and fault.hits(method, path):
                self.faults[number] = fault._replace(times=fault.times - 1)
                return fault
        return None

    def answer(self, request: BaseHTTPRequestHandler, host: str) -> None:
        self.seen.append((request.command, request.path))
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self._fault(request.command, request.path)
        if fault is not None and fault.delay:
            time.sleep(fault.delay)
        if fault is not None and fault.cut == 0:
            _break(request)
            return
        if fault is not None and fault.status is not None:
            request.send_response(fault.status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        connection = http.client.HTTPConnection(host)
        connection.request(request.command, request.path, body, dict(request.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self._send(request, answer, content, fault)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        answer: http.client.HTTPResponse,
        content: bytes,
        fault: Fault | None,
    ) -> None:
        if fault is not None and fault.short:
            content = content[: -fault.short]
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                request.send_header(name, value)
        length = answer.getheader("Content-Length") if request.command == "HEAD" else str(len(content))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        if fault is not None and fault.cut is not None:
            request.wfile.write(content[: fault.cut])
            request.wfile.flush()
            _break(request)
        elif request.command != "HEAD":
            request.wfile.write(content)


def _break(request: BaseHTTPRequestHandler) -> None:
    """Reset the connection."""
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """A running proxy."""
    proxy = FaultyProxy(endpoint)
    thread = Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
