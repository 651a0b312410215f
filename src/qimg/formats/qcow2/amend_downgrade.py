"""From version 3 to version 2 (qcow2 sheet, section 17): no zero clusters, no feature bits.

Zero clusters become data full of zeros, or nothing where no backing file would show through. That goes for
the tables of internal snapshots as well. A table that several states share is rewritten in its place,
because it means the same to each of them before and afterwards.
"""

from __future__ import annotations

import sys
from array import array

from qimg.errors import NotSupported, OptionError
from qimg.formats.qcow2.refcounts import big_endian
from qimg.formats.qcow2.snapshot import validate_l1
from qimg.formats.qcow2.structs import (
    COMPRESSION_ZLIB,
    COPIED,
    INCOMPAT_COMPRESSION,
    L2_COMPRESSED,
    L2_ZERO,
    OFFSET_MASK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qimg.formats.qcow2.write import WritableQcow2

#: Bytes of changed tables after which a batch ends.
_BATCH = 8 << 20
_SECTOR = 512
_LOW_BIT = bytes(byte & 1 for byte in range(256))
_COMPRESSED_BIT = bytes(byte >> 6 & 1 for byte in range(256))


def check_downgrade(image: WritableQcow2, *, bits: int, size: int) -> None:
    """Raise OptionError or NotSupported for what version 2 cannot hold; the image is going to have counts of
    `bits` bits and `size` guest bytes."""
    header = image.header
    if bits != 16:
        raise OptionError("compat=0.10 requires refcount_bits=16", option="compat")
    if header.has_data_file:
        raise NotSupported("Cannot downgrade an image with a data file")
    if any(snapshot.disk_size(size) != size for snapshot in image.snapshot_entries()):
        raise NotSupported("Internal snapshots prevent downgrade of image")
    tables = _l2_tables(image)
    others = header.header.incompatible_features & ~INCOMPAT_COMPRESSION
    if others:
        raise NotSupported(f"Cannot downgrade an image with incompatible features {others:#x} set")
    if header.header.compression_type != COMPRESSION_ZLIB and _has_compressed(image, tables):
        raise NotSupported(
            "Cannot downgrade an image with zstd compression type and existing compressed clusters"
        )


def downgrade(image: WritableQcow2, progress: Callable[[int, int], None]) -> None:
    """Make `image`, which has passed `check_downgrade`, one of version 2.

    Raises StorageError, CorruptImage."""
    image.flush()
    image.reload()
    _Rewrite(image).run(progress)
    fixed = image.header.header
    fixed.version = 2
    fixed.incompatible_features = fixed.compatible_features = fixed.autoclear_features = 0
    fixed.compression_type = COMPRESSION_ZLIB
    image.header_changed = True
    image.flush()
    # Not `reload`: opening it anew would tell that version 2 loses sight of bitmaps, which is for later.
    image.header.bitmaps = None
    image.directory = []
    image.restart()


def _has_compressed(image: WritableQcow2, tables: Iterable[int]) -> bool:
    return any(
        image.file.read(place, image.cluster_size)[::8].translate(_COMPRESSED_BIT).find(1) >= 0
        for place in tables
    )


def _l2_tables(image: WritableQcow2) -> dict[int, tuple[bool, int]]:
    """Host offset of every L2 table, of the active state and of snapshots; whether it belongs to the active
    state alone, and its number in the L1 table."""
    places = {place: (alone, index) for place, alone, index in _tables_of(image, bytes(image.tables.l1))}
    for snapshot in image.snapshot_entries():
        validate_l1(image.file, image.header, snapshot)
        entry = snapshot.entry
        l1 = image.file.read(entry.l1_table_offset, entry.l1_size * 8)
        for place, _alone, index in _tables_of(image, bytes(l1)):
            places.setdefault(place, (False, index))
    return places


def _tables_of(image: WritableQcow2, l1: bytes) -> Iterator[tuple[int, bool, int]]:
    words = array("Q", l1)
    if sys.byteorder == "little":
        words.byteswap()
    for index, word in enumerate(words):
        offset = word & OFFSET_MASK
        if offset and offset % image.cluster_size == 0:
            yield offset, bool(word & COPIED), index


class _Rewrite:
    """Takes the zero flag out of all L2 tables, a batch of tables at a time."""

    def __init__(self, image: WritableQcow2) -> None:
        self.image = image
        self.covered = image.header.backing_name is not None
        self.changed: list[tuple[int, bytes]] = []  # (host offset, bytes) to be written over tables
        self.released: list[tuple[int, int]] = []  # (cluster, references) to be given up afterwards
        self.bytes = 0

    def run(self, progress: Callable[[int, int], None]) -> None:
        """All tables."""
        places = sorted(_l2_tables(self.image).items())
        for number, (place, (alone, index)) in enumerate(places):
            self._table(place, alone, index * self.image.header.l2_entries * self.image.cluster_size)
            if self.bytes >= _BATCH or self.image.wants_flush:
                self._commit()
            progress(number, len(places))
        self._commit()
        progress(1, 1)

    def _table(self, place: int, alone: bool, guest: int) -> None:
        """The table at `place`, for the guest's bytes from `guest` on."""
        raw = self.image.file.read(place, self.image.cluster_size)
        flags = raw[7::8].translate(_LOW_BIT)
        index = flags.find(1)
        if index < 0:
            return
        users = self.image.refcounts.get(place // self.image.cluster_size)
        words = array("Q", bytes(raw))
        if sys.byteorder == "little":
            words.byteswap()
        low = high = index
        while index >= 0:
            if not words[index] & L2_COMPRESSED:
                here = guest + index * self.image.cluster_size
                words[index] = self._entry(words[index], users, alone and users == 1, here)
                high = index + 1
            index = flags.find(1, index + 1)
        low = low * 8 // _SECTOR * _SECTOR // 8
        high = min(-(-high * 8 // _SECTOR) * _SECTOR // 8, len(words))
        self.changed.append((place + 8 * low, big_endian(words[low:high])))
        self.bytes += 8 * (high - low)

    def _entry(self, word: int, users: int, alone: bool, guest: int) -> int:
        """What the zero cluster `word` at `guest`, in a table that has `users`, becomes."""
        image, size = self.image, self.image.cluster_size
        host = word & OFFSET_MASK
        if host % size:
            image.guard_kept(host, 1, 0)
        if host and image.refcounts.get(host // size) == users:
            # All who refer to the cluster do so by this entry: it can hold the zeros.
            image.guard_kept(host, 1, 0)
            image.guest_storage(guest, host).zero(host, size)
            return word & ~L2_ZERO
        if host:
            self.released.append((host // size, users))
        if not self.covered:
            return 0
        ((cluster, _count),) = image.refcounts.take_any(1)
        for _more in range(users - 1):
            image.refcounts.share(cluster)
        image.guest_storage(guest, cluster * size).zero(cluster * size, size)
        return cluster * size | (COPIED if alone else 0)

    def _commit(self) -> None:
        """Zeros and raised counts first, then the tables, then what they no longer refer to."""
        image = self.image
        image.flush()
        image.file.flush()
        for offset, raw in self.changed:
            image.file.write(raw, offset)
        image.file.flush()
        for cluster, references in self.released:
            for _one in range(references):
                image.refcounts.release(cluster)
        image.flush()
        self.changed, self.released, self.bytes = [], [], 0
