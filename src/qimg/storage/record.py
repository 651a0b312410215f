"""A filter that remembers every change and every barrier, so that a test can look at any moment between.

``replay(n)`` is the place after the first n events; ``lost`` leaves out changes that no barrier had made
durable yet, as a power cut may. Several records can share a clock, for jobs that change several files.
"""

from __future__ import annotations

from _thread import allocate_lock
from collections import namedtuple

from qimg.storage.base import Filter, Storage
from qimg.storage.memory import MemoryStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import NamedTuple

    from qimg.storage.base import Bytes

WRITE, ZERO, DISCARD, RESIZE, FLUSH = "write", "zero", "discard", "resize", "flush"

if TYPE_CHECKING:

    class Event(NamedTuple):
        """One change: `kind`, byte `offset` (the new length of a resize), `length`, `data` of a write."""

        kind: str
        offset: int
        length: int
        data: bytes

else:
    Event = namedtuple("Event", ("kind", "offset", "length", "data"))


class RecordStorage(Filter):
    """Passes everything on to `child` and appends what succeeded to `events`. Offload copies are refused."""

    def __init__(self, child: Storage, clock: list[tuple[RecordStorage, Event]] | None = None) -> None:
        """The content that `child` has now (`base`) is what `replay` starts from. `clock` gets every event
        too; several places that are given the same list have their events there in order."""
        super().__init__(child)
        self.base = bytes(child.read(0, child.size))
        self._recording = allocate_lock()
        self._clock = clock
        self.events: list[Event] = []

    def _record(self, kind: str, offset: int, length: int, data: bytes = b"") -> None:
        event = Event(kind, offset, length, data)
        with self._recording:
            self.events.append(event)
            if self._clock is not None:
                self._clock.append((self, event))

    def write(self, buf: Bytes, offset: int) -> None:
        data = bytes(buf)
        super().write(data, offset)
        self._record(WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        super().zero(offset, length, unmap)
        self._record(ZERO, offset, length)

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, length)
        self._record(DISCARD, offset, length)

    def resize(self, size: int, preallocation: str = "off") -> None:
        super().resize(size, preallocation)
        self._record(RESIZE, size, 0)

    def flush(self) -> None:
        super().flush()
        self._record(FLUSH, 0, 0)

    def barriers(self) -> list[int]:
        """Numbers of the events that are barriers."""
        return [number for number, event in enumerate(self.events) if event.kind == FLUSH]

    def unsafe(self, prefix: int) -> list[int]:
        """Numbers of the changes among the first `prefix` events that came after the last barrier."""
        numbers: list[int] = []
        for number, event in enumerate(self.events[:prefix]):
            numbers = [] if event.kind == FLUSH else [*numbers, number]
        return numbers

    def replay(self, prefix: int | None = None, lost: Collection[int] = ()) -> MemoryStorage:
        """The place after the first `prefix` events (None: all), without those numbered in `lost`. What was
        discarded reads as zeros."""
        place = MemoryStorage(self.base, size=len(self.base), name=self.name)
        for number, event in enumerate(self.events[:prefix]):
            if number in lost or event.kind == FLUSH:
                continue
            if event.kind == WRITE:
                place.write(event.data, event.offset)
            elif event.kind == ZERO:
                place.zero(event.offset, event.length)
            elif event.kind == DISCARD:
                place.discard(event.offset, event.length)
            else:
                place.resize(event.offset)
        return place
