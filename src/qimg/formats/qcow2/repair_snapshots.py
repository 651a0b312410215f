"""Damaged snapshot tables: reading what can be read of them, and writing them anew (qcow2 sheet,
sections 7 and 15)."""

from __future__ import annotations

from struct import pack

from qimg.errors import CorruptImage
from qimg.formats.qcow2.snapshot import V3_EXTRA, Snapshot, SnapshotTable
from qimg.formats.qcow2.structs import (
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    NO_ICOUNT,
    Header,
    SnapshotEntry,
    SnapshotExtra,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.repair import Repairer
    from qimg.storage.base import Storage

_CHUNK = 256 << 10


class LenientTable:
    """`table` is what is kept; `fixed` how many findings that mends; `rewrite`: it has to be written anew."""

    def __init__(self, table: SnapshotTable) -> None:
        self.table = table
        self.fixed = 0
        self.rewrite = False


class _Reader:
    """Goes through the bytes of a file from `at` on, in chunks."""

    def __init__(self, file: Storage, at: int) -> None:
        self._file = file
        self.at = at
        self._base = at
        self._data = b""

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        start = self.at - self._base
        if start < 0 or start + length > len(self._data):
            self._data = bytes(self._file.read(self.at, max(length, _CHUNK)))
            self._base, start = self.at, 0
        self.at += length
        return self._data[start : start + length]


def read_leniently(file: Storage, header: ParsedHeader, report: Callable[[str], None]) -> LenientTable:
    """The snapshot table without the entries and the extra data that are too many; `report` hears of each.
    Changes nothing. Raises StorageError."""
    start = header.header.snapshots_offset
    found = LenientTable(SnapshotTable([], 0))
    number = header.header.nb_snapshots
    if number > MAX_SNAPSHOTS:
        report(f"Discarding {number - MAX_SNAPSHOTS} overhanging snapshots")
        found.fixed += number - MAX_SNAPSHOTS
        number = MAX_SNAPSHOTS
    reader = _Reader(file, start)
    left_out = 0
    for index in range(number):
        reader.at = start + ((reader.at - start + 7) & ~7)
        before = reader.at
        snapshot, skipped = _read_entry(reader)
        if skipped:
            size = skipped + MAX_SNAPSHOT_EXTRA
            report(
                f"Discarding too much extra metadata in snapshot table entry {index} ({size} >"
                f" {MAX_SNAPSHOT_EXTRA})"
            )
            found.fixed += 1
            found.rewrite = True
            left_out += skipped
        if reader.at - start - left_out > MAX_SNAPSHOT_TABLE_BYTES:
            report(f"Discarding {number - index} overhanging snapshots (snapshot table is too big)")
            found.fixed += number - index
            reader.at = before
            break
        found.table.snapshots.append(snapshot)
    found.table.length = reader.at - start
    if header.version >= 3:
        _complete(found, report)
    return found


def _read_entry(reader: _Reader) -> tuple[Snapshot, int]:
    """One entry, and how many bytes of its extra data were left out."""
    fixed = reader.take(SnapshotEntry.SIZE)
    entry = SnapshotEntry.unpack(fixed)
    extra = reader.take(min(entry.extra_data_size, MAX_SNAPSHOT_EXTRA))
    skipped = entry.extra_data_size - len(extra)
    reader.at += skipped
    id = reader.take(entry.id_size)
    return Snapshot(fixed, extra, id, reader.take(entry.name_size)), skipped


def _complete(found: LenientTable, report: Callable[[str], None]) -> None:
    for index, snapshot in enumerate(found.table.snapshots):
        if len(snapshot.extra) < V3_EXTRA:
            report(f"Repairing snapshot table entry {index} is incomplete")
            found.fixed += 1
            found.rewrite = True


def pack_table(snapshots: list[Snapshot], disk_size: int) -> bytes:
    """The table with all known fields in every entry; `disk_size` stands for the sizes that are missing."""
    table = bytearray()
    for snapshot in snapshots:
        table += bytes(-len(table) % 8)
        icount = snapshot.icount
        extra = SnapshotExtra(
            vm_state_size=snapshot.vm_state_size,
            disk_size=snapshot.disk_size(disk_size),
            icount=NO_ICOUNT if icount is None else icount,
        ).pack()
        extra += snapshot.extra[SnapshotExtra.SIZE :]
        entry = snapshot.entry
        entry.vm_state_size = snapshot.vm_state_size if snapshot.vm_state_size >> 32 == 0 else 0
        entry.extra_data_size = len(extra)
        table += entry.pack() + extra + snapshot.id + snapshot.name
    return bytes(table)


def write_table(repairer: Repairer, table: SnapshotTable, *, release_old: bool) -> None:
    """Write `table` to a new place and let the header lead there. The counts are right already; those of
    the old place fall with `release_old`. Raises StorageError, CorruptImage."""
    from qimg.formats.qcow2.live_refcounts import LiveRefcounts
    from qimg.formats.qcow2.repair_tables import TableNames

    file, header = repairer.file, repairer.header
    size = header.cluster_size
    names = TableNames(repairer)

    def guard(first: int, count: int) -> None:
        for cluster in range(first, first + count):
            # What the old table takes is counted, as far as it lies in the file.
            name = names.name(cluster, besides="snapshot table")
            if name is not None:
                text = f"Image is corrupt: Preventing invalid write on metadata (overlaps with {name})"
                raise CorruptImage(text)

    raw = pack_table(table.snapshots, header.virtual_size)
    old, length = header.header.snapshots_offset, table.length
    counts = LiveRefcounts(file, header, guard)
    new = counts.take(-(-len(raw) // size)) * size if raw else 0
    counts.settle()
    if raw:
        file.write(raw, new)
    counts.write_new()
    counts.write_raised()
    file.flush()
    counts.link()
    file.flush()
    header.header.snapshots_offset = new
    file.write(pack(">IQ", len(table.snapshots), new), Header.offset_of("nb_snapshots"))
    file.flush()
    if release_old and length:
        first = old // size
        counts.release(first, -(-(old + length) // size) - first)
        counts.lower()
        file.flush()
    table.length = len(raw)
