"""Reference counts of an image being written (sheet, sections 4 and 13).

Every host cluster below the end of the file counts 1, and only what differs is kept: compressed
clusters that share a host cluster, and clusters that were given up. Blocks with such counts are arrays
while they change; complete ones are written when all together take more than OPEN_LIMIT bytes. All
other blocks are made at `store`, from one pattern.
"""

from __future__ import annotations

import sys
from array import array

from qimg.formats.qcow2.alloc import BatchWriter, HostSpace, file_too_large
from qimg.formats.qcow2.structs import MAX_REFCOUNT_TABLE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Storage

OPEN_LIMIT = 4 << 20

_WIDE = {8: "B", 16: "H", 32: "I", 64: "Q"}


def pack_counts(bits: int, counts: array[int]) -> bytes:
    """Counters of `bits` width as a block stores them: big-endian, below 8 bits from the low end up."""
    if bits > 8:
        return big_endian(counts)
    if bits == 8:
        return counts.tobytes()
    raw = counts.tobytes()
    share = 8 // bits
    packed = 0
    for position in range(share):
        packed |= int.from_bytes(raw[position::share], "little") << (bits * position)
    return packed.to_bytes(len(raw) // share, "little")


def unpack_counts(bits: int, block: bytes | bytearray) -> array[int]:
    """The counters of a block: the reverse of `pack_counts`."""
    if bits >= 8:
        counts = array(_WIDE[bits], bytes(block))
        if sys.byteorder == "little":
            counts.byteswap()
        return counts
    share = 8 // bits
    mask = (1 << bits) - 1
    counts = array("B", bytes(len(block) * share))
    for position in range(share):
        shifted = bytes(byte >> (bits * position) & mask for byte in range(256))
        counts[position::share] = array("B", bytes(block).translate(shifted))
    return counts


def big_endian(values: array[int]) -> bytes:
    """The bytes of `values` in the order in which qcow2 stores integers."""
    if sys.byteorder == "little":
        values = values[:]
        values.byteswap()
    return values.tobytes()


class Refcounts:
    """The counts of one image, its refcount blocks and its refcount table. Clusters, unless said."""

    def __init__(self, file: Storage, space: HostSpace, cluster_size: int, bits: int) -> None:
        """A fresh image: the table in cluster 1, the first block in cluster 2."""
        self._file = file
        self._space = space
        self._cluster_size = cluster_size
        self._bits = bits
        self.maximum = (1 << bits) - 1
        self.per_block = counters_per_block(cluster_size, bits)
        self._typecode = _WIDE[max(8, bits)]
        self._item_size = max(8, bits) // 8
        self.table_offset = cluster_size
        self.table_clusters = 1
        #: Host offset of every block in bytes, 0 where it has no place yet.
        self._table = array("Q", [2 * cluster_size])
        self._open: dict[int, array[int]] = {}
        self._written: set[int] = set()

    # -- counts

    def get(self, cluster: int) -> int:
        """The count of host cluster `cluster`."""
        block, slot = divmod(cluster, self.per_block)
        if block in self._open or block in self._written:
            return self._block(block)[slot]
        return 1

    def set(self, cluster: int, count: int) -> None:
        """Give host cluster `cluster` this count."""
        block, slot = divmod(cluster, self.per_block)
        self._block(block)[slot] = count

    def release(self, first: int, count: int) -> None:
        """Clusters that nothing refers to any more."""
        for cluster in range(first, first + count):
            self.set(cluster, 0)
            self._space.free.append(cluster)

    def take_any(self, count: int) -> list[int]:
        """`count` single clusters, with a count of 1 each."""
        taken = self._space.take_any(count)
        for cluster in taken:
            if cluster // self.per_block in self._open or cluster // self.per_block in self._written:
                self.set(cluster, 1)
        return taken

    def _block(self, block: int) -> array[int]:
        counts = self._open.get(block)
        if counts is None:
            if block in self._written:
                raw = self._file.read(self._table[block], self._cluster_size)
                counts = unpack_counts(self._bits, raw)
                self._written.discard(block)
            else:
                counts = self._ones()
            self._open[block] = counts
        return counts

    def settle(self) -> None:
        """Write the blocks that the end of the file has passed, once they take much memory."""
        if len(self._open) * self.per_block * self._item_size <= OPEN_LIMIT:
            return
        complete = sorted(block for block in self._open if (block + 1) * self.per_block <= self._space.end)
        if not complete:
            return
        self._grow_table(complete[-1] + 1)
        homeless = [block for block in complete if not self._table[block]]
        self._give_places(homeless)
        writer = BatchWriter(self._file)
        for block in complete:
            # A place taken just now may lie in a block of this list: pack only after all are taken.
            writer.put(self._table[block], pack_counts(self._bits, self._open.pop(block)))
            self._written.add(block)
        writer.flush()

    def _give_places(self, blocks: list[int]) -> None:
        for block, cluster in zip(blocks, self.take_any(len(blocks)), strict=True):
            self._table[block] = cluster * self._cluster_size

    def _grow_table(self, blocks: int) -> None:
        if blocks > len(self._table):
            self._table.extend(array("Q", bytes(8 * (blocks - len(self._table)))))

    # -- writing

    def place(self) -> None:
        """Find room for every block and for the table. They lie in clusters that they count themselves:
        a fixed point. No cluster may be taken after this. Raises StorageError (EFBIG)."""
        space = self._space
        placed = len(self._table) - self._table.count(0)
        total = space.end
        while True:
            blocks = -(-total // self.per_block)
            table = -(-8 * blocks // self._cluster_size)
            moves = table > self.table_clusters
            spare = len(space.free) + (self.table_clusters if moves else 0)
            needed = space.end + max(0, blocks - placed - spare) + (table if moves else 0)
            if needed <= total:
                break
            total = needed
        if table * self._cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise file_too_large()
        if moves:
            old = self.table_offset // self._cluster_size
            self.table_offset = space.take(table) * self._cluster_size
            self.release(old, self.table_clusters)
            self.table_clusters = table
        self._grow_table(blocks)
        self._give_places([block for block in range(blocks) if not self._table[block]])

    def store(self) -> None:
        """Write the blocks that changed, and the table, to where `place` put them."""
        writer = BatchWriter(self._file)
        end = self._space.end
        ones = b""
        for block, offset in enumerate(self._table):
            if block in self._written:
                continue
            if (block + 1) * self.per_block > end:
                writer.put(offset, pack_counts(self._bits, self._cut(block)))
                continue
            self._written.add(block)
            counts = self._open.pop(block, None)
            if counts is None:
                ones = ones or pack_counts(self._bits, self._ones())
            writer.put(offset, ones if counts is None else pack_counts(self._bits, counts))
        writer.flush()
        table = big_endian(self._table)
        self._file.write(table.ljust(self.table_clusters * self._cluster_size, b"\0"), self.table_offset)

    def _ones(self) -> array[int]:
        return array(self._typecode, [1]) * self.per_block

    def _cut(self, block: int) -> array[int]:
        """The counters of the last block, with zeros for what lies past the end of the file."""
        used = max(0, self._space.end - block * self.per_block)
        counts = self._open[block][:used] if block in self._open else array(self._typecode, [1]) * used
        return counts + array(self._typecode, bytes(self._item_size * (self.per_block - used)))


def counters_per_block(cluster_size: int, bits: int) -> int:
    """Clusters that one refcount block describes (section 4)."""
    return cluster_size * 8 // bits


def most_clusters(cluster_size: int, bits: int) -> int:
    """Host clusters that a refcount table of the largest size describes (section 10); also keeps host
    offsets below 2^56."""
    by_table = MAX_REFCOUNT_TABLE_BYTES // 8 * counters_per_block(cluster_size, bits)
    return min(by_table, (1 << 56) // cluster_size)
