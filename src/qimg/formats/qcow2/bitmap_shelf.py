"""Where the bitmaps of a living image are stored: everything new goes into clusters that are free, and the
header switches to it (sections 9 and 14). Until then, and after a crash, the old ones are as they were."""

from __future__ import annotations

from array import array

from qimg.errors import LimitError
from qimg.formats.qcow2.alloc import BatchWriter
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_BITMAPS,
    BITMAP_AUTO,
    BITMAP_IN_USE,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    BitmapEntry,
    BitmapsPointer,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from qimg.formats.qcow2.bitmap import Bitmap
    from qimg.formats.qcow2.bitmap_contents import Contents
    from qimg.formats.qcow2.write import WritableQcow2
    from qimg.storage.base import Bytes


class Shelf:
    """Clusters of one image for bitmaps. What is put lies in clusters of its own with a count of 1; what is
    given up is freed by the `flush` after the header."""

    def __init__(self, image: WritableQcow2) -> None:
        self._image = image
        self._bits = image.header.cluster_bits
        self._size = image.header.cluster_size

    def put(self, data: Bytes) -> int:
        """Write `data` into neighbouring clusters; their byte offset. Raises StorageError."""
        clusters = -(-len(data) // self._size)
        offset = self._image.refcounts.take(clusters) << self._bits
        self._image.file.write(bytes(data).ljust(clusters << self._bits, b"\0"), offset)
        return offset

    def store(self, bitmap: Bitmap, contents: Contents) -> None:
        """Put what changed of a bitmap, and a new table. Raises StorageError."""
        words = contents.store(self)
        entry = bitmap.entry
        self.give_up(entry.table_offset, entry.table_size * 8)
        entry.table_offset, entry.table_size = self.put(big_endian(array("Q", words))), len(words)

    def put_chunks(self, chunks: list[bytearray]) -> list[int]:
        """Write chunks of a cluster each, wherever there is room; their byte offsets. Raises StorageError."""
        places = [
            cluster << self._bits
            for first, count in self._image.refcounts.take_any(len(chunks))
            for cluster in range(first, first + count)
        ]
        writer = BatchWriter(self._image.file)
        for place, chunk in zip(places, chunks, strict=True):
            writer.put(place, chunk)
        writer.flush()
        return places

    def give_up(self, offset: int, length: int) -> None:
        """Free the clusters of ``offset .. offset + length`` once the header no longer leads there."""
        if length:
            self._image.refcounts.release(offset >> self._bits, -(-length // self._size))

    def switch(self, directory: list[Bitmap]) -> None:
        """Put a new directory, and have the header lead to it. Raises StorageError."""
        header = self._image.header
        old = header.bitmaps
        if directory:
            packed = pack_directory(directory)
            header.bitmaps = BitmapsPointer(
                count=len(directory), directory_size=len(packed), directory_offset=self.put(packed)
            )
            header.header.autoclear_features |= AUTOCLEAR_BITMAPS
        else:
            header.bitmaps = None
            header.header.autoclear_features &= ~AUTOCLEAR_BITMAPS
        if old is not None:
            self.give_up(old.directory_offset, old.directory_size)
        self._image.header_changed = True


def pack_directory(directory: list[Bitmap]) -> bytes:
    """The bitmap directory as it is stored."""
    return b"".join(
        (bitmap.entry.pack() + bitmap.name).ljust(entry_size(bitmap.name), b"\0") for bitmap in directory
    )


def entry_size(name: bytes) -> int:
    """Bytes that a bitmap of this name takes in the directory."""
    return BitmapEntry.SIZE + len(name) + 7 & ~7


def check_room(image: WritableQcow2, directory: list[Bitmap]) -> None:
    """Whether the image can hold the list of these bitmaps. Raises LimitError."""
    if len(directory) > MAX_BITMAPS:
        raise LimitError(f"Maximum number of persistent bitmaps is already reached ({MAX_BITMAPS})")
    if sum(entry_size(bitmap.name) for bitmap in directory) > MAX_BITMAP_DIRECTORY_BYTES:
        raise LimitError("Bitmap directory is too large")
    header = image.header
    old = header.bitmaps
    if old is None:
        header.bitmaps = BitmapsPointer(count=1, directory_size=0, directory_offset=0)
        try:
            header.pack()  # raises LimitError where cluster 0 is full
        finally:
            header.bitmaps = None


def mark_in_use(image: WritableQcow2, numbers: Collection[int]) -> None:
    """Say on disk that the contents of bitmaps, by their places in the directory, are about to be wrong.

    One write in place, of a field that no sector border cuts, and a barrier. Raises StorageError."""
    pointer = image.header.bitmaps
    assert pointer is not None
    packed = bytearray(image.file.read(pointer.directory_offset, pointer.directory_size))
    at, touched = 0, []
    for number, bitmap in enumerate(image.directory):
        if number in numbers:
            field = at + BitmapEntry.offset_of("flags")
            flags = BITMAP_IN_USE | (BITMAP_AUTO if bitmap.auto else 0)
            packed[field : field + 4] = flags.to_bytes(4, "big")
            touched.append(field)
        at += entry_size(bitmap.name)
    low, high = touched[0], touched[-1] + 4
    image.file.write(packed[low:high], pointer.directory_offset + low)
    image.file.flush()
