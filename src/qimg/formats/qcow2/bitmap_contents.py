"""The bits of one bitmap of a living image (section 9).

Contents are kept in chunks of a cluster each, as they are stored. A chunk comes into memory when bits of it
are to change; the others keep their clusters, whatever happens to the rest.
"""

from __future__ import annotations

from qimg.formats.qcow2.bitmap import read_table, table_entries
from qimg.formats.qcow2.bitmap_bits import clear_from, rescaled, set_bits, unite
from qimg.formats.qcow2.structs import OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.qcow2.bitmap import Bitmap
    from qimg.formats.qcow2.bitmap_shelf import Shelf
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage


class Contents:
    """Bits of a bitmap over `size` guest bytes. `words` is its table: a host offset, 0 (all clear) or 1 (all
    set) for every cluster of bits."""

    def __init__(self, file: Storage, header: ParsedHeader, granularity: int, words: tuple[int, ...]) -> None:
        self._file = file
        self._cluster_size = header.cluster_size
        self._granularity = granularity
        self._bits = -(-header.virtual_size // granularity)
        self._words = list(words)
        self._given_up: list[int] = []
        self._chunks: dict[int, bytearray] = {}  # those that changed
        self.changed = False

    @classmethod
    def stored(cls, file: Storage, header: ParsedHeader, bitmap: Bitmap) -> Contents:
        """What the image holds. Reads the table. Raises FormatError, StorageError."""
        return cls(file, header, bitmap.granularity, read_table(file, header, bitmap))

    @classmethod
    def empty(cls, file: Storage, header: ParsedHeader, granularity: int) -> Contents:
        """All bits clear, and nothing stored yet."""
        contents = cls(file, header, granularity, (0,) * table_entries(header, granularity))
        contents.changed = True
        return contents

    # -- changing

    def cover(self, start: int, length: int) -> None:
        """Set the bits of the guest bytes ``start .. start + length``. Raises StorageError."""
        low = start // self._granularity
        high = min(-(-(start + length) // self._granularity), self._bits)
        size = self._cluster_size
        while low < high:
            index, at = divmod(low, size * 8)
            stop = min(size * 8, at + high - low)
            if stop - at == size * 8:
                self._chunks[index] = bytearray(b"\xff" * size)
            else:
                set_bits(self._chunk(index), at, stop)
            low += stop - at
            self.changed = True

    def clear(self) -> None:
        """Clear every bit."""
        self._given_up += filter(None, (word & OFFSET_MASK for word in self._words))
        self._words = [0] * len(self._words)
        self._chunks.clear()
        self.changed = True

    def merge(self, bits: bytes, granularity: int) -> None:
        """Set every bit of whose guest bytes some are covered by `bits` of another granularity."""
        size = self._cluster_size
        for at, piece in rescaled(bits, granularity, self._granularity):
            done = 0
            while done < len(piece):
                index, within = divmod(at + done, size)
                if index >= len(self._words):
                    break
                part = piece[done : done + size - within]
                unite(self._chunk(index), within, part)
                done += len(part)
            self.changed = True
        self._cut()

    def resize(self, size: int) -> None:
        """Cover `size` guest bytes from now on: what is cut off is gone, what is added is clear."""
        per_chunk = self._cluster_size * 8
        if self._bits % per_chunk:
            self._chunk(self._bits // per_chunk)  # what lies behind its end must not come up
        self._bits = -(-size // self._granularity)
        entries = -(-self._bits // per_chunk)
        for word in self._words[entries:]:
            if word & OFFSET_MASK:
                self._given_up.append(word & OFFSET_MASK)
        self._words = (self._words + [0] * entries)[:entries]
        self._chunks = {index: chunk for index, chunk in self._chunks.items() if index < entries}
        if self._bits % per_chunk:
            self._chunk(self._bits // per_chunk)
        self._cut()
        self.changed = True

    def _chunk(self, index: int) -> bytearray:
        """A chunk that is about to change. Raises StorageError."""
        chunk = self._chunks.get(index)
        if chunk is None:
            word, size = self._words[index], self._cluster_size
            if word & OFFSET_MASK:
                chunk = self._file.read(word & OFFSET_MASK, size)
            else:
                chunk = bytearray((b"\xff" if word else b"\0") * size)
            self._chunks[index] = chunk
            if index == self._bits // (size * 8):
                self._cut()
        return chunk

    def _cut(self) -> None:
        """Clear what the last chunk has behind the disk's end."""
        index, rest = divmod(self._bits, self._cluster_size * 8)
        chunk = self._chunks.get(index)
        if chunk is not None:
            clear_from(chunk, rest)

    # -- storing

    def store(self, shelf: Shelf) -> list[int]:
        """Put changed chunks on the shelf and give up the old ones; the words of the table. Raises
        StorageError."""
        changed = sorted(self._chunks)
        held = [index for index in changed if self._chunks[index].count(0) != self._cluster_size]
        self._given_up += filter(None, (self._words[index] & OFFSET_MASK for index in changed))
        for index in changed:
            self._words[index] = 0
        for index, place in zip(held, shelf.put_chunks([self._chunks[index] for index in held]), strict=True):
            self._words[index] = place
        self._chunks.clear()
        for place in self._given_up:
            shelf.give_up(place, self._cluster_size)
        self._given_up.clear()
        self.changed = False
        return self._words
