"""How often each host cluster is referred to: two ways to keep the numbers, for `check`.

`PlainCounts` is for small images, `VectorCounts` works through `qimg.vec` in bulk. Both know one partition
of the clusters, ``start .. stop``, and ignore the others.
"""

from __future__ import annotations

from qimg.formats.qcow2.refcount_scan import counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Protocol

    from qimg.formats.qcow2.check import Checker
    from qimg.vec.refcounts import TableScan

    class Walker(Protocol):
        """Takes aligned L2 tables by host offset; `flush` deals with those that wait."""

        def add(self, table: int) -> None: ...

        def flush(self) -> None: ...

    class Counts(Protocol):
        """References to the clusters ``start .. stop``; those that were given to `load`: stored counts."""

        start: int
        stop: int

        def __contains__(self, cluster: int) -> bool: ...

        def __getitem__(self, cluster: int) -> int: ...

        def add(self, first: int, stop: int) -> Sequence[int]:
            """Count ``first .. stop``; the clusters whose count can grow no more."""

        def last_in_use(self, start: int, stop: int, raw: bytes | bytearray | None) -> int:
            """Number of the last cluster in use, plus one, or 0."""

        def compare(
            self, start: int, stop: int, raw: bytes | bytearray | None
        ) -> Iterator[tuple[int, int, int]]:
            """(cluster, stored, references) of those of ``start .. stop`` where `raw` differs."""

        def load(self, start: int, stop: int, raw: bytes | bytearray | None) -> None:
            """Let `raw`, what is stored for ``start .. stop``, take the place of the references."""

        def mended(self, start: int, stop: int, raw: bytes | bytearray, *, lower: bool) -> bytes | None:
            """`raw` with too high counts lowered to the references, or too low ones raised; None: there
            are none."""

        def freed(self, start: int, stop: int, raw: bytes | bytearray) -> list[tuple[int, int]]:
            """(first, count) of the runs that counted something in `raw` and that nothing refers to."""

        def next_free(self, start: int) -> int | None:
            """The first cluster from `start` on that nothing refers to."""

        def any_used(self, start: int, stop: int) -> bool:
            """Whether anything refers to any of ``start .. stop``."""

        def packed(self, start: int, per_block: int, more: Sequence[int]) -> bytes:
            """A refcount block of the clusters from `start` on. `more`: clusters behind this partition that
            count 1."""

        def unreadable(self, start: int, stop: int) -> None:
            """The stored counts of these cannot be told."""

        def walker(self, checker: Checker, active: bool) -> Walker: ...

        def copied_walker(self, checker: Checker) -> Walker: ...


_ARRAYS = {8: "B", 16: "H", 32: "I", 64: "Q"}
#: Bytes of L2 tables looked at together.
BATCH = 64 << 10


class PlainCounts:
    """Counts in a list."""

    def __init__(self, start: int, stop: int, width: int) -> None:
        self.start = start
        self.stop = stop
        self._width = width
        self._limit = min((1 << width) - 1, (1 << 32) - 1)
        self._counts = [0] * (stop - start)

    def __contains__(self, cluster: int) -> bool:
        return self.start <= cluster < self.stop

    def __getitem__(self, cluster: int) -> int:
        return self._counts[cluster - self.start]

    def add(self, first: int, stop: int) -> list[int]:
        full = []
        counts = self._counts
        for cluster in range(max(first, self.start), min(stop, self.stop)):
            if counts[cluster - self.start] < self._limit:
                counts[cluster - self.start] += 1
            else:
                full.append(cluster)
        return full

    def _stored(self, count: int, raw: bytes | bytearray | None) -> Sequence[int]:
        if raw is None:
            return bytes(count)
        return counters(raw, self._width, count)

    def last_in_use(self, start: int, stop: int, raw: bytes | bytearray | None) -> int:
        stored = self._stored(stop - start, raw)
        for cluster in range(stop - 1, start - 1, -1):
            if stored[cluster - start] or self._counts[cluster - self.start]:
                return cluster + 1
        return 0

    def compare(self, start: int, stop: int, raw: bytes | bytearray | None) -> Iterator[tuple[int, int, int]]:
        stored = self._stored(stop - start, raw)
        for cluster in range(start, stop):
            count, references = stored[cluster - start], self._counts[cluster - self.start]
            if count != references:
                yield cluster, count, references

    def load(self, start: int, stop: int, raw: bytes | bytearray | None) -> None:
        self._counts[start - self.start : stop - self.start] = self._stored(stop - start, raw)

    def mended(self, start: int, stop: int, raw: bytes | bytearray, *, lower: bool) -> bytes | None:
        from qimg.formats.qcow2.refcounts import pack_counts, unpack_counts

        stored = unpack_counts(self._width, raw)
        choose = min if lower else max
        part = self._counts[start - self.start : stop - self.start]
        changed = False
        for slot, references in enumerate(part):
            if choose(stored[slot], references) != stored[slot]:
                stored[slot] = references
                changed = True
        return pack_counts(self._width, stored) if changed else None

    def freed(self, start: int, stop: int, raw: bytes | bytearray) -> list[tuple[int, int]]:
        stored = self._stored(stop - start, raw)
        runs: list[tuple[int, int]] = []
        for cluster in range(start, stop):
            if stored[cluster - start] and not self._counts[cluster - self.start]:
                if runs and sum(runs[-1]) == cluster:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((cluster, 1))
        return runs

    def next_free(self, start: int) -> int | None:
        try:
            return self.start + self._counts.index(0, max(start - self.start, 0))
        except ValueError:
            return None

    def any_used(self, start: int, stop: int) -> bool:
        return any(self._counts[start - self.start : stop - self.start])

    def packed(self, start: int, per_block: int, more: Sequence[int]) -> bytes:
        from array import array

        from qimg.formats.qcow2.refcounts import pack_counts

        part = self._counts[max(start - self.start, 0) : max(start + per_block - self.start, 0)]
        block = array(_ARRAYS[max(self._width, 8)], part + [0] * (per_block - len(part)))
        for cluster in more:
            if 0 <= cluster - start < per_block:
                block[cluster - start] = 1
        return pack_counts(self._width, block)

    def unreadable(self, start: int, stop: int) -> None:
        pass

    def walker(self, checker: Checker, active: bool) -> PlainWalker:
        return PlainWalker(checker, active)

    def copied_walker(self, checker: Checker) -> PlainCopied:
        return PlainCopied(checker)


class PlainWalker:
    """Goes through each table at once."""

    def __init__(self, checker: Checker, active: bool) -> None:
        self._checker = checker
        self._active = active

    def add(self, table: int) -> None:
        checker = self._checker
        checker.count(table, checker.cluster_size)
        checker.walk_l2(checker.file.read(table, checker.cluster_size), table, self._active)

    def flush(self) -> None:
        pass


class PlainCopied:
    """Looks at the COPIED bits of each table at once."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker

    def add(self, table: int) -> None:
        self._checker.check_copied_l2(self._checker.file.read(table, self._checker.cluster_size), table)

    def flush(self) -> None:
        pass


# -- in bulk


def partitions(clusters: int, width: int) -> Iterator[VectorCounts]:
    """Partitions of `clusters` host clusters, one after the other; each takes at most 64 MiB. Their borders
    are borders of refcount blocks, the largest of which has 2^24 counters."""
    step = 1 << (26 if width <= 8 else 25 if width == 16 else 24)
    walked, copied = Spans(), Spans()
    for start in range(0, clusters, step):
        walked.rewind()
        copied.rewind()
        yield VectorCounts(start, min(start + step, clusters), width, walked, copied)


class Spans:
    """Remembers, for every batch of tables of a walk, which clusters it refers to, so that later walks can
    leave out batches that have nothing in their partition. Every walk has the same batches."""

    def __init__(self) -> None:
        from array import array

        self._low = array("q")
        self._high = array("q")
        self._next = 0

    def rewind(self) -> None:
        """A new walk begins."""
        self._next = 0

    def skip(self, start: int, stop: int) -> bool:
        """Whether the next batch refers to nothing in ``start .. stop``; if so it is passed over."""
        at = self._next
        if at >= len(self._low) or (self._low[at] < stop and self._high[at] >= start):
            return False
        self._next += 1
        return True

    def done(self, low: int, high: int) -> None:
        """The next batch was walked and refers to ``low .. high``."""
        if self._next == len(self._low):
            self._low.append(low)
            self._high.append(high)
        self._next += 1


_EVERYTHING = (0, (1 << 63) - 1)


class VectorCounts:
    """Counts in an array of numpy's."""

    def __init__(self, start: int, stop: int, width: int, walked: Spans, copied: Spans) -> None:
        from qimg.vec import refcounts

        self._vec = refcounts
        self.start = start
        self.stop = stop
        self.width = width
        self.walked = walked
        self.copied = copied
        self.all_readable = True
        self.counts = refcounts.new_counts(stop - start, width)
        self._limit = min((1 << width) - 1, (1 << 32) - 1)

    def __contains__(self, cluster: int) -> bool:
        return self.start <= cluster < self.stop

    def __getitem__(self, cluster: int) -> int:
        return int(self.counts[cluster - self.start])

    def add(self, first: int, stop: int) -> list[int]:
        first, stop = max(first, self.start), min(stop, self.stop)
        if first >= stop:
            return []
        full = self._vec.add_range(self.counts, first - self.start, stop - self.start, self._limit)
        return [self.start + index for index in full]

    def last_in_use(self, start: int, stop: int, raw: bytes | bytearray | None) -> int:
        part = self.counts[start - self.start : stop - self.start]
        last = self._vec.last_in_use(part, raw, self.width)
        return start + last if last else 0

    def compare(self, start: int, stop: int, raw: bytes | bytearray | None) -> Iterator[tuple[int, int, int]]:
        part = self.counts[start - self.start : stop - self.start]
        for index, stored, references in self._vec.compare(part, raw, self.width):
            yield start + index, stored, references

    def load(self, start: int, stop: int, raw: bytes | bytearray | None) -> None:
        self._vec.load(self.counts[start - self.start : stop - self.start], raw, self.width)

    def mended(self, start: int, stop: int, raw: bytes | bytearray, *, lower: bool) -> bytes | None:
        part = self.counts[start - self.start : stop - self.start]
        return self._vec.mended(part, raw, self.width, lower=lower)

    def freed(self, start: int, stop: int, raw: bytes | bytearray) -> list[tuple[int, int]]:
        part = self.counts[start - self.start : stop - self.start]
        return [(start + first, count) for first, count in self._vec.freed(part, raw, self.width)]

    def next_free(self, start: int) -> int | None:
        free = self._vec.next_zero(self.counts, max(start - self.start, 0))
        return None if free is None else self.start + free

    def any_used(self, start: int, stop: int) -> bool:
        return bool(self.counts[start - self.start : stop - self.start].any())

    def packed(self, start: int, per_block: int, more: Sequence[int]) -> bytes:
        part = self.counts[max(start - self.start, 0) : max(start + per_block - self.start, 0)]
        slots = [cluster - start for cluster in more if 0 <= cluster - start < per_block]
        return self._vec.packed(part, per_block, slots, self.width)

    def unreadable(self, start: int, stop: int) -> None:
        self.all_readable = False

    def walker(self, checker: Checker, active: bool) -> VectorWalker:
        return VectorWalker(checker, self, active)

    def copied_walker(self, checker: Checker) -> VectorCopied | PlainCopied:
        return VectorCopied(checker, self) if self.all_readable else PlainCopied(checker)

    def scan(self, checker: Checker) -> TableScan:
        """A scan of the checked image's tables."""
        geometry = checker.geometry
        return self._vec.TableScan(
            cluster_bits=geometry.cluster_bits,
            extended=geometry.extended,
            data_file=geometry.data_file,
            file_size=checker.file_size,
            count_shift=geometry.count_shift,
            width=self.width,
        )


class _Batches:
    """Collects tables until there is enough for one call of numpy, and reads them."""

    def __init__(self, checker: Checker, counts: VectorCounts, spans: Spans) -> None:
        self.checker = checker
        self.counts = counts
        self.spans = spans
        self.scan = counts.scan(checker)
        self._tables: list[int] = []
        self._most = max(BATCH // checker.cluster_size, 1)
        self._raw = bytearray(0)

    def add(self, table: int) -> None:
        self._tables.append(table)
        if len(self._tables) >= self._most:
            self.flush()

    def flush(self) -> None:
        tables, self._tables = self._tables, []
        if not tables or self.spans.skip(self.counts.start, self.counts.stop):
            return
        size = self.checker.cluster_size
        if len(self._raw) != len(tables) * size:
            self._raw = bytearray(len(tables) * size)
        view = memoryview(self._raw)
        for number, table in enumerate(tables):
            self.checker.file.read_into(view[number * size : (number + 1) * size], table)
        self.work(tables, self._raw)

    def work(self, tables: list[int], raw: bytearray) -> None:
        """Deal with the tables at these host offsets, `raw` in order."""
        raise NotImplementedError

    def each(self, raw: bytearray) -> Iterator[memoryview]:
        """The tables in `raw` one by one."""
        size = self.checker.cluster_size
        view = memoryview(raw)
        for at in range(0, len(raw), size):
            yield view[at : at + size]


class VectorWalker(_Batches):
    """Counts what tables refer to, and the tables themselves."""

    def __init__(self, checker: Checker, counts: VectorCounts, active: bool) -> None:
        super().__init__(checker, counts, counts.walked)
        self._active = active

    def work(self, tables: list[int], raw: bytearray) -> None:
        checker, counts, scan = self.checker, self.counts, self.scan
        if not scan.walk(raw, checker.geometry.l2_entries, counts.counts, counts.start):
            self.spans.done(*_EVERYTHING)
            for table, part in zip(tables, self.each(raw), strict=True):
                checker.count(table, checker.cluster_size)
                checker.walk_l2(part, table, self._active)
            return
        low, high = scan.span
        own = [table >> checker.cluster_bits for table in tables]
        if low > high:
            low, high = own[0], own[0]
        self.spans.done(min(low, *own), max(high, *own))
        for table in tables:
            checker.count(table, checker.cluster_size)
        if self._active and checker.first:
            checker.allocated += scan.allocated
            checker.compressed += scan.compressed
            checker.fragmented += scan.fragmented


class VectorCopied(_Batches):
    """Looks for wrong COPIED bits."""

    def __init__(self, checker: Checker, counts: VectorCounts) -> None:
        super().__init__(checker, counts, counts.copied)

    def work(self, tables: list[int], raw: bytearray) -> None:
        counts, scan = self.counts, self.scan
        if scan.copied(raw, counts.counts, counts.start, self.checker.clusters):
            low, high = scan.span
            self.spans.done(low, high) if low <= high else self.spans.done(1, 0)
            return
        self.spans.done(*_EVERYTHING)
        for table, part in zip(tables, self.each(raw), strict=True):
            some = scan.suspects(part, counts.counts, counts.start, self.checker.clusters)
            self.checker.check_copied_l2(part, table, some)
