"""Bytes in memory: for tests, and for callers of the library that have no file."""

from __future__ import annotations

from _thread import allocate_lock

from qimg.errors import NotSupported, OptionError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.storage.base import Limits, Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes


class MemoryStorage(Storage):
    """Sparse: blocks never written to take no memory and are holes.

    `block` is the unit of holes in bytes. With ``holes=False`` everything below `size` is reported as data.
    """

    driver = "memory"
    can_create = True
    zero_init = True

    def __init__(
        self,
        content: Bytes = b"",
        *,
        size: int | None = None,
        name: str = "memory",
        block: int = 65536,
        holes: bool = True,
        writable: bool = True,
    ) -> None:
        """Start with `content`, then zeros up to `size`."""
        self.name = name
        self.writable = writable
        self.limits = Limits()
        self.flushes = 0
        self._block = block
        self._holes = holes
        self._blocks: dict[int, bytearray] = {}
        self._size = 0
        self._changing = allocate_lock()
        if content:
            self.write(content, 0)
        if size is not None:
            self._size = max(size, self._size)

    @property
    def size(self) -> int:
        return self._size

    def content(self) -> bytes:
        """Everything, as one string."""
        return bytes(self.read(0, self._size))

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(block number, offset in it, offset in the request, length) of every block touched."""
        done = 0
        while done < length:
            number, inner = divmod(offset + done, self._block)
            step = min(self._block - inner, length - done)
            yield number, inner, done, step
            done += step

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        for number, inner, done, step in self._pieces(offset, len(view)):
            block = self._blocks.get(number)
            view[done : done + step] = bytes(step) if block is None else block[inner : inner + step]

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf)
        with self._changing:
            for number, inner, done, step in self._pieces(offset, len(view)):
                block = self._blocks.setdefault(number, bytearray(self._block))
                block[inner : inner + step] = view[done : done + step]
            if view:
                self._size = max(self._size, offset + len(view))

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if length <= 0:
            return
        with self._changing:
            self._clear(offset, length, unmap)
            self._size = max(self._size, offset + length)

    def _clear(self, offset: int, length: int, unmap: bool) -> None:
        """Zero a range; only blocks that exist are visited."""
        first, last = offset // self._block, (offset + length - 1) // self._block
        touched = [number for number in self._blocks if first <= number <= last]
        for number in touched:
            low = max(offset - number * self._block, 0)
            high = min(offset + length - number * self._block, self._block)
            if unmap and high - low == self._block:
                del self._blocks[number]
            else:
                self._blocks[number][low:high] = bytes(high - low)

    def discard(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if length > 0:
            self.zero(offset, length)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = min(end, self._size)
        first, last = start // self._block, (inside - 1) // self._block
        if self._holes:
            present = sorted(number for number in list(self._blocks) if first <= number <= last)
            for number in present:
                low = max(number * self._block, start)
                high = min((number + 1) * self._block, inside)
                if low > start:
                    yield Extent(start, low - start, ZERO, 0, start, self)
                yield Extent(low, high - low, MAPPED, 0, low, self)
                start = high
        elif inside > start:
            yield Extent(start, inside - start, MAPPED, 0, start, self)
            start = inside
        if start < end:
            yield Extent(start, end - start, ZERO, 0, start, self)

    def copy_from(self, source: Storage, source_offset: int, offset: int, length: int) -> None:
        if not isinstance(source, MemoryStorage):
            raise NotSupported("copy offload")
        self.write(source.read(source_offset, length), offset)

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation == "metadata":
            raise OptionError("Unsupported preallocation mode: metadata", option="preallocation")
        if preallocation not in ("off", "falloc", "full"):
            raise OptionError(f"invalid parameter value: {preallocation}", option="preallocation")
        if preallocation != "off" and size < self._size:
            raise NotSupported("Cannot use preallocation for shrinking files")
        with self._changing:
            if size < self._size:
                self._clear(size, self._size - size, unmap=True)
            elif preallocation == "full":
                for number, *_ in self._pieces(self._size, size - self._size):
                    self._blocks.setdefault(number, bytearray(self._block))
            self._size = size

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        self.resize(0)

    def flush(self) -> None:
        self.flushes += 1

    def allocated_bytes(self) -> int | None:
        return len(self._blocks) * self._block
