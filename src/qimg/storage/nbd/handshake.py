"""Agreeing with a server on how to talk, and about which export: the handshake of the NBD protocol.

Fixed newstyle only. What is asked for: TLS where it is wanted, extended headers or else structured replies,
one metadata context, and the export with its block sizes.
"""

from __future__ import annotations

import errno

from qimg.storage.nbd import wire
from qimg.storage.nbd.channel import Channel, NbdError, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from qimg.ondisk import Struct

    S = TypeVar("S", bound=Struct)

#: The longest answer to an option; the longest that one can need is a name and a little.
_MAX_REPLY = 64 << 10
#: Answers before the last one to an option.
_MAX_REPLIES = 64
_MAX_ALIGNMENT = 64 << 10

_NO_TLS_OBJECT = "Did you forget a valid tls-creds?"


class Export:
    """What was agreed on.

    size        bytes of the export.
    flags       transmission flags (`wire`).
    minimum     requests are multiples of so many bytes.
    maximum     a request has at most so many bytes of data.
    structured  replies come in chunks; `extended`: with wide headers.
    context     number of the metadata context, None: there is none.
    """

    __slots__ = ("context", "extended", "flags", "maximum", "minimum", "size", "structured")

    def __init__(self) -> None:
        self.size = 0
        self.flags = 0
        self.minimum = 0
        self.maximum = 0
        self.structured = False
        self.extended = False
        self.context: int | None = None

    def can(self, flag: int) -> bool:
        """Whether the export has this transmission flag."""
        return bool(self.flags & flag)


class OptionRefused(NbdError):
    """The server refuses an option: `kind` is the number of the error."""

    def __init__(self, option: int, kind: int, text: str) -> None:
        name = wire.OPTION_NAMES[option]
        hint = f"server reported: {text}" if text else None
        if kind == wire.REP_ERR_UNKNOWN:
            message = "Requested export not available"
        elif kind == wire.REP_ERR_TLS_REQD:
            message = f"TLS negotiation required before option {option} ({name})"
            hint = _NO_TLS_OBJECT if hint is None else f"{_NO_TLS_OBJECT}\n{hint}"
        elif kind == wire.REP_ERR_POLICY:
            message = f"Denied by server for option {option} ({name})"
        elif kind == wire.REP_ERR_SHUTDOWN:
            message = f"Server shutting down before option {option} ({name})"
        elif kind == wire.REP_ERR_BLOCK_SIZE_REQD:
            message = f"Server requires INFO_BLOCK_SIZE for option {option} ({name})"
        else:
            message = f"Server refuses option {option} ({name}) with error {kind - wire.REP_ERROR}"
        super().__init__(message, errno=errno.EINVAL, hint=hint)
        self.kind = kind


class Handshake:
    """One handshake on `channel`, which may be another one (with TLS) afterwards."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._no_zeroes = False
        self._export = Export()

    def run(self, name: str, context: str, start_tls: Callable[[Channel], Channel] | None) -> Export:
        """Agree on the export called `name`; `context` is the metadata context that is asked for; `start_tls`
        makes a channel with TLS of one without. Raises NbdError."""
        self._greet()
        if start_tls is not None:
            self._start_tls(start_tls)
        export = self._export
        export.extended = self._agree(wire.OPT_EXTENDED_HEADERS)
        export.structured = export.extended or self._agree(wire.OPT_STRUCTURED_REPLY)
        if export.structured:
            export.context = self._choose_context(name, context)
        try:
            self._go(name)
        except OptionRefused as refusal:
            if refusal.kind != wire.REP_ERR_UNSUP:
                raise
            self._take_by_name(name)
        self._check()
        return export

    def _greet(self) -> None:
        hello = wire.Hello.unpack(self.channel.receive(wire.Hello.SIZE))
        if hello.magic != wire.MAGIC:
            raise NbdError("Not an NBD server", errno=errno.EINVAL)
        if hello.style == wire.OLD_STYLE:
            raise NbdError("NBD servers of the old style are not supported", errno=errno.EINVAL)
        if hello.style != wire.OPTION_MAGIC:
            raise ProtocolError(f"unknown style {hello.style:#x}")
        flags = int.from_bytes(self.channel.receive(2), "big")
        if not flags & wire.FIXED_NEWSTYLE:
            raise NbdError("NBD server does not offer the fixed newstyle handshake", errno=errno.EINVAL)
        self._no_zeroes = bool(flags & wire.NO_ZEROES)
        self.channel.send((flags & (wire.FIXED_NEWSTYLE | wire.NO_ZEROES)).to_bytes(4, "big"))

    # -- options

    def _send(self, option: int, data: bytes = b"") -> None:
        head = wire.OptionRequest(magic=wire.OPTION_MAGIC, option=option, length=len(data))
        self.channel.send(head.pack() + data)

    def _replies(self, option: int) -> Iterator[tuple[int, bytearray]]:
        """(kind, data) of the answers to `option` before the acknowledgement. Raises OptionRefused."""
        for _ in range(_MAX_REPLIES):
            reply = wire.OptionReply.unpack(self.channel.receive(wire.OptionReply.SIZE))
            if reply.magic != wire.OPTION_REPLY_MAGIC:
                raise ProtocolError(f"magic {reply.magic:#x} of an option's reply")
            if reply.option != option:
                raise ProtocolError(f"a reply to option {reply.option} where {option} was sent")
            if reply.length > _MAX_REPLY:
                raise ProtocolError(f"an option's reply of {reply.length} bytes")
            data = self.channel.receive(reply.length)
            if reply.kind & wire.REP_ERROR:
                raise OptionRefused(option, reply.kind, _printable(data))
            if reply.kind == wire.REP_ACK:
                if data:
                    raise ProtocolError("an acknowledgement with data")
                return
            yield reply.kind, data
        raise ProtocolError(f"more than {_MAX_REPLIES} replies to an option")

    def _agree(self, option: int) -> bool:
        """Whether the server takes an option that has no data."""
        self._send(option)
        try:
            for kind, _ in self._replies(option):
                raise ProtocolError(f"a reply of type {kind} to option {option}")
        except OptionRefused:
            return False  # Whatever the reason is: it comes up again where it matters.
        return True

    def _start_tls(self, start_tls: Callable[[Channel], Channel]) -> None:
        self._send(wire.OPT_STARTTLS)
        for kind, _ in self._replies(wire.OPT_STARTTLS):
            raise ProtocolError(f"a reply of type {kind} to the wish for TLS")
        self.channel = start_tls(self.channel)

    def _choose_context(self, name: str, context: str) -> int | None:
        query = context.encode("utf-8", "surrogateescape")
        data = _text(name) + (1).to_bytes(4, "big") + len(query).to_bytes(4, "big") + query
        self._send(wire.OPT_SET_META_CONTEXT, data)
        number: int | None = None
        try:
            for kind, reply in self._replies(wire.OPT_SET_META_CONTEXT):
                if kind != wire.REP_META_CONTEXT or len(reply) < 4:
                    raise ProtocolError(f"a reply of type {kind} to the choice of a metadata context")
                if reply[4:] != query or number is not None:
                    raise ProtocolError("a metadata context that was not asked for")
                number = int.from_bytes(reply[:4], "big")
        except OptionRefused as refusal:
            if refusal.kind in (wire.REP_ERR_UNKNOWN, wire.REP_ERR_TLS_REQD):
                raise
            return None
        return number

    def _go(self, name: str) -> None:
        wanted = (wire.INFO_BLOCK_SIZE,)
        data = (
            _text(name)
            + len(wanted).to_bytes(2, "big")
            + b"".join(kind.to_bytes(2, "big") for kind in wanted)
        )
        self._send(wire.OPT_GO, data)
        told = False
        for kind, reply in self._replies(wire.OPT_GO):
            if kind != wire.REP_INFO or len(reply) < 2:
                raise ProtocolError(f"a reply of type {kind} to the choice of an export")
            what = int.from_bytes(reply[:2], "big")
            if what == wire.INFO_EXPORT:
                info = _exactly(wire.InfoExport, reply)
                self._export.size, self._export.flags = info.size, info.flags
                told = True
            elif what == wire.INFO_BLOCK_SIZE:
                sizes = _exactly(wire.InfoBlockSize, reply)
                self._export.minimum, self._export.maximum = sizes.minimum, sizes.maximum
                if not 0 < sizes.minimum <= sizes.preferred <= sizes.maximum:
                    raise ProtocolError("block sizes that contradict each other")
        if not told:
            raise ProtocolError("no size of the export")

    def _take_by_name(self, name: str) -> None:
        """The way of servers that do not know how to say no."""
        data = name.encode("utf-8", "surrogateescape")
        self._send(wire.OPT_EXPORT_NAME, data)
        try:
            reply = self.channel.receive(wire.ExportName.SIZE)
        except NbdError as error:
            raise NbdError("Requested export not available", errno=errno.EINVAL) from error
        info = wire.ExportName.unpack(reply)
        self._export.size, self._export.flags = info.size, info.flags
        if not self._no_zeroes:
            self.channel.receive(124)

    def _check(self) -> None:
        """Hold what the server says against what it may say, and fill in what it left out."""
        export = self._export
        if export.size >= 1 << 63:
            raise ProtocolError(f"an export of {export.size} bytes")
        if not export.flags & wire.HAS_FLAGS:
            export.flags = 0
        if not export.minimum:
            export.minimum = 1 if export.size % wire.DEFAULT_MINIMUM else wire.DEFAULT_MINIMUM
            export.maximum = wire.DEFAULT_MAXIMUM
        minimum = export.minimum
        if minimum & (minimum - 1) or minimum > _MAX_ALIGNMENT:
            raise ProtocolError(f"a minimum block size of {minimum} bytes")
        if export.size % minimum:
            raise ProtocolError(f"an export of {export.size} bytes in blocks of {minimum}")
        export.maximum = min(export.maximum, wire.DEFAULT_MAXIMUM) // minimum * minimum


def _text(name: str) -> bytes:
    data = name.encode("utf-8", "surrogateescape")
    return len(data).to_bytes(4, "big") + data


def _exactly(kind: type[S], data: bytearray) -> S:
    if len(data) != kind.SIZE:
        raise ProtocolError(f"information of {len(data)} bytes about the export")
    return kind.unpack(data)


def _printable(data: bytearray) -> str:
    """A server's text, fit for a line on a terminal."""
    text = data[: wire.MAX_NAME].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)
