"""Images whose map is a table with one word a block: vdi, vpc, vhdx, parallels, vmdk, qed, qcow, bochs.

A format says what a word means (`BlockCode`), where its tables are (`pieces`), and where new blocks go
(`place`); lookup, staging and the order of writes are here::

    data            the caller wrote it to the places that `allocate` gave
    barrier
    tables          nothing in the file referred to the new blocks before
    barrier
    header          `finish`, if the format has anything to say there

A new image gets its header in the first `flush` only: an interrupted job leaves a file that no reader takes
for an image.
"""

from __future__ import annotations

import sys
from array import array

from qimg.errors import NotSupported
from qimg.extent import COMPRESSED, HOLE, MAPPED, ZERO, Runs, clip
from qimg.formats.base import Image
from qimg.formats.tables import WordTable, uniform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from qimg.extent import Extent
    from qimg.storage.base import Storage

    #: (first, stop, flags, host) of blocks of one kind in a piece of a table.
    Run = tuple[int, int, int, int | None]

#: Bytes of staged tables with which a batch should end.
STAGE_LIMIT = 16 << 20
#: Words from which on numpy is faster, and from which on even its import pays.
_SOME, _MANY = 256, 400_000
#: Bytes of L2 tables without changes that stay in memory, and L1 words looked at together.
_TABLES = 16 << 20
_L1_STEP = 512


class BlockCode:
    """What the words of a format's tables mean. Sizes in bytes.

    block       guest bytes of one word.
    unit, base  a word that is not special lies at host offset ``word * unit + base``.
    special     word -> flags of those that are no place (HOLE, ZERO).
    compressed  bits that mark a compressed block, 0 where there are none.
    stride      host bytes from one block to the next of the same allocation.
    mask        bits of a word that make up the place.
    """

    def __init__(
        self,
        block: int,
        *,
        unit: int,
        base: int = 0,
        special: Mapping[int, int],
        compressed: int = 0,
        stride: int | None = None,
        mask: int = (1 << 64) - 1,
    ) -> None:
        self.block = block
        self.unit = unit
        self.base = base
        self.special = special
        self.compressed = compressed
        self.stride = block if stride is None else stride
        self.mask = mask
        # Words of blocks that continue each other grow by this; 0: none do.
        self.step = block // unit if self.stride == block and block % unit == 0 else 0
        self._seen = 0  # words looked at one by one, in tables of some size

    def host(self, word: int) -> int:
        """Where the block with this word lies."""
        return (word & self.mask) * self.unit + self.base

    def word(self, host: int) -> int:
        """The word of a block that lies at `host`."""
        return (host - self.base) // self.unit

    def words(self, host: int, count: int, typecode: str) -> array[int]:
        """The words of `count` blocks, the first of which lies at `host`."""
        first, step = self.word(host), self.stride // self.unit
        return array(typecode, range(first, first + count * step, step))

    def runs(self, words: array[int]) -> Iterator[Run]:
        """`words` as runs of one kind, ascending; neighbours of the same run continue each other."""
        starts = self._starts(words)
        for at, stop in zip(starts, [*starts[1:], len(words)], strict=True):
            word = words[at]
            flags = self.special.get(word)
            if flags is not None:
                yield at, stop, flags, None
            elif word & self.compressed:
                yield at, stop, COMPRESSED, None
            else:
                yield at, stop, MAPPED, self.host(word)

    def _starts(self, words: array[int]) -> list[int]:
        """Indices at which a new run begins."""
        if len(words) < _SOME:
            return self.plain_starts(words)
        if words[0] in self.special and uniform(words):
            return [0]
        self._seen += len(words)
        if "numpy" in sys.modules or self._seen >= _MANY:
            from qimg.vec.blocks import runs

            return runs(words, self.special, self.compressed, self.step)
        return self.plain_starts(words)

    def plain_starts(self, words: array[int]) -> list[int]:
        """The same without numpy."""
        starts: list[int] = []
        last, kind = 0, -1
        for index, word in enumerate(words):
            if word == last and kind == 1:
                continue  # the commonest case by far
            now = 1 if word in self.special else 2 if word & self.compressed else 0
            joined = now == kind and (now == 2 or (now == 0 and self.step and word - last == self.step))
            if not joined:
                starts.append(index)
            last, kind = word, now
        return starts


class BlockImage(Image):
    """One opened image. Subclasses set `file`, `size`, `cluster_size`, `code`, and `granularity` (512 where
    new blocks read as zeros and nothing lies below, else the block's size)."""

    cluster_size: int
    code: BlockCode

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        """(first block, table, low, high): which words of which tables describe the blocks `first` ..
        `last`, ascending. Blocks without a table are left out, or get one where `create` is set.

        Raises CorruptImage, StorageError."""
        raise NotImplementedError

    def place(self, block: int, count: int) -> tuple[int, int]:
        """Room for up to `count` new blocks, for the guest blocks from `block` on: the host offset of the
        first one's data, and how many there are. What is there reads as zeros. Raises StorageError,
        LimitError."""
        raise NotSupported(f"Writing to {self.format_name} images is not supported")

    def validate(self, block: int, count: int, host: int) -> None:
        """Raise CorruptImage where guest blocks from `block` on cannot lie at `host`."""

    # -- reading

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        size = self.cluster_size
        for base, table, low, high in self.pieces(start // size, -(-(start + length) // size), create=False):
            for at, stop, flags, host in self.code.runs(table.words(low, high)):
                self._add(runs, base + at, stop - at, flags, host)
        return runs.take()

    def _add(self, runs: Runs, block: int, count: int, flags: int, host: int | None) -> None:
        size = self.cluster_size
        if host is None:
            runs.append(block * size, count * size, flags)
            return
        self.validate(block, count, host)
        runs.append(block * size, count * size, flags, host, self.data)

    @property
    def data(self) -> Storage:
        """What holds the blocks."""
        return self.file

    # -- writing

    def begin(self) -> None:
        """Before the first change: refuse, or note it in the file. Called before every change."""

    def in_place(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        for extent in self.extents(start, length):
            if extent.flags & MAPPED:
                runs.append(extent.start, extent.length, MAPPED, extent.host, extent.source)
        return runs.take()

    def allocate(self, start: int, length: int) -> list[Extent]:
        self.begin()
        size = self.cluster_size
        first, last = start // size, -(-(start + length) // size)
        runs = Runs(first * size, (last - first) * size)
        for base, table, low, high in self.pieces(first, last, create=True):
            words = table.words(low, high)
            for at, stop, flags, host in self.code.runs(words):
                if flags & MAPPED:
                    self._add(runs, base + at, stop - at, MAPPED, host)
                    continue
                self._place(base + at, stop - at, table, low + at, runs)
        return list(clip(runs.take(), start, length))

    def _place(self, block: int, count: int, table: WordTable, index: int, runs: Runs) -> None:
        code = self.code
        while count:
            host, placed = self.place(block, count)
            table.put(index, code.words(host, placed, "Q"))
            for number in range(placed):
                runs.append(
                    (block + number) * code.block, code.block, MAPPED, host + number * code.stride, self.data
                )
            block += placed
            index += placed
            count -= placed

    def mark_zero(self, start: int, length: int) -> None:
        """Zeros are written where there is a block; where there is none and nothing below, none is made."""
        self.begin()
        for extent in self.extents(start, length):
            if extent.flags & MAPPED:
                assert extent.source is not None and extent.host is not None
                extent.source.zero(extent.host, extent.length)
            elif not extent.flags & ZERO and (self.backing is not None or not extent.flags & HOLE):
                self.zero_absent(extent.start, extent.length)

    def zero_absent(self, start: int, length: int) -> None:
        """Make a range without plain blocks, over a backing file or compressed, read as zeros."""
        raise NotSupported(f"Zeros cannot be stored in {self.format_name} images without writing them")

    def clear_end(self) -> None:
        """Before the disk grows: make what its last block holds behind its end read as zeros."""
        behind = -self.size % self.cluster_size
        if not behind:
            return
        (extent,) = self.extents(self.size - 1, 1)
        if extent.flags & MAPPED:
            assert extent.source is not None and extent.host is not None
            if any(extent.source.read(extent.host + 1, behind)):
                extent.source.zero(extent.host + 1, behind)

    # -- the end

    def levels(self) -> list[list[WordTable]]:
        """The tables in memory, the deepest level first: each is written, and a barrier follows, before the
        one that leads to it."""
        raise NotImplementedError

    @property
    def wants_flush(self) -> bool:  # type: ignore[override]
        return sum(table.staged for level in self.levels() for table in level) > STAGE_LIMIT

    def settle(self) -> None:
        """Before the first barrier of `flush`: give the file its length."""

    def finish(self) -> None:
        """After the tables: the header, or what else has to come last."""

    def flush(self) -> None:
        self.settle()
        self.file.flush()
        for level in self.levels():
            written = False
            for table in level:
                written |= table.write()
            if written:
                self.file.flush()
        self.finish()


def pieces_of(table: WordTable, first: int, last: int) -> Iterator[tuple[int, WordTable, int, int]]:
    """`BlockImage.pieces` of a format with one table, at most 64 Ki words at a time."""
    last = min(last, table.count)
    step = 1 << 16
    while first < last:
        high = min(last, first - first % step + step)
        yield first, table, first, high
        first = high


class TwoLevels:
    """An L1 table whose words lead to L2 tables of the same kind of words, as qed, qcow and vmdk have them.

    place    gives a new L2 table its place: a host offset at which there are zeros.
    check    called with (index, host offset) of an L2 table before it is used; raises CorruptImage.
    """

    def __init__(
        self,
        l1: WordTable,
        l2_entries: int,
        *,
        size: int,
        big: bool,
        unit: int = 1,
        place: Callable[[int], int],
        check: Callable[[int, int], None],
    ) -> None:
        """`size` of an L2 word in bytes; an L1 word times `unit` is a host offset, 0: no table."""
        self.l1 = l1
        self.l2_entries = l2_entries
        self._size = size
        self._big = big
        self._unit = unit
        self._place = place
        self._check = check
        self._tables: dict[int, WordTable] = {}

    def table(self, index: int, *, create: bool = False) -> WordTable | None:
        """L2 table `index`; None where there is none. Raises CorruptImage, StorageError."""
        found = self._tables.get(index)
        if found is not None:
            return found
        host = self.l1.words(index, index + 1)[0] * self._unit
        if host:
            self._check(index, host)
        elif not create:
            return None
        else:
            host = self._place(index)
            self.l1.put(index, array("Q", [host // self._unit]))
        self._make_room()
        found = WordTable(self.l1.file, host, self.l2_entries, size=self._size, big=self._big)
        self._tables[index] = found
        return found

    def _make_room(self) -> None:
        """Forget the tables that wait for nothing, if there are many."""
        if len(self._tables) * self.l2_entries * self._size >= _TABLES:
            self._tables = {index: table for index, table in self._tables.items() if table.staged}

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        """`BlockImage.pieces`."""
        last = min(last, self.l1.count * self.l2_entries)
        while first < last:
            index, low = divmod(first, self.l2_entries)
            if not create:
                skipped = self._absent(index, -(-last // self.l2_entries))
                if skipped:
                    first = (index + skipped) * self.l2_entries
                    continue
            high = min(self.l2_entries, low + last - first)
            table = self.table(index, create=create)
            if table is not None:
                yield first, table, low, high
            first += high - low

    def _absent(self, index: int, stop: int) -> int:
        """How many of the L2 tables from `index` on do not exist."""
        count = 0
        while index + count < stop:
            step = min(_L1_STEP, stop - index - count)
            words = self.l1.words(index + count, index + count + step)
            used = next((number for number, word in enumerate(words) if word), step)
            count += used
            if used < step:
                break
        return count

    def levels(self) -> list[list[WordTable]]:
        """`BlockImage.levels`."""
        return [list(self._tables.values()), [self.l1]]
