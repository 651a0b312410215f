"""Small help for writing."""

from __future__ import annotations

import sys
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Bytes, Storage

#: Bytes that are written together.
BATCH = 2 << 20


def little(words: array[int]) -> bytes:
    """Words of 32 bits as they are in the file."""
    if sys.byteorder == "big":
        words = array("I", words)
        words.byteswap()
    return words.tobytes()


class BatchWriter:
    """Joins writes that follow each other. Nothing is written before BATCH bytes are together, a gap appears
    or `flush` is called."""

    def __init__(self, file: Storage) -> None:
        self._file = file
        self._start = 0
        self._parts: list[Bytes] = []
        self.pending = 0

    def put(self, offset: int, *parts: Bytes) -> None:
        """Write `parts`, one behind the other, at byte `offset`, sooner or later. Raises StorageError."""
        if offset != self._start + self.pending:
            self.flush()
            self._start = offset
        self._parts += parts
        self.pending += sum(map(len, parts))
        if self.pending >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Raises StorageError."""
        parts, self._parts = self._parts, []
        if self.pending:
            self._file.write(b"".join(parts), self._start)
            self._start += self.pending
            self.pending = 0
