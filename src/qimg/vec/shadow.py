"""Counts and COPIED bits of qcow2 tables in bulk: the fast twin of parts of `qimg.formats.qcow2.shadow_walk`.

It says nothing about damage: what it finds odd it hands back to the plain path, which has the words.
"""

from __future__ import annotations

from array import array

from qimg.vec.door import np

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from numpy.typing import NDArray

    Words = NDArray[np.uint64]
    Clusters = NDArray[np.int64]
    Counts = NDArray[Any]

_COPIED = np.uint64(1 << 63)
_COMPRESSED = np.uint64(1 << 62)
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_ONE = np.uint64(1)
_NINE = np.uint64(9)


def _words(raw: bytearray, extended: bool) -> Words:
    words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    return words[0::2] if extended else words


def references(raw: bytearray, *, extended: bool, cluster_bits: int, count_shift: int) -> Clusters | None:
    """Host clusters that the entries of the tables in `raw` refer to, ascending, each as often as it is
    referred to. None: an entry is damaged. `count_shift`: where a compressed descriptor's sectors begin."""
    words = _words(raw, extended)
    words = words[words != 0]
    compressed = (words & _COMPRESSED) != 0
    offset = words[~compressed] & _OFFSET
    offset = offset[offset != 0]
    if (offset & np.uint64((1 << cluster_bits) - 1)).any():
        return None
    bits = np.uint64(cluster_bits)
    parts = [(offset >> bits).astype(np.int64)]
    if compressed.any():
        parts += _compressed(words[compressed], bits, count_shift)
    clusters = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if (clusters[1:] < clusters[:-1]).any():
        clusters.sort()
    return clusters


def _compressed(words: Words, bits: np.uint64, count_shift: int) -> list[Clusters]:
    """First clusters of compressed data, and those behind that it reaches into."""
    begin = words & np.uint64((1 << count_shift) - 1)
    sectors = ((words >> np.uint64(count_shift)) & np.uint64((1 << (62 - count_shift)) - 1)) + _ONE
    end = ((begin >> _NINE) + sectors) << _NINE
    first, last = (begin >> bits).astype(np.int64), ((end - _ONE) >> bits).astype(np.int64)
    longest = int((last - first).max())
    return [first, *(first[first + more <= last] + more for more in range(1, longest + 1))]


def by_block(clusters: Clusters, per_block: int) -> Iterator[tuple[int, Clusters]]:
    """Ascending `clusters` cut by refcount block: (block, slots)."""
    if len(clusters) == 0:
        return
    blocks = clusters // per_block
    cuts = np.flatnonzero(blocks[1:] != blocks[:-1]) + 1
    for part in np.split(clusters, cuts):
        block = int(part[0]) // per_block
        yield block, part - block * per_block


def add(
    counts: array[int], slots: Clusters, delta: int, maximum: int
) -> tuple[int | None, list[tuple[int, int]]]:
    """Add `delta` (1 or -1) to the counts at the ascending `slots`, once for each time that a slot is there.

    Returns a slot whose count cannot change so (nothing is changed then), or None, and the runs of slots
    whose counts became 0."""
    values = np.frombuffer(counts, dtype=counts.typecode)
    if len(slots) > 1 and not (slots[1:] != slots[:-1]).all():
        slots, times = np.unique(slots, return_counts=True)
    else:
        times = np.ones(1, dtype=np.int64)
    now = values[slots]
    more = times.astype(np.uint64)
    wide = now.astype(np.uint64)
    limit = np.uint64(maximum)
    wrong = (more > limit) | (wide > limit - np.minimum(more, limit)) if delta > 0 else wide < more
    wrong |= wide == 0
    if wrong.any():
        return int(slots[int(np.argmax(wrong))]), []
    after = wide + more if delta > 0 else wide - more
    values[slots] = after.astype(values.dtype)
    return None, _runs(slots[after == 0])


def zero_slot(counts: array[int], slots: Clusters) -> int | None:
    """One of the `slots` at which a count is 0."""
    zero = np.flatnonzero(np.frombuffer(counts, dtype=counts.typecode)[slots] == 0)
    return int(slots[zero[0]]) if len(zero) else None


def _runs(slots: Clusters) -> list[tuple[int, int]]:
    if len(slots) == 0:
        return []
    cuts = np.flatnonzero(slots[1:] != slots[:-1] + 1) + 1
    first = slots[np.concatenate(([0], cuts))]
    last = slots[np.concatenate((cuts - 1, [len(slots) - 1]))]
    return list(zip(first.tolist(), (last + 1).tolist(), strict=True))


class Placed:
    """Entries with a cluster of their own: their `numbers` among all, the `clusters`, their COPIED bits."""

    def __init__(self, numbers: Clusters, clusters: Clusters, copied: NDArray[np.bool_]) -> None:
        self.numbers = numbers
        self.clusters = clusters
        self.copied = copied


def placed(raw: bytearray, *, extended: bool, cluster_bits: int) -> Placed | None:
    """Those of the tables in `raw`; None: one is damaged."""
    words = _words(raw, extended)
    numbers = np.flatnonzero(((words & _OFFSET) != 0) & ((words & _COMPRESSED) == 0))
    words = words[numbers]
    offset = words & _OFFSET
    if (offset & np.uint64((1 << cluster_bits) - 1)).any():
        return None
    clusters = (offset >> np.uint64(cluster_bits)).astype(np.int64)
    return Placed(numbers, clusters, (words & _COPIED) != 0)


def values(found: Placed, per_block: int, look: Callable[[int], array[int]]) -> Counts:
    """The count of each entry's cluster; `look` gives the counts of a refcount block."""
    result = np.zeros(len(found.clusters), dtype=np.uint64)
    order = np.argsort(found.clusters, kind="stable")
    at = 0
    for block, slots in by_block(found.clusters[order], per_block):
        counts = look(block)
        part = np.frombuffer(counts, dtype=counts.typecode)[slots]
        result[order[at : at + len(slots)]] = part
        at += len(slots)
    return result


def first_zero(found: Placed, counts: Counts) -> int | None:
    """A cluster whose count is 0."""
    zero = np.flatnonzero(counts == 0)
    return int(found.clusters[zero[0]]) if len(zero) else None


def mark(raw: bytearray, found: Placed, counts: Counts, *, extended: bool) -> bool:
    """Set COPIED in the tables in `raw` where the count is 1, and clear it elsewhere; whether any changes."""
    wrong = found.numbers[found.copied != (counts == 1)]
    if len(wrong) == 0:
        return False
    octets = np.frombuffer(raw, dtype=np.uint8)
    octets[wrong * (16 if extended else 8)] ^= np.uint8(0x80)
    return True
