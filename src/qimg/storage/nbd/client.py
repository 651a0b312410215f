"""A client of one export: as many connections as help, opened anew where the user allows waiting for that."""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from time import monotonic, sleep

from qimg.errors import StorageError
from qimg.storage.nbd import wire
from qimg.storage.nbd.channel import Channel, ConnectionLost, NbdError
from qimg.storage.nbd.connection import Connection, Request
from qimg.storage.nbd.handshake import Handshake

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.storage.address import Address
    from qimg.storage.nbd.handshake import Export

#: Seconds without a byte after which a server counts as lost: while we agree, and while it works on requests
#: (a flush may take long).
HANDSHAKE_TIMEOUT = 30.0
REPLY_TIMEOUT = 180.0
#: The same for a further connection: there are servers that allow for several and let the next one wait.
FURTHER_TIMEOUT = 1.0
#: More of them make nothing faster.
MAX_CONNECTIONS = 4
#: Seconds between attempts to connect: the first, and the longest.
_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


class Client:
    """Requests to one export, from any number of threads.

    `reconnect_delay`: so many seconds a lost connection may take to come back; until then requests wait, and
    are then sent again, which changes nothing for any of them. `open_timeout`: seconds in which the first one
    has to be there.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        context: str,
        *,
        start_tls: Callable[[Channel], Channel] | None = None,
        reconnect_delay: float = 0,
        open_timeout: float = 0,
    ) -> None:
        """Connect. Raises StorageError."""
        self._address = address
        self._name = name
        self._context = context
        self._start_tls = start_tls
        self._delay = reconnect_delay
        self._connecting = allocate_lock()
        self._closed = self._gone = False
        first = self._retry(open_timeout)
        self.export: Export = first.export
        self._connections = [first]
        self._most = MAX_CONNECTIONS if self.export.can(wire.CAN_MULTI_CONN) else 1

    def _connect(self, timeout: float) -> Connection:
        channel = Channel(self._address.connect(timeout), timeout)
        handshake = Handshake(channel)
        try:
            self._tune(channel)
            export = handshake.run(self._name, self._context, self._start_tls)
            handshake.channel.set_timeout(REPLY_TIMEOUT)
        except BaseException:
            handshake.channel.close()
            raise
        return Connection(handshake.channel, export)

    def _tune(self, channel: Channel) -> None:
        import socket

        if self._address.kind == "inet":
            channel.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _retry(self, seconds: float) -> Connection:
        """Connect, and try again for so many seconds where nobody answers. Raises StorageError."""
        end = monotonic() + seconds
        pause = _PAUSE
        while True:
            try:
                return self._connect(HANDSHAKE_TIMEOUT)
            except StorageError as error:
                if _is_final(error) or self._closed or monotonic() + pause >= end:
                    raise
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    # -- requests

    def perform(self, request: Request) -> None:
        """Have the server do a request. Raises StorageError with its offset."""
        while True:
            connection = self._choose()
            try:
                connection.perform(request)
            except ConnectionLost as error:
                if not self._delay or self._closed:
                    raise
                self._replace(connection, error)
                request.reset()
                continue
            if request.error:
                raise _server_error(request)
            return

    def _choose(self) -> Connection:
        """The connection with the least to do, or a new one where all are busy and one more is allowed."""
        connections = self._connections
        best = min(connections, key=_load)
        if not best.busy or len(connections) >= self._most or not best.alive:
            return best
        if not self._connecting.acquire(False):
            return best
        try:
            if len(self._connections) < self._most:
                more = self._connect(FURTHER_TIMEOUT)
                self._check_same(more)
                self._connections = [*self._connections, more]
                return more
        except StorageError:
            self._most = len(self._connections)  # what there is will do
        finally:
            self._connecting.release()
        return best

    def _replace(self, lost: Connection, error: ConnectionLost) -> None:
        """Open a connection in place of a lost one. Raises StorageError where that fails for too long."""
        with self._connecting:
            if lost not in self._connections:
                return  # Another thread has done it.
            if self._gone:
                raise error  # Another thread has tried for as long as may be.
            lost.close()
            try:
                fresh = self._retry(self._delay)
                self._check_same(fresh)
            except StorageError as failure:
                self._gone = True
                if _is_final(failure):
                    raise
                raise error from failure
            self._connections = [fresh if known is lost else known for known in self._connections]

    def _check_same(self, fresh: Connection) -> None:
        """Raise NbdError if the export of a further connection is not the one of the first."""
        old, new = self.export, fresh.export
        same = all(getattr(old, name) == getattr(new, name) for name in old.__slots__ if name != "context")
        if not same or (old.context is None) != (new.context is None):
            fresh.close()
            raise NbdError("NBD export has changed while the connection was lost", errno=errno.EIO)

    def close(self) -> None:
        """Close all connections. Never raises."""
        self._closed = True
        for connection in self._connections:
            connection.close()


def _is_final(error: StorageError) -> bool:
    """Whether somebody was there and said so."""
    return isinstance(error, NbdError) and not isinstance(error, ConnectionLost)


def _load(connection: Connection) -> int:
    return connection.busy if connection.alive else 1 << 30


def _server_error(request: Request) -> StorageError:
    number: int = getattr(errno, wire.ERRORS.get(request.error, "EINVAL"))
    return StorageError(os.strerror(number), errno=number, offset=request.offset)
