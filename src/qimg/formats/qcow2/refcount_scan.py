"""Reading reference counts of an image (qcow2 sheet, section 4)."""

from __future__ import annotations

from struct import unpack

from qimg.formats.qcow2.structs import REFTABLE_OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage

_CHUNK = 64 << 10
_ZEROS = bytes(_CHUNK)
_CODES = {16: "H", 32: "I", 64: "Q"}


def refcount_table(file: Storage, header: ParsedHeader) -> Iterator[tuple[int, int]]:
    """(index, entry) of every entry of the refcount table that is not 0. The table is at most 8 MiB."""
    start = header.header.refcount_table_offset
    length = header.header.refcount_table_clusters * header.cluster_size
    for at in range(0, length, _CHUNK):
        raw = file.read(start + at, min(_CHUNK, length - at))
        if _ZEROS.startswith(raw):
            continue
        for number, word in enumerate(unpack(f">{len(raw) // 8}Q", raw)):
            if word:
                yield at // 8 + number, word


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
    bits = 1 << header.header.refcount_order
    per_block = size * 8 // bits
    found = 0
    for index, word in refcount_table(file, header):
        left = total - index * per_block
        if left <= 0:
            break
        offset = word & REFTABLE_OFFSET_MASK
        if offset % size:
            return False
        length = size if left >= per_block else -(-left * bits // 64) * 8
        found += counted(file.read(offset, min(length, size)), bits)
        if found >= wanted:
            return True
    return False
