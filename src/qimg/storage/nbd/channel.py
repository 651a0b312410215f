"""A connected socket on which a given number of bytes is sent or received, in the clear or through TLS.

One thread may send while another one receives. Nothing waits for ever: a server from which nothing comes,
or that takes nothing, for `timeout` seconds counts as lost.
"""

from __future__ import annotations

import errno
import os
import socket
from _thread import allocate_lock
from struct import pack

from qimg.errors import StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

    from qimg.storage.base import Buffer, Bytes

_TLS_RECORD = 16 << 10


class NbdError(StorageError):
    """What went wrong between the server and us, in words of its own; no answer to a request."""

    @property
    def reason(self) -> str:
        return self.message


class ConnectionLost(NbdError):
    """The connection is gone; another one may serve."""


class ProtocolError(NbdError):
    """The server does not keep to the protocol. Nothing more can be said to it."""

    def __init__(self, message: str) -> None:
        super().__init__(f"NBD server breaks the protocol: {message}", errno=errno.EPROTO)


def _lost(error: OSError) -> ConnectionLost:
    if isinstance(error, BlockingIOError | TimeoutError):
        return ConnectionLost("NBD server does not answer", errno=errno.ETIMEDOUT)
    number = error.errno or errno.EIO
    return ConnectionLost(f"Connection to NBD server lost: {os.strerror(number)}", errno=number)


class Channel:
    """A socket in the clear; it owns the socket."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        """`timeout` in seconds."""
        self.sock = sock
        self.set_timeout(timeout)

    def set_timeout(self, timeout: float) -> None:
        """Wait no longer than so many seconds for one more byte."""
        # The kernel's own timeouts: those of Python's sockets cost a further call for each request.
        value = pack("@ll", int(timeout), int(timeout % 1 * 1e6))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def receive_into(self, buf: Buffer) -> None:
        """Fill `buf`. Raises ConnectionLost."""
        view = memoryview(buf)
        while view:
            try:
                count = self.sock.recv_into(view, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise _lost(error) from error
            if not count:
                raise ConnectionLost("NBD server closed the connection", errno=errno.EPIPE)
            view = view[count:]

    def receive(self, length: int) -> bytearray:
        """`length` bytes. Raises ConnectionLost."""
        buf = bytearray(length)
        self.receive_into(buf)
        return buf

    def send(self, head: bytes, payload: Bytes = b"") -> None:
        """Send all of both. Raises ConnectionLost."""
        parts = [memoryview(head), memoryview(payload)] if len(payload) else [memoryview(head)]
        try:
            while parts:
                count = self.sock.sendmsg(parts)
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][count:]
        except OSError as error:
            raise _lost(error) from error

    def close(self) -> None:
        """Close the socket, also under the hands of those who wait for it."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # It is gone already.
        self.sock.close()


class TlsChannel(Channel):
    """A socket through TLS. The session works on memory, for it must not be used by two threads at once, and
    neither sender nor receiver may wait for the network while they have it."""

    def __init__(self, plain: Channel, context: ssl.SSLContext, hostname: str | None, timeout: float) -> None:
        """Take over the socket of `plain` and shake hands. Raises NbdError."""
        import ssl

        super().__init__(plain.sock, timeout)
        self._ssl = ssl
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)
        self._using = allocate_lock()
        self._sending = allocate_lock()
        self._buffer = bytearray(4 * _TLS_RECORD)
        try:
            self._shake_hands()
        except ssl.SSLError as error:
            raise _handshake_error(error, hostname) from error

    def _shake_hands(self) -> None:
        while True:
            try:
                self._session.do_handshake()
            except self._ssl.SSLWantReadError:
                self._send_out()
                self._take_in()
            except self._ssl.SSLError:
                self._send_out()  # the alert, which says why
                raise
            else:
                self._send_out()
                return

    def _send_out(self) -> None:
        """What the session has to say goes out, in the order in which it said it."""
        with self._sending:
            with self._using:
                data = self._outgoing.read()
            if data:
                super().send(data)

    def _take_in(self) -> None:
        """Give the session what has come, at least one byte."""
        try:
            count = self.sock.recv_into(self._buffer)
        except OSError as error:
            raise _lost(error) from error
        if not count:
            raise ConnectionLost("NBD server closed the connection", errno=errno.EPIPE)
        with self._using:
            self._incoming.write(memoryview(self._buffer)[:count])

    def receive_into(self, buf: Buffer) -> None:
        view = memoryview(buf)
        while view:
            try:
                with self._using:
                    count = int(self._session.read(len(view), view))
            except self._ssl.SSLWantReadError:
                self._take_in()
            except self._ssl.SSLError as error:
                raise ConnectionLost(f"TLS failed: {_tls_reason(error)}", errno=errno.EPROTO) from error
            else:
                if not count:
                    raise ConnectionLost("NBD server closed the connection", errno=errno.EPIPE)
                view = view[count:]

    def send(self, head: bytes, payload: Bytes = b"") -> None:
        try:
            with self._using:
                self._session.write(head)
            view = memoryview(payload)
            while view:
                with self._using:
                    count = self._session.write(view[: 16 * _TLS_RECORD])
                self._send_out()
                view = view[count:]
        except self._ssl.SSLError as error:
            raise ConnectionLost(f"TLS failed: {_tls_reason(error)}", errno=errno.EPROTO) from error
        self._send_out()


#: OpenSSL's numbers of what may be wrong with a certificate, in the words of the real program.
_WRONG_HOST = (62, 64)
_UNKNOWN_ISSUER = (18, 19, 20, 21)


def _handshake_error(error: ssl.SSLError, hostname: str | None) -> NbdError:
    code = getattr(error, "verify_code", 0)
    message = f"TLS handshake failed: {_tls_reason(error)}"
    if code in _WRONG_HOST:
        message = f"Certificate does not match the hostname {hostname}"
    elif code in _UNKNOWN_ISSUER:
        message = "The certificate hasn't got a known issuer"
    return NbdError(message, errno=errno.EACCES)


def _tls_reason(error: ssl.SSLError) -> str:
    """OpenSSL's words without numbers and places in its code."""
    verify = getattr(error, "verify_message", None)
    return str(verify) if verify else str(error.reason or error).replace("_", " ").lower()
