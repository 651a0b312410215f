"""The counts that an image is going to have, in refcount blocks built beside the stored ones.

A block that changes gets a new place, in clusters that are free now; so nothing that the header leads to
is touched. Blocks are kept in memory up to CACHE_BYTES; past that, changed ones are written to their new
places and read back from there when they change again. Units: clusters, unless said.
"""

from __future__ import annotations

import os
import sys
from array import array
from errno import EINVAL

from qimg.errors import CorruptImage, StorageError
from qimg.formats.qcow2.alloc import file_too_large
from qimg.formats.qcow2.refcounts import big_endian, counters_per_block, pack_counts, unpack_counts
from qimg.formats.qcow2.structs import MAX_REFCOUNT_TABLE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from qimg.formats.qcow2.shadow_space import FreeSpace, Run, StoredBlocks
    from qimg.storage.base import Storage

#: Bytes of counts in memory.
CACHE_BYTES = 64 << 20
#: Runs of freed clusters that are remembered; the space of more is not given back to the host.
MOST_FREED = 1 << 20
_WIDE = {8: "B", 16: "H", 32: "I", 64: "Q"}
_FEW = 16  # counters looked at one by one


class ShadowCounts:
    """Counts of one image. `lower` and `raise_` change them; `settle` and `write` store them."""

    def __init__(
        self, file: Storage, stored: StoredBlocks, space: FreeSpace, bits: int | None = None
    ) -> None:
        """`bits`: the width that they are going to have, the stored one if not given."""
        self._file = file
        self._stored = stored
        self._space = space
        self._cluster_size = stored.cluster_size
        self.bits = bits or stored.bits
        self.per_block = counters_per_block(stored.cluster_size, self.bits)
        self.maximum = (1 << self.bits) - 1
        self.typecode = _WIDE[max(8, self.bits)]
        self._item = array(self.typecode).itemsize
        self._blocks: dict[int, array[int]] = {}  # the last one is the one used last
        self._changed: set[int] = set()  # blocks that differ from what is at their place
        self._places: dict[int, int] = {}  # new host offset in bytes of each block that changed
        self._homeless: list[int] = []  # blocks that changed and have no new place yet
        self._taken: list[int] = []  # clusters for blocks, still to be counted
        self._table: Run = (0, 0)
        #: Runs whose count became 0.
        self.freed: list[Run] = []

    # -- blocks

    def look(self, block: int) -> array[int]:
        """The counts of `block`, to be read only. Raises CorruptImage, StorageError."""
        counts = self._blocks.pop(block, None)
        if counts is None:
            self._make_room()
            counts = self._load(block)
        self._blocks[block] = counts
        return counts

    def change(self, block: int) -> array[int]:
        """The counts of `block`, to be changed. Raises CorruptImage, StorageError."""
        counts = self.look(block)
        if block not in self._changed:
            self._changed.add(block)
            if block not in self._places:
                self._places[block] = 0
                self._homeless.append(block)
        return counts

    def _load(self, block: int) -> array[int]:
        place = self._places.get(block)
        if place:
            return unpack_counts(self.bits, self._file.read(place, self._cluster_size))
        counts = self._stored_counts(block)
        return array(self.typecode, bytes(self.per_block * self._item)) if counts is None else counts

    def _stored_counts(self, block: int) -> array[int] | None:
        """What is stored now, None for zeros."""
        return self._stored.counts(block)

    def _leave(self, block: int) -> None:
        """`block` gets a new place: the old one is given up."""
        old = self._stored.place(block)
        if old:
            self.lower(old // self._cluster_size, 1)

    def _make_room(self) -> None:
        """Write out or forget the block not used for longest, if there are many."""
        if len(self._blocks) < max(2, CACHE_BYTES // (self.per_block * self._item)):
            return
        block = next(iter(self._blocks))
        counts = self._blocks.pop(block)
        if block in self._changed:
            self._changed.discard(block)
            self._store(block, counts)

    def _store(self, block: int, counts: array[int]) -> None:
        if not self._places[block]:
            self._places[block] = self._take_block() * self._cluster_size
        self._file.write(pack_counts(self.bits, counts), self._places[block])

    def _take_block(self) -> int:
        cluster = self._space.take()
        self._taken.append(cluster)
        return cluster

    # -- counts

    def _slots(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(block, low, high) of ``first .. first + count``, cut at the borders of blocks."""
        while count > 0:
            block, low = divmod(first, self.per_block)
            high = min(self.per_block, low + count)
            yield block, low, high
            first += high - low
            count -= high - low

    def raise_(self, first: int, count: int = 1) -> None:
        """One reference more. Raises StorageError (EINVAL) at the largest count, CorruptImage at 0."""
        for block, low, high in self._slots(first, count):
            self._add(block, low, high, 1)

    def lower(self, first: int, count: int = 1) -> None:
        """One reference less. Raises CorruptImage at 0."""
        for block, low, high in self._slots(first, count):
            self._add(block, low, high, -1)

    def put(self, first: int, count: int, value: int = 1) -> None:
        """Clusters that were free get this count. Raises StorageError (EINVAL)."""
        if value > self.maximum:
            raise too_many()
        for block, low, high in self._slots(first, count):
            self.change(block)[low:high] = array(self.typecode, [value]) * (high - low)

    def get(self, cluster: int) -> int:
        """The count of one cluster."""
        block, slot = divmod(cluster, self.per_block)
        return self.look(block)[slot]

    def uniform(self, first: int, count: int) -> int | None:
        """The count that all of ``first .. first + count`` have, None if they differ."""
        found = None
        for block, low, high in self._slots(first, count):
            counts = self.look(block)
            value = counts[low]
            if found is not None and value != found:
                return None
            if high - low > 1:
                same = array(self.typecode, [value]).tobytes() * (high - low)
                if counts[low:high].tobytes() != same:
                    return None
            found = value
        return found

    def require(self, first: int, count: int = 1) -> None:
        """Raises CorruptImage where a count is 0."""
        for block, low, high in self._slots(first, count):
            part = self.look(block)[low:high]
            same = array(self.typecode, [part[0]]).tobytes() * len(part)
            if not part[0] or (part.tobytes() != same and 0 in part):
                self.uncounted(block * self.per_block + low + part.index(0))

    def _add(self, block: int, low: int, high: int, delta: int) -> None:
        counts = self.change(block)
        part = counts[low:high]
        least, most = part[0], part[0]
        if len(part) > 1 and part.tobytes() != array(self.typecode, [least]).tobytes() * len(part):
            least, most = min(part), max(part)
        if not least:
            self.uncounted(block * self.per_block + low + part.index(0))
        if most + delta > self.maximum:
            raise too_many()
        if least == most:
            counts[low:high] = array(self.typecode, [least + delta]) * len(part)
        else:
            counts[low:high] = self._sum(part, delta)
        if least + delta == 0:
            self._free_zeros(block, low, counts[low:high])

    def add_each(self, clusters: list[int], delta: int) -> None:
        """`raise_` (`delta` 1) or `lower` (-1) for single clusters in any order."""
        per_block = self.per_block
        stop = self.maximum if delta > 0 else -1
        last = -1
        for cluster in clusters:
            block, slot = divmod(cluster, per_block)
            if block != last:
                counts = self.change(block)
                last = block
            value = counts[slot]
            if not value:
                self.uncounted(cluster)
            if value == stop:
                raise too_many()
            counts[slot] = value + delta
            if value + delta == 0:
                self.note_freed(cluster, 1)

    def _sum(self, part: array[int], delta: int) -> array[int]:
        """`part` with `delta` added to each: as one long number, nothing carries over."""
        if len(part) <= _FEW:
            return array(self.typecode, [value + delta for value in part])
        ones = int.from_bytes((array(self.typecode, [1]) * len(part)).tobytes(), sys.byteorder)
        total = int.from_bytes(part.tobytes(), sys.byteorder) + delta * ones
        return array(self.typecode, total.to_bytes(len(part) * self._item, sys.byteorder))

    def refuse(self, cluster: int, delta: int) -> NoReturn:
        """Raises what keeps `delta` from being added to a cluster's count: StorageError, CorruptImage."""
        if delta > 0 and self.get(cluster):
            raise too_many()
        self.uncounted(cluster)

    def uncounted(self, cluster: int) -> NoReturn:
        """Raises CorruptImage: something refers to `cluster`, but its count is 0."""
        offset = cluster * self._cluster_size
        raise CorruptImage(
            f"Image is corrupt: The cluster at offset {offset:#x} is in use, but its reference count is 0",
            offset=offset,
        )

    # -- what became free

    def _free_zeros(self, block: int, low: int, part: array[int]) -> None:
        if not any(part):
            self.note_freed(block * self.per_block + low, len(part))
            return
        at = 0
        while at < len(part):
            stop = at
            while stop < len(part) and not part[stop]:
                stop += 1
            if stop > at:
                self.note_freed(block * self.per_block + low + at, stop - at)
            at = stop + 1

    def note_freed(self, first: int, count: int) -> None:
        """Remember that the count of ``first .. first + count`` became 0."""
        freed = self.freed
        if freed and sum(freed[-1]) == first:
            freed[-1] = freed[-1][0], freed[-1][1] + count
        elif len(freed) < MOST_FREED:
            freed.append((first, count))

    # -- storing

    def settle(self, old_table: Run) -> Run:
        """Find places for the blocks that changed, and for the table, which leaves `old_table`; they count
        themselves: a fixed point. No cluster may be taken or given up after this.

        Returns the table's place. Raises StorageError (EFBIG), CorruptImage."""
        self.lower(*old_table)
        self._settle_blocks()
        first, clusters = 0, 0
        while self._table_clusters() > clusters:
            if clusters:
                self._forget(first, clusters)  # its own blocks made the table longer still
            clusters = self._grown(old_table[1])
            first = self._space.take(clusters)
            self.put(first, clusters)
            self._settle_blocks()
        self._table = first, clusters
        return first, clusters

    def _settle_blocks(self) -> None:
        while self._homeless or self._taken:
            taken, self._taken = self._taken, []
            for cluster in taken:
                self.put(cluster, 1)
            homeless, self._homeless = self._homeless, []
            for block in homeless:
                self._leave(block)
                if not self._places[block]:
                    self._places[block] = self._take_block() * self._cluster_size

    def _forget(self, first: int, clusters: int) -> None:
        """Clusters that were taken are free again."""
        for block, low, high in self._slots(first, clusters):
            self.change(block)[low:high] = array(self.typecode, bytes((high - low) * self._item))

    def _entries(self) -> int:
        """Entries that the table needs."""
        return max(max(self._places, default=-1) + 1, self._kept_entries())

    def _kept_entries(self) -> int:
        return len(self._stored.table)

    def _table_clusters(self) -> int:
        return max(1, -(-8 * self._entries() // self._cluster_size))

    def _grown(self, before: int) -> int:
        """Clusters for the table: half as many again where it has to grow."""
        needed = self._table_clusters()
        largest = MAX_REFCOUNT_TABLE_BYTES // self._cluster_size
        if needed > largest:
            raise file_too_large()
        return needed if needed <= before else min(largest, needed + needed // 2)

    def write(self) -> None:
        """Write what changed, and the table, to where `settle` put them. Raises StorageError."""
        for block in sorted(self._changed):
            self._store(block, self._blocks[block])
        self._changed.clear()
        table = self._kept_table()
        table.extend(array("Q", bytes(8 * (self._entries() - len(table)))))
        for block, place in self._places.items():
            table[block] = place
        first, clusters = self._table
        self._file.write(
            big_endian(table).ljust(clusters * self._cluster_size, b"\0"), first * self._cluster_size
        )

    def _kept_table(self) -> array[int]:
        """Entries of the blocks that stay where they are."""
        return self._stored.table[:]


def too_many() -> StorageError:
    """A count would not fit into its width."""
    return StorageError(os.strerror(EINVAL), errno=EINVAL)
