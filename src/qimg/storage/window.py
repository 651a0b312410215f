"""A window: part of another storage as a storage of its own."""

from __future__ import annotations

import errno
import os

from qimg.errors import NotSupported, StorageError
from qimg.storage.base import Filter, Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.extent import Extent
    from qimg.storage.base import Buffer, Bytes


class Window(Filter):
    """The bytes ``start .. start + length`` of `child`, addressed from 0 on; it closes `child`.

    `length` None: up to the child's end, wherever that is, and the window can grow and shrink with it.
    Otherwise the length is fixed, and writing past it is an error.
    """

    def __init__(self, child: Storage, start: int, length: int | None = None) -> None:
        super().__init__(child)
        self.start = start
        self._length = length
        if length is not None:
            self.fixed_size = True

    @property
    def size(self) -> int:
        if self._length is not None:
            return self._length
        return max(0, self.child.size - self.start)

    def _bound(self, offset: int, length: int) -> int:
        """`offset` in the child. Raises StorageError for what reaches past a fixed end."""
        if self._length is not None and offset + length > self._length:
            number = errno.ENOSPC
            raise StorageError(os.strerror(number), errno=number, offset=offset)
        return self.start + offset

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        inside = max(0, min(len(view), self.size - offset))
        if inside:
            self.child.read_into(view[:inside], self.start + offset)
        view[inside:] = bytes(len(view) - inside)

    def write(self, buf: Bytes, offset: int) -> None:
        self.child.write(buf, self._bound(offset, len(buf)))

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self.child.zero(self._bound(offset, length), length, unmap)

    def discard(self, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        if length > 0:
            self.child.discard(self.start + offset, length)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        from qimg.extent import ZERO, Extent

        inside = max(0, min(length, self.size - start))
        if inside:
            for extent in self.child.extents(self.start + start, inside):
                at = extent.start - self.start
                yield extent._replace(start=at, host=at, source=self)
        if inside < length:
            yield Extent(start + inside, length - inside, ZERO, 0, start + inside, self)

    def resize(self, size: int, preallocation: str = "off") -> None:
        if self._length is not None:
            if size > self._length:
                raise NotSupported("Cannot resize a window of fixed size")
            return
        self.child.resize(self.start + size, preallocation)
