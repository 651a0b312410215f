"""Adding, removing and changing the bitmaps of an image (bitmap sheet; qcow2 sheet, sections 9 and 14).

Each change is one switch of the header: a crash leaves the old bitmaps or the new ones, and leaked clusters
at most. Nothing has to be marked as in use for that.
"""

from __future__ import annotations

from qimg.errors import QimgError
from qimg.formats.qcow2.bitmap import Bitmap, table_word_is_valid, table_words
from qimg.formats.qcow2.bitmap_contents import Contents
from qimg.formats.qcow2.bitmap_rules import (
    already_exists,
    check_granularity,
    check_storable,
    default_granularity,
    inconsistent,
)
from qimg.formats.qcow2.bitmap_shelf import Shelf, check_room
from qimg.formats.qcow2.structs import (
    BITMAP_AUTO,
    BITMAP_IN_USE,
    BITMAP_TYPE_DIRTY,
    OFFSET_MASK,
    BitmapEntry,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.base import BitmapData
    from qimg.formats.qcow2.write import WritableQcow2


class BitmapChanges:
    """What `WritableQcow2` does with bitmaps. Every change is durable when its function returns. What can be
    refused is refused before anything is written; after a StorageError the image has to be closed."""

    @staticmethod
    def add_bitmap(image: WritableQcow2, name: str, granularity: int | None) -> None:
        """Add an empty bitmap that records. Raises QimgError, NotSupported, LimitError, StorageError."""
        change = _Change(image)
        change.add(name, granularity or default_granularity(image.header.cluster_size), BITMAP_AUTO)
        change.apply()

    @staticmethod
    def remove_bitmap(image: WritableQcow2, name: str) -> None:
        """Remove a bitmap, whatever state it is in. Raises QimgError, StorageError."""
        change = _Change(image)
        change.remove(change.find(name))
        change.apply()

    @staticmethod
    def change_bitmap(
        image: WritableQcow2,
        name: str,
        *,
        enabled: bool | None = None,
        clear: bool = False,
        merge: BitmapData | None = None,
    ) -> None:
        """Switch a bitmap on or off, clear it, set the bits of `merge` in it; in this order.

        Raises QimgError where there is none or it is inconsistent, StorageError."""
        change = _Change(image)
        bitmap = change.find(name)
        if bitmap.in_use:
            raise inconsistent(name)
        if enabled is not None:
            bitmap.entry.flags = BITMAP_AUTO if enabled else 0
        if clear or merge is not None:
            contents = Contents.stored(image.file, image.header, bitmap)
            if clear:
                contents.clear()
            if merge is not None:
                contents.merge(merge.bits, merge.granularity)
            change.contents.append((bitmap, contents))
        change.apply()

    @staticmethod
    def store_bitmaps(image: WritableQcow2, bitmaps: Iterable[BitmapData]) -> None:
        """Add bitmaps with their contents, all or none. Raises QimgError, NotSupported, LimitError,
        StorageError."""
        change = _Change(image)
        for data in bitmaps:
            flags = (BITMAP_AUTO if data.enabled else 0) | (BITMAP_IN_USE if data.inconsistent else 0)
            change.add(data.name, data.granularity, flags).merge(data.bits, data.granularity)
        change.apply()


class _Change:
    """One change: a new directory, and the contents that have to be stored for it.

    `apply` makes it the image's. Until then only memory is touched, and only memory of its own."""

    def __init__(self, image: WritableQcow2) -> None:
        """What was staged before comes first: bitmaps that record are on disk afterwards."""
        image.flush()
        self._image = image
        self._directory = [
            Bitmap(BitmapEntry.unpack(bitmap.entry.pack()), bitmap.name) for bitmap in image.directory
        ]
        self._gone: list[Bitmap] = []
        self.contents: list[tuple[Bitmap, Contents]] = []

    def find(self, name: str) -> Bitmap:
        """The bitmap of this name. Raises QimgError."""
        for bitmap in self._directory:
            if bitmap.text == name:
                return bitmap
        raise QimgError(f"Dirty bitmap '{name}' not found")

    def add(self, name: str, granularity: int, flags: int) -> Contents:
        """A new bitmap at the end; its contents, all clear. Raises QimgError, NotSupported, LimitError."""
        image, header = self._image, self._image.header
        stored = name.encode("utf-8", "surrogateescape")
        check_granularity(granularity)
        if any(bitmap.text == name for bitmap in self._directory):
            raise already_exists(name)
        try:
            check_storable(
                stored,
                granularity,
                version=header.version,
                size=header.virtual_size,
                cluster_size=header.cluster_size,
            )
        except QimgError as error:
            text = f"Can't make bitmap '{name}' persistent in '{image.file.name}': {error}"
            raise type(error)(text) from error
        entry = BitmapEntry(
            flags=flags,
            type=BITMAP_TYPE_DIRTY,
            granularity_bits=granularity.bit_length() - 1,
            name_size=len(stored),
        )
        bitmap = Bitmap(entry, stored)
        contents = Contents.empty(image.file, header, granularity)
        self._directory.append(bitmap)
        self.contents.append((bitmap, contents))
        return contents

    def remove(self, bitmap: Bitmap) -> None:
        """Leave a bitmap out."""
        self._directory.remove(bitmap)
        self._gone.append(bitmap)

    def apply(self) -> None:
        """Write it, and switch the header to it. Raises LimitError before any change, StorageError."""
        image = self._image
        check_room(image, self._directory)
        image.begin()
        shelf = Shelf(image)
        for bitmap, contents in self.contents:
            shelf.store(bitmap, contents)
        for bitmap in self._gone:
            _free(image, shelf, bitmap)
        shelf.switch(self._directory)
        image.directory = self._directory
        image.flush()


def _free(image: WritableQcow2, shelf: Shelf, bitmap: Bitmap) -> None:
    """Give up all that a bitmap has. Of an inconsistent one with a damaged table, what is sound."""
    header = image.header
    for word in table_words(image.file, bitmap):
        if table_word_is_valid(header, word) and word & OFFSET_MASK:
            shelf.give_up(word & OFFSET_MASK, header.cluster_size)
    shelf.give_up(bitmap.entry.table_offset, bitmap.entry.table_size * 8)
