"""L2 tables of an image being written, staged in memory, and the L1 table.

Tables are kept in chunks: as many neighbouring L2 tables as fit 64 KiB, at least one, in one array of
native words. A chunk comes into being when it is touched; when more than STAGE_LIMIT bytes are staged,
the ones not used for longest are written out and forgotten. A table gets its host cluster when it is
first written; if it is touched again, it is read back from there and goes there again: nothing refers
to it before the header is written.
"""

from __future__ import annotations

import sys
from array import array

from qimg.formats.qcow2.alloc import BatchWriter, HostSpace
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.structs import COPIED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.storage.base import Storage

CHUNK_BYTES = 64 << 10
STAGE_LIMIT = 32 << 20


class StagedTables:
    """The guest map of one image. `words` of 64 bits make an entry; other sizes in bytes."""

    def __init__(
        self, file: Storage, space: HostSpace, *, cluster_size: int, words: int, l1_size: int
    ) -> None:
        self._file = file
        self._space = space
        self._cluster_size = cluster_size
        self._words = words
        self._chunk_tables = max(1, CHUNK_BYTES // cluster_size)
        self._chunk_words = self._chunk_tables * cluster_size // 8
        #: Guest clusters of one chunk.
        self.chunk_clusters = self._chunk_words // words
        #: Host offset of every L2 table, 0 where it has no place.
        self._places = array("Q", bytes(8 * l1_size))
        self._staged: dict[int, array[int]] = {}

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Guest clusters `first` .. `last` cut at chunk borders: (chunk, low, high), entries in the chunk."""
        per = self.chunk_clusters
        while first < last:
            index, low = divmod(first, per)
            high = min(per, low + last - first)
            yield index, low, high
            first += high - low

    def chunk(self, index: int) -> array[int]:
        """The words of chunk `index`, to be changed in place. Raises StorageError."""
        words = self._staged.pop(index, None)
        if words is None:
            if (len(self._staged) + 1) * self._chunk_words * 8 > STAGE_LIMIT:
                self._spill()
            words = self._load(index)
        self._staged[index] = words  # the last one of the dict is the one used last
        return words

    def is_blank(self, index: int) -> bool:
        """Whether nothing was ever put into chunk `index`."""
        return index not in self._staged and not any(self._chunk_places(index))

    def _chunk_places(self, index: int) -> array[int]:
        first = index * self._chunk_tables
        return self._places[first : first + self._chunk_tables]

    def _load(self, index: int) -> array[int]:
        words = array("Q", bytes(8 * self._chunk_words))
        per_table = self._cluster_size // 8
        for number, place in enumerate(self._chunk_places(index)):
            if place:
                table = array("Q", bytes(self._file.read(place, self._cluster_size)))
                if sys.byteorder == "little":
                    table.byteswap()
                words[number * per_table : (number + 1) * per_table] = table
        return words

    # -- writing

    def _spill(self) -> None:
        """Write and forget the half not used for longest: what goes out together lies together."""
        writer = BatchWriter(self._file)
        for index in list(self._staged)[: (len(self._staged) + 1) // 2]:
            self._write(index, self._staged.pop(index), writer)
        writer.flush()

    def _write(self, index: int, words: array[int], writer: BatchWriter) -> None:
        size = self._cluster_size
        first = index * self._chunk_tables
        raw = big_endian(words)
        blank = bytes(size)
        present = [
            number
            for number in range(min(self._chunk_tables, len(self._places) - first))
            if self._places[first + number] or raw[number * size : (number + 1) * size] != blank
        ]
        homeless = [number for number in present if not self._places[first + number]]
        if homeless:
            host = self._space.take(len(homeless)) * size
            for number in homeless:
                self._places[first + number] = host
                host += size
        for number in present:
            writer.put(self._places[first + number], raw[number * size : (number + 1) * size])

    def store(self) -> None:
        """Write every staged table; they stay staged."""
        writer = BatchWriter(self._file)
        for index in sorted(self._staged):
            self._write(index, self._staged[index], writer)
        writer.flush()

    def store_l1(self, offset: int, unit: int) -> None:
        """Write the L1 table at `offset`, filled up with zeros to a multiple of `unit` bytes."""
        writer = BatchWriter(self._file)
        step = 1 << 16
        for first in range(0, len(self._places), step):
            entries = array("Q", (place and place | COPIED for place in self._places[first : first + step]))
            writer.put(offset + 8 * first, big_endian(entries))
        writer.pad(unit)
