"""Enabled bitmaps record what is written (section 9).

Before the first change the bitmaps that record are marked on disk as in use: whoever finds them so after a
crash knows that they mean nothing. `store`, called by every `flush`, writes what they have become and takes
the mark away; the next change sets it again. A failed job leaves the mark.

Disabled bitmaps are not touched. (The real program marks and rewrites them too, and a crash costs them.)
"""

from __future__ import annotations

from qimg.formats.qcow2.bitmap_contents import Contents
from qimg.formats.qcow2.bitmap_shelf import Shelf, mark_in_use

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.qcow2.bitmap import Bitmap
    from qimg.formats.qcow2.write import WritableQcow2


class Recorder:
    """What the bitmaps of one image have to remember. One thread at a time."""

    def __init__(self, image: WritableQcow2) -> None:
        """Reads nothing yet."""
        self._image = image
        self._open: dict[int, tuple[Bitmap, Contents]] = {}  # marked in use; by place in the directory
        self._recording: list[Contents] = []
        self._begun = False
        self._held = False
        # Guest bytes that changed and are not in the bits yet: writes mostly follow each other.
        self._start = self._end = 0

    def record(self, start: int, length: int) -> None:
        """The guest bytes ``start .. start + length`` are about to change. Raises StorageError."""
        if not self._begun:
            self.begin()
        if not self._recording:
            return
        end = start + length
        if self._start <= start <= self._end:
            self._end = max(self._end, end)
        else:
            self._note()
            self._start, self._end = start, end

    def begin(self) -> None:
        """Mark what records as in use. Durable when it returns; before the first change of guest data."""
        self._begun = True
        self._mark(number for number, bitmap in enumerate(self._image.directory) if bitmap.auto)
        self._recording = [contents for _, contents in self._open.values()]

    def _mark(self, numbers: Iterable[int]) -> None:
        """Open the consistent ones of these bitmaps, and mark them."""
        image = self._image
        added: dict[int, tuple[Bitmap, Contents]] = {}
        for number in numbers:
            bitmap = image.directory[number]
            if not bitmap.in_use and number not in self._open:
                added[number] = bitmap, Contents.stored(image.file, image.header, bitmap)
        if added:
            mark_in_use(image, added)
            self._open |= added

    def _note(self) -> None:
        """Bring what was recorded into the bits."""
        if self._start < self._end:
            for contents in self._recording:
                contents.cover(self._start, self._end - self._start)
        self._start = self._end = 0

    def hold(self) -> None:
        """The disk is about to be resized: all bitmaps are in use, and `store` leaves them so until `resized`
        is called. (The new size and what leads to the bitmaps do not lie in one sector of the header, so they
        cannot change together.) Durable when it returns. Raises StorageError."""
        if not self._begun:
            self.begin()
        self._mark(range(len(self._image.directory)))
        self._held = True

    def resized(self, size: int) -> None:
        """The disk has `size` bytes, on disk too: the bitmaps follow. The next `flush` stores them."""
        self._note()
        for _, contents in self._open.values():
            contents.resize(size)
        self._held = False

    def store(self) -> None:
        """Stage what the bitmaps have become, for `flush` to write. Raises StorageError."""
        if self._held:
            return
        if self._open:
            self._note()
            shelf = Shelf(self._image)
            for bitmap, contents in self._open.values():
                if contents.changed:
                    shelf.store(bitmap, contents)
            shelf.switch(self._image.directory)
        self._open = {}
        self._recording = []
        self._begun = False
