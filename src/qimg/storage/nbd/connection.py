"""One connection after the handshake: requests of many threads in flight at once.

Nobody but those who wait receives. One of them leads: it takes replies off the wire, into the buffers of
those they belong to, until its own is complete; then it hands over to another one that still waits.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock

from qimg.storage.nbd import wire
from qimg.storage.nbd.channel import Channel, NbdError, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Bytes
    from qimg.storage.nbd.handshake import Export

#: The longest list of block states in one reply, in bytes; qemu-nbd sends 1 MiB, nbdkit 8 MiB at most.
_MAX_STATUS = 16 << 20
#: Chunks of one reply. A read has one for each run of data or zeros.
_MAX_CHUNKS = 1 << 17
_MAX_ERROR = 8 << 10


class Request:
    """One request and what became of it.

    payload  the data of a write.
    into     where a read's data goes.
    error    number of the server's error, 0: none.
    states   (length, flags) of a block status, in bytes.
    failure  why there will be no reply.
    waits    its thread sleeps until `wake` is released.
    """

    __slots__ = (
        "chunks",
        "command",
        "done",
        "error",
        "failure",
        "flags",
        "into",
        "length",
        "offset",
        "payload",
        "spans",
        "states",
        "waits",
        "wake",
    )

    def __init__(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: Bytes = b"",
        into: memoryview | None = None,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.payload = payload
        self.into = into
        self.wake = allocate_lock()
        self.wake.acquire()
        self.reset()

    def reset(self) -> None:
        """As if it had never been sent."""
        self.done = self.waits = False
        self.error = 0
        self.failure: NbdError | None = None
        self.states: list[tuple[int, int]] = []
        self.spans: list[tuple[int, int]] = []
        self.chunks = 0

    def room(self, offset: int, length: int) -> memoryview:
        """Where the data of a chunk goes. Raises ProtocolError for data that was not asked for."""
        start = offset - self.offset
        if self.into is None or length <= 0 or start < 0 or start + length > self.length:
            raise ProtocolError(f"{length} bytes at {offset}, which nobody asked for")
        spans = self.spans
        if spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], start + length
        else:
            spans.append((start, start + length))
        return self.into[start : start + length]

    def complete(self) -> None:
        """Take the last chunk. Raises ProtocolError if something is missing."""
        if self.error:
            return
        if self.into is not None:
            at = 0
            for start, end in sorted(self.spans):
                if start != at:
                    raise ProtocolError("a read whose data is incomplete or comes twice")
                at = end
            if at != self.length:
                raise ProtocolError("a read whose data is incomplete")
        if self.command == wire.CMD_BLOCK_STATUS and not self.states:
            raise ProtocolError("a block status without states")


class Connection:
    """Sends requests and waits for their replies; used by many threads."""

    def __init__(self, channel: Channel, export: Export) -> None:
        self.export = export
        self._channel = channel
        self._extended = export.extended
        self._sending = allocate_lock()
        self._state = allocate_lock()  # guards what follows
        self._pending: dict[int, Request] = {}
        self._cookie = 0
        self._led = False
        self._failure: NbdError | None = None

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        return self._failure is None

    @property
    def busy(self) -> int:
        """How many requests have no reply yet."""
        return len(self._pending)

    def perform(self, request: Request) -> None:
        """Send a request and wait for its reply, whose error is in the request. Raises NbdError."""
        self._send(request)
        self._wait(request)
        if request.failure is not None:
            raise request.failure

    def close(self) -> None:
        """Say goodbye if there is somebody, and close. Never raises."""
        if self.alive:
            try:
                self._channel.send(self._head(Request(wire.CMD_DISC), 0))
            except NbdError:
                pass  # It was to be the last word.
            self._fail(NbdError("NBD connection is closed", errno=errno.EBADF))
        self._channel.close()

    # -- sending

    def _head(self, request: Request, cookie: int) -> bytes:
        flags = request.flags
        if self._extended and len(request.payload):
            flags |= wire.FLAG_PAYLOAD_LEN
        kind = wire.ExtendedRequest if self._extended else wire.Request
        magic = wire.EXTENDED_REQUEST_MAGIC if self._extended else wire.REQUEST_MAGIC
        head = kind(
            magic=magic,
            flags=flags,
            command=request.command,
            cookie=cookie,
            offset=request.offset,
            length=request.length,
        )
        return head.pack()

    def _send(self, request: Request) -> None:
        with self._state:
            if self._failure is not None:
                raise self._failure
            self._cookie += 1
            cookie = self._cookie
            self._pending[cookie] = request
        try:
            with self._sending:
                self._channel.send(self._head(request, cookie), request.payload)
        except NbdError as error:
            self._fail(error)

    # -- receiving

    def _wait(self, request: Request) -> None:
        while True:
            with self._state:
                if request.done:
                    return
                request.waits = self._led
                self._led = True
            if request.waits:
                request.wake.acquire()  # released when it is done, or is to lead
                continue
            try:
                while not request.done:
                    self._receive()
            except NbdError as error:
                self._fail(error)
            finally:
                self._hand_over()

    def _hand_over(self) -> None:
        """Let somebody lead who sleeps: who is still sending may need others to receive before it gets on."""
        with self._state:
            self._led = False
            for other in self._pending.values():
                if other.waits:
                    _wake(other)
                    break

    def _fail(self, error: NbdError) -> None:
        """The connection is of no use any more."""
        with self._state:
            if self._failure is None:
                self._failure = error
            for request in self._pending.values():
                request.failure = self._failure
                request.done = True
                _wake(request)
            self._pending.clear()
        self._channel.close()

    def _finish(self, cookie: int, request: Request) -> None:
        request.complete()
        with self._state:
            self._pending.pop(cookie, None)
            request.done = True
            _wake(request)

    def _request(self, cookie: int) -> Request:
        with self._state:
            request = self._pending.get(cookie)
        if request is None:
            raise ProtocolError(f"a reply to a request that was not sent (cookie {cookie:#x})")
        return request

    def _receive(self) -> None:
        """Take one reply, or one chunk of one."""
        head = self._channel.receive(wire.SimpleReply.SIZE)
        magic = int.from_bytes(head[:4], "big")
        if magic == wire.SIMPLE_REPLY_MAGIC and not self._extended:
            self._receive_simple(wire.SimpleReply.unpack(head))
        elif magic == wire.STRUCTURED_REPLY_MAGIC and self.export.structured and not self._extended:
            head += self._channel.receive(wire.StructuredReply.SIZE - len(head))
            self._receive_chunk(wire.StructuredReply.unpack(head))
        elif magic == wire.EXTENDED_REPLY_MAGIC and self._extended:
            head += self._channel.receive(wire.ExtendedReply.SIZE - len(head))
            self._receive_chunk(wire.ExtendedReply.unpack(head))
        else:
            raise ProtocolError(f"magic {magic:#x} of a reply")

    def _receive_simple(self, reply: wire.SimpleReply) -> None:
        request = self._request(reply.cookie)
        if request.chunks:
            raise ProtocolError("a simple reply after a chunk")
        request.error = reply.error
        if request.into is not None and not reply.error:
            if self.export.structured:
                raise ProtocolError("a simple reply to a read")
            self._channel.receive_into(request.room(request.offset, request.length))
        self._finish(reply.cookie, request)

    def _receive_chunk(self, reply: wire.StructuredReply | wire.ExtendedReply) -> None:
        request = self._request(reply.cookie)
        request.chunks += 1
        if request.chunks > _MAX_CHUNKS:
            raise ProtocolError(f"more than {_MAX_CHUNKS} chunks of one reply")
        kind, length = reply.kind, reply.length
        if kind & wire.CHUNK_IS_ERROR:
            self._receive_error(request, length)
        elif kind == wire.CHUNK_DATA and length > 8:
            offset = int.from_bytes(self._channel.receive(8), "big")
            self._channel.receive_into(request.room(offset, length - 8))
        elif kind == wire.CHUNK_HOLE and length == wire.HoleChunk.SIZE:
            hole = wire.HoleChunk.unpack(self._channel.receive(length))
            room = request.room(hole.offset, hole.length)
            room[:] = bytes(len(room))
        elif kind in (wire.CHUNK_STATUS, wire.CHUNK_STATUS_EXT):
            self._receive_states(request, kind, length)
        elif kind != wire.CHUNK_NONE or length or not reply.flags & wire.REPLY_DONE:
            raise ProtocolError(f"a chunk of type {kind} and {length} bytes")
        if reply.flags & wire.REPLY_DONE:
            self._finish(reply.cookie, request)

    def _receive_error(self, request: Request, length: int) -> None:
        if not wire.ErrorChunk.SIZE <= length <= _MAX_ERROR:
            raise ProtocolError(f"an error of {length} bytes")
        data = self._channel.receive(length)
        chunk = wire.ErrorChunk.unpack(data)
        if not chunk.error or chunk.length > length - wire.ErrorChunk.SIZE:
            raise ProtocolError("an error without a number or beyond its chunk")
        request.error = request.error or chunk.error

    def _receive_states(self, request: Request, kind: int, length: int) -> None:
        """The states of a range, which may be told shorter, and beyond its end in the last one."""
        wide = kind == wire.CHUNK_STATUS_EXT
        head, entry = (8, wire.StatusEntryExt) if wide else (4, wire.StatusEntry)
        if (
            request.command != wire.CMD_BLOCK_STATUS
            or request.states
            or wide != self._extended
            or not head < length <= _MAX_STATUS
            or (length - head) % entry.SIZE
        ):
            raise ProtocolError(f"block states of {length} bytes")
        data = self._channel.receive(length)
        count = (length - head) // entry.SIZE
        if wide and wire.StatusHeadExt.unpack(data).count != count:
            raise ProtocolError("another number of block states than it says")
        if int.from_bytes(data[:4], "big") != self.export.context:
            raise ProtocolError("block states of a context that was not chosen")
        states = list(_pairs(data, head, wide=wide))
        total = 0
        for size, _ in states:
            if not size or total >= request.length:
                raise ProtocolError("an empty block state, or one beyond the range asked for")
            total += size
        request.states = states


def _pairs(data: bytearray, start: int, *, wide: bool) -> list[tuple[int, int]]:
    """(length, flags) of all entries from `start` on."""
    from struct import iter_unpack

    rows: list[tuple[int, int]] = list(iter_unpack(">QQ" if wide else ">II", memoryview(data)[start:]))
    return rows


def _wake(request: Request) -> None:
    """Called under the connection's lock, so that nobody else releases it between."""
    request.waits = False
    if request.wake.locked():
        request.wake.release()
