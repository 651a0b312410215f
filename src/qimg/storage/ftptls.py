"""FTP inside TLS from the first byte (the old, implicit way of ``ftps://``)."""

from __future__ import annotations

import ftplib
import socket
import ssl


class ImplicitTls(ftplib.FTP_TLS):
    """A client that speaks TLS before anything else, and on data connections as part of the same TLS session,
    which many servers insist on."""

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
