"""check -r: mending what a check finds (qcow2 sheet, section 15).

::

    look      walk and compare as `check` does; misplaced zero clusters lose their place at once
    counts    too low counts are raised, or all refcount structures are made anew (`repair_rebuild`)
    copied    COPIED bits of the active tables are set right
    lower     too high counts are lowered
    table     a damaged snapshot table is written anew (`repair_snapshots`)
    header    the dirty and the corrupt bit are cleared

Each step is durable before the next one begins, and in this order none of them makes an image worse: counts
rise before anything relies on them and fall last, what is new lies in clusters that nothing refers to until
one write to the header leads there. So an interrupted repair can be repeated. Guest data is never written.

Findings and their order are the real program's.
"""

from __future__ import annotations

from errno import EFBIG, EIO

from qimg.errors import QimgError, StorageError
from qimg.findings import ErrorFinding
from qimg.formats.base import CheckResult
from qimg.formats.qcow2.check import MAX_CLUSTERS, Checker, failed
from qimg.formats.qcow2.refcount_scan import StoredCounts
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    COPIED,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    MAX_REFCOUNT_TABLE_BYTES,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.refcount_scan import UnreadableBlock
    from qimg.formats.qcow2.repair_tables import TableNames
    from qimg.options import Value

    Opened = TypeVar("Opened", bound=Qcow2Image)

_KNOWN_AUTOCLEAR = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW
#: Clusters behind the end of the file of which it is known whether something refers to them.
WATCHED = 1 << 20
#: Runs of freed clusters that are remembered so that their space can be given back.
_MOST_FREED = 1 << 20


def repair(
    image: Qcow2Image, report: Callable[[str], None], fix: str, *, plain: bool | None = None
) -> CheckResult:
    """Repair `image`, which is open for writing. `fix`: ``leaks`` or ``all``; `plain` as for `check`.

    The counts of the result are of this pass: check again to see what is left. Raises StorageError where
    the repair cannot be finished, after reporting why.
    """
    repairer = Repairer(image, report, fix)
    try:
        return repairer.run(plain)
    finally:
        image.dirty = image.header.dirty


def repair_dirty(image: Opened, options: dict[str, Value] | None) -> Opened:
    """What opening an image for writing does first if its counts may be stale (section 11); the image as it
    is then, opened with `options`. Findings are remarks to the context's `warn`. Raises StorageError."""
    from qimg.context import Notice

    def tell(line: str) -> None:
        image.context.warn(Notice(line, plain=True))

    try:
        result = repair(image, tell, "all")
    except QimgError as error:
        raise _unrepaired(error) from error
    if result.check_errors:
        raise _unrepaired(failed(EIO))
    return type(image).open(
        image.file,
        context=image.context,
        writable=True,
        options=options,
    )


def _unrepaired(error: QimgError) -> StorageError:
    number = error.errno if isinstance(error, StorageError) else EIO
    reason = error.reason if isinstance(error, StorageError) else str(error)
    return StorageError(f"Could not repair dirty image: {reason}", errno=number)


class Repairer(Checker):
    """One repair."""

    def __init__(self, image: Qcow2Image, report: Callable[[str], None], fix: str) -> None:
        super().__init__(image, report)
        self.fix_all = fix == "all"
        self._plain: bool | None = None
        self._told = False  # the findings of the walk are known
        self._whole = False  # `counts` holds the references to all clusters
        self._compared = (0, 0, 0)  # corruptions, leaks and errors that `_compare` added to the result
        self._too_high = False  # a count has to be lowered
        self._fixing = False  # `wrong_*_copied` repair
        self._fixes: dict[int, int] = {}  # entries of one table by host offset, not written yet
        self._names: TableNames | None = None
        self._freed: list[tuple[int, int]] = []
        self._rewrite_snapshots = False
        self._in_snapshot_table = 0  # corruptions that are none of the counts
        #: Which of the WATCHED clusters from the end of the file on something refers to.
        self.behind = bytearray()
        self._old_stop = self.clusters + 1  # clusters that the first walk counts
        self._far: dict[int, int] = {}  # references to clusters behind it, since the file has grown

    def run(self, plain: bool | None = None) -> CheckResult:
        if self.clusters > MAX_CLUSTERS:
            raise failed(EFBIG)
        self._plain = plain
        self._tidy_header()
        self._read_snapshots()
        self._in_snapshot_table = self.result.corruptions
        self._look()
        if self.must_rebuild:
            self._rebuild()
        elif any(self._compared):
            self._fix_counts()
        table = self._in_snapshot_table
        if self.fix_all or not (self.result.corruptions - table or self.result.check_errors):
            self._fix_copied()
            self._lower()
        else:
            self._lower()
            self._tell_copied()
        self._give_back()
        if self._rewrite_snapshots:
            self._write_snapshots()
        self._clear_bits()
        self._figures()
        return self.result

    # -- passes over the clusters

    def walked(self) -> Iterator[None]:
        """One partition of the clusters after the other in `counts`, its references counted. Only the
        first time findings are told."""
        if self._whole:
            yield
            return
        for counts in self._partitions(self._plain):
            self.counts = counts
            if self._told:
                self._silently(self._walk)
            else:
                self._walk()
            self._whole = counts.start == 0 and counts.stop > self.clusters
            yield
            self.first = False
        self._told = True

    def recount(self) -> None:
        """Count anew when clusters are looked at the next time."""
        self._whole = False

    def _silently(self, work: Callable[[], None]) -> bool:
        """Do `work`, whose findings are known; whether they demand a rebuild."""
        kept = self.result, self.report, self.first, self.must_rebuild
        self.result, self.report, self.first = CheckResult(), _ignore, False
        try:
            work()
            return self.must_rebuild
        finally:
            self.result, self.report, self.first, self.must_rebuild = kept

    def _look(self) -> None:
        for _ in self.walked():
            self._compare_here()
        if self.clusters >= self._old_stop:
            self._compare_grown()
            self._look_again()

    def _look_again(self) -> None:
        """The file has grown over places that were not counted."""
        self.recount()
        for counts in () if self.must_rebuild else self._partitions(self._plain):
            self.counts = counts
            if self._silently(self._compare_counted):
                self.must_rebuild = True
                break

    def _compare_counted(self) -> None:
        self._walk()
        self._compare(load=False)

    def _compare_here(self) -> None:
        result = self.result
        before = result.corruptions, result.leaks, result.check_errors
        self._compare(load=False)
        after = result.corruptions, result.leaks, result.check_errors
        a, b, c = (new - old for new, old in zip(after, before, strict=True))
        self._compared = self._compared[0] + a, self._compared[1] + b, self._compared[2] + c

    def mismatch(self, cluster: int, stored: int, references: int) -> None:
        self._too_high = self._too_high or stored > references
        super().mismatch(cluster, stored, references)

    # -- what is mended during the walk

    def clear_misplaced(self, table: int, index: int, offset: int) -> bool:
        if not self.fix_all or self._told:
            return False
        size = 16 if self.geometry.extended else 8
        # The bitmap of an extended entry says by itself that it reads as zeros.
        word = 0 if self.geometry.extended else 1
        self.report(
            f"Repairing offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        )
        self._check_overlap("L2", table, "ERROR: Overlap check failed")
        self.file.write(word.to_bytes(8, "big"), table + index * size)
        self.result.corruptions_fixed += 1
        return True

    def beyond(self, offset: int, size: int) -> None:
        first = (offset >> self.cluster_bits) - self.clusters
        stop = ((offset + size - 1) >> self.cluster_bits) + 1 - self.clusters
        if first < WATCHED and stop > 0:
            if not self.behind:
                self.behind = bytearray(WATCHED)
            first, stop = max(first, 0), min(stop, WATCHED)
            self.behind[first:stop] = b"\1" * (stop - first)

    def block_outside(self, index: int, offset: int) -> None:
        if not self.fix_all:
            super().block_outside(index, offset)
        elif self.first:
            self.report(f"Repairing refcount block {index} is outside image")
            reason = self._grow(offset + self.cluster_size)
            if reason is None:
                self.result.corruptions_fixed += 1
                self.count_block(index, offset)
            else:
                self.corruption(f"ERROR could not resize image: {reason}")
                self.must_rebuild = True

    def _grow(self, size: int) -> str | None:
        """Let the file reach up to `size`; the reason why it does not."""
        import os

        if size >> 63:
            return "Invalid argument"
        try:
            # More than a refcount table can describe would leave an image that nobody can open.
            most = min(MAX_REFCOUNT_TABLE_BYTES // 8 * self.stored.per_block, MAX_CLUSTERS)
            if -(-size // self.cluster_size) > most:
                raise StorageError(f"Could not resize file: {os.strerror(EFBIG)}", errno=EFBIG)
            self.file.resize(size)
        except StorageError as error:
            self.report(ErrorFinding(str(error)))
            return error.reason
        except QimgError as error:
            return str(error)
        self.file_size = size
        self.clusters = -(-size // self.cluster_size)
        return None

    def count_block(self, index: int, offset: int) -> None:
        cluster = offset >> self.cluster_bits
        if self._told or cluster < self._old_stop:
            super().count_block(index, offset)
            return
        if not self.first:
            return
        self._far[cluster] = self._far.get(cluster, 0) + 1
        if self._far[cluster] > 1:
            self.must_rebuild = True
            self.result.corruptions += 1
            self.report(f"ERROR refcount block {index} refcount={self._far[cluster]}")

    def _compare_grown(self) -> None:
        """Compare the counts of the clusters by which the file has grown."""
        from qimg.formats.qcow2.counts import partitions

        for counts in partitions(self.clusters, self.width):
            if counts.stop <= self._old_stop:
                continue
            self.counts = counts
            for cluster in self._far:
                counts.add(cluster, cluster + 1)
            for start, stop, raw in self.stored_blocks():
                if stop <= self._old_stop:
                    continue
                self.end = max(self.end, counts.last_in_use(start, stop, raw))
                for cluster, stored, references in counts.compare(start, stop, raw):
                    if cluster >= self._old_stop:
                        self.mismatch(cluster, stored, references)

    # -- counts

    def _fix_counts(self) -> None:
        """Raise what is too low, and tell what will be lowered. The result of `_compare` is replaced."""
        self.result.corruptions -= self._compared[0]
        self.result.leaks -= self._compared[1]
        self.result.check_errors -= self._compared[2]
        self._mend_counts()

    def _mend_counts(self) -> bool:
        """Raise what is too low, as far as there are blocks for it, and tell of all that is wrong. Whether
        all is right then, or too high."""
        raised = False
        fits = True
        for _ in self.walked():
            for start, stop, raw in self.stored_blocks():
                for cluster, stored, references in self.counts.compare(start, stop, raw):
                    self._mend(cluster, stored, references)
                    fits = fits and (raw is not None or stored > references)
                if self.fix_all and raw is not None:
                    raised = self._store(start, self.counts.mended(start, stop, raw, lower=False)) or raised
        if raised:
            self.file.flush()
        return fits

    def _mend(self, cluster: int, stored: int, references: int) -> None:
        if stored < references and not self.fix_all:
            self.mismatch(cluster, stored, references)
            return
        self.report(f"Repairing cluster {cluster} refcount={stored} reference={references}")
        if stored > references:
            self._too_high = True
            self.result.leaks_fixed += 1
        else:
            self.result.corruptions_fixed += 1

    def _store(self, start: int, raw: bytes | None) -> bool:
        """Write the counters of the clusters from `start` on, if there is anything to write."""
        if raw is None:
            return False
        self.file.write(raw, self.stored.place(start))
        self.stored.forget()
        return True

    def _rebuild(self) -> None:
        """Make the refcount structures anew, then count and compare once more: what the old ones took is
        free now."""
        from qimg.formats.qcow2.repair_rebuild import rebuild

        if not self.fix_all:
            self.report("ERROR need to rebuild refcount structures")
            raise failed(EIO)
        self.report("Rebuilding refcount structure")
        old = self.result
        rebuild(self)
        self._begin_again()
        # Too low is only what the old header was taken for, where a table is said to lie over it.
        fits = self._mend_counts()
        if self.must_rebuild or not fits:
            self.report("ERROR rebuilt refcount structure is still broken")
            self.result.corruptions += 1
        # What the old structures took is no finding of its own.
        result = self.result
        result.corruptions_fixed = old.corruptions_fixed + max(old.corruptions - result.corruptions, 0)
        result.leaks_fixed = old.leaks_fixed + old.leaks

    def _begin_again(self) -> None:
        self.stored = StoredCounts(self.file, self.header)
        self.file_size = -(-self.file.size // 512) * 512
        self.clusters = -(-self.file_size // self.cluster_size)
        self._old_stop = self.clusters + 1
        self.result = CheckResult()
        self.first, self._told, self._whole, self.must_rebuild = True, False, False, False
        self._too_high = False
        self.allocated = self.compressed = self.fragmented = 0
        self.end = 1

    def _lower(self) -> None:
        """Lower what is too high: the last step, when nothing relies on it any more."""
        if not self._too_high:
            return
        for _ in self.walked():
            self._silently(self._lower_here)
        self.file.flush()

    def _lower_here(self) -> None:
        for start, stop, raw in self.stored_blocks():
            if raw is None:
                continue
            if self._store(start, self.counts.mended(start, stop, raw, lower=True)):
                room = _MOST_FREED - len(self._freed)
                self._freed += self.counts.freed(start, stop, raw)[:room]

    def _give_back(self) -> None:
        """Give the space of freed clusters back, unless there is damage left whose victims may be among
        them."""
        if self.result.corruptions or self.result.check_errors:
            return
        try:
            for first, count in self._freed:
                self.file.discard(first << self.cluster_bits, count << self.cluster_bits)
        except StorageError:
            pass  # the image is right without it

    # -- COPIED

    def _tell_copied(self) -> None:
        """Report wrong bits; nothing is repaired."""
        for counts in self._partitions(self._plain):
            self.counts = counts
            self._silently(self._load)
            self._check_copied()
        self.recount()

    def _load(self) -> None:
        for start, stop, raw in self.stored_blocks():
            self.counts.load(start, stop, raw)

    def _fix_copied(self) -> None:
        """Every reference is counted right by now, or will be: the references decide."""
        self._fixing = True
        for _ in self.walked():
            self._check_copied()
            self._write_entries("L1")
        self._fixing = False
        self.file.flush()

    def count_here(self, cluster: int) -> int | None:
        if self._fixing and cluster in self.counts:
            references = self.counts[cluster]
            if references or cluster < self.clusters:
                return references
        return super().count_here(cluster)

    def check_copied_l2(
        self, raw: bytes | bytearray | memoryview, table: int, numbers: Iterable[int] | None = None
    ) -> None:
        super().check_copied_l2(raw, table, numbers)
        self._write_entries("L2")

    def wrong_l1_copied(self, index: int, word: int, count: int) -> None:
        if not self._fixing:
            super().wrong_l1_copied(index, word, count)
            return
        self.report(f"Repairing OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={word:x} refcount={count}")
        self.result.corruptions_fixed += 1
        self._fixes[self.header.header.l1_table_offset + 8 * index] = word ^ COPIED
        self._write_entries("L1")

    def wrong_l2_copied(self, place: int, word: int, count: int) -> None:
        if not self._fixing:
            super().wrong_l2_copied(place, word, count)
            return
        self.report(f"Repairing OFLAG_COPIED data cluster: l2_entry={word:x} refcount={count}")
        self.result.corruptions_fixed += 1
        self._fixes[place] = word ^ COPIED

    def _write_entries(self, kind: str) -> None:
        """Write the entries of one table whose bit was wrong. Raises StorageError where the table lies over
        another one."""
        if not self._fixes:
            return
        fixes, self._fixes = self._fixes, {}
        low, high = min(fixes), max(fixes) + 8
        failure = "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error"
        self._check_overlap(kind, low, failure if kind == "L2" else None)
        part = self.file.read(low, high - low)
        for place, word in fixes.items():
            part[place - low : place - low + 8] = word.to_bytes(8, "big")
        self.file.write(part, low)

    def _check_overlap(self, kind: str, place: int, failure: str | None) -> None:
        """Raise StorageError where a table of `kind` (L1 or L2) lies over another table, after reporting
        `failure`: what would be written there would damage that one."""
        from qimg.formats.qcow2.repair_tables import TableNames

        if self._names is None or self._names.stored is not self.stored:
            self._names = TableNames(self)
        name = self._names.name(place >> self.cluster_bits, besides=f"active {kind} table")
        if name is None:
            return
        self._mark_corrupt(f"Preventing invalid write on metadata (overlaps with {name})")
        if failure is not None:
            self.report(failure)
        raise failed(EIO)

    # -- snapshot table and header

    def warn_corrupt(self, error: UnreadableBlock) -> None:
        if error.unaligned and not self.image.warned:
            self.image.warned = True
            self._mark_corrupt(str(error))

    def _mark_corrupt(self, reason: str) -> None:
        """Note in the header that the image is damaged, until it is repaired."""
        self.report(
            f"qcow2: Marking image as corrupt: {reason}; further corruption events will be suppressed"
        )
        if self.header.version >= 3 and not self._incompatible & INCOMPAT_CORRUPT:
            self._write_word("incompatible_features", INCOMPAT_CORRUPT | self._incompatible)
            self.file.flush()

    def _read_snapshots(self) -> None:
        if not self.fix_all:
            super()._read_snapshots()
            return
        from qimg.formats.qcow2.repair_snapshots import read_leniently

        self._check_snapshots_offset()
        found = read_leniently(self.file, self.header, self.report)
        self.snapshots = found.table
        self.result.corruptions_fixed += found.fixed
        self._rewrite_snapshots = found.rewrite
        if len(found.table.snapshots) < self.header.header.nb_snapshots:
            # Before the counts of what they refer to fall.
            self.header.header.nb_snapshots = len(found.table.snapshots)
            self._write_word("nb_snapshots", self.header.header.nb_snapshots, 4)
            self.file.flush()

    def _write_snapshots(self) -> None:
        from qimg.formats.qcow2.repair_snapshots import write_table

        assert self.snapshots is not None
        counted = (
            self.header.header.snapshots_offset + self.snapshots.length - self.file_size < self.cluster_size
        )
        write_table(self, self.snapshots, release_old=counted and not self.overflown)

    @property
    def _incompatible(self) -> int:
        return self.header.header.incompatible_features

    def _write_word(self, name: str, value: int, length: int = 8) -> None:
        setattr(self.header.header, name, value)
        self.file.write(value.to_bytes(length, "big"), Header.offset_of(name))

    def _tidy_header(self) -> None:
        """What only programs that know it may leave standing: unknown autoclear bits, and bitmaps that some
        other program did not keep up."""
        header = self.header
        if header.version < 3 and header.bitmaps is None:
            return
        autoclear = header.header.autoclear_features
        lost = header.bitmaps is not None and not autoclear & AUTOCLEAR_BITMAPS
        if lost:
            header.header.autoclear_features = autoclear & _KNOWN_AUTOCLEAR
            header.bitmaps = None
            self.image.directory = []
            self.file.write(header.pack(), 0)
            self.file.flush()
        elif autoclear & ~_KNOWN_AUTOCLEAR:
            self._write_word("autoclear_features", autoclear & _KNOWN_AUTOCLEAR)
            self.file.flush()

    def _clear_bits(self) -> None:
        """Clear the corrupt bit if no damage is left, and the dirty bit if the counts are right."""
        result = self.result
        sound = not (result.corruptions or result.check_errors)
        clear = INCOMPAT_CORRUPT if sound else 0
        if sound or (self.fix_all and not result.check_errors):
            clear |= INCOMPAT_DIRTY
        if self.header.version >= 3 and self._incompatible & clear:
            self._write_word("incompatible_features", self._incompatible & ~clear)
            self.file.flush()


def _ignore(line: str) -> None:
    pass
