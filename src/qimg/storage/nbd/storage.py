"""NBD exports as storages: the protocol ``nbd`` (protocols sheet 2).

An export has a fixed length and block sizes of its own: what does not fit them is rounded out, read, and
written back.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from qimg.context import Context
from qimg.errors import LimitError, LocationError, NotSupported, OptionError, StorageError
from qimg.extent import ABSENT, MAPPED, ZERO, Extent
from qimg.options import BOOL, NUM, SIZE, STR, Option
from qimg.storage import address as addresses
from qimg.storage.base import Limits, Storage
from qimg.storage.nbd import names, wire
from qimg.storage.nbd.client import HANDSHAKE_TIMEOUT, Client
from qimg.storage.nbd.connection import Request
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ClassVar, Self

    from qimg.options import Value
    from qimg.storage.address import Address
    from qimg.storage.base import Buffer, Bytes
    from qimg.storage.nbd.channel import Channel

_ALLOCATION = "base:allocation"
_MAX_DELAY = 1 << 31
#: Requests without data may be longer than those with, but not so long that the server seems lost meanwhile.
_MAX_ZERO = 1 << 30
_MAX_STATUS = (1 << 32) - (64 << 10)
# Cache modes in which a write is durable when it returns, and in which nothing ever is.
_SYNC = ("directsync", "writethrough")
_NO_FLUSH = ("unsafe", "direct-unsafe")


class NbdStorage(Storage):
    """One export, over one connection or several."""

    driver = "nbd"
    fixed_size = True
    can_create: ClassVar[bool] = True
    must_exist: ClassVar[bool] = True
    has_directory: ClassVar[bool] = False
    plural = "NBD nodes"
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("server.*", STR, None, "Address of the server"),
        Option("host", STR, None, "The server's name or number"),
        Option("port", STR, None, "The server's port"),
        Option("path", STR, None, "The server's socket in the file system"),
        Option("export", STR, None, "Name of the export"),
        Option("tls-creds", STR, None, "ID of the credentials for TLS"),
        Option("tls-hostname", STR, None, "What the server's certificate has to be for"),
        Option("tls", BOOL, False, "TLS with the certificates of the system (nbds://)"),
        Option("tls-certificates", STR, None, "Folder with the certificates to use instead"),
        Option("x-dirty-bitmap", STR, None, "Metadata context to show instead of the allocation"),
        Option("reconnect-delay", NUM, 0, "Seconds that a lost connection may take to come back"),
        Option("open-timeout", NUM, 0, "Seconds to go on trying when it is opened"),
    )
    identity: ClassVar[tuple[str, ...]] = (
        "server.*",
        "host",
        "port",
        "path",
        "driver",
        "export",
        "tls-creds",
        "tls-hostname",
        "tls",
        "tls-certificates",
    )
    create_options: ClassVar[tuple[Option, ...]] = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("preallocation", STR, None, "Preallocation mode (allowed values: off)"),
    )

    def __init__(
        self,
        client: Client,
        name: str,
        *,
        writable: bool,
        cache: str = "writeback",
        discard: bool = True,
        bitmap: bool = False,
    ) -> None:
        """Use `from_options`. `bitmap`: block states are those of a dirty bitmap."""
        self._client = client
        self._export = export = client.export
        self.name = name
        self.writable = writable
        self._discard = discard
        self._no_flush = cache in _NO_FLUSH
        self._sync = cache in _SYNC
        self._write_flags = wire.FLAG_FUA if self._sync and export.can(wire.SEND_FUA) else 0
        self._bitmap = bitmap
        self._edges = allocate_lock()
        self.limits = Limits(
            request_alignment=export.minimum,
            fast_zero=export.can(wire.SEND_WRITE_ZEROES),
            remote=True,
        )

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        return names.parse(name)

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        address = _address(values)
        export = str(values.get("export", ""))
        if len(export.encode("utf-8", "surrogateescape")) > wire.MAX_NAME:
            raise LimitError("export name too long to send to server")
        bitmap = values.get("x-dirty-bitmap")
        tls = values.get("tls-creds") is not None or bool(values.get("tls", False))
        client = Client(
            address,
            export,
            _ALLOCATION if bitmap is None else str(bitmap),
            start_tls=_start_tls(values, address, context) if tls else None,
            reconnect_delay=_seconds(values, "reconnect-delay"),
            open_timeout=_seconds(values, "open-timeout"),
        )
        try:
            plain = not values.get("tls") or not any(word in values for word in names.TLS_WORDS)
            name = names.shown(address, export, tls=bool(values.get("tls", False)))
            new = cls(
                client,
                name or f"nbd:{address}:exportname={export}",
                writable=writable or create,
                cache=cache,
                discard=discard,
                bitmap=bitmap is not None,
            )
            new.named = plain and name is not None
            new._check(bitmap)
        except BaseException:
            client.close()
            raise
        return new

    def _check(self, bitmap: Value | None) -> None:
        """Whether the export can serve for this. Raises StorageError, OptionError."""
        if self.writable and self._export.can(wire.READ_ONLY):
            raise StorageError("NBD export is read-only", errno=errno.EACCES)
        if bitmap is not None and self._export.context is None:
            raise OptionError(f"requested x-dirty-bitmap {bitmap} not found", option="x-dirty-bitmap")

    @property
    def size(self) -> int:
        return self._export.size

    # -- reading

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        inside = max(0, min(len(view), self.size - offset))
        view[inside:] = bytes(len(view) - inside)
        start, end = self._blocks(offset, inside)
        if (start, end) == (offset, offset + inside):
            self._read(view[:inside], offset)
            return
        whole = memoryview(bytearray(end - start))
        self._read(whole, start)
        view[:inside] = whole[offset - start : offset - start + inside]

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks that a range lies in."""
        unit = self._export.minimum
        return round_down(offset, unit), round_up(offset + length, unit)

    def _read(self, view: memoryview, offset: int) -> None:
        step = self._export.maximum
        for at in range(0, len(view), step):
            part = view[at : at + step]
            self._client.perform(Request(wire.CMD_READ, offset + at, len(part), into=part))

    # -- writing

    def _check_end(self, offset: int, length: int) -> None:
        if offset + length > self.size:
            number = errno.ENOSPC
            raise StorageError(os.strerror(number), errno=number, offset=offset)

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf).cast("B")
        if not view:
            return
        self._check_end(offset, len(view))
        start, end = self._blocks(offset, len(view))
        if (start, end) == (offset, offset + len(view)):
            self._write(view, offset)
        else:
            # Two writes to parts of one block must not undo each other.
            with self._edges:
                whole = memoryview(bytearray(end - start))
                self._read(whole, start)
                whole[offset - start : offset - start + len(view)] = view
                self._write(whole, start)
        self._settle()

    def _write(self, view: memoryview, offset: int) -> None:
        step = self._export.maximum
        for at in range(0, len(view), step):
            part = view[at : at + step]
            self._client.perform(
                Request(wire.CMD_WRITE, offset + at, len(part), flags=self._write_flags, payload=part)
            )

    def _settle(self) -> None:
        """After a write that has to be durable, by a server that cannot make it so by itself."""
        if self._sync and not self._write_flags:
            self.flush()

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if length <= 0:
            return
        self._check_end(offset, length)
        if not self._export.can(wire.SEND_WRITE_ZEROES):
            super().zero(offset, length, unmap)
            return
        unit = self._export.minimum
        end = offset + length
        low, high = round_up(offset, unit), round_down(end, unit)
        if low >= high:
            self.write(bytes(length), offset)
            return
        if offset < low:
            self.write(bytes(low - offset), offset)
        flags = self._write_flags | (0 if unmap and self._discard else wire.FLAG_NO_HOLE)
        self._without_data(wire.CMD_WRITE_ZEROES, low, high, flags)
        if high < end:
            self.write(bytes(end - high), high)
        self._settle()

    def _without_data(self, command: int, start: int, end: int, flags: int = 0) -> None:
        while start < end:
            step = min(end - start, _MAX_ZERO)
            self._client.perform(Request(command, start, step, flags=flags))
            start += step

    def discard(self, offset: int, length: int) -> None:
        unit = self._export.minimum
        low, high = round_up(offset, unit), round_down(min(offset + length, self.size), unit)
        if self._discard and self._export.can(wire.SEND_TRIM) and low < high:
            self._without_data(wire.CMD_TRIM, low, high)

    def flush(self) -> None:
        if self.writable and not self._no_flush and self._export.can(wire.SEND_FLUSH):
            self._client.perform(Request(wire.CMD_FLUSH))

    # -- the rest

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = max(start, min(end, self.size))
        if self._export.context is None:
            if inside > start:
                yield Extent(start, inside - start, MAPPED, 0, start, self)
            start = inside
        while start < inside:
            for size, flags in self._states(start, inside):
                step = min(size, inside - start)
                if step > 0:
                    yield Extent(start, step, flags, 0, start, self)
                    start += step
        if inside < end:
            yield Extent(inside, end - inside, ZERO, 0, inside, self)

    def _states(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(length, flags of an extent) of runs from `start` on, of the first few at least."""
        low, high = self._blocks(start, end - start)
        longest = high - low if self._export.extended else _MAX_STATUS
        request = Request(wire.CMD_BLOCK_STATUS, low, min(high - low, longest))
        self._client.perform(request)
        before = start - low
        for size, state in request.states:
            kept = size - min(before, size)
            before -= size - kept
            if kept:
                yield kept, self._flags(state)

    def _flags(self, state: int) -> int:
        if self._bitmap:
            return MAPPED | ABSENT if state & 1 else MAPPED
        if not state & wire.STATE_ZERO:
            return MAPPED
        return ZERO if state & wire.STATE_HOLE else ZERO | MAPPED

    def resize(self, size: int, preallocation: str = "off") -> None:
        if size != self.size:
            raise NotSupported(f"Cannot resize {self.plural}")

    def close(self) -> None:
        self._client.close()


def _address(values: dict[str, Value]) -> Address:
    """Where the options say that the server is. Raises OptionError, LocationError."""
    host, port, path = (values.get(name) for name in ("host", "port", "path"))
    server = addresses.from_options(values, "server.")
    if server is not None:
        if not host is port is path is None:
            raise OptionError("Cannot use 'server' and path/host/port at the same time")
        return server
    if path is not None and host is not None:
        raise OptionError("path and host may not be used at the same time")
    if path is not None:
        if port is not None:
            raise OptionError("port may not be used without host")
        return addresses.unix(str(path))
    if host is not None:
        return addresses.inet(str(host), names.DEFAULT_PORT if port is None else str(port))
    raise LocationError("NBD server address missing")


def _seconds(values: dict[str, Value], name: str) -> int:
    seconds = int(values.get(name, 0))
    if not 0 <= seconds < _MAX_DELAY:
        raise OptionError(f"Parameter '{name}' expects a number of seconds", option=name)
    return seconds


def _start_tls(
    values: dict[str, Value], address: Address, context: Context | None
) -> Callable[[Channel], Channel]:
    from qimg.storage.nbd.tls import starter

    hostname = values.get("tls-hostname", address.host)
    credentials, directory = values.get("tls-creds"), values.get("tls-certificates")
    return starter(
        context if context is not None else Context(),
        None if credentials is None else str(credentials),
        None if directory is None else str(directory),
        None if hostname is None else str(hostname),
        HANDSHAKE_TIMEOUT,
    )
