"""Images made of compressed chunks: decoded chunks that several readers want, kept within a bound.

A chunk is often larger than what one worker reads, so that several ask for the same one at the same time:
one of them decodes it, the others wait. What cannot be decoded is remembered too, for whoever salvages a
damaged disk comes back for every sector of it.
"""

from __future__ import annotations

from _thread import allocate_lock

from qimg.errors import CorruptImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterator

    from qimg.storage.base import Storage

#: Bytes of decoded chunks that are kept: the largest chunk that any format allows, or many of the usual ones.
ROOM = 64 << 20
#: Chunks larger than this are decoded one at a time: memory stays bounded whatever the number of workers.
LARGE = 4 << 20
#: Damaged chunks that are remembered.
_FAILURES = 64
#: Compressed bytes read at once.
_PIECE = 1 << 20


class DecodedChunks:
    """Chunks by number. For several threads.

    ``decode(number, buffer)`` fills the buffer with chunk `number`; raises CorruptImage where it is damaged.
    """

    def __init__(self, decode: Callable[[int, memoryview], None], room: int = ROOM) -> None:
        self._decode = decode
        self._room = room
        self._changing = allocate_lock()
        self._large = allocate_lock()
        self._kept: dict[int, memoryview] = {}
        self._used = 0
        self._failed: dict[int, CorruptImage] = {}
        self._under_way: dict[int, LockType] = {}

    def get(self, number: int, size: int) -> memoryview:
        """The `size` bytes of chunk `number`. Raises what `decode` raises."""
        while True:
            with self._changing:
                kept = self._kept.pop(number, None)
                if kept is not None:
                    self._kept[number] = kept  # the youngest now
                    return kept
                other = self._under_way.get(number)
                if other is None:
                    mine = self._under_way[number] = allocate_lock()
                    mine.acquire()
                    break
            with other:
                pass
        try:
            data = self._decoded(number, size)
            with self._changing:
                self._make_room(size)
                self._kept[number] = data
                self._used += size
            return data
        finally:
            with self._changing:
                del self._under_way[number]
            mine.release()

    def fill(self, number: int, view: memoryview) -> None:
        """Decode the whole of chunk `number` into `view`, which nobody else is likely to want."""
        with self._changing:
            kept = self._kept.get(number)
        if kept is not None:
            view[:] = kept
        else:
            self._guarded(number, view)

    def _decoded(self, number: int, size: int) -> memoryview:
        if size <= LARGE:
            data = memoryview(bytearray(size))
            self._guarded(number, data)
            return data
        with self._large:
            with self._changing:
                self._make_room(size)
            data = memoryview(bytearray(size))
            self._guarded(number, data)
            return data

    def _guarded(self, number: int, view: memoryview) -> None:
        with self._changing:
            known = self._failed.get(number)
        if known is not None:
            raise known.with_traceback(None)
        try:
            self._decode(number, view)
        except CorruptImage as error:
            with self._changing:
                if len(self._failed) >= _FAILURES:
                    del self._failed[next(iter(self._failed))]
                self._failed[number] = error
            raise

    def _make_room(self, size: int) -> None:
        while self._kept and self._used + size > self._room:
            self._used -= len(self._kept.pop(next(iter(self._kept))))


def pieces(file: Storage, offset: int, length: int) -> Iterator[bytearray]:
    """``offset .. offset + length`` of `file` in pieces of bounded size."""
    end = offset + length
    while offset < end:
        step = min(_PIECE, end - offset)
        yield file.read(offset, step)
        offset += step
