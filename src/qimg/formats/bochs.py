"""bochs: the growing images of the Bochs emulator, read only (bochs sheet). All integers little-endian.

A catalog tells for each extent of the disk where it is in the file, if it is there at all: first a bitmap of
the sectors that it holds, then room for all of them.
"""

from __future__ import annotations

from array import array
from sys import byteorder

from qimg.errors import CorruptImage, NotSupported
from qimg.extent import Extent
from qimg.formats.base import Format, Image
from qimg.formats.refusal import refuse
from qimg.ondisk import U32, U64, Struct
from qimg.units import SECTOR, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Storage

TEXTS = (b"Bochs Virtual HD Image", b"Redolog", b"Growing")
VERSION_1, VERSION_2 = 0x10000, 0x20000
#: Limits of the sheet.
MAX_CATALOG = 0x100000
MAX_EXTENT = 0x800000
ABSENT = 0xFFFFFFFF
_WORD = 4


class Header(Struct, order="<"):
    """Version 2. In version 1 the disk's size stands four bytes further ahead."""

    magic: Annotated[bytes, 32]
    type: Annotated[bytes, 16]
    subtype: Annotated[bytes, 16]
    version: U32
    header_size: U32
    catalog: U32
    bitmap: U32
    extent: U32
    reserved: U32
    disk: U64

    @property
    def disk_size(self) -> int:
        """Bytes of the disk."""
        if self.version == VERSION_1:
            return self.reserved | (self.disk & 0xFFFFFFFF) << 32
        return self.disk


class BochsImage(Image):
    """One image. To everyone but `read_into` it is data all over, as to the real program."""

    format_name = "bochs"

    def __init__(self, file: Storage, header: Header) -> None:
        self.file = file
        self.header = header
        self.size = round_down(header.disk_size, SECTOR)
        self._catalog = array("I", bytes(file.read(header.header_size, _WORD * header.catalog)))
        if byteorder == "big":
            self._catalog.byteswap()
        self._data = header.header_size + _WORD * header.catalog
        self._bitmap = round_up(header.bitmap, SECTOR)
        self._step = self._bitmap + round_up(header.extent, SECTOR)

    def extents(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, 0)] if length else []

    def read_into(self, buf: Buffer, guest: int) -> None:
        view = memoryview(buf)
        size = self.header.extent
        while view:
            number, inner = divmod(guest, size)
            step = min(len(view), size - inner)
            place = self._catalog[number]
            if place == ABSENT:
                view[:step] = bytes(step)
            else:
                self._read_extent(self._data + place * self._step, view[:step], inner, guest)
            view = view[step:]
            guest += step

    def _read_extent(self, place: int, view: memoryview, inner: int, guest: int) -> None:
        """Fill `view` with what the extent at `place` of the file holds from `inner` on."""
        start, end = inner, inner + len(view)
        first, last = start // SECTOR, -(-end // SECTOR)
        bits = int.from_bytes(self.file.read(place + first // 8, -(-last // 8) - first // 8), "little")
        bits >>= first % 8
        place += self._bitmap
        while start < end:
            sectors, present = _run(bits, last - first)
            stop = min((first + sectors) * SECTOR, end)
            part = view[start - inner : stop - inner]
            if not present:
                part[:] = bytes(len(part))
            elif place + stop > self.file.size:
                raise CorruptImage(
                    f"Input/output error: sectors at {place + start:#x} lie beyond the end of the file",
                    file=self.file.name,
                    field="catalog",
                    offset=place + start,
                    guest=guest,
                )
            else:
                self.file.read_into(part, place + start)
            bits >>= sectors
            first += sectors
            start = stop


def _run(bits: int, count: int) -> tuple[int, bool]:
    """How many of `count` bits from the lowest on are alike, and which they are."""
    present = bool(bits & 1)
    other = ~bits if present else bits
    lowest = other & -other  # 0 where all are clear
    return (min(count, lowest.bit_length() - 1) if lowest else count), present


def parse(file: Storage) -> Header:
    """Read and validate the header. Raises FormatError."""
    header = Header.unpack(file.read(0, Header.SIZE))
    for field, text in zip(("magic", "type", "subtype"), TEXTS, strict=True):
        if not getattr(header, field).startswith(text + b"\0"):
            refuse(file, header, "Image not in Bochs format", field)
    if header.version not in (VERSION_1, VERSION_2):
        refuse(file, header, "Image not in Bochs format", "version")
    if header.catalog > MAX_CATALOG:
        refuse(file, header, "Catalog size is too large", "catalog")
    extent, size = header.extent, header.disk_size
    if extent < SECTOR:
        refuse(file, header, f"Extent size must be at least {SECTOR}", "extent")
    if extent & (extent - 1):
        refuse(file, header, f"Extent size {extent} is not a power of two", "extent")
    if extent > MAX_EXTENT:
        refuse(file, header, f"Extent size {extent} is too large", "extent")
    if header.catalog < -(-round_down(size, SECTOR) // extent):
        refuse(file, header, "Catalog size is too small for this disk size", "catalog")
    if header.bitmap * 8 < extent // SECTOR:
        refuse(file, header, f"Bitmap size {header.bitmap} is too small for this extent size", "bitmap")
    if header.header_size + _WORD * header.catalog > file.size:
        refuse(file, header, "Catalog reaches beyond the end of the file", "catalog")
    return header


class Bochs(Format):
    """The driver."""

    name = "bochs"

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> BochsImage:
        if writable:
            raise NotSupported("Image is read-only")
        return BochsImage(file, parse(file))
