"""The layouts of the disks that ``fat:`` makes (protocols sheet): boot sectors and file allocation tables.

Disks with FAT12 and FAT16 are those of the real program to the byte. Its FAT32 is a FAT16 with entries of 32
bits, which no reader understands; the one here is a FAT32.
"""

from __future__ import annotations

from array import array
from sys import byteorder

from qimg.ondisk import U8, U16, U32, Struct
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

    from qimg.storage.base import Bytes

ENTRY = 32
_FATS = 2
_OEM = b"MSWIN4.1"
_VOLUME_ID = 0xFABE1AFD
_DISK_ID = 0xBE1AFDFA
_BOOT_LABEL = b"QEMU VVFAT "
_BOOT_MARK = b"\x55\xaa"
_FAT32_BACKUP, _FAT32_INFO, _FAT32_ROOT = 6, 1, 2
#: What ends a chain of clusters, by bits of an entry.
_END = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}


class Parameters(Struct, order="<"):
    """The start of every boot sector."""

    jump: Annotated[bytes, 3]
    oem: Annotated[bytes, 8]
    sector: U16
    cluster_sectors: U8
    reserved: U16
    fats: U8
    root_entries: U16
    sectors_16: U16
    media: U8
    fat_sectors_16: U16
    track_sectors: U16
    heads: U16
    hidden: U32
    sectors_32: U32


class Tail(Struct, order="<"):
    """What follows `Parameters`, behind the fields of its own that FAT32 has."""

    drive: U8
    reserved: U8
    mark: U8
    volume_id: U32
    label: Annotated[bytes, 11]
    kind: Annotated[bytes, 8]


class Fat32Fields(Struct, order="<"):
    """What only FAT32 has."""

    fat_sectors: U32
    flags: U16
    version: U16
    root_cluster: U32
    info_sector: U16
    backup_sector: U16
    reserved: Annotated[bytes, 12]


class PartitionEntry(Struct, order="<"):
    """One partition of the master boot record."""

    active: U8
    start: Annotated[bytes, 3]
    type: U8
    end: Annotated[bytes, 3]
    first: U32
    sectors: U32


class Geometry:
    """One layout. Counts are of sectors where not said otherwise.

    bits          of an entry of the file allocation table.
    first         where the file system starts: behind the partition table and its track, or 0 on a floppy.
    last_cluster  the highest cluster number that may be used.
    """

    def __init__(
        self, bits: int, cylinders: int, heads: int, track: int, *, fat: int, partition: int
    ) -> None:
        """`fat`: sectors of one file allocation table; `partition`: its type, 0: a floppy, without any."""
        self.bits = bits
        self.cylinders = cylinders
        self.heads = heads
        self.track = track
        self.fat = fat
        self.partition = partition
        self.sectors = cylinders * heads * track
        self.first = track if partition else 0
        self.cluster_sectors = 8 if bits == 32 else 16
        self.reserved = 32 if bits == 32 else 1
        #: Directory entries in the root, 0: as many as there are.
        self.root_entries = 0 if bits == 32 else 512
        data = self.volume - self.reserved - _FATS * fat - self.root_entries * ENTRY // SECTOR
        if bits != 32:
            data -= self.first  # the real program's disks end that much earlier
        self.last_cluster = data // self.cluster_sectors + 1

    @property
    def volume(self) -> int:
        """Sectors of the file system."""
        return self.sectors - self.first

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.cluster_sectors * SECTOR

    @property
    def fat_places(self) -> list[int]:
        """Byte offsets of the file allocation tables."""
        start = self.first + self.reserved
        return [(start + number * self.fat) * SECTOR for number in range(_FATS)]

    @property
    def root_place(self) -> int:
        """Byte offset of the root directory, where it has a place of its own."""
        return (self.first + self.reserved + _FATS * self.fat) * SECTOR

    def cluster_place(self, cluster: int) -> int:
        """Byte offset of a cluster."""
        return self.root_place + self.root_entries * ENTRY + (cluster - 2) * self.cluster_size

    @property
    def capacity(self) -> str:
        """What messages say of the size."""
        return f"FAT{self.bits} (capacity {self.volume / 2000:.2f} MB)"

    # -- sectors

    def start_sectors(self, used: int) -> list[tuple[int, bytes]]:
        """(byte offset, content) of all that stands before the tables; `used` clusters are in use."""
        boot = self._boot_sector()
        found = [(self.first * SECTOR, boot)]
        if self.partition:
            found.insert(0, (0, self._partition_table()))
        if self.bits == 32:
            info = b"RRaA" + bytes(480) + b"rrAa"
            info += (self.last_cluster - 1 - used).to_bytes(4, "little") + (used + 2).to_bytes(4, "little")
            info = info.ljust(SECTOR - 2, b"\0") + _BOOT_MARK
            for sector in (0, _FAT32_BACKUP):
                if sector:
                    found.append(((self.first + sector) * SECTOR, boot))
                found.append(((self.first + sector + _FAT32_INFO) * SECTOR, info))
        return found

    def _partition_table(self) -> bytes:
        entry = PartitionEntry(
            active=0x80,
            start=self._address(self.first),
            type=self.partition,
            end=self._address(self.sectors - 1),
            first=self.first,
            sectors=self.volume,
        )
        table = bytes(440) + _DISK_ID.to_bytes(4, "little") + bytes(2) + entry.pack()
        return table.ljust(SECTOR - 2, b"\0") + _BOOT_MARK

    def _address(self, sector: int) -> bytes:
        """Head, sector and cylinder as the partition table has them."""
        rest, number = divmod(sector, self.track)
        cylinder, head = divmod(rest, self.heads)
        return bytes((head, number + 1 | cylinder >> 8 << 6, cylinder & 0xFF))

    def _boot_sector(self) -> bytes:
        short = self.volume <= 0xFFFF
        wide = self.bits == 32
        parameters = Parameters(
            jump=b"\xeb\x58\x90" if wide else b"\xeb\x3e\x90",
            oem=_OEM,
            sector=SECTOR,
            cluster_sectors=self.cluster_sectors,
            reserved=self.reserved,
            fats=_FATS,
            root_entries=self.root_entries,
            sectors_16=self.volume if short else 0,
            media=self.media,
            fat_sectors_16=0 if wide else self.fat,
            track_sectors=self.track,
            heads=self.heads,
            hidden=self.first,
            sectors_32=0 if short else self.volume,
        )
        fields = b""
        if wide:
            fields = Fat32Fields(
                fat_sectors=self.fat,
                root_cluster=_FAT32_ROOT,
                info_sector=_FAT32_INFO,
                backup_sector=_FAT32_BACKUP,
            ).pack()
        tail = Tail(
            drive=0x80 if self.partition else 0,
            mark=0x29,
            volume_id=_VOLUME_ID,
            label=_BOOT_LABEL,
            kind=f"FAT{self.bits}".encode().ljust(8),
        )
        sector = parameters.pack() + fields + tail.pack()
        return sector.ljust(SECTOR - 2, b"\0") + _BOOT_MARK

    @property
    def media(self) -> int:
        """The byte that tells hard disks from floppies."""
        return 0xF8 if self.partition else 0xF0

    # -- tables

    def table(self, chains: list[tuple[int, int]]) -> Bytes:
        """A file allocation table with these (first cluster, number of clusters)."""
        end = _END[self.bits]
        words = array("I", [end & ~0xFF | self.media, end])
        for first, count in sorted(chains):
            words.extend(range(first + 1, first + count))
            words.append(end)
        if self.bits == 12:
            return _packed_12(words)
        if self.bits == 16:
            words = array("H", words)
        if byteorder == "big":
            words.byteswap()
        return words.tobytes()


def _packed_12(words: array[int]) -> bytes:
    """Two entries in three bytes."""
    words = words + array("I", [0] * (len(words) % 2))
    return b"".join(
        (low | high << 12).to_bytes(3, "little") for low, high in zip(words[::2], words[1::2], strict=True)
    )


def geometry(bits: int, *, floppy: bool) -> Geometry | None:
    """The layout for `bits` (0: what is usual); None where there is no such thing."""
    if not floppy:
        sizes = {0: (16, 1024, 252, 6), 12: (12, 64, 12, 1), 16: (16, 1024, 252, 6), 32: (32, 1024, 1006, 11)}
        bits, cylinders, fat, partition = sizes[bits]
        return Geometry(bits, cylinders, 16, 63, fat=fat, partition=partition)
    if bits == 32:
        return None
    if bits == 12:
        return Geometry(12, 80, 2, 18, fat=1, partition=0)
    return Geometry(bits or 12, 80, 2, 36, fat=2, partition=0)
