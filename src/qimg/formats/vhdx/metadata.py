"""The metadata region: size of the disk, of its blocks and sectors, and what is below (vhdx sheet 1, 9)."""

from __future__ import annotations

from qimg.errors import UnsupportedFeature
from qimg.formats.vhdx.structs import (
    CHUNK_SECTORS,
    DISK_SIZE,
    FILE_PARAMETERS,
    KIB,
    LOGICAL_SECTOR,
    MAX_BLOCK,
    MAX_ENTRIES,
    MAX_SIZE,
    MIN_BLOCK,
    PAGE_83,
    PARENT_LOCATOR,
    PHYSICAL_SECTOR,
    VHDX_LOCATOR,
    MetadataEntry,
    MetadataTable,
    fail,
)
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qimg.formats.vhdx.structs import RegionEntry
    from qimg.storage.base import Storage

TABLE_BYTES = 64 * KIB
LEAVE_ALLOCATED, HAS_PARENT = 1, 2
#: Item -> (name, length in bytes; None: any).
_KNOWN: dict[bytes, tuple[str, int | None]] = {
    FILE_PARAMETERS: ("file parameters", 8),
    DISK_SIZE: ("virtual disk size", 8),
    PAGE_83: ("page 83 data", 16),
    LOGICAL_SECTOR: ("logical sector size", 4),
    PHYSICAL_SECTOR: ("physical sector size", 4),
    PARENT_LOCATOR: ("parent locator", None),
}
_REQUIRED = 4
_MAX_LOCATOR = 1 << 20
_MAX_KEYS = 256


class Metadata:
    """What the items say. Sizes in bytes.

    flags    of the file parameters.
    size     the guest's disk as recorded (not rounded); `size_at` where in the file that stands.
    parent   key -> value of the parent locator; None: no parent.
    """

    def __init__(self, block_size: int, flags: int, size: int, size_at: int = 0) -> None:
        self.block_size = block_size
        self.flags = flags
        self.size = size
        self.size_at = size_at
        self.parent: dict[str, str] | None = None

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.size // self.block_size)

    @property
    def ratio(self) -> int:
        """Payload blocks after which the BAT has a word for a sector bitmap."""
        return CHUNK_SECTORS * SECTOR // self.block_size

    @property
    def words(self) -> int:
        """Words that the BAT needs."""
        return bat_words(self.blocks, self.ratio, parent=self.parent is not None)


def bat_words(blocks: int, ratio: int, *, parent: bool = False) -> int:
    """Words of a BAT: one for each block and, between them, one for each sector bitmap (section 1)."""
    if parent:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + (blocks - 1) // ratio if blocks else 0


def read_metadata(file: Storage, region: RegionEntry) -> Metadata:
    """Parse and validate. Raises FormatError, UnsupportedFeature, StorageError."""
    return _Reader(file, region).read()


class _Reader:
    def __init__(self, file: Storage, region: RegionEntry) -> None:
        self.file = file
        self.region = region
        self.items: dict[bytes, MetadataEntry] = {}

    def read(self) -> Metadata:
        self._read_table()
        for guid, (name, _length) in _KNOWN.items():
            if guid not in self.items and guid != PARENT_LOCATOR:
                self._unsupported(f"The metadata has no {name}", name, self.region.offset)
        parameters = self._value(FILE_PARAMETERS)
        block, flags = parameters & 0xFFFFFFFF, parameters >> 32
        size = self._value(DISK_SIZE)
        found = Metadata(block, flags, size, self.region.offset + self.items[DISK_SIZE].offset)
        self._validate(found)
        if flags & HAS_PARENT:
            found.parent = self._parent()
        return found

    def _read_table(self) -> None:
        region = self.region
        if region.length < TABLE_BYTES or region.offset + TABLE_BYTES > self.file.size:
            self._wrong("The metadata region is too short", "region.length", region.offset, region.length)
        raw = bytes(self.file.read(region.offset, TABLE_BYTES))
        table = MetadataTable.unpack(raw)
        if table.signature != b"metadata":
            self._wrong("Invalid metadata signature", "metadata.signature", region.offset, table.signature)
        if table.count > MAX_ENTRIES:
            message = f"The metadata has {table.count} items, at most {MAX_ENTRIES} are allowed"
            self._wrong(message, "metadata.count", region.offset + 10, table.count)
        for number in range(table.count):
            place = MetadataTable.SIZE + number * MetadataEntry.SIZE
            self._take(MetadataEntry.unpack(raw, place), region.offset + place)

    def _take(self, entry: MetadataEntry, at: int) -> None:
        """One entry of the table, which is at byte `at` of the file."""
        known = _KNOWN.get(entry.guid)
        if known is None:
            if entry.flags & _REQUIRED:
                self._unsupported(
                    "The metadata has an item that qimg does not know and that is marked as required",
                    "metadata.guid",
                    at,
                    entry.guid.hex(),
                )
            return
        name, length = known
        if entry.guid in self.items:
            self._wrong(f"The metadata has the {name} twice", "metadata.guid", at, entry.guid.hex())
        if length is not None and entry.length < length:
            self._wrong(f"The {name} is {entry.length} bytes long", "metadata.length", at + 20, entry.length)
        if entry.offset < TABLE_BYTES or entry.offset + entry.length > self.region.length:
            message = f"The {name} lies outside the metadata region"
            self._wrong(message, "metadata.offset", at + 16, entry.offset)
        self.items[entry.guid] = entry

    def _value(self, guid: bytes) -> int:
        """The item as one little-endian number."""
        length = _KNOWN[guid][1]
        assert length is not None
        return int.from_bytes(self.file.read(self.region.offset + self.items[guid].offset, length), "little")

    def _validate(self, found: Metadata) -> None:
        def at(guid: bytes) -> int:
            return self.region.offset + self.items[guid].offset

        block = found.block_size
        if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
            self._wrong(
                f"Invalid block size {block}", "file parameters.block size", at(FILE_PARAMETERS), block
            )
        logical, physical = self._value(LOGICAL_SECTOR), self._value(PHYSICAL_SECTOR)
        if logical != SECTOR:
            message = f"Logical sectors of {logical} bytes are not supported"
            self._unsupported(message, "logical sector size", at(LOGICAL_SECTOR), logical)
        if physical not in (512, 4096):
            message = f"Invalid physical sector size {physical}"
            self._wrong(message, "physical sector size", at(PHYSICAL_SECTOR), physical)
        if found.size > MAX_SIZE:
            message = f"The disk has {found.size} bytes, at most {MAX_SIZE} are allowed"
            self._wrong(message, "virtual disk size", at(DISK_SIZE), found.size)

    def _parent(self) -> dict[str, str]:
        """Keys and values of the parent locator (section 9)."""
        entry = self.items.get(PARENT_LOCATOR)
        if entry is None:
            self._wrong("The file has a parent but no parent locator", "parent locator", self.region.offset)
        at = self.region.offset + entry.offset
        raw = bytes(self.file.read(at, min(entry.length, _MAX_LOCATOR)))
        if len(raw) < 20 or raw[:16] != VHDX_LOCATOR:
            self._unsupported("The parent locator is of an unknown type", "parent locator.type", at)
        count = int.from_bytes(raw[18:20], "little")
        if count > _MAX_KEYS or 20 + 12 * count > len(raw):
            self._wrong(f"The parent locator has {count} keys", "parent locator.count", at + 18, count)
        found: dict[str, str] = {}
        for number in range(count):
            place = raw[20 + 12 * number : 32 + 12 * number]
            key = self._text(raw, place[:4], place[8:10], at)
            found[key] = self._text(raw, place[4:8], place[10:12], at)
        return found

    def _text(self, raw: bytes, offset: bytes, length: bytes, at: int) -> str:
        start, count = int.from_bytes(offset, "little"), int.from_bytes(length, "little")
        if start + count > len(raw):
            self._wrong("A key of the parent locator lies outside it", "parent locator.entries", at, start)
        return raw[start : start + count].decode("utf-16-le", "replace").split("\0", 1)[0]

    def _wrong(self, message: str, field: str, offset: int, found: object = None) -> NoReturn:
        fail(self.file, message, field, offset, found=found)

    def _unsupported(self, message: str, field: str, offset: int, found: object = None) -> NoReturn:
        raise UnsupportedFeature(message, file=self.file.name, field=field, offset=offset, found=found)
