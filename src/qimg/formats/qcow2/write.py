"""An existing qcow2 image that is being changed (qcow2 sheet, sections 13 and 14).

Changes are staged: `allocate` and its kind change tables and counts in memory, the caller writes data to
the places that it was given, and `flush` makes it the image's, in an order in which a power cut at any
moment costs leaked clusters at most::

    data, new tables, raised counts   nothing refers to them yet
    barrier
    links                             L2 entries in place, L1 entries of new tables
    barrier
    header                            if it changed
    barrier
    lowered counts                    nothing refers to what they counted any more

Counts are kept right all the time: `lazy_refcounts` allows to postpone them, but in batches they cost
nothing, and an image that qimg writes to never has to be marked dirty.
"""

from __future__ import annotations

from _thread import allocate_lock

from qimg.context import Notice
from qimg.errors import CorruptImage, NotSupported
from qimg.extent import Runs, clip
from qimg.formats.qcow2.compress import Encoder, LivePacker
from qimg.formats.qcow2.header import parse
from qimg.formats.qcow2.header_write import write_header
from qimg.formats.qcow2.image import Qcow2Image
from qimg.formats.qcow2.live_entries import ALL, LiveExtended, LiveOneToOne, LivePlacement, LivePlain
from qimg.formats.qcow2.live_refcounts import LiveRefcounts
from qimg.formats.qcow2.live_tables import LiveMapping, LiveTables
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    INCOMPAT_CORRUPT,
    L2_COMPRESSED,
    OFFSET_MASK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.formats.base import BitmapData, Reference
    from qimg.formats.qcow2.bitmap_recorder import Recorder
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.mapping import Mapping
    from qimg.formats.qcow2.overlap import Overlaps
    from qimg.formats.qcow2.snapshot import Snapshot
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage

#: Bytes of staged tables and counts with which a batch should end.
STAGE_LIMIT = 16 << 20
_KNOWN_AUTOCLEAR = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW


class WritableQcow2(Qcow2Image):
    """Reads as everything staged so far. One thread at a time may change it."""

    can_write = True

    def __init__(self, file: Storage, header: ParsedHeader, context: Context) -> None:
        super().__init__(file, header, context)
        self.header_changed = False  # `flush` has to write the header
        self._dead = False  # damage was found while writing
        self.restart()

    def restart(self) -> None:
        """Forget what is staged: all that is known of the image is what `header` says."""
        self._active = None
        header = self.header
        # Compressed clusters are never encrypted.
        self.can_compress = not (header.has_data_file or self.encrypted)
        self.refcounts = LiveRefcounts(self.file, header, self._guard_new)
        self.tables = LiveTables(self.file, header, self.refcounts)
        self._encode = Encoder(header.header.compression_type, header.cluster_size)
        self._packer = LivePacker(self.file, self.refcounts, header.cluster_bits)
        self._packing = allocate_lock()
        self._entries: LivePlain | None = None
        self._overlaps: Overlaps | None = None
        self._recorder: Recorder | None = None
        self._begun = False
        self._placed = False  # guest data waits for a barrier

    @property
    def can_mark_zero(self) -> bool:  # type: ignore[override]
        return self.header.version >= 3 or self.backing is None

    def reload(self) -> None:
        """Forget everything that is not on disk, and read the header again."""
        self.header = parse(self.file, writable=True)
        self.size = self.header.virtual_size
        self._reader = self._snapshots = self._sparse = None
        self.header_changed = False
        self.directory = []
        self._open_directories(for_check=False)
        self.restart()

    # -- tables and places

    @property
    def mapping(self) -> Mapping:
        if self._active is None or self._active.l1_size != self.header.header.l1_size:
            from qimg.formats.qcow2.mapping import Geometry

            self._active = LiveMapping(self.file, Geometry(self.header), self.tables)
            self._active.data = self.data
            self._reader = None
        return self._active

    @property
    def entries(self) -> LivePlain:
        """How entries change."""
        if self._entries is None:
            header = self.header
            bits = header.cluster_bits
            if header.has_data_file:
                placement: LivePlacement = LiveOneToOne(
                    self.data, self.refcounts, bits, raw=header.data_file_raw, size=self.size
                )
            else:
                placement = LivePlacement(self.file, self.refcounts, bits, self._packer.drop, self.guard_kept)
            if header.extended_l2:
                self._entries = LiveExtended(placement, header.cluster_size, self._move)
            else:
                self._entries = LivePlain(placement, header.cluster_size, zero_flag=header.version >= 3)
        return self._entries

    def snapshot_entries(self) -> list[Snapshot]:
        """The snapshot table."""
        return self.snapshot_table().snapshots if self.header.header.nb_snapshots else []

    def begin(self) -> None:
        """Before the first change: what only programs that know it may leave standing is cleared."""
        if self._dead:
            raise NotSupported("The image was found to be damaged while it was written to")
        if self._begun:
            return
        header = self.header
        unknown = header.header.autoclear_features & ~_KNOWN_AUTOCLEAR
        lost = header.bitmaps is not None and not header.header.autoclear_features & AUTOCLEAR_BITMAPS
        if unknown or lost:
            header.header.autoclear_features &= _KNOWN_AUTOCLEAR
            if lost:
                header.bitmaps = None
            self.write_header()
        self._begun = True

    def _range(self, start: int, length: int) -> tuple[int, int, int]:
        """First and last guest cluster of a range, and its end."""
        end = start + length
        bits = self.header.cluster_bits
        return start >> bits, -(-end >> bits), end

    # -- damage

    def _guard_new(self, first: int, count: int) -> None:
        """No run of host clusters may be handed out in which the image's own tables lie."""
        self._check_overlap(first, count)

    def guard_kept(self, host: int, clusters: int, guest: int) -> None:
        """Nor may one be overwritten in place."""
        if host % self.header.cluster_size:
            self._mark_corrupt(f"Data cluster offset {host:#x} unaligned (guest offset: {guest:#x})")
        self._check_overlap(host >> self.header.cluster_bits, clusters)

    def _check_overlap(self, first: int, count: int) -> None:
        from qimg.formats.qcow2.overlap import Overlaps

        if self._overlaps is None:
            self._overlaps = Overlaps(self)
        if self._overlaps.name(first, count) is None:
            return
        self._overlaps = Overlaps(self)  # the table may have moved away since
        name = self._overlaps.name(first, count)
        if name is not None:
            self._mark_corrupt(f"Preventing invalid write on metadata (overlaps with {name})")

    def _mark_corrupt(self, reason: str) -> NoReturn:
        """Note in the header that the image is damaged, and give up. Raises CorruptImage."""
        self._dead = self.warned = True
        text = f"qcow2: Marking image as corrupt: {reason}; further corruption events will be suppressed"
        self.context.warn(Notice(text, plain=True))
        if self.header.version >= 3:
            from qimg.formats.qcow2.structs import Header

            # Only this field: the rest of the header in memory may be ahead of what is on disk.
            where = Header.offset_of("incompatible_features")
            stored = int.from_bytes(self.file.read(where, 8), "big")
            self.file.write((stored | INCOMPAT_CORRUPT).to_bytes(8, "big"), where)
            self.file.flush()
        raise CorruptImage(f"Image is corrupt: {reason}")

    # -- guest data

    def in_place(self, start: int, length: int) -> list[Extent]:
        first, last, end = self._range(start, length)
        runs = Runs(start, length)
        guest = first * self.cluster_size
        for index, low, high in self.tables.pieces(first, last):
            table = self.tables.look(index)
            if table is not None:
                self.entries.in_place(table, low, high, guest, start, end, runs)
            guest += (high - low) * self.cluster_size
        return self.uncover(runs.take())

    def allocate(self, start: int, length: int) -> list[Extent]:
        self.begin()
        first, last, end = self._range(start, length)
        size = self.cluster_size
        runs = Runs(first * size, (last - first) * size)
        guest = first * size
        tail = end == self.size and end % size != 0 and not self._tail_is_kept(end)
        for index, low, high in self.tables.pieces(first, last):
            table = self.tables.change(index, low, high)
            self.entries.allocate(table, low, high, guest, start, end, runs)
            guest += (high - low) * size
        extents = self.uncover(runs.take())
        if tail:
            self._clear_tail(extents[-1])
        self._placed = True
        self._record(start, length)
        # With subclusters only those asked for: their neighbours may hold data.
        return list(clip(extents, start, length))

    def _tail_is_kept(self, end: int) -> bool:
        """Whether the last cluster keeps its place."""
        unit = self.granularity
        start = (end - 1) // unit * unit
        return any(extent.host is not None for extent in self.in_place(start, end - start))

    def _clear_tail(self, extent: Extent) -> None:
        """What lies behind the disk's end in its last cluster would show up when the disk grows."""
        if extent.source is None or extent.host is None or self.header.has_data_file:
            return
        behind = extent.start + extent.length - self.size
        extent.source.zero(extent.host + extent.length - behind, behind, unmap=False)

    def _move(self, guest: int, word: int, host: int, bits: int) -> None:
        """Copy the subclusters `bits` of the cluster at `guest`, whose entry is `word`, to `host`."""
        size = self.cluster_size
        if word & L2_COMPRESSED:
            whole = bytearray(size)
            self.read_into(memoryview(whole), guest)
        else:
            before = word & OFFSET_MASK
            whole = self.guest_storage(guest, before).read(before, size)
        assert bits & ~ALL == 0
        storage = self.guest_storage(guest, host)
        unit = size // 32
        for sub in range(32):
            if bits >> sub & 1:
                storage.write(memoryview(whole)[sub * unit : (sub + 1) * unit], host + sub * unit)

    def mark_zero(self, start: int, length: int) -> None:
        if not self.can_mark_zero:
            raise NotSupported("Zero clusters need qcow2 version 3 where there is a backing file")
        self.begin()
        first, last, end = self._range(start, length)
        covered = self.backing is not None
        guest = first * self.cluster_size
        if end == self.size:
            end = last * self.cluster_size  # the last cluster's rest has no other content
        for index, low, high in self.tables.pieces(first, last):
            if covered or self.tables.look(index) is not None:
                table = self.tables.change(index, low, high)
                self.entries.mark_zero(table, low, high, guest, start, end, covered)
            guest += (high - low) * self.cluster_size
        self._record(start, length)

    def discard(self, start: int, length: int) -> None:
        if self.header.version < 3 and self.backing is not None:
            return
        unit = self.granularity
        low = -(-start // unit) * unit
        high = start + length
        if high < self.size:
            high = high // unit * unit
        if low < high:
            self.mark_zero(low, high - low)

    def read_into(self, buf: Buffer, guest: int) -> None:
        with self._packing:
            self._packer.flush()
        super().read_into(buf, guest)

    def _looks_for_holes(self) -> bool:
        # What was allocated and is not written yet must not pass for zeros.
        return not self._placed and super()._looks_for_holes()

    # -- compression

    def encode(self, data: Bytes) -> bytes | None:
        if not self.can_compress:
            raise NotSupported("Operation not supported")
        return self._encode(data)

    def write_encoded(self, guest: int, data: bytes) -> None:
        self.begin()
        index, entry = divmod(guest >> self.header.cluster_bits, self.tables.entries)
        table = self.tables.change(index, entry, entry + 1)
        with self._packing:
            descriptor = self._packer.put(data)
        before = self.entries.set_compressed(table, entry, descriptor)
        if before & ~1:
            self.entries.placement.give_up(before)
        self._record(guest, min(self.cluster_size, self.size - guest))

    # -- bitmaps

    @property
    def recorder(self) -> Recorder | None:
        """What keeps enabled bitmaps up to date; None where there are no bitmaps."""
        if self._recorder is None and self.directory:
            from qimg.formats.qcow2.bitmap_recorder import Recorder

            self._recorder = Recorder(self)
        return self._recorder

    def _record(self, start: int, length: int) -> None:
        """Guest bytes change: enabled bitmaps have to know."""
        recorder = self.recorder
        if recorder is not None:
            recorder.record(start, length)

    def switch_size(self) -> None:
        """Write everything staged, a new `size` among it; bitmaps follow."""
        recorder = self.recorder
        if recorder is not None:
            recorder.hold()
        self.flush()
        if recorder is not None:
            recorder.resized(self.size)
            self.flush()

    # -- changes of the whole: each in a module of its own, loaded when it is asked for

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        from qimg.formats.qcow2.resize import ResizeChanges

        ResizeChanges.resize(self, size, preallocation, shown=shown)

    def change_backing(self, backing: Reference | None) -> None:
        from qimg.formats.qcow2.amend import AmendChanges

        AmendChanges.change_backing(self, backing)

    def amend(
        self, options: dict[str, Value], *, force: bool = False, progress: Callable[[int, int], None]
    ) -> None:
        from qimg.formats.qcow2.amend import AmendChanges

        AmendChanges.amend(self, options, force=force, progress=progress)

    def make_empty(self) -> None:
        from qimg.formats.qcow2.empty import EmptyChanges

        EmptyChanges.make_empty(self)

    def create_snapshot(self, name: str, *, date_sec: int, date_nsec: int) -> None:
        from qimg.formats.qcow2.snapshot_write import SnapshotChanges

        SnapshotChanges.create_snapshot(self, name, date_sec=date_sec, date_nsec=date_nsec)

    def apply_snapshot(self, which: str) -> None:
        from qimg.formats.qcow2.snapshot_write import SnapshotChanges

        SnapshotChanges.apply_snapshot(self, which)

    def delete_snapshot(self, name: str) -> None:
        from qimg.formats.qcow2.snapshot_write import SnapshotChanges

        SnapshotChanges.delete_snapshot(self, name)

    def add_bitmap(self, name: str, granularity: int | None) -> None:
        from qimg.formats.qcow2.bitmap_changes import BitmapChanges

        BitmapChanges.add_bitmap(self, name, granularity)

    def remove_bitmap(self, name: str) -> None:
        from qimg.formats.qcow2.bitmap_changes import BitmapChanges

        BitmapChanges.remove_bitmap(self, name)

    def change_bitmap(
        self, name: str, *, enabled: bool | None = None, clear: bool = False, merge: BitmapData | None = None
    ) -> None:
        from qimg.formats.qcow2.bitmap_changes import BitmapChanges

        BitmapChanges.change_bitmap(self, name, enabled=enabled, clear=clear, merge=merge)

    def store_bitmaps(self, bitmaps: Iterable[BitmapData]) -> None:
        from qimg.formats.qcow2.bitmap_changes import BitmapChanges

        BitmapChanges.store_bitmaps(self, bitmaps)

    # -- the end

    @property
    def wants_flush(self) -> bool:  # type: ignore[override]
        return self.tables.staged + self.refcounts.staged > STAGE_LIMIT

    def flush(self) -> None:
        self._packer.flush()
        if self._recorder is not None:
            self._recorder.store()
        refcounts, tables = self.refcounts, self.tables
        refcounts.settle()
        fresh = tables.write_new()
        blocks = refcounts.write_new()
        # A new block may lie where an old one counts: that has to be so before anything leads to it.
        raised = refcounts.write_raised()
        if blocks:
            self._barrier()
            refcounts.link()
        if blocks or raised or fresh or self._placed:
            self._barrier()
        self._placed = False
        if tables.write_links():
            self._barrier()
        if self.header_changed:
            self.write_header()
        self._lower()
        if self._active is not None:
            self._active.forget()

    def _lower(self) -> None:
        """Lower counts, and give the space of what nobody has any more back to the file's host."""
        if not self.refcounts.falling:
            return
        bits = self.header.cluster_bits
        for first, count in self.refcounts.lower():
            self.file.discard(first << bits, count << bits)
        self.file.flush()

    def _barrier(self) -> None:
        if self.header.has_data_file:
            self.data.flush()
        self.file.flush()

    def write_header(self) -> None:
        """Make the header in memory the image's. Durable when it returns. Raises LimitError where it does not
        fit, StorageError."""
        write_header(self.file, self.header)
        self.header_changed = False

    def abandon(self) -> None:
        """What was not flushed is forgotten."""
