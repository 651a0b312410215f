"""Tables of words in a file: what most formats keep their map in.

A table is read in pages, a bounded number of which stay in memory; changed pages stay until `write`.
"""

from __future__ import annotations

import sys
from array import array

from qimg.extent import ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Storage

#: Bytes of one page, and of unchanged pages that stay in memory.
PAGE = 64 << 10
_CACHE = 4 << 20
#: What is written is rounded out to it, in bytes of the table.
_SECTOR = 512


def uniform(words: array[int]) -> bool:
    """Whether all words are the same: at the speed of memcmp, without a look at each."""
    raw = memoryview(words).cast("B")
    return raw[words.itemsize :] == raw[: -words.itemsize]


class WordTable:
    """`count` unsigned words of 4 or 8 bytes at byte `offset` of `file`. Indices count words.

    What the file is too short for reads as 0.
    """

    def __init__(self, file: Storage, offset: int, count: int, *, size: int, big: bool) -> None:
        """`size` of a word in bytes; `big`: most significant byte first. Reads nothing yet."""
        self.file = file
        self.offset = offset
        self.count = count
        self._size = size
        self._typecode = "I" if size == 4 else "Q"
        self._swap = big != (sys.byteorder == "big")
        self._per_page = PAGE // size
        self._pages: dict[int, array[int]] = {}
        self._changed: dict[int, list[int]] = {}  # page -> [low, high] of its words
        self._hole = (0, 0)  # bytes of the file, the hole that was seen last

    def _page(self, number: int) -> array[int]:
        page = self._pages.get(number)
        if page is None:
            first = number * self._per_page
            length = min(self._per_page, self.count - first) * self._size
            page = array(self._typecode, bytes(self.file.read(self.offset + number * PAGE, length)))
            if self._swap:
                page.byteswap()
            self._make_room()
            self._pages[number] = page
        return page

    def _make_room(self) -> None:
        """Forget an unchanged page if there are many."""
        if len(self._pages) * PAGE >= _CACHE:
            for number in list(self._pages):  # several threads may be here
                if number not in self._changed:
                    self._pages.pop(number, None)
                    return

    def words(self, first: int, last: int) -> array[int]:
        """A copy of the words `first` .. `last`. Raises StorageError."""
        found = array(self._typecode)
        while first < last:
            number, low = divmod(first, self._per_page)
            high = min(self._per_page, low + last - first)
            found += self._page(number)[low:high]
            first += high - low
        return found

    def hole(self, first: int, last: int) -> int:
        """How many of the words from `first` on are 0, as the file has a hole there; up to `last`, and only
        where that is many. Raises StorageError."""
        if last - first < self._per_page or self._changed:
            return 0
        at = self.offset + first * self._size
        low, high = self._hole
        if not low <= at < high:
            end = min(self.offset + self.count * self._size, self.file.size)
            part = next(iter(self.file.extents(at, end - at)), None) if at < end else None
            high = at if part is None or not part.flags & ZERO else at + part.length
            self._hole = (at, high)
        return max(0, min(last - first, (high - at) // self._size))

    def put(self, first: int, values: array[int]) -> None:
        """Stage `values` from word `first` on."""
        values = array(self._typecode, values)
        at = 0
        while at < len(values):
            number, low = divmod(first + at, self._per_page)
            high = min(self._per_page, low + len(values) - at)
            self._page(number)[low:high] = values[at : at + high - low]
            span = self._changed.setdefault(number, [low, high])
            span[:] = min(span[0], low), max(span[1], high)
            at += high - low

    @property
    def staged(self) -> int:
        """Bytes in memory that wait for `write`."""
        return len(self._changed) * PAGE

    def write(self) -> bool:
        """Write what changed, in whole sectors of the table; whether there was anything."""
        self._hole = (0, 0)
        changed = sorted(self._changed)
        per_sector = _SECTOR // self._size
        for number in changed:
            low, high = self._changed[number]
            page = self._pages[number]
            low -= low % per_sector
            high = min(high + -high % per_sector, len(page))
            part = page[low:high]
            if self._swap:
                part.byteswap()
            self.store(part.tobytes(), number * PAGE + low * self._size)
        self._changed.clear()
        return bool(changed)

    def store(self, raw: bytes, at: int) -> None:
        """Write a changed part of the table, `at` bytes behind its beginning. For tables that have copies."""
        self.file.write(raw, self.offset + at)
