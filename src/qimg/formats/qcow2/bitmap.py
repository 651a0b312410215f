"""Persistent dirty bitmaps: directory, tables, contents (qcow2 sheet, section 9)."""

from __future__ import annotations

from struct import unpack

from qimg.context import Notice
from qimg.errors import FormatError
from qimg.formats.base import BitmapData
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_BITMAPS,
    BITMAP_AUTO,
    BITMAP_IN_USE,
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TYPE_DIRTY,
    MAX_BITMAP_BYTES,
    MAX_BITMAP_NAME,
    OFFSET_MASK,
    BitmapEntry,
    BitmapsPointer,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage

_KNOWN_FLAGS = BITMAP_IN_USE | BITMAP_AUTO
_CHUNK = 4096
_GRANULARITY_BITS = range(9, 32)
#: Bits of a bitmap table entry that must be 0.
TABLE_RESERVED = 0xFF00_0000_0000_01FE

_UNTRUSTED = (
    "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
)
_UNTRUSTED_V2 = (
    "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent"
    " bitmap support; so now they must all be considered inconsistent"
)
_LEAK_HINT = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."


class Bitmap:
    """One entry of the directory; contents are read by `bits`."""

    __slots__ = ("entry", "name")

    def __init__(self, entry: BitmapEntry, name: bytes) -> None:
        self.entry = entry
        self.name = name

    @property
    def text(self) -> str:
        """The name, as text."""
        return self.name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.entry.granularity_bits

    @property
    def in_use(self) -> bool:
        """Not written back since it was last opened: its contents mean nothing."""
        return bool(self.entry.flags & BITMAP_IN_USE)

    @property
    def auto(self) -> bool:
        """Records writes whenever the image is open."""
        return bool(self.entry.flags & BITMAP_AUTO)

    def describe(self) -> dict[str, object]:
        """What ``Format specific information`` shows."""
        flags = ["in-use"] * self.in_use + ["auto"] * self.auto
        return {"flags": flags, "name": self.text, "granularity": self.granularity}


def open_bitmaps(file: Storage, header: ParsedHeader, warn: Callable[[Notice], None]) -> list[Bitmap]:
    """The bitmaps that can be relied on to exist, their tables validated, contents not read.

    None, and a warning, where a program that does not know bitmaps may have changed the image.
    Raises FormatError, StorageError.
    """
    if header.bitmaps is None:
        return []
    if not header.header.autoclear_features & AUTOCLEAR_BITMAPS:
        warn(Notice(_UNTRUSTED if header.version >= 3 else _UNTRUSTED_V2, hint=_LEAK_HINT))
        return []
    pointer = header.bitmaps
    found = read_directory(file, header, pointer)
    names: set[str] = set()
    for bitmap in found:
        if bitmap.text in names:
            raise _fault(
                file, f"Bitmap already exists: {bitmap.text}", "bitmap.name", pointer.directory_offset
            )
        names.add(bitmap.text)
        if not bitmap.in_use:
            read_table(file, header, bitmap)
    return found


def _fault(file: Storage, message: str, field: str, offset: int, found: object = None) -> FormatError:
    return FormatError(message, file=file.name, field=field, offset=offset, found=found)


def read_directory(file: Storage, header: ParsedHeader, pointer: BitmapsPointer) -> list[Bitmap]:
    """Entries of the directory (at most 65535, 64 MiB: `header.parse` saw to that). Raises FormatError."""
    start = pointer.directory_offset
    if pointer.directory_size == 0:
        raise _fault(file, "Requested bitmap directory size is zero", "bitmaps.directory_size", start)
    raw = file.read(start, pointer.directory_size)
    found: list[Bitmap] = []
    at = 0
    while at < len(raw):
        if at + BitmapEntry.SIZE > len(raw):
            raise _fault(file, "Broken bitmap directory", "bitmap", start + at)
        entry = BitmapEntry.unpack(raw, at)
        if len(found) == pointer.count:
            text = "More bitmaps found than specified in header extension"
            raise _fault(file, text, "bitmap", start + at, len(found) + 1)
        size = (BitmapEntry.SIZE + entry.extra_data_size + entry.name_size + 7) & ~7
        if at + size > len(raw):
            raise _fault(file, "Broken bitmap directory", "bitmap", start + at, size)
        name_at = at + BitmapEntry.SIZE + entry.extra_data_size
        bitmap = Bitmap(entry, bytes(raw[name_at : name_at + entry.name_size]))
        _check_entry(file, header, bitmap, start + at)
        found.append(bitmap)
        at += size
    if len(found) != pointer.count:
        text = "Less bitmaps found than specified in header extension"
        raise _fault(file, text, "bitmap", start, len(found))
    return found


def _check_entry(file: Storage, header: ParsedHeader, bitmap: Bitmap, offset: int) -> None:
    if bitmap.entry.extra_data_size:
        raise _fault(
            file,
            "Bitmap extra data is not supported",
            "bitmap.extra_data_size",
            offset,
            bitmap.entry.extra_data_size,
        )
    if not satisfies_constraints(header, bitmap):
        name = bitmap.name.decode("utf-8", "surrogateescape")
        raise _fault(file, f"Bitmap '{name}' doesn't satisfy the constraints", "bitmap", offset)


def satisfies_constraints(header: ParsedHeader, bitmap: Bitmap) -> bool:
    """The rules of section 9 for a directory entry."""
    entry = bitmap.entry
    return not (
        entry.table_size == 0
        or entry.table_offset == 0
        or entry.table_offset % header.cluster_size
        or entry.table_size > MAX_BITMAP_BYTES // header.cluster_size
        or entry.granularity_bits not in _GRANULARITY_BITS
        or entry.flags & ~_KNOWN_FLAGS
        or entry.name_size > MAX_BITMAP_NAME
        or entry.type != BITMAP_TYPE_DIRTY
        or (not bitmap.in_use and _covers_less(header, bitmap))
    )


def _covers_less(header: ParsedHeader, bitmap: Bitmap) -> bool:
    """Whether the data clusters have fewer bits than the image needs."""
    bits = bitmap.entry.table_size * header.cluster_size * 8
    return header.virtual_size > bits << bitmap.entry.granularity_bits


def table_entries(header: ParsedHeader, granularity: int) -> int:
    """Entries that a bitmap's table has: one a cluster of contents."""
    bits = -(-header.virtual_size // granularity)
    size = -(-bits // 8)
    return -(-size // header.cluster_size)


def table_word_is_valid(header: ParsedHeader, word: int) -> bool:
    """Whether `word` can be an entry of a bitmap's table."""
    offset = word & OFFSET_MASK
    if word & TABLE_RESERVED:
        return False
    return not offset or not (offset % header.cluster_size or word & BITMAP_TABLE_ALL_ONES)


def table_words(file: Storage, bitmap: Bitmap) -> tuple[int, ...]:
    """The table of a bitmap as it is stored, at most 8 MiB. Raises StorageError."""
    entry = bitmap.entry
    return unpack(f">{entry.table_size}Q", file.read(entry.table_offset, entry.table_size * 8))


def read_table(file: Storage, header: ParsedHeader, bitmap: Bitmap) -> tuple[int, ...]:
    """The validated table of a bitmap: a host offset, or 0 (all clear), or 1 (all set) a cluster."""
    entry = bitmap.entry
    words = table_words(file, bitmap)
    for number, word in enumerate(words):
        if not table_word_is_valid(header, word):
            raise _fault(
                file,
                f"Could not read bitmap_table table from image for bitmap '{bitmap.text}': Invalid argument",
                "bitmap table",
                entry.table_offset + number * 8,
                f"{word:#x}",
            )
    if entry.table_size != table_entries(header, bitmap.granularity):
        raise _fault(
            file,
            f"Could not read bitmap '{bitmap.text}' from image: Invalid argument",
            "bitmap.table_size",
            entry.table_offset,
            entry.table_size,
        )
    return words


def read_bits(file: Storage, header: ParsedHeader, bitmap: Bitmap) -> bytes:
    """The contents, a bit for `granularity` guest bytes; without a tail of clear bits. At most 512 MiB."""
    words = _without_zero_tail(read_table(file, header, bitmap))
    size = header.cluster_size
    out = bytearray()
    for word in words:
        if word & OFFSET_MASK:
            out += file.read(word & OFFSET_MASK, size)
        else:
            out += (b"\xff" if word else b"\0") * size
    bits = -(-header.virtual_size // bitmap.granularity)
    del out[-(-bits // 8) :]
    if bits % 8 and len(out) == -(-bits // 8):
        out[-1] &= (1 << bits % 8) - 1
    _cut_zero_tail(out)
    return bytes(out)


def _cut_zero_tail(data: bytearray) -> None:
    """Shorten `data` by the zeros at its end, without a copy of it."""
    end = len(data)
    while end and not any(data[max(end - _CHUNK, 0) : end]):
        end = max(end - _CHUNK, 0)
    del data[len(data[max(end - _CHUNK, 0) : end].rstrip(b"\0")) + max(end - _CHUNK, 0) :]


def _without_zero_tail(words: tuple[int, ...]) -> tuple[int, ...]:
    count = len(words)
    while count and words[count - 1] == 0:
        count -= 1
    return words[:count]


def load(file: Storage, header: ParsedHeader, bitmap: Bitmap) -> BitmapData:
    """A bitmap with its contents; an inconsistent one has none."""
    return BitmapData(
        bitmap.text,
        bitmap.granularity,
        b"" if bitmap.in_use else read_bits(file, header, bitmap),
        enabled=bitmap.auto,
        inconsistent=bitmap.in_use,
    )
