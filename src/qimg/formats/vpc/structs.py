"""The structures of VHD, its checksums and geometries (vpc sheet, sections 1 and 3).

All integers are big-endian.
"""

from __future__ import annotations

from qimg.ondisk import U8, U16, U32, U64, Struct
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated


COOKIE, SPARSE_COOKIE = b"conectix", b"cxsparse"
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
NOWHERE = (1 << 64) - 1
VERSION = 0x00010000
#: Seconds from 1970 to 2000, where time stamps count from.
EPOCH = 946684800
ABSENT = 0xFFFFFFFF
BLOCK = 2 << 20
WORD = 4
BAT_OFFSET = 3 * SECTOR
MAX_SECTORS = 0xFF000000
MAX_ENTRIES = 0x1FFFFFFF
#: Entries of a BAT that are looked at when the image is opened (8 TiB in blocks of the usual size).
CHECKED = 1 << 22
#: The largest geometry; disks that have it have their size from the footer's size field.
MAX_GEOMETRY = 65535 * 16 * 255
#: Creators whose images have the size that their geometry says (section 3).
BY_GEOMETRY = (b"vpc ", b"qemu")
LOCATORS = 8


class Footer(Struct, order=">"):
    """The last sector, and the first of dynamic images (section 1)."""

    cookie: Annotated[bytes, 8]
    features: U32
    version: U32
    data_offset: U64
    timestamp: U32
    creator_app: Annotated[bytes, 4]
    creator_major: U16
    creator_minor: U16
    creator_os: Annotated[bytes, 4]
    original_size: U64
    current_size: U64
    cylinders: U16
    heads: U8
    sectors: U8
    type: U32
    checksum: U32
    uuid: Annotated[bytes, 16]
    saved_state: U8
    reserved: Annotated[bytes, 427]

    @property
    def geometry(self) -> int:
        """Sectors that cylinders, heads and sectors make."""
        return self.cylinders * self.heads * self.sectors


class Locator(Struct, order=">"):
    """Where a parent may be found; `offset` in bytes."""

    code: Annotated[bytes, 4]
    space: U32
    length: U32
    reserved: U32
    offset: U64


class DynamicHeader(Struct, order=">"):
    """Behind the copy of the footer (section 1)."""

    cookie: Annotated[bytes, 8]
    data_offset: U64
    bat_offset: U64
    version: U32
    max_entries: U32
    block_size: U32
    checksum: U32
    parent_uuid: Annotated[bytes, 16]
    parent_timestamp: U32
    reserved1: U32
    parent_name: Annotated[bytes, 512]
    locators: Annotated[bytes, 192]
    reserved2: Annotated[bytes, 256]


def sealed(structure: Footer | DynamicHeader) -> bytes:
    """The structure packed, with its checksum: the complement of the sum of all other bytes."""
    structure.checksum = 0
    structure.checksum = ~sum(structure.pack()) & 0xFFFFFFFF
    return structure.pack()


def is_sealed(structure: Footer | DynamicHeader) -> bool:
    """Whether the checksum is right."""
    stored = structure.checksum
    right = stored == int.from_bytes(sealed(structure)[_checksum_at(structure) :][:4], "big")
    structure.checksum = stored
    return right


def _checksum_at(structure: Footer | DynamicHeader) -> int:
    return type(structure).offset_of("checksum")


def geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors a track for a disk of `sectors` (the specification's appendix)."""
    sectors = min(sectors, MAX_GEOMETRY)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    track = 17
    tracks = sectors // track
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        tracks = sectors // track
    if tracks >= heads * 1024:
        track, heads = 63, 16
        tracks = sectors // track
    return tracks // heads, heads, track


def fitting_geometry(sectors: int) -> tuple[int, int, int]:
    """The geometry of the smallest disk that has one and holds `sectors` (section 3)."""
    wanted = min(sectors, MAX_GEOMETRY)
    for more in range(MAX_GEOMETRY):
        cylinders, heads, track = geometry(sectors + more)
        if cylinders * heads * track >= wanted:
            break
    return cylinders, heads, track


def bitmap_bytes(block_size: int) -> int:
    """Bytes of a block's bitmap, in whole sectors."""
    return round_up(-(-block_size // SECTOR // 8), SECTOR)
