"""An NBD server that says what a test wants it to say, right or wrong, byte by byte."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import NamedTuple

GREETING = b"NBDMAGICIHAVEOPT"
REPLY = 0x3E889045565A9
ACK, INFO, META = 1, 3, 4
UNSUPPORTED = 0x80000001
GO, STRUCTURED, SET_META, EXTENDED = 7, 8, 10, 11
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES, STATUS = 0, 1, 2, 3, 4, 6, 7
#: HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES
FLAGS = 0b1101101
CONTEXT = 5


class Asked(NamedTuple):
    """A request as it came."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    data: bytes


class Talk:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket, *, structured: bool = True, extended: bool = False) -> None:
        self.sock = sock
        self.structured = structured
        self.extended = extended

    def read(self, length: int) -> bytes:
        """So many bytes; EOFError when the client has gone."""
        data = b""
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    # -- handshake

    def greet(self) -> None:
        self.send(GREETING, b"\0\3")
        self.read(4)

    def option(self) -> tuple[int, bytes]:
        """The next option and its data."""
        _, option, length = struct.unpack(">QII", self.read(16))
        return option, self.read(length)

    def answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", REPLY, option, kind, len(data)), data)

    def agree(self, size: int, flags: int = FLAGS, blocks: tuple[int, int, int] | None = None) -> None:
        """The whole handshake."""
        self.greet()
        while True:
            option, data = self.option()
            if option == GO:
                self.answer(GO, INFO, struct.pack(">HQH", 0, size, flags))
                if blocks is not None:
                    self.answer(GO, INFO, struct.pack(">HIII", 3, *blocks))
                self.answer(GO, ACK)
                return
            if option == SET_META:
                name = struct.unpack_from(">I", data)[0]
                self.answer(option, META, struct.pack(">I", CONTEXT) + data[4 + name + 4 + 4 :])
            elif not (self.extended if option == EXTENDED else self.structured):
                self.answer(option, UNSUPPORTED)
                continue
            self.answer(option, ACK)

    # -- transmission

    def request(self) -> Asked:
        _, flags, command, cookie, offset = struct.unpack(">IHHQQ", self.read(24))
        (length,) = struct.unpack(">Q" if self.extended else ">I", self.read(8 if self.extended else 4))
        data = self.read(length) if command == WRITE else b""
        return Asked(flags, command, cookie, offset, length, data)

    def simple(self, asked: Asked, data: bytes = b"", error: int = 0, cookie: int | None = None) -> None:
        cookie = asked.cookie if cookie is None else cookie
        self.send(struct.pack(">IIQ", 0x67446698, error, cookie), data)

    def chunk(self, asked: Asked, kind: int, data: bytes = b"", done: int = 1) -> None:
        if self.extended:
            head = struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, asked.cookie, asked.offset, len(data))
        else:
            head = struct.pack(">IHHQI", 0x668E33EF, done, kind, asked.cookie, len(data))
        self.send(head, data)

    def data(self, asked: Asked, offset: int, data: bytes, done: int = 1) -> None:
        self.chunk(asked, 1, struct.pack(">Q", offset) + data, done)

    def hole(self, asked: Asked, offset: int, length: int, done: int = 1) -> None:
        self.chunk(asked, 2, struct.pack(">QI", offset, length), done)

    def states(self, asked: Asked, *states: tuple[int, int]) -> None:
        if self.extended:
            data = struct.pack(">II", CONTEXT, len(states))
            self.chunk(asked, 6, data + b"".join(struct.pack(">QQ", *state) for state in states))
        else:
            data = struct.pack(">I", CONTEXT)
            self.chunk(asked, 5, data + b"".join(struct.pack(">II", *state) for state in states))

    def serve(self, content: bytearray, log: list[Asked] | None = None) -> None:
        """Answer properly until the client goes."""
        while (asked := self.request()).command != DISCONNECT:
            if log is not None:
                log.append(asked)
            part = slice(asked.offset, asked.offset + asked.length)
            if asked.command == WRITE:
                content[part] = asked.data
            elif asked.command == ZEROES:
                content[part] = bytes(asked.length)
            elif asked.command == STATUS:
                self.states(asked, (asked.length, 0))
                continue
            if asked.command == READ and not self.structured:
                self.simple(asked, bytes(content[part]))
            elif asked.command == READ:
                self.data(asked, asked.offset, bytes(content[part]))
            elif self.extended:
                self.chunk(asked, 0)
            else:
                self.simple(asked)


@contextmanager
def scripted(
    folder: Path, script: Callable[[Talk], None], *, structured: bool = True, extended: bool = False
) -> Iterator[str]:
    """A server that plays `script` on every connection, and the name of its export. What the script raises
    fails the test, but for the client's going away."""
    listener = socket.socket(socket.AF_UNIX)
    path = folder / "script.sock"
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    listener.listen()
    failures: list[BaseException] = []
    talks: list[Thread] = []

    def talk(sock: socket.socket) -> None:
        with sock:
            try:
                script(Talk(sock, structured=structured, extended=extended))
            except (EOFError, OSError):
                pass
            except BaseException as error:  # noqa: BLE001 - shown below
                failures.append(error)

    def listen() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            talks.append(Thread(target=talk, args=(sock,), daemon=True))
            talks[-1].start()

    thread = Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for one in talks:
            one.join(10)
    assert not failures, failures
