"""The node ``quorum``: the same disk several times, and the majority is right (protocols sheet 2)."""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

import errno
import os

from qimg.errors import NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, ZERO, Extent, Runs
from qimg.options import BOOL, NUM, STR, Option
from qimg.storage.base import Limits, Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes

_MAX_CHILDREN = 31  # as many as the votes of the real program have room for
_PATTERNS = ("quorum", "fifo")


class Quorum(Storage):
    """What at least `threshold` of the children agree on.

    `fifo`: reads take the first child that answers. `rewrite`: children that disagree with the majority are
    overwritten with what it says. `verify`: a disagreement of two is an error that tells where.
    """

    driver = "quorum"
    children: ClassVar[tuple[str, ...]] = ("children.*",)
    image_children: ClassVar[tuple[str, ...]] = ("children.*",)
    has_directory = False
    identity: ClassVar[tuple[str, ...]] = (
        "blkverify",
        "driver",
        "read-pattern",
        "rewrite-corrupted",
        "vote-threshold",
    )
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("vote-threshold", NUM, None, "How many children have to agree"),
        Option("blkverify", BOOL, False, "Whether two children have to be equal"),
        Option("rewrite-corrupted", BOOL, False, "Whether children that disagree are overwritten"),
        Option("read-pattern", STR, "quorum", "What reads do (quorum, fifo)"),
    )
    named = False
    addressed = False

    def __init__(
        self,
        children: list[Storage],
        threshold: int,
        *,
        fifo: bool = False,
        rewrite: bool = False,
        verify: bool = False,
    ) -> None:
        """The children belong to the new node. Raises StorageError where their sizes differ."""
        if len({child.size for child in children}) > 1:
            raise StorageError(
                f"Could not refresh total sector count: {os.strerror(errno.EIO)}", errno=errno.EIO
            )
        self._children = children
        self._threshold = threshold
        self._fifo = fifo
        self._rewrite = rewrite
        self._verify = verify
        self.name = "quorum"
        self.plural = "quorum nodes"
        self.writable = all(child.writable for child in children)
        self.zero_init = all(child.zero_init for child in children)
        self.limits = Limits(
            request_alignment=max(child.limits.request_alignment for child in children),
            memory_alignment=max(child.limits.memory_alignment for child in children),
            fast_zero=all(child.limits.fast_zero for child in children),
            parallel=min(child.limits.parallel for child in children),
        )

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        """Raises OptionError with the real program's words."""
        threshold = int(values.get("vote-threshold", 0))
        pattern = values.get("read-pattern", "quorum")
        verify = bool(values.get("blkverify", False))
        rewrite = bool(values.get("rewrite-corrupted", False))
        if not 1 <= len(children) <= _MAX_CHILDREN:
            raise OptionError("Number of provided children must be 1 or more", option="children")
        if threshold < 1:
            message = "Parameter 'vote-threshold' expects a value >= 1"
            raise OptionError(message, option="vote-threshold")
        if threshold > len(children):
            raise OptionError("threshold may not exceed children count", option="vote-threshold")
        if pattern not in _PATTERNS:
            raise OptionError("Please set read-pattern as fifo or quorum", option="read-pattern")
        if pattern == "quorum" and verify and (len(children) != 2 or threshold != 2):
            message = "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
            raise OptionError(message, option="blkverify")
        if pattern == "quorum" and rewrite and verify:
            message = "rewrite-corrupted=on cannot be used with blkverify=on"
            raise OptionError(message, option="rewrite-corrupted")
        return cls(
            list(children.values()),
            threshold,
            fifo=pattern == "fifo",
            rewrite=rewrite,
            verify=verify,
        )

    def below(self) -> list[tuple[str, Storage]]:
        return [(f"children.{number}", child) for number, child in enumerate(self._children)]

    @property
    def size(self) -> int:
        return self._children[0].size

    # -- reading

    def read_into(self, buf: Buffer, offset: int) -> None:
        if self._fifo:
            self._read_first(buf, offset)
            return
        votes: dict[bytes, list[Storage]] = {}
        for child in self._children:
            try:
                answer = bytes(child.read(offset, len(buf)))
            except StorageError:
                continue
            votes.setdefault(answer, []).append(child)
        winner = max(votes, key=lambda answer: len(votes[answer]), default=b"")
        if len(votes) > 1 and self._verify:
            raise _mismatch(offset, *votes)
        if not votes or len(votes[winner]) < self._threshold:
            raise _no_majority(offset)
        memoryview(buf)[:] = winner
        if self._rewrite and self.writable and len(votes) > 1:
            self._mend(winner, offset, votes)

    def _read_first(self, buf: Buffer, offset: int) -> None:
        for number, child in enumerate(self._children, 1):
            try:
                child.read_into(buf, offset)
            except StorageError:
                if number == len(self._children):
                    raise
            else:
                return

    @staticmethod
    def _mend(winner: bytes, offset: int, votes: dict[bytes, list[Storage]]) -> None:
        for answer, children in votes.items():
            if answer != winner:
                for child in children:
                    try:
                        child.write(winner, offset)
                    except StorageError:
                        continue  # what was asked for has been read all the same

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Zeros are where all children have them."""
        zero = [(start, start + length)]
        for child in self._children:
            found = Runs(start, length)
            for extent in child.extents(start, length):
                found.append(extent.start, extent.length, extent.flags & ZERO)
            runs = [(run.start, run.start + run.length) for run in found.take() if run.flags & ZERO]
            zero = list(_common(zero, runs))
        at = start
        for low, high in zero:
            if low > at:
                yield Extent(at, low - at, MAPPED, 0, at, self)
            yield Extent(low, high - low, ZERO, 0, low, self)
            at = high
        if at < start + length:
            yield Extent(at, start + length - at, MAPPED, 0, at, self)

    # -- writing

    def _everywhere(self, request: Callable[[Storage], None], offset: int | None) -> None:
        """Send one request to all children; enough of them have to carry it out."""
        done = 0
        failure: StorageError | None = None
        for child in self._children:
            try:
                request(child)
                done += 1
            except StorageError as error:
                failure = error
        if done < self._threshold:
            raise failure if failure is not None else _no_majority(offset)

    def write(self, buf: Bytes, offset: int) -> None:
        self._everywhere(lambda child: child.write(buf, offset), offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._everywhere(lambda child: child.zero(offset, length, unmap), offset)

    def discard(self, offset: int, length: int) -> None:
        self._everywhere(lambda child: child.discard(offset, length), offset)

    def resize(self, size: int, preallocation: str = "off") -> None:
        raise NotSupported("Image format driver does not support resize")

    def flush(self) -> None:
        self._everywhere(lambda child: child.flush(), None)

    def lock(self, use: int, share: int) -> None:
        for child in self._children:
            child.lock(use, share)

    def allocated_bytes(self) -> int | None:
        sizes = [child.allocated_bytes() for child in self._children]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def close(self) -> None:
        for child in self._children:
            child.close()


def _no_majority(offset: int | None) -> StorageError:
    return StorageError(os.strerror(errno.EIO), errno=errno.EIO, offset=offset)


def _mismatch(offset: int, first: bytes, second: bytes) -> StorageError:
    at = next(place for place, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return StorageError(
        f"quorum: offset={offset} bytes={len(first)} contents mismatch at offset {offset + at}",
        errno=errno.EIO,
        offset=offset + at,
    )


def _common(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts that two ascending lists of ranges have in common."""
    at = 0
    for low, high in second:
        while at < len(first) and first[at][1] <= low:
            at += 1
        number = at
        while number < len(first) and first[number][0] < high:
            yield max(low, first[number][0]), min(high, first[number][1])
            number += 1
