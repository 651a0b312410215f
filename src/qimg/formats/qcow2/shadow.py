"""Shadow paging: changes of a whole qcow2 image that one write of its header makes true.

An operation that changes many counts between 1 and 2 together with the COPIED bits that must agree with
them cannot be done by ordered writes in place: whoever looks between would call it corruption. So the new
refcount blocks and table, the L2 tables that change, the L1 table and the snapshot table are built in
clusters that are free now; a barrier; then the header's first 512 bytes, one sector, switch to all of it;
a barrier. What was replaced is free by the new counts. A crash before the switch leaves the old image, one
after it the new; neither has so much as a leak, only a longer file.

Refcount blocks and L2 tables that do not change stay where they are, in both.
"""

from __future__ import annotations

from qimg.errors import QimgError
from qimg.formats.qcow2.alloc import BatchWriter
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.shadow_counts import ShadowCounts
from qimg.formats.qcow2.shadow_space import FreeSpace, StoredBlocks, Tables
from qimg.formats.qcow2.shadow_walk import Walker, read_l1
from qimg.formats.qcow2.structs import COPIED, OFFSET_MASK, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from types import TracebackType
    from typing import Self

    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.shadow_walk import Batch
    from qimg.formats.qcow2.snapshot import SnapshotTable

#: What is switched by one write: one sector.
_SWITCH = 512
_WIDTHS = {
    "size": 8,
    "l1_size": 4,
    "l1_table_offset": 8,
    "refcount_table_offset": 8,
    "refcount_table_clusters": 4,
    "nb_snapshots": 4,
    "snapshots_offset": 8,
    "refcount_order": 4,
}


class Shadow:
    """One change of `image`, which is opened for writing and has nothing staged. Offsets and sizes in bytes.

    Use it with ``with``: when that is left by an exception before `commit`, the image is as it was. After
    `commit` what `image` has read before is out of date. Every method raises StorageError, CorruptImage.
    """

    def __init__(self, image: Qcow2Image) -> None:
        self.image = image
        self.header = image.header.header
        self._file = image.file
        self._size = image.cluster_size
        self._before = image.file.size
        self._switching = False
        self._fields: dict[str, int] = {}
        self._writer = BatchWriter(image.file)
        self.stored = StoredBlocks(image.file, image.header)
        self.snapshots = self._read_snapshots()
        self.space = FreeSpace(self.stored, Tables(image, self.stored, self.snapshots))
        self.counts = ShadowCounts(image.file, self.stored, self.space)
        self.walker = Walker(image, self.counts)

    def _read_snapshots(self) -> SnapshotTable | None:
        if not self.header.nb_snapshots:
            return None
        from qimg.formats.qcow2.snapshot import read_snapshots

        return read_snapshots(self._file, self.image.header)

    # -- what is there

    def active_l1(self) -> array[int]:
        """The words of the active L1 table."""
        return read_l1(self._file, self.header.l1_table_offset, self.header.l1_size)

    # -- building

    def place(self, data: bytes) -> int:
        """Write `data` to new clusters, filled up with zeros; where they are (0 for nothing)."""
        if not data:
            return 0
        clusters = -(-len(data) // self._size)
        first = self.space.take(clusters)
        self.counts.put(first, clusters)
        self._writer.put(first * self._size, data.ljust(clusters * self._size, b"\0"))
        return first * self._size

    def give_up(self, offset: int, length: int) -> None:
        """One reference less to the clusters of ``offset .. offset + length``."""
        if length:
            first = offset // self._size
            self.counts.lower(first, -(-(offset + length) // self._size) - first)

    def share_tables(self, l1: array[int]) -> None:
        """Make the tables of `l1` fit for two L1 tables: without COPIED anywhere, so that tables that have it
        are replaced by copies. Counts include both L1 tables already. `l1` gets the new places."""
        for batch in self.walker.batches(l1):
            if self.walker.cleared(batch):
                self._replace(l1, batch, sharers=2)
            for number in batch.numbers:
                l1[number] &= ~COPIED

    def own_tables(self, l1: array[int]) -> None:
        """Make the tables of `l1` fit for the active L1 table: COPIED where the count is 1. Counts include
        its references already. `l1` gets the new places. Raises CorruptImage before anything is written."""
        self.walker.require(l1)
        for batch in self.walker.batches(l1):
            if self.walker.recomputed(batch):
                self._replace(l1, batch, sharers=1)
            for number, offset in zip(batch.numbers, batch.offsets, strict=True):
                word = l1[number]
                if word & OFFSET_MASK == offset:
                    copied = COPIED if self.counts.get(offset // self._size) == 1 else 0
                    l1[number] = word & ~COPIED | copied

    def _replace(self, l1: array[int], batch: Batch, sharers: int) -> None:
        """Copy those tables of a batch that changed; `sharers` L1 tables refer to the copy instead."""
        size = self._size
        for at, (number, offset) in enumerate(zip(batch.numbers, batch.offsets, strict=True)):
            table = batch.changed(at * size, size)
            if table is None:
                continue
            first = self.space.take()
            self.counts.put(first, 1, sharers)
            for _ in range(sharers):
                self.counts.lower(offset // size)
            self._writer.put(first * size, table)
            copied = COPIED if sharers == 1 else 0
            l1[number] = l1[number] & ~(OFFSET_MASK | COPIED) | first * size | copied

    def set_active_l1(self, l1: array[int]) -> None:
        """Make `l1` the active L1 table. One that is the same already stays where it is."""
        old = self.active_l1()
        if l1 == old:
            return
        self.give_up(self.header.l1_table_offset, 8 * self.header.l1_size)
        self.set(l1_table_offset=self.place(big_endian(l1)), l1_size=len(l1))

    def set(self, **fields: int) -> None:
        """Header fields that `commit` is going to change."""
        self._fields.update(fields)

    # -- the switch

    def commit(self, *, give_back: bool = False) -> None:
        """Make it true and durable. `give_back`: the space of what became free goes back to the host."""
        old = self.header.refcount_table_offset // self._size, self.header.refcount_table_clusters
        first, clusters = self.counts.settle(old)
        self.set(refcount_table_offset=first * self._size, refcount_table_clusters=clusters)
        self._writer.flush()
        self.counts.write()
        self._file.flush()
        self._switch()
        if give_back:
            for start, count in self.counts.freed:
                self._file.discard(start * self._size, count * self._size)

    def _switch(self) -> None:
        head = self._file.read(0, _SWITCH)
        for name, value in self._fields.items():
            at = Header.offset_of(name)
            head[at : at + _WIDTHS[name]] = value.to_bytes(_WIDTHS[name], "big")
        self._switching = True
        self._file.write(head, 0)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._switching:
            self._take_back()

    def _take_back(self) -> None:
        """Nothing refers to what was written: where the file has grown, give the space back."""
        file = self._file
        try:
            if not file.fixed_size and file.size > self._before:
                file.resize(self._before)
        except QimgError:
            pass  # the failure that led here is the one to tell
