"""The header of parallels images, and what makes it valid (parallels sheet, sections 1 and 10).

All integers little-endian."""

from __future__ import annotations

from qimg.errors import LimitError, StorageError
from qimg.formats.refusal import refuse
from qimg.ondisk import U32, U64, Struct
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

    from qimg.storage.base import Storage

MAGIC_V1, MAGIC_V2 = b"WithoutFreeSpace", b"WithouFreSpacExt"
VERSION = 2
IN_USE = 0x746F6E59
#: Sectors of a cluster, and BAT entries, at most (section 10).
MAX_TRACKS = ((1 << 31) - 1) // 513
MAX_ENTRIES = ((1 << 31) - 1) // 4
WORD = 4
#: Geometry of new images; nobody uses it.
HEADS, TRACK_SECTORS = 16, 32


class Header(Struct, order="<"):
    """Section 1. `tracks` is the size of a cluster in sectors."""

    magic: Annotated[bytes, 16]
    version: U32
    heads: U32
    cylinders: U32
    tracks: U32
    bat_entries: U32
    sectors: U64
    in_use: U32
    data_offset: U32
    flags: U32
    ext_offset: U64

    @property
    def is_v2(self) -> bool:
        """The table counts clusters, and sizes have 64 bits."""
        return self.magic == MAGIC_V2

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.tracks * SECTOR

    @property
    def size(self) -> int:
        """Guest bytes."""
        return (self.sectors if self.is_v2 else self.sectors & 0xFFFFFFFF) * SECTOR

    def set_size(self, size: int) -> None:
        """Record `size` guest bytes, and a geometry that goes with it."""
        self.sectors = size // SECTOR
        self.cylinders = min(self.sectors // max(self.heads, 1) // TRACK_SECTORS, 0xFFFFFFFF)

    @property
    def table_end(self) -> int:
        """End of the BAT in bytes."""
        return Header.SIZE + WORD * self.bat_entries

    @property
    def least_data_offset(self) -> int:
        """Where data can begin at the earliest, in bytes."""
        return round_up(self.table_end, self.cluster_size if self.is_v2 else SECTOR)

    def data_start(self) -> int:
        """Where data begins, in bytes: what the header says, or what its 0 stands for in version 1."""
        if self.data_offset or self.is_v2:
            return self.data_offset * SECTOR
        return self.least_data_offset


def data_offset_is_valid(header: Header, file_size: int) -> bool:
    """Whether data can begin where the header says."""
    return header.least_data_offset <= header.data_start() <= file_size


def check_size(size: int, cluster_size: int) -> None:
    if cluster_size <= 0 or size >= cluster_size << 32:
        raise LimitError("Image size is too large for this cluster size")
    if -(-size // cluster_size) > MAX_ENTRIES:
        raise LimitError("Catalog too large")


def parse(file: Storage) -> Header:
    """Read and validate the header, in the order of section 10. Raises FormatError, StorageError."""
    from errno import EFBIG

    header = Header.unpack(bytes(file.read(0, Header.SIZE)))
    if header.version != VERSION or header.magic not in (MAGIC_V1, MAGIC_V2):
        refuse(file, header, "Image not in Parallels format", "magic")
    if not header.tracks:
        refuse(file, header, "Invalid image: Zero sectors per track", "tracks")
    if header.tracks > MAX_TRACKS:
        refuse(file, header, "Invalid image: Too big cluster", "tracks")
    if header.bat_entries > MAX_ENTRIES:
        refuse(file, header, "Catalog too large", "bat_entries")
    if header.ext_offset >= (1 << 63) // SECTOR:
        refuse(file, header, "Invalid image: Too big offset", "ext_offset")
    if header.size >> 63:
        raise StorageError("File too large", errno=EFBIG, offset=Header.offset_of("sectors"))
    return header
