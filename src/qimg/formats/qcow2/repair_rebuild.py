"""New refcount structures for an image whose own cannot be mended (qcow2 sheet, section 15).

A block for every range of clusters in use, in the first cluster from that range on that nothing refers to;
then the table, in the first run that is long enough. All of it is written before one write to the header
leads there, and the old structures keep their counts until then.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from errno import EFBIG
from struct import pack

from qimg.formats.qcow2.alloc import BatchWriter
from qimg.formats.qcow2.check import MAX_CLUSTERS, failed
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.structs import (
    MAX_REFCOUNT_TABLE_BYTES,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.qcow2.repair import Repairer

_MOST_PLANS = 16


def rebuild(repairer: Repairer) -> None:
    """Write refcount structures that hold the references of `repairer`'s walk, and switch to them. Afterwards
    the old structures are leaked. Raises StorageError."""
    for _ in range(_MOST_PLANS):
        plan = Plan(repairer)
        plan.make()
        if not plan.covers_references_behind():
            break
        # The file will reach over places that something refers to: they have to be counted as well.
        repairer.file_size = plan.end << repairer.cluster_bits
        repairer.clusters = plan.end
        repairer.behind = bytearray()
        repairer.recount()
    else:
        raise failed(EFBIG)
    plan.write()
    header, file = repairer.header.header, repairer.file
    file.flush()
    header.refcount_table_offset = plan.table << repairer.cluster_bits
    header.refcount_table_clusters = plan.table_clusters
    pointer = pack(">QI", header.refcount_table_offset, header.refcount_table_clusters)
    file.write(pointer, Header.offset_of("refcount_table_offset"))
    file.flush()


class Plan:
    """Places for the new structures. Units: host clusters; a range is what one block describes."""

    def __init__(self, repairer: Repairer) -> None:
        self._repairer = repairer
        self._per_block = repairer.stored.per_block
        self._stop = repairer.clusters + 1  # up to here `counts` knows
        self.blocks: dict[int, int] = {}  # range: cluster
        self.table = -1
        self.table_clusters = 0
        #: The last cluster in use, plus one.
        self.end = repairer.clusters
        self._taken: list[int] = []
        self._next = 0
        self._waiting: list[int] = []  # ranges that found no place in the partitions so far
        self._avoid = set(self._misled())

    def _misled(self) -> Iterable[int]:
        """Clusters that entries of the old table lead to in a way that does not count. Until the switch
        other programs read their counts there."""
        bits, size = self._repairer.cluster_bits, self._repairer.cluster_size
        for _index, word in self._repairer.stored.entries():
            offset = word & REFTABLE_OFFSET_MASK
            if word & REFTABLE_RESERVED or offset % size:
                yield offset >> bits
                yield offset + size - 1 >> bits

    def make(self) -> None:
        """Find a place for everything. Raises StorageError (EFBIG)."""
        for _ in self._repairer.walked():
            self._place_here()
        for number in self._waiting:
            self._place(number)
        while True:
            self._place_table()
            missing = {cluster // self._per_block for cluster in self._taken} - self.blocks.keys()
            if not missing:
                break
            for number in sorted(missing):
                self._place(number)
        self._taken.sort()

    def covers_references_behind(self) -> bool:
        """Whether the file would grow over something that entries lead to."""
        grown = self.end - self._repairer.clusters
        return grown > 0 and 1 in self._repairer.behind[:grown]

    # -- places

    def _place_here(self) -> None:
        """Blocks for the ranges of this partition."""
        counts = self._repairer.counts
        last = counts.stop >= self._stop
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            self._place_or_wait(number, last)
        for start in range(counts.start, counts.stop, self._per_block):
            if counts.any_used(start, min(start + self._per_block, counts.stop)):
                self._place_or_wait(start // self._per_block, last)
        if not last and self.table < 0:
            self._place_table_here()

    def _place_or_wait(self, number: int, last: bool) -> None:
        if last or self._free_here(number * self._per_block) is not None:
            self._place(number)
        else:
            self._waiting.append(number)

    def _place(self, number: int) -> None:
        """A block for range `number`. Every cluster between the range's first one and the place that was
        found last is in use: earlier searches went past them."""
        if 8 * number >= MAX_REFCOUNT_TABLE_BYTES:
            raise failed(EFBIG)
        cluster = self._free(max(number * self._per_block, self._next))
        self.blocks[number] = cluster
        self._next = cluster + 1
        self._take(cluster, 1)

    def _place_table_here(self) -> None:
        """The table, if there is room for it in a partition that is not the last one."""
        needed = self._table_length(self._stop // self._per_block)
        first = self._free_run(needed, self._repairer.counts.start)
        if first + needed <= self._repairer.counts.stop:
            self._set_table(first, needed)

    def _table_length(self, last: int) -> int:
        """Clusters of a table whose last entry is that of range `last`."""
        return -(-8 * (last + 1) // self._repairer.cluster_size)

    def _place_table(self) -> None:
        """The table, in a new place if it has become too long for its own."""
        needed = self._table_length(max(self.blocks, default=0))
        if needed > self.table_clusters:
            # A place that was too short is freed with the old structures.
            self._set_table(self._free_run(needed, self._repairer.counts.start), needed)

    def _set_table(self, first: int, count: int) -> None:
        self.table, self.table_clusters = first, count
        self._take(first, count)

    def _take(self, cluster: int, count: int) -> None:
        self._taken += range(cluster, cluster + count)
        self.end = max(self.end, cluster + count)
        if self.end > MAX_CLUSTERS:
            raise failed(EFBIG)
        self._repairer.counts.add(cluster, cluster + count)
        self._avoid.update(range(max(cluster, self._stop), cluster + count))

    def _is_wanted(self, cluster: int) -> bool:
        """Whether a cluster that counts 0 must be left alone."""
        if cluster in self._avoid:
            return True
        behind = cluster - self._repairer.clusters
        return 0 <= behind < len(self._repairer.behind) and bool(self._repairer.behind[behind])

    def _free_here(self, start: int) -> int | None:
        """The first free cluster of the partition from `start` on."""
        cluster = self._repairer.counts.next_free(start)
        while cluster is not None and self._is_wanted(cluster):
            cluster = self._repairer.counts.next_free(cluster + 1)
        return cluster

    def _free(self, start: int) -> int:
        """The first free cluster from `start` on, in this partition or behind the last one."""
        cluster = self._free_here(start) if start < self._stop else None
        if cluster is None:
            cluster = max(start, self._stop)
            while self._is_wanted(cluster):
                cluster += 1
        return cluster

    def _free_run(self, count: int, start: int) -> int:
        """The first of `count` free clusters in a row from `start` on: in this partition, or else behind the
        end of the last one."""
        counts = self._repairer.counts
        first = self._free(start)
        while True:
            for cluster in range(first + 1, first + count):
                if self._is_wanted(cluster) or (cluster in counts and counts[cluster] > 0):
                    first = self._free(cluster + 1)
                    break
            else:
                return first

    # -- writing

    def write(self) -> None:
        """Write blocks and table. Nothing refers to them yet. Raises StorageError."""
        repairer = self._repairer
        writer = BatchWriter(repairer.file)
        numbers = sorted(self.blocks)
        at = 0
        for _ in repairer.walked():
            counts = repairer.counts
            if counts.start or counts.stop < self._stop:
                self._count_taken()
            last = counts.stop >= self._stop
            while at < len(numbers) and (last or numbers[at] * self._per_block < counts.stop):
                self._write_block(writer, numbers[at])
                at += 1
        writer.flush()
        table = array("Q", bytes(8 * (numbers[-1] + 1)))
        for number, cluster in self.blocks.items():
            table[number] = cluster << repairer.cluster_bits
        raw = big_endian(table).ljust(self.table_clusters << repairer.cluster_bits, b"\0")
        repairer.file.write(raw, self.table << repairer.cluster_bits)

    def _count_taken(self) -> None:
        """The partition was counted anew: add what this plan takes."""
        for cluster in self._taken:
            self._repairer.counts.add(cluster, cluster + 1)

    def _write_block(self, writer: BatchWriter, number: int) -> None:
        repairer = self._repairer
        start = number * self._per_block
        low = bisect_left(self._taken, max(start, self._stop))
        high = bisect_left(self._taken, start + self._per_block)
        raw = repairer.counts.packed(start, self._per_block, self._taken[low:high])
        writer.put(self.blocks[number] << repairer.cluster_bits, raw)
