"""Reading reference counts of an image (qcow2 sheet, section 4)."""

from __future__ import annotations

from struct import unpack

from qimg.errors import CorruptImage
from qimg.formats.qcow2.structs import REFTABLE_OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage

_CHUNK = 64 << 10
_ZEROS = bytes(_CHUNK)
#: The real program reads nothing past it.
_MAX_OFFSET = (1 << 63) - (1 << 30)
_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class UnreadableBlock(CorruptImage):
    """A refcount block that cannot be where the table says: `unaligned`, or past the end of any file."""

    def __init__(self, message: str, *, unaligned: bool) -> None:
        super().__init__(message)
        self.unaligned = unaligned


class StoredCounts:
    """The refcount table and its blocks. The table (at most 8 MiB) is read on first use."""

    def __init__(self, file: Storage, header: ParsedHeader) -> None:
        self._file = file
        self._cluster_size = header.cluster_size
        self._offset = header.header.refcount_table_offset
        self._length = header.header.refcount_table_clusters * header.cluster_size
        self._width = 1 << header.header.refcount_order
        #: Counters of one block.
        self.per_block = header.cluster_size * 8 // self._width
        self._read: bytearray | None = None
        self._last: tuple[int, bytearray | None] | None = None  # block read last

    @property
    def _table(self) -> bytearray:
        if self._read is None:
            self._read = self._file.read(self._offset, self._length)
        return self._read

    def entries(self) -> Iterator[tuple[int, int]]:
        """(index, entry) of every entry of the table that is not 0."""
        table = memoryview(self._table)
        for at in range(0, len(table), _CHUNK):
            raw = table[at : at + _CHUNK]
            if _ZEROS.startswith(raw):
                continue
            for number, word in enumerate(unpack(f">{len(raw) // 8}Q", raw)):
                if word:
                    yield at // 8 + number, word

    def raw(self, start: int, stop: int) -> bytearray | None:
        """The counters of the clusters ``start .. stop`` as stored; they must be those of one block, from
        its first on. None: there is no block, all are 0. Raises UnreadableBlock."""
        offset = self._block(start // self.per_block)
        if offset == 0:
            return None
        return self._file.read(offset, ((stop - start) * self._width + 7) // 8)

    def place(self, start: int) -> int:
        """Host offset of the block whose first cluster is `start`. Raises UnreadableBlock."""
        return self._block(start // self.per_block)

    def forget(self) -> None:
        """A block was written: what was read of it no longer holds."""
        self._last = None

    def _block(self, index: int) -> int:
        if index * 8 >= len(self._table):
            return 0
        offset = int.from_bytes(self._table[index * 8 : index * 8 + 8], "big") & REFTABLE_OFFSET_MASK
        if offset % self._cluster_size:
            where = f"{index:#x}" if index else "0"
            text = f"Refblock offset {offset:#x} unaligned (reftable index: {where})"
            raise UnreadableBlock(text, unaligned=True)
        if offset > _MAX_OFFSET - self._cluster_size:
            raise UnreadableBlock(f"Refblock offset {offset:#x} too large", unaligned=False)
        return offset

    def get(self, cluster: int) -> int:
        """The stored count of one cluster. Raises UnreadableBlock."""
        index, slot = divmod(cluster, self.per_block)
        if self._last is None or self._last[0] != index:
            offset = self._block(index)
            self._last = index, self._file.read(offset, self._cluster_size) if offset else None
        block = self._last[1]
        if block is None:
            return 0
        width = self._width
        if width >= 8:
            return int.from_bytes(block[slot * width // 8 : (slot + 1) * width // 8], "big")
        return block[slot * width // 8] >> slot * width % 8 & (1 << width) - 1


def counters(raw: bytes | bytearray, width: int, count: int) -> Sequence[int]:
    """The first `count` counters of `width` bits of a refcount block."""
    if width >= 8:
        return unpack(f">{count}{_CODES[width]}", raw[: count * width // 8])
    mask = (1 << width) - 1
    found = [byte >> shift & mask for byte in raw for shift in range(0, 8, width)]
    return found[:count]


def counted(block: bytes | bytearray, bits: int) -> int:
    """How many of the counters of `bits` width in `block` are not 0."""
    if bits >= 16:
        code = _CODES[bits]
        count = len(block) * 8 // bits
        return count - unpack(f">{count}{code}", block).count(0)
    if bits == 1:
        return int.from_bytes(block, "little").bit_count()
    mask = (1 << bits) - 1
    table = bytes(sum(1 for shift in range(0, 8, bits) if byte >> shift & mask) for byte in range(256))
    return sum(block.translate(table))


def has_unwritten_clusters(file: Storage, header: ParsedHeader) -> bool:
    """Whether clearly more clusters are in use than the file has space for, as after
    ``preallocation=metadata``: at least 10/9 as many, and two more (sheet, section 20)."""
    size = header.cluster_size
    space = file.allocated_bytes()
    if space is None:
        return False
    allocated = space // size
    wanted = max(allocated * 10 // 9, allocated + 2)
    total = -(-file.size // size)
    if total < wanted:
        return False
    stored = StoredCounts(file, header)
    found = 0
    for index, _word in stored.entries():
        start = index * stored.per_block
        if start >= total:
            break
        try:
            raw = stored.raw(start, min(start + stored.per_block, total))
        except UnreadableBlock:
            return False
        if raw is not None:
            found += counted(raw, 1 << header.header.refcount_order)
        if found >= wanted:
            return True
    return False
