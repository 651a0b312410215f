"""A process that serves a folder by FTP to user u with password p: ``ftp_server.py FOLDER PORT [PEM]``; with
a PEM file (certificate and key) inside TLS from the first byte on."""

from __future__ import annotations

import sys

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler, TLS_FTPHandler
from pyftpdlib.servers import FTPServer


class Implicit(TLS_FTPHandler):  # type: ignore[misc]
    """TLS before anything else, which pyftpdlib has no switch for."""

    def handle(self) -> None:
        self.secure_connection(self.ssl_context)

    def handle_ssl_established(self) -> None:
        FTPHandler.handle(self)


def main(folder: str, port: str, pem: str | None = None) -> None:
    """Serve until killed."""
    handler = FTPHandler if pem is None else Implicit
    handler.authorizer = DummyAuthorizer()
    handler.authorizer.add_user("u", "p", folder)
    handler.auth_failed_timeout = 0
    if pem is not None:
        handler.certfile = pem
    FTPServer(("127.0.0.1", int(port)), handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
