"""Creating, applying and deleting internal snapshots (qcow2 sheet, section 7; snapshot sheet).

Each is one `Shadow`: durable when it returns, and whole or not there after a crash.

    create   the active tables get one reference more, lose COPIED and have two L1 tables from now on
    apply    the snapshot's tables become the active ones as well; what only the old ones had is free
    delete   the snapshot's references go; what is left with one owner gets COPIED back
"""

from __future__ import annotations

import os
from array import array
from errno import EFBIG, EINVAL

from qimg.errors import LimitError, NotSupported, OptionError, QimgError, StorageError
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.shadow import Shadow
from qimg.formats.qcow2.shadow_walk import read_l1
from qimg.formats.qcow2.snapshot import Snapshot, validate_l1
from qimg.formats.qcow2.structs import (
    MAX_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    NO_ICOUNT,
    SnapshotEntry,
    SnapshotExtra,
)
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.write import WritableQcow2

#: Bytes of a name that the real program takes from its command line; it leaves out the rest.
MAX_NAME = 255
_UNSUPPORTED = "Operation not supported"


class SnapshotChanges:
    """What `WritableQcow2` does to its snapshots; `image` is the writer."""

    @staticmethod
    def create_snapshot(image: WritableQcow2, name: str, *, date_sec: int, date_nsec: int) -> None:
        """`Image.create_snapshot`."""
        if image.header.has_data_file:
            raise NotSupported(_UNSUPPORTED)
        _ready(image)
        create(image, name, date_sec, date_nsec)
        image.reload()

    @staticmethod
    def apply_snapshot(image: WritableQcow2, which: str) -> None:
        """`Image.apply_snapshot`."""
        check_apply(image)
        _ready(image)
        apply(image, which)
        image.reload()

    @staticmethod
    def delete_snapshot(image: WritableQcow2, name: str) -> None:
        """`Image.delete_snapshot`."""
        _ready(image)
        delete(image, name)
        image.reload()


def _ready(image: WritableQcow2) -> None:
    image.begin()
    image.flush()


class ApplyFailed(QimgError):
    """A snapshot cannot be gone back to: `detail` says what is in the way, the message sums it up."""

    def __init__(self, reason: str, detail: QimgError | None = None) -> None:
        super().__init__(f"Failed to load snapshot: {reason}")
        self.detail = detail


def create(image: Qcow2Image, name: str, date_sec: int, date_nsec: int) -> None:
    """Add a snapshot of the disk as it is, without machine state.

    Raises NotSupported (external data file), LimitError (too many), StorageError (EINVAL: a count at its
    largest), CorruptImage."""
    header = image.header.header
    if image.header.has_data_file:
        raise NotSupported(_UNSUPPORTED)
    if header.nb_snapshots >= MAX_SNAPSHOTS:
        raise LimitError(os.strerror(EFBIG))
    with Shadow(image) as shadow:
        entries = list(shadow.snapshots.snapshots) if shadow.snapshots is not None else []
        l1 = shadow.active_l1()
        shadow.walker.raise_(l1)
        shadow.share_tables(l1)
        place = shadow.place(big_endian(l1))
        entries.append(_new(image, entries, name, place, date_sec, date_nsec))
        _set_table(shadow, entries)
        shadow.set_active_l1(l1)
        shadow.commit()


def check_apply(image: Qcow2Image) -> None:
    """Raise what keeps any snapshot of `image` from being applied: QimgError (bitmaps), ApplyFailed."""
    if image.directory:
        raise QimgError("Device has active dirty bitmaps")
    if image.header.has_data_file:
        raise ApplyFailed(_UNSUPPORTED)


def apply(image: Qcow2Image, which: str) -> None:
    """Go back to the snapshot with the id `which`, else with that name: content and size of the disk.

    What a snapshot holds behind the end of its disk (machine state) is kept, as the real program does.
    Raises QimgError (bitmaps), ApplyFailed, StorageError, CorruptImage."""
    check_apply(image)
    with Shadow(image) as shadow:
        table = shadow.snapshots
        chosen = None if table is None else table.find(which, None) or table.find(None, which)
        if chosen is None:
            raise ApplyFailed("No such file or directory")
        size = _checked_size(image, chosen)
        old, new = shadow.active_l1(), read_l1(image.file, chosen.entry.l1_table_offset, chosen.entry.l1_size)
        shadow.walker.lower(old, new)
        try:
            shadow.walker.raise_(new, old)
        except StorageError as error:
            raise ApplyFailed(error.reason) from error
        needed = -(-size // (image.cluster_size * image.header.l2_entries))
        if needed > len(new):
            new.extend(array("Q", bytes(8 * (needed - len(new)))))
        shadow.own_tables(new)
        shadow.set_active_l1(new)
        if size != image.size:
            shadow.set(size=size)
        shadow.commit(give_back=True)


def _checked_size(image: Qcow2Image, snapshot: Snapshot) -> int:
    """Guest bytes of the disk of `snapshot`. Raises ApplyFailed."""
    try:
        validate_l1(image.file, image.header, snapshot)
    except QimgError as error:
        large = snapshot.entry.l1_size * 8 > MAX_L1_BYTES
        raise ApplyFailed(os.strerror(EFBIG if large else EINVAL), error) from error
    size = snapshot.disk_size(image.size)
    if size == image.size:
        return size
    if size % SECTOR:
        detail: QimgError = OptionError(f"The new size must be a multiple of {SECTOR}")
        raise ApplyFailed(os.strerror(EINVAL), detail)
    if image.header.version < 3:
        detail = NotSupported("Can't resize a v2 image which has snapshots")
        raise ApplyFailed(_UNSUPPORTED, detail)
    if -(-size // (image.cluster_size * image.header.l2_entries)) * 8 > MAX_L1_BYTES:
        raise ApplyFailed(os.strerror(EFBIG), LimitError("Failed to grow the L1 table: File too large"))
    return size


def delete(image: Qcow2Image, name: str) -> None:
    """Remove the first snapshot called `name`.

    Raises NotSupported (there is none), FormatError (its L1 table), StorageError, CorruptImage."""
    if not image.header.header.nb_snapshots or image.header.has_data_file:
        raise NotSupported("snapshot not found")
    with Shadow(image) as shadow:
        assert shadow.snapshots is not None
        chosen = shadow.snapshots.find(None, name)
        if chosen is None:
            raise NotSupported("snapshot not found")
        validate_l1(image.file, image.header, chosen)
        entry = chosen.entry
        shadow.walker.lower(read_l1(image.file, entry.l1_table_offset, entry.l1_size))
        l1 = shadow.active_l1()
        shadow.own_tables(l1)
        shadow.give_up(entry.l1_table_offset, 8 * entry.l1_size)
        _set_table(shadow, [snapshot for snapshot in shadow.snapshots.snapshots if snapshot is not chosen])
        shadow.set_active_l1(l1)
        shadow.commit(give_back=True)


# -- the table


def _new(
    image: Qcow2Image, entries: list[Snapshot], name: str, place: int, date_sec: int, date_nsec: int
) -> Snapshot:
    id = str(max((_number(snapshot.id) for snapshot in entries), default=0) + 1).encode()
    entry = SnapshotEntry(
        l1_table_offset=place,
        l1_size=image.header.header.l1_size,
        date_sec=date_sec & 0xFFFF_FFFF,
        date_nsec=date_nsec,
    )
    extra = SnapshotExtra(disk_size=image.size)
    stored = name.encode("utf-8", "surrogateescape")[:MAX_NAME]
    return Snapshot(entry.pack(), extra.pack(), id, stored)


def _number(id: bytes) -> int:
    """The number that an id begins with, 0 if it begins with none."""
    digits = id.lstrip().removeprefix(b"+")
    length = len(digits) - len(digits.lstrip(b"0123456789"))
    return int(digits[:length][:20] or b"0")


def pack_table(entries: list[Snapshot], current: int) -> bytes:
    """The snapshot table as it is stored; `current` is the disk's size for entries that do not tell theirs.

    Raises LimitError."""
    parts: list[bytes] = []
    length = 0
    for snapshot in entries:
        raw = _pack(snapshot, current)
        parts.append(bytes(-length % 8) + raw)
        length += len(parts[-1])
    if length > MAX_SNAPSHOT_TABLE_BYTES or len(entries) > MAX_SNAPSHOTS:
        raise LimitError(os.strerror(EFBIG))
    return b"".join(parts)


def _pack(snapshot: Snapshot, current: int) -> bytes:
    """One entry. Extra data is made whole, and kept where it is longer than what is known."""
    entry = snapshot.entry
    state = snapshot.vm_state_size
    known = SnapshotExtra(
        vm_state_size=state,
        disk_size=snapshot.disk_size(current),
        icount=NO_ICOUNT if snapshot.icount is None else snapshot.icount,
    )
    extra = known.pack() + snapshot.extra[SnapshotExtra.SIZE :]
    entry.vm_state_size = state if state >> 32 == 0 else 0
    entry.extra_data_size = len(extra)
    entry.id_size, entry.name_size = len(snapshot.id), len(snapshot.name)
    return entry.pack() + extra + snapshot.id + snapshot.name


def _set_table(shadow: Shadow, entries: list[Snapshot]) -> None:
    """Make `entries` the snapshot table."""
    if shadow.snapshots is not None:
        shadow.give_up(shadow.header.snapshots_offset, shadow.snapshots.length)
    table = pack_table(entries, shadow.image.size)
    shadow.set(nb_snapshots=len(entries), snapshots_offset=shadow.place(table))
