"""Footer, dynamic header and parent of an existing image (vpc sheet, sections 2, 3, 9 and 10)."""

from __future__ import annotations

from errno import EFBIG

from qimg.errors import FormatError, StorageError
from qimg.formats.base import Reference
from qimg.formats.parent_path import plain_file
from qimg.formats.vpc.structs import (
    ABSENT,
    BY_GEOMETRY,
    CHECKED,
    COOKIE,
    FIXED,
    LOCATORS,
    MAX_ENTRIES,
    MAX_GEOMETRY,
    MAX_SECTORS,
    SPARSE_COOKIE,
    WORD,
    DynamicHeader,
    Footer,
    Locator,
    is_sealed,
)
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qimg.formats.vpc.dynamic import DynamicImage
    from qimg.storage.base import Storage


def refuse(file: Storage, message: str, field: str, offset: int, found: object = None) -> NoReturn:
    raise FormatError(message, file=file.name, field=field, offset=offset, found=found)


def read_footer(file: Storage) -> tuple[Footer, int]:
    """The footer that counts, and where it is. Raises FormatError (section 2)."""
    end = round_up(file.size, SECTOR)
    if end < SECTOR:
        refuse(file, "invalid VPC image", "footer.cookie", 0)
    footer = Footer.unpack(bytes(file.read(0, SECTOR)))
    if footer.cookie == COOKIE:
        if is_sealed(footer):
            return footer, 0
        last = Footer.unpack(bytes(file.read(end - SECTOR, SECTOR)))
        if end > SECTOR and last.cookie == COOKIE and is_sealed(last) and last.type != FIXED:
            return last, 0  # the copy at the front is damaged, the original is not
        refuse(file, "Incorrect header checksum", "footer.checksum", 64, footer.checksum)
    footer = Footer.unpack(bytes(file.read(end - SECTOR, SECTOR)))
    if footer.cookie != COOKIE or footer.type != FIXED:
        refuse(file, "invalid VPC image", "footer.cookie", end - SECTOR, footer.cookie)
    if not is_sealed(footer):
        refuse(file, "Incorrect header checksum", "footer.checksum", end - SECTOR + 64, footer.checksum)
    return footer, end - SECTOR


def virtual_size(footer: Footer, mode: str | None) -> int:
    """Guest bytes (section 3). `mode`: ``chs`` or ``current_size`` forces one of the two ways.

    Raises StorageError (EFBIG)."""
    by_geometry = footer.creator_app in BY_GEOMETRY
    if mode is not None:
        by_geometry = mode == "chs"
    sectors = footer.geometry
    if not by_geometry or sectors == MAX_GEOMETRY:
        sectors = footer.current_size // SECTOR
    if sectors > MAX_SECTORS:
        raise StorageError("File too large", errno=EFBIG)
    return sectors * SECTOR


def read_header(file: Storage, footer: Footer, size: int) -> DynamicHeader:
    """The dynamic header, validated (section 9). Raises FormatError."""
    offset = footer.data_offset
    if offset > (1 << 63) - 1 - DynamicHeader.SIZE:
        refuse(file, "Invalid header offset", "footer.data_offset", 16, offset)
    header = DynamicHeader.unpack(bytes(file.read(offset, DynamicHeader.SIZE)))

    def fail(message: str, field: str) -> NoReturn:
        where = offset + DynamicHeader.offset_of(field)
        refuse(file, message, f"dynamic header.{field}", where, getattr(header, field))

    if header.cookie != SPARSE_COOKIE:
        fail("Invalid header magic", "cookie")
    block = header.block_size
    if block < SECTOR or block & (block - 1):
        fail(f"Invalid block size {block}", "block_size")
    if size > header.max_entries * block:
        fail("Page table too small", "max_entries")
    if header.max_entries > MAX_ENTRIES:
        fail(f"Max Table Entries too large ({header.max_entries})", "max_entries")
    if header.bat_offset > (1 << 63) - 1 - WORD * header.max_entries:
        fail("Invalid block allocation table offset", "bat_offset")
    if header.bat_offset + WORD * -(-size // block) > round_up(file.size, SECTOR):
        fail("The block allocation table reaches past the end of the file", "bat_offset")
    return header


def check_table(image: DynamicImage) -> None:
    """Raise FormatError where a block ends past the end of the file."""
    end = round_up(image.file.size, SECTOR)
    last = (end - image.code.stride) // SECTOR
    for first, table, low, high in image.pieces(0, min(image.header.max_entries, CHECKED), create=False):
        words = table.words(low, high)
        if max(words) == ABSENT and len(set(words)) == 1:
            continue
        for number, word in enumerate(words, first):
            if word != ABSENT and word > last:
                refuse(
                    image.file,
                    "block-vpc: free_data_block_offset points after the end of file. The image has been"
                    " truncated.",
                    "bat",
                    image.header.bat_offset + WORD * number,
                    word,
                )


def parent(file: Storage, header: DynamicHeader) -> Reference:
    """What a differencing image names as its parent, as a plain file. Raises FormatError."""
    found: dict[bytes, str] = {}
    for number in range(LOCATORS):
        raw = header.locators[number * Locator.SIZE : (number + 1) * Locator.SIZE]
        locator = Locator.unpack(raw)
        if locator.code in (b"W2ru", b"W2ku") and locator.length <= 4096 and locator.offset < 1 << 62:
            text = bytes(file.read(locator.offset, locator.length)).decode("utf-16-le", "replace")
            found[locator.code] = text.split("\0", 1)[0]
    bare = header.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
    name = plain_file(found.get(b"W2ru", ""), found.get(b"W2ku", ""), bare)
    if not name:
        refuse(file, "The differencing image does not name its parent", "dynamic header.parent_name", 64)
    return Reference(name, "vpc")
