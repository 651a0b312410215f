"""Runs in tables with one word a block, found by numpy."""

from __future__ import annotations

from qimg.vec.door import np

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable


def runs(words: array[int], special: Iterable[int], compressed: int, step: int) -> list[int]:
    """Indices at which a new run begins, the first of which is 0.

    A run is made of equal `special` words, of words with the bits `compressed`, or of words that grow by
    `step` (0: such a word is a run of its own)."""
    if not len(words):
        return []
    table = np.frombuffer(words, dtype=np.uint32 if words.itemsize == 4 else np.uint64).astype(np.uint64)
    kind = np.zeros(len(table), dtype=np.uint8)
    for word in special:
        kind[table == word] = 1
    if compressed:
        kind[(kind == 0) & (table & np.uint64(compressed) != 0)] = 2
    before, after = kind[:-1], kind[1:]
    difference = table[1:] - table[:-1]
    joined = (before == after) & (
        (before == 2)
        | ((before == 1) & (difference == 0))
        | ((before == 0) & (difference == np.uint64(step)) & bool(step))
    )
    return [0, *(np.flatnonzero(~joined) + 1).tolist()]
