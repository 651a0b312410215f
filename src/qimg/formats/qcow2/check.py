"""check: every reference to a host cluster against its stored count (qcow2 sheet, section 15).

::

    walk      header, L1, L2 and data of the active state and of every snapshot, tables, bitmaps,
              refcount blocks: each range in use counts one reference for every host cluster it touches
    compare   the counts with the stored ones, cluster by cluster
    copied    whether the COPIED bits of the active tables tell the truth

Counts are kept for one partition of the host clusters at a time. Nearly every image fits into one; a larger
one is walked again for each, and what was found in the first walk is not told twice. That bounds memory.
Order and words of the findings are the real program's, except that with several partitions the findings
of `compare` and `copied` come partition by partition.

An L2 table is looked at entry by entry here; `qimg.vec.refcounts` takes the sound ones in bulk where
there are many. `repair` goes the same way and mends what it meets.
"""

from __future__ import annotations

from errno import EFBIG, EINVAL
from struct import unpack

from qimg.errors import FormatError, StorageError
from qimg.findings import ErrorFinding
from qimg.formats.base import CheckResult
from qimg.formats.qcow2.counts import PlainCounts
from qimg.formats.qcow2.mapping import Geometry
from qimg.formats.qcow2.refcount_scan import StoredCounts, UnreadableBlock
from qimg.formats.qcow2.structs import (
    COPIED,
    CRYPT_LUKS,
    L1_RESERVED,
    L2_COMPRESSED,
    L2_RESERVED,
    L2_ZERO,
    MAX_L1_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qimg.formats.qcow2.counts import Counts
    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.snapshot import SnapshotTable

#: Most host clusters that the real program handles.
MAX_CLUSTERS = (1 << 31) - 1
#: L2 entries, and host clusters, up to which numpy does not pay.
PLAIN_ENTRIES = 20 * 8192
PLAIN_CLUSTERS = 1 << 18
_CHUNK = 64 << 10
_ZEROS = bytes(_CHUNK)
_UNREADABLE = -1

_ADVICE = (
    "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if"
    " the image cannot be opened for writing"
)


def check(image: Qcow2Image, report: Callable[[str], None], *, plain: bool | None = None) -> CheckResult:
    """Check `image` without changing it. `plain` forces or forbids the way without numpy.

    Raises StorageError where the check cannot be finished (``Check failed: ...``), after reporting why.
    """
    return Checker(image, report).run(plain)


def failed(number: int) -> StorageError:
    """The check cannot go on."""
    import os

    return StorageError(os.strerror(number), errno=number)


class Checker:
    """One check. `first` is true during the first walk, the only one that reports and counts findings.
    `must_rebuild`: the refcount structures cannot be mended where they are."""

    def __init__(self, image: Qcow2Image, report: Callable[[str], None]) -> None:
        self.image = image
        self.file = image.file
        self.header = image.header
        self.geometry = Geometry(image.header)
        self.cluster_bits = self.header.cluster_bits
        self.cluster_size = self.header.cluster_size
        self.width = 1 << self.header.header.refcount_order
        self.file_size = -(-self.file.size // 512) * 512
        self.clusters = -(-self.file_size // self.cluster_size)
        self.report = report
        self.result = CheckResult()
        self.first = True
        self.must_rebuild = False
        self.overflown = False  # there are more references to a cluster than can be counted
        self.stored = StoredCounts(self.file, self.header)
        self.snapshots: SnapshotTable | None = None
        self.counts: Counts = PlainCounts(0, 0, self.width)
        self.allocated = self.compressed = self.fragmented = 0
        self.end = 1  # clusters up to the last one in use

    # -- the whole

    def run(self, plain: bool | None = None) -> CheckResult:
        """Check and return the result."""
        if self.clusters > MAX_CLUSTERS:
            raise failed(EFBIG)
        self._read_snapshots()
        for counts in self._partitions(plain):
            self.counts = counts
            self._walk()
            self._compare()
            self._check_copied()
            self.first = False
        self._figures()
        return self.result

    def _figures(self) -> None:
        result = self.result
        result.total_clusters = -(-self.header.virtual_size // self.cluster_size)
        result.allocated_clusters = self.allocated
        result.compressed_clusters = self.compressed
        result.fragmented_clusters = self.fragmented
        result.image_end_offset = self.end * self.cluster_size

    def _partitions(self, plain: bool | None) -> Iterator[Counts]:
        """Of the clusters of the file and the one behind it, of which the beginning may be in use."""
        if plain is None:
            plain = self._is_small()
        if plain:
            yield PlainCounts(0, self.clusters + 1, self.width)
            return
        from qimg.formats.qcow2.counts import partitions

        yield from partitions(self.clusters + 1, self.width)

    def _is_small(self) -> bool:
        """Whether plain Python is done before numpy is imported."""
        if self.clusters > PLAIN_CLUSTERS:
            return False
        entries = 0
        for offset, size in self._l1_tables():
            for _index, word in self._l1_entries(offset, size):
                if word & OFFSET_MASK:
                    entries += self.geometry.l2_entries
                    if entries > PLAIN_ENTRIES:
                        return False
        return True

    def _l1_tables(self) -> Iterator[tuple[int, int]]:
        header = self.header.header
        yield header.l1_table_offset, header.l1_size
        for snapshot in self.snapshots.snapshots if self.snapshots else ():
            entry = snapshot.entry
            if entry.l1_table_offset % self.cluster_size == 0 and entry.l1_size * 8 <= MAX_L1_BYTES:
                yield entry.l1_table_offset, entry.l1_size

    def corruption(self, text: str, hint: str | None = None) -> None:
        """A finding of the first walk."""
        if self.first:
            self.result.corruptions += 1
            self.report(text)
            if hint is not None:
                self.report(hint)

    # -- snapshot table

    def _read_snapshots(self) -> None:
        from qimg.formats.qcow2.snapshot import V3_EXTRA, read_snapshots

        header = self.header.header
        if header.nb_snapshots > MAX_SNAPSHOTS:
            self.report(ErrorFinding("ERROR snapshot table too large"))
            over = header.nb_snapshots - MAX_SNAPSHOTS
            self.report(f"You can force-remove all {over} overhanging snapshots with qemu-img check -r all")
            raise failed(EFBIG)
        self._check_snapshots_offset()
        try:
            self.snapshots = read_snapshots(self.file, self.header)
        except FormatError as error:
            self.report(ErrorFinding(f"ERROR failed to read the snapshot table: {error}"))
            if error.hint is not None:
                self.report(error.hint)
            raise failed(EFBIG) from error
        if self.header.version >= 3:
            for number, snapshot in enumerate(self.snapshots.snapshots):
                if len(snapshot.extra) < V3_EXTRA:
                    self.corruption(f"ERROR snapshot table entry {number} is incomplete")

    def _check_snapshots_offset(self) -> None:
        offset = self.header.header.snapshots_offset
        if offset % self.cluster_size or offset >> 63:
            self.report(ErrorFinding("ERROR snapshot table offset invalid"))
            raise failed(EINVAL)

    # -- walk

    def _walk(self) -> None:
        header = self.header.header
        self.count(0, self.cluster_size)
        self._walk_l1(header.l1_table_offset, header.l1_size, active=True)
        self._walk_snapshots()
        if self.snapshots is not None:
            self.count(header.snapshots_offset, self.snapshots.length)
        self.count(header.refcount_table_offset, header.refcount_table_clusters * self.cluster_size)
        if header.crypt_method == CRYPT_LUKS and self.header.crypto is not None:
            self.count(self.header.crypto.offset, self.header.crypto.length)
        self._walk_bitmaps()
        self._walk_refcount_blocks()

    def count(self, offset: int, size: int) -> None:
        """One reference to every cluster that ``offset .. offset + size`` touches."""
        if size <= 0:
            return
        if offset + size - self.file_size >= self.cluster_size:
            self.corruption(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or"
                f" more: offset {offset:#x} size {size:#x}"
            )
            self.beyond(offset, size)
            return
        first, last = offset >> self.cluster_bits, (offset + size - 1) >> self.cluster_bits
        for cluster in self.counts.add(first, last + 1):
            self.overflown = True
            self.result.corruptions += 1
            self.report(f"ERROR: overflow cluster offset={cluster << self.cluster_bits:#x}")
            self.report(_ADVICE)

    def beyond(self, offset: int, size: int) -> None:
        """``offset .. offset + size``, which something refers to, ends past the end of the file."""

    def _walk_snapshots(self) -> None:
        found = self.snapshots.snapshots if self.snapshots is not None else []
        if found and self.header.has_data_file:
            self.corruption(f"ERROR {len(found)} snapshots in image with data file")
        for snapshot in found:
            entry = snapshot.entry
            who = f"ERROR snapshot {snapshot.id_text} ({snapshot.name_text})"
            if entry.l1_table_offset % self.cluster_size:
                self.corruption(
                    f"{who} l1_offset={entry.l1_table_offset:#x}: L1 table is not cluster aligned; snapshot"
                    " table entry corrupted"
                )
            elif entry.l1_size * 8 > MAX_L1_BYTES:
                self.corruption(
                    f"{who} l1_size={entry.l1_size:#x}: L1 table is too large; snapshot table entry corrupted"
                )
            else:
                self._walk_l1(entry.l1_table_offset, entry.l1_size, active=False)

    def _l1_entries(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """(index, entry) of the entries of an L1 table that are not 0."""
        for at in range(0, size * 8, _CHUNK):
            raw = self.file.read(offset + at, min(_CHUNK, size * 8 - at))
            if _ZEROS.startswith(raw):
                continue
            for number, word in enumerate(unpack(f">{len(raw) // 8}Q", raw)):
                if word:
                    yield at // 8 + number, word

    def _walk_l1(self, offset: int, size: int, *, active: bool) -> None:
        self.count(offset, size * 8)
        batch = self.counts.walker(self, active)
        for _index, word in self._l1_entries(offset, size):
            table = word & OFFSET_MASK
            if word & L1_RESERVED or table % self.cluster_size or table + self.cluster_size > self.file_size:
                batch.flush()
                if word & L1_RESERVED:
                    self.corruption(f"ERROR found L1 entry with reserved bits set: {word:x}")
                self.count(table, self.cluster_size)
                if table % self.cluster_size:
                    self.corruption(
                        f"ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                    )
                self.walk_l2(self.file.read(table, self.cluster_size), table, active)
            else:
                batch.add(table)
        batch.flush()

    def walk_l2(self, raw: bytes | bytearray | memoryview, table: int, active: bool) -> None:
        """Entries of the L2 table at host offset `table`, one after the other."""
        words = unpack(f">{len(raw) // 8}Q", raw)
        extended = self.geometry.extended
        expected = 0  # host offset at which the next data cluster would continue the last one
        for index in range(len(words) // 2 if extended else len(words)):
            word, bitmap = (words[2 * index], words[2 * index + 1]) if extended else (words[index], 0)
            if not word and not bitmap:
                continue
            if word & L2_COMPRESSED:
                self._walk_compressed(index, word, bitmap, active)
                continue
            if word & L2_RESERVED:
                self.corruption(f"ERROR found l2 entry with reserved bits set: {word:x}")
            offset = word & OFFSET_MASK
            if not self.has_place(word):
                if bitmap & 0xFFFF_FFFF:
                    self.corruption("ERROR: Unallocated cluster has non-zero subcluster allocation map")
                continue
            if self.is_misplaced_zero(word, bitmap) and self.clear_misplaced(table, index, offset):
                continue
            self._walk_placed(word, bitmap)
            if active and self.first:
                self.allocated += 1
                self.fragmented += bool(expected) and offset != expected
            expected = offset + self.cluster_size

    def has_place(self, word: int) -> bool:
        """Whether an entry that is not compressed has a host cluster."""
        if word & OFFSET_MASK:
            return True
        if not self.header.has_data_file or not word & COPIED:
            return False
        return self.geometry.extended or not word & L2_ZERO

    def is_misplaced_zero(self, word: int, bitmap: int) -> bool:
        """Whether an entry reads as zeros wherever it leads, and leads to where no cluster is."""
        if not word & OFFSET_MASK & (self.cluster_size - 1):
            return False
        return not bitmap & 0xFFFF_FFFF if self.geometry.extended else bool(word & L2_ZERO)

    def clear_misplaced(self, table: int, index: int, offset: int) -> bool:
        """Take its place away from an entry for which `is_misplaced_zero`; whether that was done."""
        return False

    def _walk_placed(self, word: int, bitmap: int) -> None:
        offset = word & OFFSET_MASK
        allocated, zero = bitmap & 0xFFFF_FFFF, bitmap >> 32
        if allocated & zero:
            self.corruption(
                f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            )
        if offset % self.cluster_size:
            what = "Preallocated" if self.is_misplaced_zero(word, bitmap) else "Data"
            self.corruption(
                f"ERROR offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted."
            )
        if not self.header.has_data_file:
            self.count(offset, self.cluster_size)

    def _walk_compressed(self, index: int, word: int, bitmap: int, active: bool) -> None:
        geometry = self.geometry
        offset, length = geometry.compressed_range(word)
        if word & COPIED:
            self.corruption(
                f"ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            )
            word &= ~COPIED
        if self.header.has_data_file:
            self.corruption(f"ERROR compressed cluster {index} with data file, entry={word:#x}")
            return
        if bitmap:
            self.corruption(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap,"
                f" entry={word:#x}"
            )
            return
        self.count(offset, length)
        if active and self.first:
            self.allocated += 1
            self.compressed += 1
            self.fragmented += 1

    def _walk_bitmaps(self) -> None:
        from qimg.formats.qcow2.structs import AUTOCLEAR_BITMAPS

        pointer = self.header.bitmaps
        if pointer is None or not self.header.header.autoclear_features & AUTOCLEAR_BITMAPS:
            return
        from qimg.formats.qcow2.bitmap import table_word_is_valid

        self.count(pointer.directory_offset, pointer.directory_size)
        for bitmap in self.image.directory:
            entry = bitmap.entry
            self.count(entry.table_offset, entry.table_size * 8)
            for at in range(0, entry.table_size * 8, _CHUNK):
                raw = self.file.read(entry.table_offset + at, min(_CHUNK, entry.table_size * 8 - at))
                words = unpack(f">{len(raw) // 8}Q", raw)
                for word in words:
                    if not table_word_is_valid(self.header, word):
                        raise failed(EINVAL)
                    if word & OFFSET_MASK:
                        self.count(word & OFFSET_MASK, self.cluster_size)

    def _walk_refcount_blocks(self) -> None:
        for index, word in self.stored.entries():
            offset = word & REFTABLE_OFFSET_MASK
            if word & REFTABLE_RESERVED:
                self.must_rebuild = True
                self.corruption(f"ERROR refcount table entry {index} has reserved bits set")
            elif offset % self.cluster_size:
                self.must_rebuild = True
                self.corruption(
                    f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif offset >> self.cluster_bits >= self.clusters:
                self.block_outside(index, offset)
            else:
                self.count_block(index, offset)

    def block_outside(self, index: int, offset: int) -> None:
        """Refcount block `index` lies past the end of the file, at `offset`."""
        self.corruption(f"ERROR refcount block {index} is outside image")

    def count_block(self, index: int, offset: int) -> None:
        """A refcount block where one can be."""
        cluster = offset >> self.cluster_bits
        self.count(offset, self.cluster_size)
        if cluster in self.counts and self.counts[cluster] != 1:
            self.must_rebuild = True
            self.result.corruptions += 1
            self.report(f"ERROR refcount block {index} refcount={self.counts[cluster]}")

    # -- compare

    def _compare(self, *, load: bool = True) -> None:
        """Stored counts against references. With `load`, `counts` holds what is stored afterwards."""
        for start, stop, raw in self.stored_blocks():
            self.end = max(self.end, self.counts.last_in_use(start, stop, raw))
            for cluster, stored, references in self.counts.compare(start, stop, raw):
                self.mismatch(cluster, stored, references)
            if load:
                self.counts.load(start, stop, raw)

    def stored_blocks(self) -> Iterator[tuple[int, int, bytearray | None]]:
        """The partition, a refcount block at a time: first cluster, last plus one, the counters as stored
        (None: there is no block). Blocks that cannot be read are reported and left out."""
        counts = self.counts
        per_block = self.stored.per_block
        at, end = counts.start, counts.stop
        if end > self.clusters and counts[self.clusters] == 0:
            end = self.clusters
        while at < end:
            stop = min((at // per_block + 1) * per_block, end)
            try:
                yield at, stop, self.stored.raw(at, stop)
            except UnreadableBlock as error:
                self._unreadable(at, stop, error)
            at = stop

    def _unreadable(self, start: int, stop: int, error: UnreadableBlock) -> None:
        self.warn_corrupt(error)
        for cluster in range(start, stop):
            self.report(f"Can't get refcount for cluster {cluster}: Input/output error")
        self.result.check_errors += stop - start
        self.counts.unreadable(start, stop)

    def warn_corrupt(self, error: UnreadableBlock) -> None:
        """Say once that reading met a refcount block where none can be."""
        if error.unaligned and not self.image.warned:
            self.image.warned = True
            self.report(
                f"qcow2: Image is corrupt: {error}; further non-fatal corruption events will be suppressed"
            )

    def mismatch(self, cluster: int, stored: int, references: int) -> None:
        if stored > references:
            self.result.leaks += 1
            self.report(f"Leaked cluster {cluster} refcount={stored} reference={references}")
        else:
            self.must_rebuild = self.must_rebuild or not stored
            self.result.corruptions += 1
            self.report(f"ERROR cluster {cluster} refcount={stored} reference={references}")

    # -- copied

    def _check_copied(self) -> None:
        header = self.header.header
        batch = self.counts.copied_walker(self)
        for index, word in self._l1_entries(header.l1_table_offset, header.l1_size):
            table = word & OFFSET_MASK
            if not table:
                continue
            count = self.count_here(table >> self.cluster_bits)
            if count == _UNREADABLE:
                continue
            if count is not None and (count == 1) != bool(word & COPIED):
                batch.flush()
                self.wrong_l1_copied(index, word, count)
            batch.add(table)
        batch.flush()

    def count_here(self, cluster: int) -> int | None:
        """The stored count of `cluster`; None where another partition is in charge, _UNREADABLE where it
        cannot be told. Clusters past the end of the file belong to the first partition."""
        if cluster >= self.clusters:
            if self.counts.start:
                return None
        elif cluster not in self.counts:
            return None
        try:
            return self.stored.get(cluster)
        except UnreadableBlock as error:
            self.warn_corrupt(error)
            return _UNREADABLE

    def check_copied_l2(
        self, raw: bytes | bytearray | memoryview, table: int, numbers: Iterable[int] | None = None
    ) -> None:
        """The COPIED bits of one table of the active state, at host offset `table`, entry by entry; only of
        the entries `numbers` where the others are known to be right."""
        words = unpack(f">{len(raw) // 8}Q", raw)
        step = 2 if self.geometry.extended else 1
        for at in range(0, len(words), step) if numbers is None else (step * number for number in numbers):
            word = words[at]
            if not word or word & L2_COMPRESSED or not self.has_place(word):
                continue
            count: int | None = 1
            if not self.header.has_data_file:
                count = self.count_here((word & OFFSET_MASK) >> self.cluster_bits)
            elif self.counts.start:
                continue
            if count is not None and count != _UNREADABLE and (count == 1) != bool(word & COPIED):
                self.wrong_l2_copied(table + 8 * at, word, count)

    def wrong_l1_copied(self, index: int, word: int, count: int) -> None:
        """The COPIED bit of L1 entry `index` lies: its table's stored count is `count`."""
        self.result.corruptions += 1
        self.report(f"ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={word:x} refcount={count}")

    def wrong_l2_copied(self, place: int, word: int, count: int) -> None:
        """The COPIED bit of the L2 entry at host offset `place` lies."""
        self.result.corruptions += 1
        self.report(f"ERROR OFLAG_COPIED data cluster: l2_entry={word:x} refcount={count}")
