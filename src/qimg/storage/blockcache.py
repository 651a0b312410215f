"""Small reads of a far place out of blocks that are fetched whole and kept for a while."""

from __future__ import annotations

from _thread import allocate_lock

from qimg.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: All blocks together; at least so many blocks, whatever their size.
_MEMORY = 16 * MIB
_FEWEST = 4
#: Reading on and on fetches more and more blocks at once, up to this.
_MOST_AHEAD = 8


class BlockCache:
    """Blocks of `block` bytes, which ``fetch(view, offset)`` fills as far as the place goes. Several threads
    may read; fetching is one thread's at a time, for what it brings is often what the others want."""

    def __init__(self, fetch: Callable[[memoryview, int], int], block: int) -> None:
        self.block = block
        self._fetch = fetch
        self._capacity = max(_FEWEST, _MEMORY // block)
        self._most_ahead = max(1, min(_MOST_AHEAD, self._capacity // 2))
        # By block number, the least recently used first.
        self._blocks: dict[int, bytes] = {}
        self._lock = allocate_lock()
        self._ahead = 1
        self._expected = -1

    def start(self) -> None:
        """Fetch the first block, from a place whose size nobody knows yet."""
        with self._lock:
            self._load(0, 1)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`, which lies inside the place. Raises what `fetch` raises."""
        done = 0
        while done < len(view):
            number, skip = divmod(offset + done, self.block)
            block = self._get(number)
            step = min(len(block) - skip, len(view) - done)
            view[done : done + step] = memoryview(block)[skip : skip + step]
            done += step

    def _get(self, number: int) -> bytes:
        with self._lock:
            if number not in self._blocks:
                self._ahead = min(2 * self._ahead, self._most_ahead) if number == self._expected else 1
                self._load(number, self._ahead)
            found = self._blocks[number] = self._blocks.pop(number)
            return found

    def _load(self, number: int, count: int) -> None:
        """Fetch `count` blocks from `number` on, in place of those that nobody used for longest."""
        view = memoryview(bytearray(count * self.block))
        view = view[: self._fetch(view, number * self.block)]
        self._expected = number + count
        for index in range(count):
            self._blocks.pop(number + index, None)
            self._blocks[number + index] = bytes(view[index * self.block : (index + 1) * self.block])
        while len(self._blocks) > self._capacity:
            del self._blocks[next(iter(self._blocks))]
