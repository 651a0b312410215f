"""The region table: where the BAT and the metadata are. There are two copies (vhdx sheet 1)."""

from __future__ import annotations

from qimg.errors import UnsupportedFeature
from qimg.formats.vhdx.structs import (
    BAT_REGION,
    HEADER_AREA,
    MAX_ENTRIES,
    METADATA_REGION,
    MIB,
    REGION_TABLE_BYTES,
    REGION_TABLES,
    RegionEntry,
    RegionTable,
    fail,
    is_sealed,
    sealed,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.vhdx.structs import Header
    from qimg.storage.base import Storage


class Regions:
    """The regions of one file. `raw`: the table as it is stored."""

    def __init__(self, raw: bytes, entries: list[RegionEntry], log: tuple[int, int]) -> None:
        """`log`: [start, end) of the log."""
        self.raw = raw
        self.entries = entries
        self._log = log

    @property
    def bat(self) -> RegionEntry:
        """Where the BAT is."""
        return next(entry for entry in self.entries if entry.guid == BAT_REGION)

    @property
    def metadata(self) -> RegionEntry:
        """Where the metadata is."""
        return next(entry for entry in self.entries if entry.guid == METADATA_REGION)

    @property
    def taken(self) -> list[tuple[int, int]]:
        """[start, end) of the header area, the log and the regions, in bytes."""
        found = [(0, HEADER_AREA), self._log]
        return found + [(entry.offset, entry.offset + entry.length) for entry in self.entries]

    @property
    def end(self) -> int:
        """The first byte behind all of them, in whole MiB."""
        last = max(end for _start, end in self.taken)
        return -(-last // MIB) * MIB

    @classmethod
    def read(cls, file: Storage, header: Header) -> Regions:
        """The first table whose checksum is right. Raises FormatError, UnsupportedFeature, StorageError."""
        for at in REGION_TABLES:
            raw = bytes(file.read(at, REGION_TABLE_BYTES))
            if raw[:4] == b"regi" and is_sealed(raw):
                break
        else:
            fail(file, "No valid VHDX region table found", "region table.checksum", REGION_TABLES[0] + 4)
        return cls.parse(file, raw, header, at)

    @classmethod
    def parse(cls, file: Storage, raw: bytes, header: Header, at: int = REGION_TABLES[0]) -> Regions:
        """A table whose checksum is right. Raises FormatError, UnsupportedFeature."""
        table = RegionTable.unpack(raw)
        if table.count > MAX_ENTRIES:
            message = f"The region table has {table.count} entries, at most {MAX_ENTRIES} are allowed"
            fail(file, message, "region table.count", at + RegionTable.offset_of("count"), found=table.count)
        entries = []
        for number in range(table.count):
            place = RegionTable.SIZE + number * RegionEntry.SIZE
            entry = RegionEntry.unpack(raw, place)
            _check_entry(file, entry, at + place)
            entries.append(entry)
        new = cls(raw, entries, (header.log_offset, header.log_offset + header.log_length))
        for name, wanted in (("BAT", BAT_REGION), ("metadata", METADATA_REGION)):
            count = sum(entry.guid == wanted for entry in entries)
            if count != 1:
                what = "no" if not count else "more than one"
                fail(file, f"The region table names {what} {name} region", "region table.entries", at)
        new._check_overlaps(file, at)
        return new

    def _check_overlaps(self, file: Storage, at: int) -> None:
        placed = sorted((start, end) for start, end in self.taken if end > start)
        for number, (low, high) in enumerate(placed[1:]):
            start, end = placed[number]
            if low < end:
                message = f"VHDX region {low}-{high} overlaps with region {start}-{end}"
                fail(file, message, "region table.entries", at, found=low)

    def moved(self, offset: int, length: int) -> bytes:
        """The table, to be stored, with the BAT elsewhere; `entries` say so from then on."""
        number = next(at for at, entry in enumerate(self.entries) if entry.guid == BAT_REGION)
        entry = self.entries[number]
        entry.offset, entry.length = offset, length
        raw = bytearray(self.raw)
        place = RegionTable.SIZE + number * RegionEntry.SIZE
        raw[place : place + RegionEntry.SIZE] = entry.pack()
        self.raw = sealed(bytes(raw))
        return self.raw


def new_table(bat: tuple[int, int], metadata: tuple[int, int]) -> bytes:
    """The table of a new image, to be stored; each region as (offset, length) in bytes."""
    raw = RegionTable(signature=b"regi", count=2).pack()
    for guid, (offset, length) in ((BAT_REGION, bat), (METADATA_REGION, metadata)):
        raw += RegionEntry(guid=guid, offset=offset, length=length, flags=1).pack()
    return sealed(raw.ljust(REGION_TABLE_BYTES, b"\0"))


def _check_entry(file: Storage, entry: RegionEntry, at: int) -> None:
    if entry.guid not in (BAT_REGION, METADATA_REGION) and entry.flags & 1:
        raise UnsupportedFeature(
            "The file has a region that qimg does not know and that is marked as required",
            file=file.name,
            field="region.guid",
            offset=at,
            found=entry.guid.hex(),
        )
    for field in ("offset", "length"):
        value = getattr(entry, field)
        if value % MIB or (field == "offset" and not HEADER_AREA <= value < 1 << 62):
            message = f"Invalid {field} {value:#x} of a region"
            fail(file, message, f"region.{field}", at + RegionEntry.offset_of(field), found=value)
