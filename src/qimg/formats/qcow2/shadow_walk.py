"""Going through the tables below an L1 table: to change the counts of all that they refer to, and to set the
COPIED bits anew.

Tables of real images are made of long runs: neighbours in the disk that are neighbours in the file. Plain
Python takes a run at once, by arithmetic on long numbers; that way a hundred tables take less time than the
import of numpy. Where tables turn out to be of short runs, `qimg.vec.shadow` takes over.
"""

from __future__ import annotations

import sys
from array import array

from qimg.errors import CorruptImage
from qimg.formats.qcow2.mapping import Geometry
from qimg.formats.qcow2.shadow_space import native
from qimg.formats.qcow2.structs import COPIED, L2_COMPRESSED, OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NoReturn

    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.shadow_counts import ShadowCounts
    from qimg.storage.base import Storage
    from qimg.vec.shadow import Clusters as Slots

    #: (number of the first entry, its word, entries): each the next cluster of the file.
    Piece = tuple[int, int, int]

#: Bytes of tables looked at together, in plain Python and by numpy.
BATCH = 64 << 10
VECTOR_BATCH = 4 << 20
#: Entries looked at one by one in plain Python before numpy pays for its import.
PLAIN_ENTRIES = 24 * 8192
_CHUNK = 64 << 10
_ZEROS = bytes(_CHUNK)
_FEW = 128  # entries that are not worth cutting further
_SET = bytes(byte | 0x80 for byte in range(256))
_CLEAR = bytes(byte & 0x7F for byte in range(256))


def read_l1(file: Storage, offset: int, size: int) -> array[int]:
    """An L1 table of `size` entries (bounded by the caller) as native words."""
    return native(file.read(offset, 8 * size))


class Batch:
    """Some L2 tables: their numbers in the L1 table, host offsets in bytes, and contents in a row."""

    __slots__ = ("_before", "numbers", "offsets", "raw")

    def __init__(self, numbers: list[int], offsets: list[int], raw: bytearray) -> None:
        self.numbers = numbers
        self.offsets = offsets
        self.raw = raw
        self._before = b""

    def keep(self) -> None:
        """`raw` is about to change: remember what it is."""
        self._before = bytes(self.raw)

    def changed(self, at: int, length: int) -> bytearray | None:
        """The bytes ``at .. at + length`` if they changed since `keep`."""
        part = self.raw[at : at + length]
        return None if part == memoryview(self._before)[at : at + length] else part


class Walker:
    """Goes through the tables of one image, whose counts are `counts`."""

    def __init__(self, image: Qcow2Image, counts: ShadowCounts) -> None:
        self._file = image.file
        self._counts = counts
        self.geometry = Geometry(image.header)
        self._bits = self.geometry.cluster_bits
        self._size = self.geometry.cluster_size
        self._step = self.geometry.entry_size
        self._patterns: dict[int, tuple[int, int]] = {}
        self._singly = 0  # entries looked at one by one so far

    # -- reading

    @property
    def _vectored(self) -> bool:
        return self._singly > PLAIN_ENTRIES or ("numpy" in sys.modules and self._singly > 0)

    def batches(self, l1: array[int], skip: array[int] | None = None) -> Iterator[Batch]:
        """The tables that `l1` names, but for those that `skip` names at the same place.

        Raises CorruptImage, StorageError."""
        numbers: list[int] = []
        for number in _used(l1):
            if skip is not None and number < len(skip) and not (skip[number] ^ l1[number]) & OFFSET_MASK:
                continue
            numbers.append(number)
            if len(numbers) * self._size >= (VECTOR_BATCH if self._vectored else BATCH):
                yield self._read(l1, numbers)
                numbers = []
        if numbers:
            yield self._read(l1, numbers)

    def _read(self, l1: array[int], numbers: list[int]) -> Batch:
        offsets = [self._table_offset(l1, number) for number in numbers]
        raw = bytearray(len(offsets) * self._size)
        view = memoryview(raw)
        at = 0
        while at < len(offsets):
            stop = at + 1
            while stop < len(offsets) and offsets[stop] == offsets[stop - 1] + self._size:
                stop += 1
            self._file.read_into(view[at * self._size : stop * self._size], offsets[at])
            at = stop
        return Batch(numbers, offsets, raw)

    def _table_offset(self, l1: array[int], number: int) -> int:
        offset = l1[number] & OFFSET_MASK
        if offset % self._size:
            raise CorruptImage(
                f"Image is corrupt: L2 table offset {offset:#x} unaligned (L1 index: {number:#x})"
            )
        return offset

    # -- counts

    def raise_(self, l1: array[int], skip: array[int] | None = None) -> None:
        """One reference more to every table of `l1` (but `skip`) and to all that these refer to.

        Raises StorageError (EINVAL) where a count cannot be larger, CorruptImage."""
        for batch in self.batches(l1, skip):
            for offset in batch.offsets:
                self._counts.raise_(offset >> self._bits)
            self._change(batch, 1)

    def lower(self, l1: array[int], skip: array[int] | None = None) -> None:
        """One reference less. Raises CorruptImage."""
        for batch in self.batches(l1, skip):
            self._change(batch, -1)
            for offset in batch.offsets:
                self._counts.lower(offset >> self._bits)

    def require(self, l1: array[int]) -> None:
        """Raises CorruptImage where the count of a table, or of what it refers to, is 0: such clusters would
        pass for free."""
        for batch in self.batches(l1):
            for offset in batch.offsets:
                self._counts.require(offset >> self._bits)
            if self._vectored:
                self._require_vectored(batch)
                continue
            for index, word, count in self._pieces(self._words(batch.raw)):
                if word & L2_COMPRESSED:
                    offset, length = self.geometry.compressed_range(word)
                    first = offset >> self._bits
                    self._counts.require(first, ((offset + length - 1) >> self._bits) + 1 - first)
                else:
                    self._counts.require(self._cluster(batch, index, word), count)

    def _change(self, batch: Batch, delta: int) -> None:
        if self._vectored:
            self._change_vectored(batch, delta)
            return
        change = self._counts.raise_ if delta > 0 else self._counts.lower
        single: list[int] = []
        for index, word, count in self._pieces(self._words(batch.raw)):
            if word & L2_COMPRESSED:
                offset, length = self.geometry.compressed_range(word)
                single += range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1)
            elif count == 1:
                single.append(self._cluster(batch, index, word))
            else:
                change(self._cluster(batch, index, word), count)
        self._counts.add_each(single, delta)

    def _references(self, batch: Batch) -> Iterator[tuple[int, Slots]]:
        """(refcount block, slots) of all that the tables refer to."""
        from qimg.vec import shadow

        clusters = shadow.references(
            batch.raw,
            extended=self.geometry.extended,
            cluster_bits=self._bits,
            count_shift=self.geometry.count_shift,
        )
        if clusters is None:
            self._find_damage(batch)
        return shadow.by_block(clusters, self._counts.per_block)

    def _require_vectored(self, batch: Batch) -> None:
        from qimg.vec import shadow

        counts = self._counts
        for block, slots in self._references(batch):
            wrong = shadow.zero_slot(counts.look(block), slots)
            if wrong is not None:
                counts.uncounted(block * counts.per_block + wrong)

    def _change_vectored(self, batch: Batch, delta: int) -> None:
        from qimg.vec import shadow

        counts = self._counts
        for block, slots in self._references(batch):
            wrong, freed = shadow.add(counts.change(block), slots, delta, counts.maximum)
            if wrong is not None:
                counts.refuse(block * counts.per_block + wrong, delta)
            for low, high in freed:
                counts.note_freed(block * counts.per_block + low, high - low)

    def _find_damage(self, batch: Batch) -> NoReturn:
        """Raises CorruptImage for what numpy gave back."""
        for index, word, _count in self._pieces(self._words(batch.raw)):
            if not word & L2_COMPRESSED:
                self._cluster(batch, index, word)
        raise CorruptImage("Image is corrupt: an L2 table is damaged")

    def _words(self, raw: bytearray) -> array[int]:
        words = native(raw)
        return words[::2] if self._step == 16 else words

    def _cluster(self, batch: Batch, index: int, word: int) -> int:
        """The host cluster of an entry that has one. Raises CorruptImage."""
        offset = word & OFFSET_MASK
        if offset % self._size:
            table, number = divmod(index, self.geometry.l2_entries)
            raise CorruptImage(
                f"Image is corrupt: Cluster allocation offset {offset:#x} unaligned"
                f" (L2 offset: {batch.offsets[table]:#x}, L2 index: {number:#x})",
                offset=batch.offsets[table] + number * self._step,
            )
        return offset >> self._bits

    # -- pieces

    def _pieces(self, words: array[int]) -> Iterator[Piece]:
        """The entries that refer to clusters, ascending; compressed ones one by one."""
        todo = [(0, len(words))]
        while todo:
            low, high = todo.pop()
            first, last = words[low], words[high - 1]
            count = high - low
            if (
                first == last
                and not first & (OFFSET_MASK | L2_COMPRESSED)
                and self._is_same(words, low, high)
            ):
                continue
            if self._is_run(words, low, high):
                yield low, first, count
            elif count <= _FEW:
                yield from self._linear(words, low, high)
            else:
                middle = low + count // 2
                todo.append((middle, high))
                todo.append((low, middle))

    def _linear(self, words: array[int], low: int, high: int) -> Iterator[Piece]:
        """The same, entry by entry."""
        self._singly += high - low
        size = self._size
        begin, first, count = 0, 0, 0
        expected = -1  # the word that would continue the run
        for index, word in enumerate(words[low:high], low):
            if word == expected:
                expected += size
                count += 1
                continue
            if count:
                yield begin, first, count
            count = 0
            expected = -1
            if word & L2_COMPRESSED:
                yield index, word, 1
            elif word & OFFSET_MASK:
                begin, first, count = index, word, 1
                expected = word + size
        if count:
            yield begin, first, count

    def _is_same(self, words: array[int], low: int, high: int) -> bool:
        if high - low == 1:
            return True
        return words[low:high].tobytes() == words[low : low + 1].tobytes() * (high - low)

    def _is_run(self, words: array[int], low: int, high: int) -> bool:
        """Whether the entries are those of neighbouring clusters, all of one kind."""
        first, last = words[low], words[high - 1]
        count = high - low
        if last - first != (count - 1) * self._size or first & L2_COMPRESSED:
            return False
        if not first & OFFSET_MASK or (first ^ last) & ~OFFSET_MASK:
            return False
        if count <= 2:
            return True
        ones, rising = self._pattern(count)
        return int.from_bytes(words[low:high].tobytes(), sys.byteorder) == first * ones + rising

    def _pattern(self, count: int) -> tuple[int, int]:
        """`count` words 1, 1, 1 ... and 0, size, 2 * size ..., each as one long number."""
        found = self._patterns.get(count)
        if found is None:
            ones = array("Q", [1]) * count
            rising = array("Q", range(0, count * self._size, self._size))
            found = (
                int.from_bytes(ones.tobytes(), sys.byteorder),
                int.from_bytes(rising.tobytes(), sys.byteorder),
            )
            self._patterns[count] = found
        return found

    # -- COPIED

    def cleared(self, batch: Batch) -> bool:
        """Take COPIED from all entries; whether there was any."""
        before = batch.raw[:: self._step]
        after = before.translate(_CLEAR)
        if after == before:
            return False
        batch.keep()
        batch.raw[:: self._step] = after
        return True

    def recomputed(self, batch: Batch) -> bool:
        """Give COPIED to the entries whose cluster has a count of 1, and take it from the others; whether
        any changes. Raises CorruptImage."""
        batch.keep()
        if self._vectored:
            return self._recomputed_vectored(batch)
        changed = False
        for index, word, count in self._pieces(self._words(batch.raw)):
            if word & L2_COMPRESSED:
                continue
            first = self._cluster(batch, index, word)
            changed |= self._mark(batch.raw, index, first, count, copied=bool(word & COPIED))
        return changed

    def _mark(self, raw: bytearray, index: int, first: int, count: int, *, copied: bool) -> bool:
        value = self._counts.uniform(first, count)
        if value is None:
            half = count // 2
            changed = self._mark(raw, index, first, half, copied=copied)
            return self._mark(raw, index + half, first + half, count - half, copied=copied) or changed
        if value == 0:
            self._counts.uncounted(first)
        if copied == (value == 1):
            return False
        part = slice(index * self._step, (index + count) * self._step, self._step)
        raw[part] = raw[part].translate(_CLEAR if copied else _SET)
        return True

    def _recomputed_vectored(self, batch: Batch) -> bool:
        from qimg.vec import shadow

        counts = self._counts
        found = shadow.placed(batch.raw, extended=self.geometry.extended, cluster_bits=self._bits)
        if found is None:
            self._find_damage(batch)
        values = shadow.values(found, counts.per_block, counts.look)
        missing = shadow.first_zero(found, values)
        if missing is not None:
            counts.uncounted(missing)
        return shadow.mark(batch.raw, found, values, extended=self.geometry.extended)


def _used(l1: Iterable[int]) -> Iterator[int]:
    """Numbers of the entries of an L1 table that name a table."""
    step = _CHUNK // 8
    assert isinstance(l1, array)
    for low in range(0, len(l1), step):
        part = l1[low : low + step]
        if _ZEROS.startswith(part.tobytes()):
            continue
        for number, word in enumerate(part, low):
            if word & OFFSET_MASK:
                yield number
