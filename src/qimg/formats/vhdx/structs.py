"""The structures of vhdx files (vhdx sheet 1, 4). Integers are little-endian, GUIDs as Microsoft has them."""

from __future__ import annotations

from qimg.errors import FormatError
from qimg.identity import guid_bytes
from qimg.ondisk import U16, U32, U64, Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated, NoReturn

    from qimg.storage.base import Storage

SIGNATURE = b"vhdxfile"
KIB, MIB = 1 << 10, 1 << 20
#: Where things are that have a fixed place, and how long they are.
HEADERS = (64 * KIB, 128 * KIB)
HEADER_BYTES = 4 * KIB
REGION_TABLES = (192 * KIB, 256 * KIB)
REGION_TABLE_BYTES = 64 * KIB
#: What lies before this belongs to nobody but the parts above.
HEADER_AREA = MIB
MAX_ENTRIES = 2047
MAX_SIZE = 64 << 40
MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB
#: Unit of the log, and of what goes through it.
LOG_SECTOR = 4 * KIB
#: Sectors of a chunk: as many as one sector bitmap block has bits.
CHUNK_SECTORS = 8 * MIB

NO_GUID = bytes(16)

# States of blocks: the low three bits of a word in the BAT (section 1).
NOT_PRESENT, UNDEFINED, ZEROED, UNMAPPED, INVALID, UNMAPPED_OLD, PRESENT, PARTIAL = range(8)
STATE = 7
PLACE = ((1 << 64) - 1) & ~(MIB - 1)


def guid(text: str) -> bytes:
    """A GUID as it is stored."""
    return guid_bytes(bytes.fromhex(text.replace("-", "")))


BAT_REGION = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
PAGE_83 = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
VHDX_LOCATOR = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")


class Header(Struct, order="<"):
    """One of the two headers; 4 KiB with what follows it."""

    signature: Annotated[bytes, 4]
    checksum: U32
    sequence: U64
    file_guid: Annotated[bytes, 16]
    data_guid: Annotated[bytes, 16]
    log_guid: Annotated[bytes, 16]
    log_version: U16
    version: U16
    log_length: U32
    log_offset: U64


class RegionTable(Struct, order="<"):
    """What a region table starts with."""

    signature: Annotated[bytes, 4]
    checksum: U32
    count: U32
    reserved: U32


class RegionEntry(Struct, order="<"):
    """A region of the file; bit 0 of `flags`: whoever does not know it must not open the file."""

    guid: Annotated[bytes, 16]
    offset: U64
    length: U32
    flags: U32


class MetadataTable(Struct, order="<"):
    """What the metadata region starts with."""

    signature: Annotated[bytes, 8]
    reserved: U16
    count: U16
    reserved2: Annotated[bytes, 20]


class MetadataEntry(Struct, order="<"):
    """An item; `offset` counts from the region's start. Flags: 1 user, 2 virtual disk, 4 required."""

    guid: Annotated[bytes, 16]
    offset: U32
    length: U32
    flags: U32
    reserved: U32


class LogHeader(Struct, order="<"):
    """An entry of the log; `tail` is where in the log the oldest entry that is still needed starts."""

    signature: Annotated[bytes, 4]
    checksum: U32
    length: U32
    tail: U32
    sequence: U64
    descriptors: U32
    reserved: U32
    log_guid: Annotated[bytes, 16]
    flushed_size: U64
    last_size: U64


class Descriptor(Struct, order="<"):
    """``desc``: a sector of data, whose first 8 and last 4 bytes are in `leading` and `trailing`; ``zero``:
    zeros, as many as `leading` says."""

    signature: Annotated[bytes, 4]
    trailing: Annotated[bytes, 4]
    leading: Annotated[bytes, 8]
    offset: U64
    sequence: U64


class DataSector(Struct, order="<"):
    """The rest of a sector of data."""

    signature: Annotated[bytes, 4]
    sequence_high: U32
    data: Annotated[bytes, 4084]
    sequence_low: U32


def sealed(raw: bytes) -> bytes:
    """A structure with its checksum, which is at byte 4 and covers all of it."""
    from qimg.ondisk.crc32c import crc32c

    blank = raw[:4] + bytes(4) + raw[8:]
    return raw[:4] + crc32c(blank).to_bytes(4, "little") + raw[8:]


def is_sealed(raw: bytes) -> bool:
    """Whether the checksum is right."""
    return sealed(raw) == raw


def fail(
    file: Storage, message: str, field: str, offset: int, *, expected: object = None, found: object = None
) -> NoReturn:
    """Raise FormatError for a field at byte `offset` of the file."""
    raise FormatError(message, file=file.name, field=field, offset=offset, expected=expected, found=found)
