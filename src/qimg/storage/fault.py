"""A filter that makes requests fail on purpose, for tests of what an interruption leaves behind."""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from qimg.errors import StorageError
from qimg.storage.base import Filter, Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qimg.extent import Extent
    from qimg.storage.base import Buffer, Bytes

READ, WRITE, ZERO, FLUSH, RESIZE, EXTENTS, DISCARD = (
    "read",
    "write",
    "zero",
    "flush",
    "resize",
    "extents",
    "discard",
)
#: Everything that changes the place or makes changes durable.
CHANGE = "change"

_LETTERS = {"r": READ, "w": WRITE, "z": ZERO, "f": FLUSH, "t": RESIZE, "c": CHANGE}
_CHANGES = (WRITE, ZERO, FLUSH, RESIZE, DISCARD)
_SECTOR = 512


class Rule:
    """The `nth` request of a kind (from 1 on) fails with `errno`.

    operation   read, write, zero, flush, resize, extents, discard; or ``change`` for all that writes.
    power_cut   every later request fails too, whatever its kind.
    torn        a failing write still puts the sectors of its first half in place (a disk writes single
                sectors whole).
    """

    __slots__ = ("errno", "nth", "operation", "power_cut", "torn")

    def __init__(
        self,
        operation: str,
        nth: int,
        errno: int = errno.EIO,
        *,
        power_cut: bool = False,
        torn: bool = False,
    ) -> None:
        self.operation = operation
        self.nth = nth
        self.errno = errno
        self.power_cut = power_cut
        self.torn = torn

    @classmethod
    def parse(cls, script: str) -> Rule:
        """``wwwE``: three writes pass and the fourth fails with EIO. One kind of letter, then the end.

        Letters: r read, w write, z zero, f flush, t resize, c any change. Ends: E EIO, N ENOSPC, P power
        cut, T torn write and power cut. Where nothing is to pass, one letter names the kind after a
        minus: ``-wE`` fails the first write. Raises ValueError.
        """
        end = script[-1:]
        body = script[:-1]
        passing = 0 if body.startswith("-") else len(body)
        body = body.removeprefix("-")
        if end not in "ENPT" or not body or body.strip(body[0]) or body[0] not in _LETTERS:
            raise ValueError(f"not a fault script: {script!r}")
        number = errno.ENOSPC if end == "N" else errno.EIO
        return cls(_LETTERS[body[0]], passing + 1, number, power_cut=end in "PT", torn=end == "T")


class FaultStorage(Filter):
    """Passes requests on to `child` until a rule says otherwise. `counts` tells how many of each kind came,
    so that a run without rules says where faults can be put. Offload copies are refused."""

    def __init__(self, child: Storage, rules: Iterable[Rule | str] = ()) -> None:
        """`rules` as Rule or as a script for `Rule.parse`."""
        super().__init__(child)
        self._rules = [Rule.parse(rule) if isinstance(rule, str) else rule for rule in rules]
        self._counting = allocate_lock()
        self.counts: dict[str, int] = {}
        self.dead = False

    def _count(self, operation: str) -> Rule | None:
        """Count a request; the rule that it meets, if any. Raises StorageError after a power cut."""
        kinds = (operation, CHANGE) if operation in _CHANGES else (operation,)
        with self._counting:
            if self.dead:
                raise _error(errno.EIO)
            met = None
            for kind in kinds:
                count = self.counts[kind] = self.counts.get(kind, 0) + 1
                for rule in self._rules:
                    if rule.operation == kind and rule.nth == count:
                        met = rule
            if met is not None and met.power_cut:
                self.dead = True
            return met

    def _pass(self, operation: str, offset: int | None = None) -> None:
        met = self._count(operation)
        if met is not None:
            raise _error(met.errno, offset)

    def read_into(self, buf: Buffer, offset: int) -> None:
        self._pass(READ, offset)
        super().read_into(buf, offset)

    def write(self, buf: Bytes, offset: int) -> None:
        met = self._count(WRITE)
        if met is None:
            return super().write(buf, offset)
        if met.torn:
            view = memoryview(buf)
            middle = (offset + len(view) // 2) // _SECTOR * _SECTOR
            super().write(view[: max(middle - offset, 0)], offset)
        raise _error(met.errno, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._pass(ZERO, offset)
        super().zero(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        self._pass(DISCARD, offset)
        super().discard(offset, length)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        self._pass(EXTENTS, start)
        yield from super().extents(start, length)

    def resize(self, size: int, preallocation: str = "off") -> None:
        self._pass(RESIZE)
        super().resize(size, preallocation)

    def flush(self) -> None:
        self._pass(FLUSH)
        super().flush()


def _error(number: int, offset: int | None = None) -> StorageError:
    return StorageError(os.strerror(number), errno=number, offset=offset)
