"""The node ``blklogwrites``: every write is noted in a log, in the format of Linux' dm-log-writes.

The log is one sector with the super block, then for each request one sector with an entry, then the data of a
write. Tools that replay such logs show what a power cut at any point would have left (the kernel's
documentation of the log-writes target; protocols sheet 2).
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

from _thread import allocate_lock

from qimg.errors import FormatError, OptionError
from qimg.ondisk import U32, U64, Struct
from qimg.options import BOOL, NUM, SIZE, Option
from qimg.storage.base import Filter, Limits
from qimg.units import MIB, SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Bytes, Storage

MAGIC = 0x6A736677736872
VERSION = 1
FLUSH, DISCARD = 1, 4

_INTERVAL = 4096
_LARGEST_SECTOR = 8 * MIB


class Super(Struct, order="<"):
    """The first sector of a log."""

    magic: U64
    version: U64
    entries: U64
    sector_size: U32


class Entry(Struct, order="<"):
    """One request. Units: sectors of the log's size."""

    sector: U64
    sectors: U64
    flags: U64
    data_length: U64


class BlkLogWrites(Filter):
    """Passes requests on to `child` and notes those that change something in `log`."""

    driver = "blklogwrites"
    children: ClassVar[tuple[str, ...]] = ("file", "log")
    identity: ClassVar[tuple[str, ...]] = (
        "driver",
        "log-append",
        "log-sector-size",
        "log-super-update-interval",
    )
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("log-append", BOOL, False, "Whether to go on with an existing log"),
        Option("log-sector-size", SIZE, SECTOR, "Sector size of a new log"),
        Option("log-super-update-interval", NUM, _INTERVAL, "Entries between updates of the super block"),
    )
    named = False

    def __init__(self, child: Storage, log: Storage, *, sector: int, interval: int, append: bool) -> None:
        """The log is begun anew unless `append`, then its own sector size counts. Raises FormatError,
        StorageError."""
        super().__init__(child)
        self._log = log
        self._interval = interval
        self._logging = allocate_lock()
        self._entries = 0
        self._sector = sector
        self._end = sector
        if append:
            self._find_end()
        limits = child.limits
        self.limits = Limits(
            request_alignment=max(self._sector, limits.request_alignment),
            memory_alignment=limits.memory_alignment,
            preferred_request=limits.preferred_request,
            fast_zero=False,
            parallel=limits.parallel,
        )

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        """Raises OptionError."""
        append = bool(values.get("log-append", False))
        sector = int(values.get("log-sector-size", SECTOR))
        interval = int(values.get("log-super-update-interval", _INTERVAL))
        if append and "log-sector-size" in values:
            raise OptionError(
                "log-append and log-sector-size are mutually exclusive", option="log-sector-size"
            )
        if not SECTOR <= sector <= _LARGEST_SECTOR or sector & (sector - 1):
            raise OptionError(f"Invalid log sector size {sector}", option="log-sector-size")
        if interval < 1:
            raise OptionError(f"Invalid log superblock update interval {interval}")
        return cls(children["file"], children["log"], sector=sector, interval=interval, append=append)

    def below(self) -> list[tuple[str, Storage]]:
        return [("file", self.child), ("log", self._log)]

    def _find_end(self) -> None:
        """Go through the entries of an existing log. Raises FormatError where it is none."""
        log = self._log
        head = Super.unpack(log.read(0, Super.SIZE))
        size = head.sector_size
        if head.magic != MAGIC or head.version != VERSION:
            raise FormatError(
                "Invalid log superblock", file=log.name, field="Super.magic", offset=0, found=head.magic
            )
        if not SECTOR <= size <= _LARGEST_SECTOR or size & (size - 1):
            raise FormatError(
                f"Invalid log sector size {size}",
                file=log.name,
                field="Super.sector_size",
                offset=Super.offset_of("sector_size"),
                found=size,
            )
        self._sector = self._end = size
        for _ in range(head.entries):
            if self._end + size > log.size:
                raise FormatError("The log ends inside an entry", file=log.name, offset=self._end)
            entry = Entry.unpack(log.read(self._end, Entry.SIZE))
            self._end += size + (0 if entry.flags & DISCARD else entry.sectors * size)
        self._entries = head.entries

    # -- logging

    def _note(self, flags: int, offset: int = 0, length: int = 0, data: Bytes = b"") -> None:
        """Add an entry. `data` None is for requests that bring none."""
        sector = self._sector
        with self._logging:
            entry = Entry(sector=offset // sector, sectors=length // sector, flags=flags)
            self._log.write(entry.pack().ljust(sector, b"\0"), self._end)
            if len(data):
                self._log.write(data, self._end + sector)
            self._end += sector + len(data)
            self._entries += 1
            if flags & FLUSH or self._entries % self._interval == 0:
                self._write_super()

    def _write_super(self) -> None:
        head = Super(magic=MAGIC, version=VERSION, entries=self._entries, sector_size=self._sector)
        self._log.write(head.pack().ljust(self._sector, b"\0"), 0)
        self._log.flush()

    def write(self, buf: Bytes, offset: int) -> None:
        super().write(buf, offset)
        self._note(0, offset, len(buf), buf)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        super().zero(offset, length, unmap)
        blank = bytes(min(length, MIB))
        while length > 0:
            step = min(length, MIB)
            self._note(0, offset, step, blank[:step])
            offset += step
            length -= step

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, length)
        self._note(DISCARD, offset, length)

    def flush(self) -> None:
        super().flush()
        if self.writable:
            self._note(FLUSH)

    def close(self) -> None:
        self._log.close()
        super().close()
