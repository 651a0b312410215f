"""Persistent bitmaps of an image being written (sheet, section 9)."""

from __future__ import annotations

from array import array

from qimg.errors import LimitError, NotSupported
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.structs import (
    BITMAP_AUTO,
    BITMAP_IN_USE,
    BITMAP_TYPE_DIRTY,
    MAX_BITMAP_BYTES,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAP_NAME,
    MAX_BITMAPS,
    BitmapEntry,
    BitmapsPointer,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import BitmapData
    from qimg.formats.qcow2.alloc import HostSpace
    from qimg.storage.base import Storage

_MIN_GRANULARITY = 1 << 9
_MAX_GRANULARITY = 1 << 31


def ceil_div(value: int, unit: int) -> int:
    """`value` divided by `unit`, rounded up."""
    return -(-value // unit)


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """Clusters of data that a bitmap over `size` guest bytes takes (section 9)."""
    return ceil_div(ceil_div(ceil_div(size, granularity), 8), cluster_size)


class BitmapStore:
    """Takes bitmaps with `add`; `store` writes them and says what the header has to point to."""

    def __init__(self, file: Storage, space: HostSpace, cluster_size: int, size: int) -> None:
        self._file = file
        self._space = space
        self._cluster_size = cluster_size
        self._size = size
        self._names: set[bytes] = set()
        self._pending: list[tuple[bytes, BitmapData]] = []
        self._entries: list[bytes] = []

    def add(self, bitmap: BitmapData) -> None:
        """Check `bitmap` and keep it for `store`. Raises LimitError, NotSupported."""
        name = bitmap.name.encode("utf-8", "surrogateescape")
        if name in self._names:
            raise NotSupported(f"Bitmap already exists: {bitmap.name}")
        granularity = bitmap.granularity
        if granularity & (granularity - 1) or not _MIN_GRANULARITY <= granularity <= _MAX_GRANULARITY:
            raise LimitError("Granularity must be power of 2 and at least 512")
        if len(name) > MAX_BITMAP_NAME:
            raise LimitError(f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)")
        entries = table_entries(self._size, granularity, self._cluster_size)
        if entries * self._cluster_size > MAX_BITMAP_BYTES:
            raise LimitError("Too much space will be occupied by the bitmap. Use larger granularity")
        if entries == 0:
            raise NotSupported("An image of size 0 cannot store bitmaps")
        if len(self._names) == MAX_BITMAPS:
            raise LimitError(f"Maximum number of persistent bitmaps is already reached ({MAX_BITMAPS})")
        self._names.add(name)
        self._pending.append((name, bitmap))

    def store(self) -> BitmapsPointer | None:
        """Write what was added: data, tables, a new directory. None where there is nothing new.

        Raises StorageError, LimitError.
        """
        if not self._pending:
            return None
        while self._pending:
            name, bitmap = self._pending[0]
            self._entries.append(self._store_one(name, bitmap))
            del self._pending[0]
        directory = b"".join(self._entries)
        if len(directory) > MAX_BITMAP_DIRECTORY_BYTES:
            raise LimitError("Bitmap directory is too large")
        offset = self._write(directory)
        return BitmapsPointer(
            count=len(self._entries), directory_size=len(directory), directory_offset=offset
        )

    def _store_one(self, name: bytes, bitmap: BitmapData) -> bytes:
        size = self._cluster_size
        table = array("Q", bytes(8 * table_entries(self._size, bitmap.granularity, size)))
        bits = memoryview(bitmap.bits)
        blank = bytes(size)
        for index in range(len(table)):
            part = bytes(bits[index * size : (index + 1) * size])
            if part and part != blank[: len(part)]:
                table[index] = self._write(part)
        flags = (BITMAP_AUTO if bitmap.enabled else 0) | (BITMAP_IN_USE if bitmap.inconsistent else 0)
        entry = BitmapEntry(
            table_offset=self._write(big_endian(table)),
            table_size=len(table),
            flags=flags,
            type=BITMAP_TYPE_DIRTY,
            granularity_bits=bitmap.granularity.bit_length() - 1,
            name_size=len(name),
        ).pack()
        return entry + name + bytes(-(len(entry) + len(name)) % 8)

    def _write(self, data: bytes) -> int:
        """Put `data` into clusters of its own; their byte offset."""
        count = -(-len(data) // self._cluster_size)
        offset = self._space.take(count) * self._cluster_size
        if not self._file.zero_init:
            data = data.ljust(count * self._cluster_size, b"\0")
        self._file.write(data, offset)
        return offset
