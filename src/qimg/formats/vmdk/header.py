"""Reading and validating the binary headers (vmdk sheet 4.1, 4.2, 5.1)."""

from __future__ import annotations

from qimg.errors import FormatError, UnsupportedFeature
from qimg.formats.vmdk.structs import (
    AT_END,
    COWD,
    COWD_TABLE_ENTRIES,
    DEFLATE,
    KDMV,
    MARKER_END,
    MARKER_FOOTER,
    MARKERS,
    MAX_DIRECTORY,
    MAX_GRAIN_SECTORS,
    MAX_TABLE_ENTRIES,
    MAX_VERSION,
    REDUNDANT,
    SECTOR,
    ZEROED_GRAIN,
    CowdHeader,
    Marker,
    SparseHeader,
)
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qimg.storage.base import Storage


class Geometry:
    """Where the tables of a sparse extent are. Sizes and offsets in bytes, unless a name says otherwise.

    size               of the guest's part.
    grain              guest bytes of one grain.
    per_table          grains of one grain table.
    directory          offset of the grain directory; redundant: of its second copy, None without one.
    tables             entries of the directory that are needed; `listed`: how many there are.
    data_start         where the first grain can be.
    zeroed_grain       table entries of 1 mean zeros.
    compressed         grains are deflated; markers: with a marker in front.
    footer             the tables were found by the footer: nothing can be appended.
    """

    def __init__(
        self,
        *,
        size: int,
        grain: int,
        per_table: int,
        directory: int,
        redundant: int | None = None,
        listed: int | None = None,
        data_start: int,
        zeroed_grain: bool = False,
        compressed: bool = False,
        markers: bool = False,
        footer: bool = False,
    ) -> None:
        self.size = size
        self.grain = grain
        self.per_table = per_table
        self.directory = directory
        self.redundant = redundant
        self.data_start = data_start
        self.tables = -(-size // (grain * per_table))
        self.listed = self.tables if listed is None else min(listed, self.tables)
        self.zeroed_grain = zeroed_grain
        self.compressed = compressed
        self.markers = markers
        self.footer = footer
        #: Offset of the word of a COWD header that says where free space begins.
        self.next_free: int | None = None

    def with_tables(self, header: SparseHeader) -> Geometry:
        """The same extent with the capacity and the directories of `header`."""
        return Geometry(
            size=header.capacity * SECTOR,
            grain=self.grain,
            per_table=self.per_table,
            directory=header.directory_offset * SECTOR,
            redundant=None if self.redundant is None else header.redundant_offset * SECTOR,
            data_start=self.data_start,
            zeroed_grain=self.zeroed_grain,
        )

    @property
    def grains(self) -> int:
        """Guest grains, the last of which may be cut off by the size."""
        return -(-self.size // self.grain)

    @property
    def table_bytes(self) -> int:
        """Bytes of one grain table in the file."""
        return round_up(self.per_table * 4, SECTOR)


def _fail(file: Storage, message: str, field: str, offset: int, found: object) -> NoReturn:
    raise FormatError(message, file=file.name, field=f"header.{field}", offset=offset, found=found)


def parse_sparse(file: Storage, *, writable: bool) -> tuple[SparseHeader, Geometry]:
    """Header and geometry of a hosted sparse extent. Raises FormatError, UnsupportedFeature, StorageError."""
    header = SparseHeader.unpack(bytes(file.read(0, SparseHeader.SIZE)))
    if header.magic != KDMV:
        _fail(file, "Image not in VMDK format", "magic", 0, header.magic)
    footer = header.directory_offset == AT_END
    if footer:
        header = _footer(file)
    _check_version(file, header, writable=writable)
    _check_numbers(file, header)
    compressed = header.compression == DEFLATE
    geometry = Geometry(
        size=header.capacity * SECTOR,
        grain=header.grain_size * SECTOR,
        per_table=header.table_entries,
        directory=header.directory_offset * SECTOR,
        redundant=header.redundant_offset * SECTOR if header.flags & REDUNDANT and not footer else None,
        data_start=header.overhead * SECTOR,
        zeroed_grain=bool(header.flags & ZEROED_GRAIN),
        compressed=compressed,
        markers=bool(header.flags & MARKERS),
        footer=footer,
    )
    if geometry.tables > MAX_DIRECTORY:
        _fail(file, "L1 size too big", "capacity", SparseHeader.offset_of("capacity"), header.capacity)
    return header, geometry


def _check_version(file: Storage, header: SparseHeader, *, writable: bool) -> None:
    if header.version > MAX_VERSION:
        raise UnsupportedFeature(
            f"Unsupported VMDK version {header.version}", file=file.name, field="header.version", offset=4
        )
    if header.version == MAX_VERSION and header.compression != DEFLATE and writable:
        raise UnsupportedFeature("VMDK version 3 must be read only", file=file.name, field="header.version")


def _check_numbers(file: Storage, header: SparseHeader) -> None:
    """The rows of section 4.1 that bound what is used afterwards."""
    if header.table_entries > MAX_TABLE_ENTRIES:
        _fail(file, "L2 table size too big", "table_entries", 44, header.table_entries)
    if not header.table_entries or not header.grain_size:
        _fail(file, "L1 entry size is invalid", "grain_size", 20, header.grain_size)
    if header.grain_size > MAX_GRAIN_SECTORS:
        _fail(file, "Invalid granularity, image may be corrupt", "grain_size", 20, header.grain_size)
    for field in ("capacity", "redundant_offset", "directory_offset", "overhead"):
        value = getattr(header, field)
        if value >= 1 << 54 and not (field == "redundant_offset" and not header.flags & REDUNDANT):
            _fail(file, f"{field} is beyond any file", field, SparseHeader.offset_of(field), value)
    needed = header.overhead * SECTOR
    if file.size < needed:
        _fail(file, f"File truncated, expecting at least {needed} bytes", "overhead", 64, header.overhead)


def _footer(file: Storage) -> SparseHeader:
    """The header's copy at the end of a stream (4.2). Raises FormatError."""
    start = round_up(file.size, SECTOR) - 3 * SECTOR
    raw = bytes(file.read(start, 3 * SECTOR)) if start >= 0 else bytes(3 * SECTOR)
    before, after = Marker.unpack(raw), Marker.unpack(raw, 2 * SECTOR)
    header = SparseHeader.unpack(raw, SECTOR)
    if (
        header.magic != KDMV
        or (before.size, before.type) != (0, MARKER_FOOTER)
        or (after.value, after.size, after.type) != (0, 0, MARKER_END)
        or header.directory_offset == AT_END
    ):
        raise FormatError("Invalid footer", file=file.name, field="footer", offset=max(start, 0))
    return header


def parse_cowd(file: Storage) -> Geometry:
    """Geometry of an ESX delta extent (5.1). Raises FormatError."""
    header = CowdHeader.unpack(bytes(file.read(0, CowdHeader.SIZE)))
    if header.magic != COWD:
        _fail(file, "Image not in VMDK format", "magic", 0, header.magic)
    if not header.grain_size:
        _fail(file, "L1 entry size is invalid", "grain_size", 16, header.grain_size)
    if header.grain_size > MAX_GRAIN_SECTORS:
        _fail(file, "Invalid granularity, image may be corrupt", "grain_size", 16, header.grain_size)
    start = header.directory_offset * SECTOR + header.directory_entries * 4
    geometry = Geometry(
        size=header.capacity * SECTOR,
        grain=header.grain_size * SECTOR,
        per_table=COWD_TABLE_ENTRIES,
        directory=header.directory_offset * SECTOR,
        listed=header.directory_entries,
        data_start=round_up(start, SECTOR),
    )
    geometry.next_free = CowdHeader.offset_of("next_free")
    return geometry
