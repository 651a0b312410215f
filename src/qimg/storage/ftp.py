"""Images on FTP servers: the protocols ``ftp`` and ``ftps`` with TLS from the first byte (protocols sheet 2;
RFC 959, RFC 3659).

A transfer starts at an offset (REST) and then brings everything up to the end of the file, so a session reads
on where it has come to, and one session serves all threads in turn.
"""

from __future__ import annotations

import time
from _thread import allocate_lock

from qimg.storage.http import connect_words
from qimg.storage.webfile import Facts, Interrupted, Patience, Session, WebFile, failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ftplib
    import socket

    from qimg.storage.webfile import Access

_FTP, _FTPS = 21, 990
_LOGIN = (b"anonymous", b"ftp@example.com")
#: What cannot be found or must not be read.
_NO_FILE, _NOT_LOGGED_IN = "550", "530"


class FtpFile(WebFile):
    """A file behind ``ftp://``."""

    driver = "ftp"
    several = False

    def __init__(self, access: Access, readahead: int) -> None:
        self._turn = allocate_lock()
        super().__init__(access, readahead)

    def _session(self) -> Session:
        return FtpSession(self.access)

    def _fetch(self, view: memoryview, offset: int) -> int:
        with self._turn:
            return super()._fetch(view, offset)


class FtpsFile(FtpFile):
    """A file behind ``ftps://``."""

    driver = "ftps"


class FtpSession(Session):
    """A control connection and, between reads, the transfer that is under way."""

    def __init__(self, access: Access) -> None:
        super().__init__(access)
        self._control: ftplib.FTP | None = None
        self._data: socket.socket | None = None
        self._position = 0
        self._file = ""

    def read(self, view: memoryview, offset: int) -> int:
        import ftplib
        import ssl

        try:
            return self._read(view, offset)
        except ssl.SSLCertVerificationError as error:
            raise failed(f"SSL certificate problem: {error.verify_message}") from error
        except TimeoutError as error:
            raise Interrupted("Operation timed out") from error
        except ftplib.error_perm as error:
            raise failed(_refusal(str(error)[:3])) from error
        except ftplib.error_proto as error:
            raise failed("The server's answer makes no sense") from error
        except (ftplib.Error, EOFError) as error:
            raise Interrupted(f"The server answered {str(error)[:3] or 'nothing'}") from error
        except ValueError as error:
            raise failed("URL using bad/illegal format or missing URL") from error
        except OSError as error:
            raise Interrupted(f"Recv failure: {error.strerror or type(error).__name__}") from error

    def close(self) -> None:
        self.alive = False
        self._stop()
        if self._control is not None:
            self._control.close()

    def _stop(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None

    def _read(self, view: memoryview, offset: int) -> int:
        if self._control is None:
            self._control = self._connect()
        assert self.facts is not None
        length = min(len(view), self.facts.size - offset)
        if length <= 0:
            return 0
        if self._data is None or offset != self._position:
            self._begin(offset)
        assert self._data is not None
        done = self._receive(self._data, view[:length])
        self._position = offset + done
        if done < length:
            self.alive = False
            if not done:
                raise Interrupted("The server closed the connection")
        elif self._position == self.facts.size:
            self._end()
        return done

    def _receive(self, data: socket.socket, view: memoryview) -> int:
        patience = Patience(self.access.timeout)
        done = 0
        try:
            while done < len(view):
                count = data.recv_into(view[done:])
                if not count:
                    break
                done += count
                patience.check(done)
        except OSError:
            self.alive = False
            if not done:
                raise
        return done

    # -- transfers

    def _begin(self, offset: int) -> None:
        """Have the file sent from `offset` on."""
        assert self._control is not None
        if self._data is not None:
            self._end()
            self.facts = _facts(self._control, self._file)
        self._data = self._control.transfercmd(f"RETR {self._file}", rest=offset or None)
        self._data.settimeout(self.access.timeout)
        self._position = offset

    def _end(self) -> None:
        """Break the transfer off, or see that it is complete; a server says so in many ways."""
        import ftplib

        assert self._control is not None
        self._stop()
        try:
            self._control.voidresp()
        except ftplib.Error:
            pass  # 426: it was broken off, as it should be.

    # -- connecting

    def _connect(self) -> ftplib.FTP:
        """Log in, go to the file's folder, and learn what can be learned of the file: sets `facts`."""
        from urllib.parse import unquote, urlsplit

        url = urlsplit(self.access.url)
        if not url.hostname:
            raise ValueError
        control = self._open(url.scheme, url.hostname, url.port)
        try:
            login = self.access.login
            if login is None and url.username is not None:
                login = unquote(url.username).encode(), unquote(url.password or "").encode()
            user, password = (part.decode("utf-8", "surrogateescape") for part in login or _LOGIN)
            control.login(user, password)
            # RFC 1738 3.2.2: a folder a segment; an empty one is where the login leads.
            *folders, self._file = (unquote(part) for part in url.path[1:].split("/"))
            for folder in folders:
                control.cwd(folder or "/")
            control.voidcmd("TYPE I")
            self.facts = _facts(control, self._file)
        except BaseException:
            control.close()
            raise
        return control

    def _open(self, scheme: str, host: str, port: int | None) -> ftplib.FTP:
        import ftplib
        import ssl

        from qimg.storage.ftpcontrol import Control, ImplicitTls

        timeout = self.access.timeout
        control = ImplicitTls(timeout, self.access.tls()) if scheme == "ftps" else Control(timeout)
        port = port or (_FTPS if scheme == "ftps" else _FTP)
        began = time.monotonic()
        try:
            control.connect(host, port)
        except (TimeoutError, ssl.SSLError, EOFError, ftplib.Error):
            control.close()
            raise
        except OSError as error:
            control.close()
            took = int(1000 * (time.monotonic() - began))
            raise Interrupted(connect_words(host, port, error, took), connected=False) from error
        return control


def _facts(control: ftplib.FTP, file: str) -> Facts:
    """Length and time of change, the latter where the server says it (RFC 3659 3, 4)."""
    import ftplib

    size = control.size(file)
    if size is None or size < 0:
        raise failed("Server didn't report file size.")
    try:
        return Facts(size, control.sendcmd(f"MDTM {file}"))
    except ftplib.error_perm:
        return Facts(size, None)


def _refusal(code: str) -> str:
    """What a permanent refusal means, as curl puts it."""
    if code == _NO_FILE:
        return "The file does not exist"
    return f"Access denied: {code}" if code == _NOT_LOGGED_IN else f"The server refused with {code}"
