"""Reference counts of an existing image that is being changed (sheet, sections 4, 13 and 14).

Counts that rise and counts that fall are kept apart: what rises is written before anything refers to the
clusters, what falls after nothing refers to them any more. `WritableQcow2.flush` calls the steps in order:

    settle        a place for the refcount table if it has outgrown its own
    write_new     blocks, and a table, that nothing points to yet
    write_raised  existing blocks with the raised counts, those of the new blocks' own clusters among them
    link          after a barrier: the table's entries, or the header's pointer, that lead to what is new
    lower         the lowered counts; gives the clusters that became free

Clusters that are given up can be handed out again after `lower`. Units: clusters, unless said.
"""

from __future__ import annotations

import sys
from array import array
from struct import pack

from qimg.errors import CorruptImage, StorageError
from qimg.formats.qcow2.alloc import file_too_large
from qimg.formats.qcow2.refcounts import (
    big_endian,
    counters_per_block,
    most_clusters,
    pack_counts,
    unpack_counts,
)
from qimg.formats.qcow2.structs import MAX_REFCOUNT_TABLE_BYTES, REFTABLE_OFFSET_MASK, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage

    Run = tuple[int, int]  # (first cluster, clusters)

_WIDE = {8: "B", 16: "H", 32: "I", 64: "Q"}
#: Bytes of unchanged blocks that stay in memory.
_CACHE = 8 << 20
_SECTOR = 512


class Span:
    """The items ``low .. high`` of something that changed."""

    __slots__ = ("high", "low")

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def cover(self, low: int, high: int) -> None:
        """Make it reach over ``low .. high`` too."""
        self.low = min(self.low, low)
        self.high = max(self.high, high)


class LiveRefcounts:
    """Counts, blocks and table of one image. `guard` is called with every run that is about to be handed
    out and raises CorruptImage where the image's own tables lie (a free count that lies)."""

    def __init__(self, file: Storage, header: ParsedHeader, guard: Callable[[int, int], None]) -> None:
        """Reads nothing yet. `header.header` gets the table's new place when it moves."""
        self._file = file
        self._header = header.header
        self._guard = guard
        self._cluster_size = header.cluster_size
        self._bits = 1 << header.header.refcount_order
        self.maximum = (1 << self._bits) - 1
        self.per_block = counters_per_block(header.cluster_size, self._bits)
        self._limit = most_clusters(header.cluster_size, self._bits)
        self._typecode = _WIDE[max(8, self._bits)]
        self._table: array[int] | None = None
        self._blocks: dict[int, array[int]] = {}
        self._dirty: dict[int, Span] = {}
        self._drops: dict[int, array[int]] = {}
        self._new: set[int] = set()  # blocks that the table on disk does not know
        self._moved = False
        self._next = 0  # where the search for free clusters goes on

    # -- the table

    @property
    def table(self) -> array[int]:
        """Host offset of every block in bytes, 0 where there is none."""
        if self._table is None:
            length = self._header.refcount_table_clusters * self._cluster_size
            table = array("Q", bytes(self._file.read(self._header.refcount_table_offset, length)))
            if sys.byteorder == "little":
                table.byteswap()
            self._table = array("Q", (word & REFTABLE_OFFSET_MASK for word in table))
        return self._table

    def _is_absent(self, block: int) -> bool:
        return block >= len(self.table) or not self.table[block]

    def _block(self, block: int) -> array[int]:
        """The counts of `block`, raised ones included. Raises CorruptImage, StorageError."""
        counts = self._blocks.get(block)
        if counts is None:
            if self._is_absent(block):
                return array(self._typecode, bytes(self.per_block * array(self._typecode).itemsize))
            offset = self.table[block]
            if offset % self._cluster_size:
                where = f"{block:#x}" if block else "0"
                raise CorruptImage(
                    f"Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {where})",
                    offset=self._header.refcount_table_offset + 8 * block,
                )
            counts = unpack_counts(self._bits, self._file.read(offset, self._cluster_size))
            self._make_room()
            self._blocks[block] = counts
        return counts

    def _make_room(self) -> None:
        """Forget an unchanged block if there are many."""
        if len(self._blocks) * self.per_block * array(self._typecode).itemsize < _CACHE:
            return
        for block in self._blocks:
            if block not in self._dirty and block not in self._new:
                del self._blocks[block]
                return

    # -- counts

    @property
    def staged(self) -> int:
        """Bytes in memory that wait to be written."""
        blocks = len(self._dirty) + len(self._drops)
        return blocks * self.per_block * array(self._typecode).itemsize

    def get(self, cluster: int) -> int:
        """The count that `cluster` will have when everything staged is written."""
        block, slot = divmod(cluster, self.per_block)
        count = self._block(block)[slot]
        drops = self._drops.get(block)
        return count - drops[slot] if drops is not None else count

    def _slots(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(block, low, high) of ``first .. first + count``, cut at the borders of blocks."""
        while count > 0:
            block, low = divmod(first, self.per_block)
            high = min(self.per_block, low + count)
            yield block, low, high
            first += high - low
            count -= high - low

    def _touch(self, block: int, low: int, high: int) -> None:
        span = self._dirty.get(block)
        if span is None:
            self._dirty[block] = Span(low, high)
        else:
            span.cover(low, high)

    def share(self, first: int, count: int = 1) -> None:
        """One reference more to each of ``first .. first + count``. Raises StorageError (EINVAL) at the
        largest count, before any change of that block."""
        import errno

        for block, low, high in self._slots(first, count):
            counts = self._block(block)
            if max(counts[low:high]) >= self.maximum:
                raise StorageError("Invalid argument", errno=errno.EINVAL)
            counts[low:high] = array(self._typecode, map((1).__add__, counts[low:high]))
            self._touch(block, low, high)

    def release(self, first: int, count: int = 1) -> None:
        """One reference less to each of ``first .. first + count``, once nothing on disk has it."""
        for block, low, high in self._slots(first, count):
            drops = self._drops.get(block)
            if drops is None:
                drops = array(self._typecode, bytes(self.per_block * array(self._typecode).itemsize))
                self._drops[block] = drops
            drops[low:high] = array(self._typecode, map((1).__add__, drops[low:high]))

    # -- free clusters

    def take(self, count: int) -> int:
        """The first of `count` neighbouring clusters that were free, with a count of 1 each. Raises
        StorageError (EFBIG), CorruptImage."""
        at = 0
        while True:
            first = self._next_free(at)
            needed = count + self._absent_from(first, count)
            free = self._free_from(first, needed)
            if free >= needed:
                self._claim(first, count, needed)
                return first
            at = first + free

    def take_any(self, count: int) -> list[Run]:
        """`count` clusters that were free, in as many runs as it takes, with a count of 1 each. Raises
        StorageError (EFBIG), CorruptImage."""
        runs: list[Run] = []
        while count > 0:
            first = self._next_free(self._next)
            free = self._free_from(first, count + self._absent_from(first, count))
            usable = min(count, free - self._absent_between(first, first + free))
            if usable <= 0:
                self._claim(first, 0, 1)  # all there is goes to the block that describes it
                continue
            self._claim(first, usable, usable + self._absent_from(first, usable))
            self._next = first + usable
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + usable)
            else:
                runs.append((first, usable))
            count -= usable
        return runs

    def take_at(self, cluster: int) -> bool:
        """Take just this cluster, if it is free and its block is there."""
        block, slot = divmod(cluster, self.per_block)
        if cluster >= self._limit or self._is_absent(block) or self._block(block)[slot]:
            return False
        self._claim(cluster, 1, 1)
        return True

    def _next_free(self, at: int) -> int:
        """The first free cluster from `at` on."""
        while at < self._limit:
            block, slot = divmod(at, self.per_block)
            if self._is_absent(block) and block not in self._blocks:
                return at
            counts = self._block(block)
            try:
                return block * self.per_block + counts.index(0, slot)
            except ValueError:
                at = (block + 1) * self.per_block
        raise file_too_large()

    def _free_from(self, first: int, most: int) -> int:
        """How many clusters from `first` on are free, up to `most`. Raises StorageError (EFBIG)."""
        if first + most > self._limit:
            raise file_too_large()
        free = 0
        for block, low, high in self._slots(first, most):
            if not self._is_absent(block):
                part = self._block(block)[low:high]
                if any(part):
                    return free + next(number for number, count in enumerate(part) if count)
            free += high - low
        return free

    def _absent_between(self, first: int, stop: int) -> int:
        """How many of the blocks that describe ``first .. stop`` are still to be made."""
        return sum(
            self._is_absent(block)
            for block in range(first // self.per_block, -(-stop // self.per_block) if stop > first else 0)
        )

    def _absent_from(self, first: int, count: int) -> int:
        """How many blocks have to be made for `count` clusters from `first` on and for these blocks, which
        come right behind."""
        absent = 0
        while (more := self._absent_between(first, first + count + absent)) > absent:
            absent = more
        return absent

    def _claim(self, first: int, count: int, with_blocks: int) -> None:
        """Give ``first .. first + count`` a count of 1; what follows up to `with_blocks` becomes the blocks
        that are missing."""
        self._guard(first, with_blocks)
        place = first + count
        for block, low, high in self._slots(first, with_blocks):
            if self._is_absent(block):
                self._make(block, place)
                place += 1
            counts = self._block(block)
            counts[low:high] = array(self._typecode, [1]) * (high - low)
            self._touch(block, low, high)
        if place > first + with_blocks:
            raise AssertionError("a refcount block without a place")

    def _make(self, block: int, place: int) -> None:
        if block >= len(self.table):
            self.table.extend(array("Q", bytes(8 * (block + 1 - len(self.table)))))
        self._blocks[block] = self._block(block)
        self.table[block] = place * self._cluster_size
        self._new.add(block)

    # -- writing

    def settle(self) -> None:
        """Give the table a larger place if its entries no longer fit. Last call before the writing.

        Raises StorageError (EFBIG)."""
        size = self._cluster_size
        if self._table is None or 8 * len(self.table) <= self._header.refcount_table_clusters * size:
            return
        old = self._header.refcount_table_offset // size, self._header.refcount_table_clusters
        largest = MAX_REFCOUNT_TABLE_BYTES // size
        first = clusters = 0
        while 8 * len(self.table) > clusters * size:
            if clusters:
                self.release(first, clusters)  # its own blocks made the table longer still
            clusters = min(-(-12 * len(self.table) // size), largest)
            if 8 * len(self.table) > clusters * size:
                raise file_too_large()
            first = self.take(clusters)
        self._header.refcount_table_offset = first * size
        self._header.refcount_table_clusters = clusters
        self._moved = True
        self.release(*old)

    def write_new(self) -> bool:
        """Write the blocks and the table that nothing points to yet; whether there are any."""
        for block in sorted(self._new):
            self._file.write(pack_counts(self._bits, self._blocks[block]), self.table[block])
            self._dirty.pop(block, None)
        if self._moved:
            length = self._header.refcount_table_clusters * self._cluster_size
            self._file.write(big_endian(self.table).ljust(length, b"\0"), self._header.refcount_table_offset)
        return bool(self._new) or self._moved

    def link(self) -> None:
        """Point to what `write_new` wrote. A block whose own cluster another new one counts follows that one
        after a barrier."""
        if self._moved:
            pointer = pack(">QI", self._header.refcount_table_offset, self._header.refcount_table_clusters)
            self._file.write(pointer, Header.offset_of("refcount_table_offset"))
            self._new.clear()
        self._moved = False
        while self._new:
            ready = [block for block in self._new if self._counted_by(block) not in self._new - {block}]
            for block in sorted(ready):
                place = self._header.refcount_table_offset + 8 * block
                self._file.write(self.table[block].to_bytes(8, "big"), place)
            self._new.difference_update(ready)
            if self._new:
                self._file.flush()

    def _counted_by(self, block: int) -> int:
        """The block in which the cluster of `block` has its count."""
        return self.table[block] // self._cluster_size // self.per_block

    def write_raised(self) -> bool:
        """Write the existing blocks whose counts rose; whether there are any."""
        raised = bool(self._dirty)
        for block in sorted(self._dirty):
            self._write(block, self._dirty[block])
        self._dirty.clear()
        return raised

    def _write(self, block: int, span: Span) -> None:
        """Write the sectors of a block in which the counts of `span` are."""
        per_sector = _SECTOR * 8 // self._bits
        low = span.low // per_sector * per_sector
        high = min(-(-span.high // per_sector) * per_sector, self.per_block)
        raw = pack_counts(self._bits, self._blocks[block][low:high])
        self._file.write(raw, self.table[block] + low * self._bits // 8)

    @property
    def falling(self) -> bool:
        """Whether counts wait to be lowered."""
        return bool(self._drops)

    def lower(self) -> list[Run]:
        """Lower the counts that were released and write them; the clusters that are free now."""
        free: list[Run] = []
        for block in sorted(self._drops):
            drops = self._drops[block]
            self._blocks[block] = counts = self._block(block)
            low, high = _nonzero(drops)
            before, fall = counts[low:high], drops[low:high]
            left = array(self._typecode, map(_reduce, before, fall))
            counts[low:high] = left
            for first, stop in _freed(left, fall):
                _append(free, block * self.per_block + low + first, stop - first)
            if not self._is_absent(block):
                self._write(block, Span(low, high))
        self._drops.clear()
        if free:
            self._next = min(self._next, free[0][0])
        return free

    def used_end(self) -> int:
        """Number of the last cluster in use, plus one."""
        for block in range(len(self.table) - 1, -1, -1):
            if self.table[block]:
                _low, high = _nonzero(self._block(block))
                if high:
                    return block * self.per_block + high
        return 0


def _nonzero(counts: array[int]) -> tuple[int, int]:
    """The slots from the first to behind the last that is not 0; the second is 0 where there is none."""
    raw = counts.tobytes()
    size = counts.itemsize
    return (len(raw) - len(raw.lstrip(b"\0"))) // size, -(-len(raw.rstrip(b"\0")) // size)


def _reduce(count: int, drop: int) -> int:
    return count - drop if count > drop else 0


def _freed(left: array[int], drops: array[int]) -> Iterator[Run]:
    """The runs (first slot, slot behind the last) that were dropped and have nothing left."""
    states = bytes(map(_is_freed, left, drops))
    at = states.find(1)
    while at >= 0:
        end = states.find(0, at)
        end = end if end >= 0 else len(states)
        yield at, end
        at = states.find(1, end)


def _is_freed(count: int, drop: int) -> bool:
    return drop > 0 and not count


def _append(runs: list[Run], cluster: int, count: int) -> None:
    if runs and sum(runs[-1]) == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((cluster, count))
