"""The log: changes of tables that are not, or may not be, in their places yet (vhdx sheet 4).

Reading: `find_changes` finds the entries that count, and `Overlay` shows the file as it will be once they are
applied. Writing: `Journal` makes changes of several sectors happen together or not at all.
"""

from __future__ import annotations

from qimg.errors import UnsupportedFeature
from qimg.extent import MAPPED, ZERO
from qimg.formats.vhdx.header import fresh_guid
from qimg.formats.vhdx.structs import (
    LOG_SECTOR,
    MIB,
    NO_GUID,
    REGION_TABLES,
    DataSector,
    Descriptor,
    LogHeader,
    fail,
    is_sealed,
    sealed,
)
from qimg.storage.base import Filter
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.extent import Extent
    from qimg.formats.vhdx.header import Headers
    from qimg.formats.vhdx.structs import Header
    from qimg.storage.base import Buffer, Bytes, Storage

#: Bytes of entries that are looked at: checksums take a second for ten MiB.
LIMIT = 32 * MIB
_SEARCH = MIB
_FIRST_DESCRIPTORS = 126
_DESCRIPTORS = 128
#: Sectors that one entry changes: with its one sector of descriptors it fits the smallest log.
BATCH = _FIRST_DESCRIPTORS
_LOW = 0xFFFFFFFF


class Entry:
    """A valid entry: its `header`, `start` in the log, and `changes`: (offset, data) or (offset, number of
    zeros)."""

    __slots__ = ("changes", "header", "start")

    def __init__(self, start: int, header: LogHeader, changes: list[tuple[int, bytes | int]]) -> None:
        self.start = start
        self.header = header
        self.changes = changes


class _Reader:
    """Looks for entries in the log of one file."""

    def __init__(self, file: Storage, header: Header) -> None:
        self.file = file
        self.guid = header.log_guid
        self.offset = header.log_offset
        self.length = header.log_length
        self._looked_at = 0

    def entries(self) -> dict[int, Entry]:
        """All valid entries by their place in the log. Raises FormatError, StorageError."""
        found = {}
        for start in self._candidates():
            entry = self._entry(start)
            if entry is not None:
                found[start] = entry
        return found

    def _candidates(self) -> Iterator[int]:
        """Places of sectors that start as an entry with the right GUID does."""
        for part in self.file.extents(self.offset, self.length):
            if not part.flags & MAPPED or part.flags & ZERO:
                continue
            end = part.start + part.length
            at = part.start - (part.start - self.offset) % LOG_SECTOR
            while at < end:
                raw = self.file.read(at, min(_SEARCH, round_up(end - at, LOG_SECTOR)))
                for inside in range(0, len(raw), LOG_SECTOR):
                    if raw[inside : inside + 4] == b"loge" and raw[inside + 32 : inside + 48] == self.guid:
                        yield at + inside - self.offset
                at += len(raw)

    def _read(self, start: int, length: int) -> bytes:
        """Bytes of the log, which goes round."""
        start %= self.length
        first = min(length, self.length - start)
        raw = bytes(self.file.read(self.offset + start, first))
        return raw if first == length else raw + bytes(self.file.read(self.offset, length - first))

    def _entry(self, start: int) -> Entry | None:
        header = LogHeader.unpack(self._read(start, LogHeader.SIZE))
        length = header.length
        if not 0 < length <= self.length or length % LOG_SECTOR or not header.sequence:
            return None
        sectors = -(-(header.descriptors + 2) // _DESCRIPTORS)
        if sectors * LOG_SECTOR > length:
            return None
        self._looked_at += length
        if self._looked_at > LIMIT:
            raise UnsupportedFeature(
                f"The log holds more than {LIMIT} bytes", file=self.file.name, offset=self.offset
            )
        raw = self._read(start, length)
        if not is_sealed(raw):
            return None  # it was not written to its end
        changes = self._changes(raw, header, sectors)
        if changes is None:
            message = "The log is damaged: an entry's descriptors contradict it"
            fail(self.file, message, "log descriptor", self.offset + start + LogHeader.SIZE)
        return Entry(start, header, changes)

    @staticmethod
    def _changes(raw: bytes, header: LogHeader, sectors: int) -> list[tuple[int, bytes | int]] | None:
        """What the descriptors of a whole entry say; None where they contradict it."""
        changes: list[tuple[int, bytes | int]] = []
        data = sectors * LOG_SECTOR
        for number in range(header.descriptors):
            one = Descriptor.unpack(raw, LogHeader.SIZE + number * Descriptor.SIZE)
            if one.sequence != header.sequence or one.offset % LOG_SECTOR:
                return None
            if one.signature == b"zero":
                length = int.from_bytes(one.leading, "little")
                if length % LOG_SECTOR:
                    return None
                changes.append((one.offset, length))
                continue
            if one.signature != b"desc" or data + LOG_SECTOR > len(raw):
                return None
            sector = DataSector.unpack(raw, data)
            if (
                sector.signature != b"data"
                or sector.sequence_high << 32 | sector.sequence_low != one.sequence
            ):
                return None
            changes.append((one.offset, one.leading + sector.data + one.trailing))
            data += LOG_SECTOR
        return changes


def _runs(found: dict[int, Entry], log_length: int) -> Iterator[list[Entry]]:
    """Entries that follow each other with ascending sequence numbers, each run as long as it gets."""

    def after(entry: Entry) -> Entry | None:
        following = found.get((entry.start + entry.header.length) % log_length)
        if following is not None and following.header.sequence == entry.header.sequence + 1:
            return following
        return None

    later = {id(following) for entry in found.values() if (following := after(entry)) is not None}
    for entry in found.values():
        if id(entry) in later:
            continue
        run = [entry]
        while (following := after(run[-1])) is not None:
            run.append(following)
        yield run


def find_changes(file: Storage, header: Header) -> list[Entry]:
    """The entries to apply, in order; empty where there is nothing to do.

    The run with the highest sequence number counts, from the entry on that its last one names as the oldest
    that is needed. Raises FormatError, UnsupportedFeature, StorageError."""
    found = _Reader(file, header).entries()
    runs = sorted(_runs(found, header.log_length), key=lambda run: run[-1].header.sequence, reverse=True)
    for run in runs:
        tail = run[-1].header.tail
        needed = [number for number, entry in enumerate(run) if entry.start == tail]
        if needed:
            entries = run[needed[0] :]
            for entry in entries:
                _check(file, header, entry)
            return entries
    if runs:
        message = "The log is damaged: entries are missing that are not applied yet"
        fail(file, message, "log entry.tail", header.log_offset + runs[0][-1].start + 12)
    return []


def _check(file: Storage, header: Header, entry: Entry) -> None:
    """Raise FormatError for an entry that must not be applied."""
    at = header.log_offset + entry.start
    flushed, last = entry.header.flushed_size, entry.header.last_size
    if flushed > file.size:
        message = f"The log was written for a file of {flushed} bytes, this one has {file.size}"
        fail(file, message, "log entry.flushed_size", at + 48, found=flushed)
    if last >= 1 << 62:
        fail(file, f"Invalid file length {last} in the log", "log entry.last_size", at + 56, found=last)
    log = (header.log_offset, header.log_offset + header.log_length)
    for offset, change in entry.changes:
        length = change if isinstance(change, int) else LOG_SECTOR
        inside_log = offset < log[1] and log[0] < offset + length
        if offset < REGION_TABLES[0] or inside_log:
            message = f"The log wants to change headers or the log itself, at {offset:#x}"
            fail(file, message, "log descriptor.offset", at, found=offset)
        if offset + length > max(round_up(last, MIB), file.size):
            message = f"The log wants to change bytes behind the end of the file, at {offset:#x}"
            fail(file, message, "log descriptor.offset", at, found=offset)


class Overlay(Filter):
    """A file as it will be when the log's changes are applied; after `apply`, the file itself."""

    def __init__(self, child: Storage, entries: list[Entry]) -> None:
        super().__init__(child)
        self._sectors: dict[int, bytes] = {}
        self._zeros: list[tuple[int, int]] = []
        self._size = 0
        for entry in entries:
            self._size = max(self._size, round_up(entry.header.last_size, MIB))
            for offset, change in entry.changes:
                self._add(offset, change)

    def _add(self, offset: int, change: bytes | int) -> None:
        if not isinstance(change, int):
            self._sectors[offset] = change
        elif change:
            self._sectors = {
                at: data for at, data in self._sectors.items() if not offset <= at < offset + change
            }
            self._zeros.append((offset, change))

    @property
    def pending(self) -> bool:
        """There is something to apply."""
        return bool(self._sectors or self._zeros or self._size > self.child.size)

    @property
    def size(self) -> int:
        return max(self.child.size, self._size)

    def _touched(self, start: int, length: int) -> list[int]:
        """Changed sectors in a range."""
        end = start + length
        if length // LOG_SECTOR > len(self._sectors):
            return [at for at in self._sectors if start - LOG_SECTOR < at < end]
        first = start - start % LOG_SECTOR
        return [at for at in range(first, end, LOG_SECTOR) if at in self._sectors]

    def read_into(self, buf: Buffer, offset: int) -> None:
        self.child.read_into(buf, offset)
        if not self._sectors and not self._zeros:
            return
        view = memoryview(buf)
        for at, length in self._zeros:
            low, high = max(at - offset, 0), min(at + length - offset, len(view))
            if low < high:
                view[low:high] = bytes(high - low)
        for at in self._touched(offset, len(view)):
            low, high = max(at - offset, 0), min(at + LOG_SECTOR - offset, len(view))
            view[low:high] = self._sectors[at][low + offset - at : high + offset - at]

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        if not self.pending:
            yield from super().extents(start, length)
            return
        changed = self._touched(start, length)
        changed += [at for at, count in self._zeros if at < start + length and start < at + count]
        for part in super().extents(start, length):
            yield part._replace(flags=MAPPED) if changed else part

    def write(self, buf: Bytes, offset: int) -> None:
        assert not self.pending, "the log comes first"
        super().write(buf, offset)

    def apply(self) -> None:
        """Write the changes where they belong, durably. Raises StorageError."""
        if self._size > self.child.size and not self.child.fixed_size:
            self.child.resize(self._size)
        for at, length in self._zeros:
            self.child.zero(at, length)
        for at, data in joined(sorted(self._sectors.items())):
            self.child.write(data, at)
        self.child.flush()
        self._sectors.clear()
        self._zeros.clear()
        self._size = 0


def joined(sectors: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Ascending (offset, sector) with neighbours put together."""
    start, parts = 0, list[bytes]()
    for at, data in sectors:
        if parts and start + len(parts) * LOG_SECTOR != at:
            yield start, b"".join(parts)
            parts = []
        if not parts:
            start = at
        parts.append(data)
    if parts:
        yield start, b"".join(parts)


class Journal:
    """Changes sectors of tables through the log::

        header      a fresh log GUID: from now on the log counts
        entry       up to `BATCH` sectors
        in place    the same sectors
        header      no log GUID: the log is empty

    with a barrier after each. An entry that is not whole is none; a whole one is applied by whoever opens the
    file next. What an entry refers to has to be durable before.
    """

    def __init__(self, file: Storage, headers: Headers) -> None:
        self.file = file
        self.headers = headers

    def commit(self, sectors: list[tuple[int, bytes]]) -> None:
        """Make the ascending (offset, sector) true: up to `BATCH` of them together, more in several steps.

        Raises StorageError."""
        if not sectors:
            return
        guid = fresh_guid("vhdx log", self.headers.current.sequence, self.headers.current.data_guid)
        self.headers.update(log_guid=guid)
        for number, first in enumerate(range(0, len(sectors), BATCH), 1):
            part = sectors[first : first + BATCH]
            self.file.write(self._entry(part, number), self.headers.current.log_offset)
            self.file.flush()
            for at, data in joined(part):
                self.file.write(data, at)
            self.file.flush()
        self.headers.update(log_guid=NO_GUID, both=True)

    def _entry(self, sectors: list[tuple[int, bytes]], sequence: int) -> bytes:
        """An entry at the start of the log."""
        size = self.file.size
        header = LogHeader(
            signature=b"loge",
            length=LOG_SECTOR * (1 + len(sectors)),
            tail=0,
            sequence=sequence,
            descriptors=len(sectors),
            log_guid=self.headers.current.log_guid,
            flushed_size=size,
            last_size=size,
        )
        head, data = header.pack(), b""
        for at, sector in sectors:
            head += Descriptor(
                signature=b"desc", trailing=sector[-4:], leading=sector[:8], offset=at, sequence=sequence
            ).pack()
            data += DataSector(
                signature=b"data",
                sequence_high=sequence >> 32,
                data=sector[8:-4],
                sequence_low=sequence & _LOW,
            ).pack()
        return sealed(head.ljust(LOG_SECTOR, b"\0") + data)
