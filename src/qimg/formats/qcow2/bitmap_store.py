"""Persistent bitmaps of an image being written (sheet, section 9)."""

from __future__ import annotations

from array import array

from qimg.errors import LimitError
from qimg.formats.qcow2.bitmap_rules import (
    already_exists,
    check_granularity,
    check_storable,
    table_entries,
)
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.structs import (
    BITMAP_AUTO,
    BITMAP_IN_USE,
    BITMAP_TYPE_DIRTY,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    BitmapEntry,
    BitmapsPointer,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import BitmapData
    from qimg.formats.qcow2.alloc import HostSpace
    from qimg.storage.base import Storage


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
            raise already_exists(bitmap.name)
        check_granularity(bitmap.granularity)
        check_storable(name, bitmap.granularity, version=3, size=self._size, cluster_size=self._cluster_size)
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
