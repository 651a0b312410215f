"""The snapshot table (qcow2 sheet, section 7)."""

from __future__ import annotations

from qimg.errors import FormatError
from qimg.formats.base import SnapshotInfo
from qimg.formats.qcow2.structs import (
    MAX_L1_BYTES,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_BYTES,
    NO_ICOUNT,
    SnapshotEntry,
    SnapshotExtra,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage

_CHUNK = 64 << 10
#: Extra data that version 3 demands: the first two fields.
V3_EXTRA = 16


class Snapshot:
    """One entry of the table, kept as it is stored: there may be 65536. `extra` is its extra data."""

    __slots__ = ("_fixed", "extra", "id", "name")

    def __init__(self, fixed: bytes, extra: bytes, id: bytes, name: bytes) -> None:
        self._fixed = fixed
        self.extra = extra
        self.id = id
        self.name = name

    @property
    def entry(self) -> SnapshotEntry:
        """The fixed part."""
        return SnapshotEntry.unpack(self._fixed)

    @property
    def id_text(self) -> str:
        """The id, as text."""
        return _text(self.id)

    @property
    def name_text(self) -> str:
        """The name, as text."""
        return _text(self.name)

    @property
    def vm_state_size(self) -> int:
        """Bytes of saved machine state. The 64-bit field counts where it is there."""
        if len(self.extra) < 8:
            return self.entry.vm_state_size
        return self._extra().vm_state_size

    def disk_size(self, current: int) -> int:
        """Guest bytes of the snapshot; `current` is the image's, which stands for a missing field."""
        return current if len(self.extra) < V3_EXTRA else self._extra().disk_size

    @property
    def icount(self) -> int | None:
        """Instructions executed, None where unknown."""
        if len(self.extra) < SnapshotExtra.SIZE:
            return None
        value = self._extra().icount
        return None if value == NO_ICOUNT else value

    def _extra(self) -> SnapshotExtra:
        return SnapshotExtra.unpack(self.extra[: SnapshotExtra.SIZE].ljust(SnapshotExtra.SIZE, b"\0"))

    def info(self) -> SnapshotInfo:
        """What ``info`` and ``snapshot -l`` show."""
        entry = self.entry
        return SnapshotInfo(
            id=self.id_text,
            name=self.name_text,
            vm_state_size=self.vm_state_size,
            date_sec=entry.date_sec,
            date_nsec=entry.date_nsec,
            vm_clock_nsec=entry.vm_clock_nsec,
            icount=self.icount,
        )


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


class SnapshotTable:
    """The entries, in order, and the `length` of the table in bytes."""

    def __init__(self, snapshots: list[Snapshot], length: int) -> None:
        self.snapshots = snapshots
        self.length = length

    def find(self, id: str | None, name: str | None) -> Snapshot | None:
        """The first snapshot with this id and this name (as far as given)."""
        for snapshot in self.snapshots:
            if (id is None or snapshot.id_text == id) and (name is None or snapshot.name_text == name):
                return snapshot
        return None


class _Window:
    """Bytes of a file from `start` on, read in chunks as they are needed."""

    def __init__(self, file: Storage, start: int) -> None:
        self._file = file
        self._base = start
        self._data = b""

    def bytes_at(self, offset: int, length: int) -> bytes:
        """`length` bytes at the file offset `offset`, which only grows from call to call."""
        if offset + length > self._base + len(self._data):
            self._data = bytes(self._file.read(offset, max(length, _CHUNK)))
            self._base = offset
        at = offset - self._base
        return self._data[at : at + length]


def read_snapshots(file: Storage, header: ParsedHeader) -> SnapshotTable:
    """The snapshot table that `header` (validated) points to. At most 65536 entries and 64 MiB.

    Raises FormatError, StorageError.
    """
    start = header.header.snapshots_offset
    window = _Window(file, start)
    found: list[Snapshot] = []
    at = 0
    for number in range(header.header.nb_snapshots):
        at = (at + 7) & ~7
        fixed = window.bytes_at(start + at, SnapshotEntry.SIZE)
        entry = SnapshotEntry.unpack(fixed)
        at += SnapshotEntry.SIZE
        if entry.extra_data_size > MAX_SNAPSHOT_EXTRA:
            raise FormatError(
                f"Too much extra metadata in snapshot table entry {number}",
                file=file.name,
                field="snapshot.extra_data_size",
                offset=start + at - SnapshotEntry.SIZE + SnapshotEntry.offset_of("extra_data_size"),
                expected=f"<= {MAX_SNAPSHOT_EXTRA}",
                found=entry.extra_data_size,
                hint="You can force-remove this extra metadata with qemu-img check -r all",
            )
        lengths = entry.extra_data_size, entry.id_size, entry.name_size
        parts = []
        for length in lengths:
            parts.append(window.bytes_at(start + at, length))
            at += length
        if at > MAX_SNAPSHOT_TABLE_BYTES:
            raise FormatError(
                "Snapshot table is too big",
                file=file.name,
                field="snapshot",
                offset=start,
                expected=f"<= {MAX_SNAPSHOT_TABLE_BYTES} bytes",
                found=at,
                hint=f"You can force-remove all {header.header.nb_snapshots - number} overhanging snapshots"
                " with qemu-img check -r all",
            )
        found.append(Snapshot(fixed, parts[0], parts[1], parts[2]))
    return SnapshotTable(found, at)


def validate_l1(file: Storage, header: ParsedHeader, snapshot: Snapshot) -> None:
    """Raise FormatError unless the snapshot's L1 table can be read."""
    entry = snapshot.entry
    if entry.l1_size * 8 > MAX_L1_BYTES:
        raise FormatError(
            "Snapshot L1 table too large",
            file=file.name,
            field="snapshot.l1_size",
            expected=f"<= {MAX_L1_BYTES // 8}",
            found=entry.l1_size,
        )
    limit = (1 << 63) - 1 - entry.l1_size * 8
    if entry.l1_table_offset > limit or entry.l1_table_offset % header.cluster_size:
        raise FormatError(
            "Snapshot L1 table offset invalid",
            file=file.name,
            field="snapshot.l1_table_offset",
            expected="cluster aligned, below 2^63",
            found=entry.l1_table_offset,
        )
