"""Structures and constants of vmdk (vmdk sheet 4, 4.2, 5.1): little-endian integers, sectors of 512 bytes."""

from __future__ import annotations

from qimg.ondisk import U8, U16, U32, U64, Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

KDMV = b"KDMV"
COWD = b"COWD"
SECTOR = 512

# Header flags.
NEWLINE_TEST = 1
REDUNDANT = 1 << 1
ZEROED_GRAIN = 1 << 2
COMPRESSED = 1 << 16
MARKERS = 1 << 17

NEWLINES = b"\n \r\n"
DEFLATE = 1
#: Grain directory offset of a header that leaves the word to the footer.
AT_END = (1 << 64) - 1
#: Grain table entry of a grain that reads as zeros, with ZEROED_GRAIN.
ZERO_GRAIN = 1

# Types of metadata markers (4.2).
MARKER_END, MARKER_TABLE, MARKER_DIRECTORY, MARKER_FOOTER = 0, 1, 2, 3

# What new images have (4).
GRAIN_SECTORS = 128
GRAIN = GRAIN_SECTORS * SECTOR
TABLE_ENTRIES = 512
TABLE_SECTORS = TABLE_ENTRIES * 4 // SECTOR
DESCRIPTOR_SECTOR = 1
DESCRIPTOR_SECTORS = 20
REDUNDANT_SECTOR = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS
#: Guest bytes of one extent of a split image.
SPLIT = 1 << 31

# What is refused (4.1).
MAX_VERSION = 3
MAX_TABLE_ENTRIES = 512
MAX_GRAIN_SECTORS = 0x200000
MAX_DIRECTORY = 32 << 20
#: Grains lie below this sector: entries have 32 bits.
MAX_SECTOR = 1 << 32

COWD_TABLE_ENTRIES = 4096


class SparseHeader(Struct, order="<"):
    """The first sector of a hosted sparse extent, and the footer."""

    magic: Annotated[bytes, 4]
    version: U32
    flags: U32
    capacity: U64
    grain_size: U64
    descriptor_offset: U64
    descriptor_size: U64
    table_entries: U32
    redundant_offset: U64
    directory_offset: U64
    overhead: U64
    unclean: U8
    newlines: Annotated[bytes, 4]
    compression: U16
    padding: Annotated[bytes, 433]


class CowdHeader(Struct, order="<"):
    """The beginning of an ESX delta extent."""

    magic: Annotated[bytes, 4]
    version: U32
    flags: U32
    capacity: U32
    grain_size: U32
    directory_offset: U32
    directory_entries: U32
    next_free: U32
    cylinders: U32
    heads: U32
    sectors: U32


class Marker(Struct, order="<"):
    """In front of a compressed grain: `value` is its guest sector, `size` the bytes that follow. With `size`
    0 a metadata marker: `value` sectors of `type` follow."""

    value: U64
    size: U32
    type: U32


#: Bytes in front of a compressed grain.
GRAIN_MARKER = Marker.offset_of("type")
