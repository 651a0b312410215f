"""Answers of web servers that do not come in a trickle: `http.client` alone waits for each piece anew."""

from __future__ import annotations

import http.client
import io

from qimg.storage.webfile import Patience

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any


class Response(http.client.HTTPResponse):
    """An answer all of which has to come in time, head and body."""

    def __init__(self, sock: socket.socket, *rest: Any, **named: Any) -> None:
        super().__init__(sock, *rest, **named)
        timeout = sock.gettimeout()
        self.fp = io.BufferedReader(_Watched(sock.makefile("rb", buffering=0), Patience(timeout)))


class _Watched(io.RawIOBase):
    """Passes on what comes from a socket as long as it is worth waiting for."""

    def __init__(self, socket: io.RawIOBase, patience: Patience) -> None:
        self._socket = socket
        self._patience = patience
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._socket.readinto(buffer)
        self._done += count or 0
        self._patience.check(self._done)
        return count

    def close(self) -> None:
        self._socket.close()
        super().close()
