"""Building big tables."""

from __future__ import annotations

from array import array

from qimg.vec.door import np


def arithmetic(first: int, count: int, step: int) -> array[int]:
    """``first, first + step, ...``, `count` words of 64 bits; the same as `entries.arithmetic`."""
    words = array("Q", bytes(8 * count))
    view = np.frombuffer(words, dtype=np.uint64)
    view[:] = np.arange(count, dtype=np.uint64)
    view *= np.uint64(step)
    view += np.uint64(first)
    return words
