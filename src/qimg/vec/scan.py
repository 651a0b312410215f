"""Finding zeros in a buffer.

Needs no numpy: ``bytes.startswith`` compares a memoryview in place at the speed of memcmp and gives up
at the first byte of data, which beats a vector scan that has to look at all of it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Bytes

_ZEROS = bytes(1 << 16)


def is_zero(data: Bytes) -> bool:
    """Whether every byte is zero (an empty buffer is)."""
    view = memoryview(data)
    if len(view) <= len(_ZEROS):
        return _ZEROS.startswith(view)
    step = len(_ZEROS)
    return all(_ZEROS.startswith(view[at : at + step]) for at in range(0, len(view), step))


def data_runs(data: Bytes, block: int, first: int | None = None) -> list[tuple[int, int]]:
    """(offset, length) of every maximal run of blocks that hold a byte other than zero, ascending.

    Blocks are `block` bytes, only the first is `first` bytes (so that blocks can be aligned to something
    outside the buffer) and the last may be cut short.
    """
    view = memoryview(data).cast("B")
    size = len(view)
    runs: list[tuple[int, int]] = []
    begin = -1  # of the run of data that is open, -1: none
    at = 0
    end = block if first is None else first
    startswith = _ZEROS.startswith
    stride = len(_ZEROS) // block * block  # most that one comparison can take
    while at < size:
        if begin >= 0 and view[at]:  # one byte settles most blocks of real data
            at = end
            end = at + block
            continue
        if begin < 0 and stride and startswith(view[at : end + stride - block]):
            at = end + stride - block  # zeros: a long stride costs little more than one block
        else:
            part = view[at:end]
            zero = startswith(part) if stride else is_zero(part)
            if zero and begin >= 0:
                runs.append((begin, at - begin))
                begin = -1
            elif not zero and begin < 0:
                begin = at
            at = end
        end = at + block
    if begin >= 0:
        runs.append((begin, size - begin))
    return runs
