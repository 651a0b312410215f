"""The node ``preallocate``: a file grows in big steps, for file systems where growing is dear.

What was prepared and not used is given back when the node is closed (protocols sheet 2).
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

from _thread import allocate_lock

from qimg.errors import NotSupported, OptionError, StorageError
from qimg.extent import ZERO, Extent
from qimg.options import SIZE, Option
from qimg.storage.base import Filter
from qimg.units import MIB, SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Bytes, Storage

_ALIGN = MIB
_SIZE = 128 * MIB


class Preallocate(Filter):
    """Gives `child` `step` bytes more than it needs, up to a multiple of `align`, when a write would make it
    grow."""

    driver = "preallocate"
    children: ClassVar[tuple[str, ...]] = ("file",)
    identity: ClassVar[tuple[str, ...]] = ("driver",)
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("prealloc-align", SIZE, _ALIGN, "What the length is a multiple of"),
        Option("prealloc-size", SIZE, _SIZE, "How much is prepared at once"),
    )
    named = False

    def __init__(self, child: Storage, align: int, step: int) -> None:
        super().__init__(child)
        self._align = align
        self._step = step
        self._growing = allocate_lock()
        self._end = child.size
        self._prepared = self._end

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        """Raises OptionError."""
        align = int(values.get("prealloc-align", _ALIGN))
        if align < 1 or align % SECTOR:
            message = f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR}"
            raise OptionError(message, option="prealloc-align")
        return cls(children["file"], align, int(values.get("prealloc-size", _SIZE)))

    @property
    def size(self) -> int:
        return self._end

    def _reach(self, end: int) -> None:
        """Have room up to `end`."""
        with self._growing:
            if end > self._prepared and not self.child.fixed_size:
                prepared = round_up(end + self._step, self._align)
                try:
                    self.child.resize(prepared, "falloc")
                except (NotSupported, StorageError):
                    prepared = end  # the request itself will tell what is wrong
                self._prepared = prepared
            self._end = max(self._end, end)

    def write(self, buf: Bytes, offset: int) -> None:
        self._reach(offset + len(buf))
        super().write(buf, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._reach(offset + length)
        super().zero(offset, length, unmap)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        inside = max(0, min(length, self._end - start))
        if inside:
            yield from super().extents(start, inside)
        if inside < length:
            yield Extent(start + inside, length - inside, ZERO, 0, start + inside, self)

    def resize(self, size: int, preallocation: str = "off") -> None:
        with self._growing:
            super().resize(size, preallocation)
            self._end = self._prepared = size

    def close(self) -> None:
        if self._prepared > self._end:
            try:
                self.child.resize(self._end)
            except (NotSupported, StorageError):
                pass  # a file that is too long reads the same
        super().close()
