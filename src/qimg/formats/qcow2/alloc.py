"""Which host clusters are in use: the part of the writer that hands them out.

Fresh images are filled front to back, so an allocation is a step of one pointer (`end`). Clusters that
were given up on the way (a refcount table that had to move, a compressed cluster that was overwritten)
are kept in `free` and serve requests for single clusters.
"""

from __future__ import annotations

from qimg.errors import StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Bytes, Storage

#: Writes of at most this many bytes are joined when they follow each other.
BATCH = 1 << 20


class HostSpace:
    """Hands out host clusters of one file. Units: clusters, unless a name says bytes.

    end    the first cluster never handed out.
    limit  clusters that the image's refcount table can describe at most.
    free   clusters below `end` that are not in use.
    """

    def __init__(self, end: int, limit: int) -> None:
        self.end = end
        self.limit = limit
        self.free: list[int] = []

    def take(self, count: int) -> int:
        """The first of `count` neighbouring clusters. Raises StorageError (EFBIG)."""
        first = self.end
        if count > self.limit - first:
            raise file_too_large()
        self.end = first + count
        return first

    def take_any(self, count: int) -> list[int]:
        """`count` clusters, wherever they are: those that became free first."""
        reused = self.free[:count]
        del self.free[:count]
        fresh = self.take(count - len(reused)) if count > len(reused) else 0
        return reused + list(range(fresh, fresh + count - len(reused)))


def file_too_large() -> StorageError:
    """What writers raise where host offsets or the refcount table come to their end (section 10)."""
    import errno

    return StorageError("File too large", errno=errno.EFBIG)


class BatchWriter:
    """Joins writes that follow each other into larger ones. Nothing is written before BATCH bytes are
    together, a gap appears or `flush` is called."""

    def __init__(self, file: Storage) -> None:
        self._file = file
        self._start = 0
        self._pending = bytearray()

    def put(self, offset: int, data: Bytes) -> None:
        """Write `data` at byte `offset`, sooner or later. Raises StorageError."""
        if offset != self._start + len(self._pending) or not self._pending:
            self.flush()
            self._start = offset
        self._pending += data
        if len(self._pending) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Raises StorageError."""
        if not self._pending:
            return
        pending, self._pending = self._pending, bytearray()
        self._file.write(pending, self._start)
        self._start += len(pending)

    def pad(self, unit: int) -> None:
        """Fill up what is pending with zeros to a multiple of `unit` bytes in the file, and write it."""
        if self._pending:
            self._pending += bytes(-(self._start + len(self._pending)) % unit)
        self.flush()
