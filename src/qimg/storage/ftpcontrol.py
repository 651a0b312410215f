"""Control connections to FTP servers, plain and with TLS, that neither wait nor listen for ever."""

from __future__ import annotations

import ftplib
import socket
import ssl
import time

#: Bytes of the answer to one command.
_MAX_ANSWER = 64 << 10


class Control(ftplib.FTP):
    """A client whose answers have to come in time, and to end."""

    def __init__(self, timeout: float | None) -> None:
        super().__init__(timeout=timeout)
        self._received = bytearray()
        self._length = 0

    def putcmd(self, line: str) -> None:
        self._length = 0
        super().putcmd(line)

    def getline(self) -> str:
        began = time.monotonic()
        while (end := self._received.find(b"\n")) < 0:
            if self.timeout is not None and time.monotonic() - began > self.timeout:
                raise TimeoutError
            self._receive()
        line = self._received[:end].decode(self.encoding, "replace")
        del self._received[: end + 1]
        return line.rstrip("\r")

    def _receive(self) -> None:
        assert self.sock is not None
        data = self.sock.recv(4096)
        if not data:
            raise EOFError
        self._received += data
        self._length += len(data)
        if self._length > _MAX_ANSWER:
            raise ftplib.error_proto("an answer without end")


class ImplicitTls(Control, ftplib.FTP_TLS):
    """A client that speaks TLS before anything else, and on data connections as part of the same TLS session,
    which many servers insist on: the old way of ``ftps://``."""

    def __init__(self, timeout: float | None, context: ssl.SSLContext) -> None:
        super().__init__(timeout)
        self.context = context

    def connect(
        self,
        host: str = "",
        port: int = 0,
        timeout: float = -999,
        source_address: tuple[str, int] | None = None,
    ) -> str:
        self.host, self.port = host, port
        plain = socket.create_connection((host, port), self.timeout, source_address)
        self.af = plain.family
        self.sock = self.context.wrap_socket(plain, server_hostname=host)
        self.file = self.sock.makefile("r", encoding=self.encoding)
        self.welcome = self.getresp()
        return self.welcome

    def login(self, user: str = "", passwd: str = "", acct: str = "", secure: bool = False) -> str:
        answer = super().login(user, passwd, acct, secure=secure)
        self.prot_p()
        return answer

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[socket.socket, int | None]:
        plain, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.context.wrap_socket(plain, server_hostname=self.host, session=self.sock.session), size
