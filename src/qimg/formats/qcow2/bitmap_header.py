"""The bitmaps extension comes into the header, or goes (section 3).

What follows it moves, and what leads to it lies in the first sector: a disk writes single sectors whole, but
not the sectors of a request together. So they are written one after the other, those that nothing leads to
first, and the name of the backing file, which moves too, is somewhere else meanwhile.
"""

from __future__ import annotations

from qimg.formats.qcow2.structs import Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.qcow2.write import WritableQcow2
    from qimg.storage.base import Storage

_SECTOR = 512


def write_with_extension(image: WritableQcow2) -> None:
    """Write the header, which has bitmaps now and had none. Durable when it returns. Raises StorageError."""
    old, new = _clusters(image)
    sectors = _differing(old, new)
    if len(sectors) > 1:
        new = _keep_name(image.file, old, new, first=old)
    _write(image.file, new, reversed(sectors))
    image.header_changed = False


def write_without_extension(image: WritableQcow2) -> None:
    """Write the header, which had bitmaps and has none now. Durable when it returns. Raises StorageError."""
    old, new = _clusters(image)
    sectors = _differing(old, new)
    if len(sectors) > 1:
        kept = _keep_name(image.file, old, new, first=new)
        if kept != new:
            _write(image.file, kept, sectors[1:])
            sectors = sectors[:1]
    _write(image.file, new, sectors)
    image.header_changed = False


def _clusters(image: WritableQcow2) -> tuple[bytes, bytes]:
    """The first cluster as it is stored, and as it is to be."""
    return bytes(image.file.read(0, image.header.cluster_size)), image.header.pack()


def _differing(old: bytes, new: bytes) -> list[int]:
    """Offsets of the sectors that differ, and of the first one."""
    offsets = range(0, len(new), _SECTOR)
    return [at for at in offsets if not at or old[at : at + _SECTOR] != new[at : at + _SECTOR]]


def _write(file: Storage, cluster: bytes, sectors: Iterable[int]) -> None:
    for at in sectors:
        file.write(cluster[at : at + _SECTOR], at)
        file.flush()


def _keep_name(file: Storage, old: bytes, new: bytes, *, first: bytes) -> bytes:
    """Put the backing file's name where neither `old` nor `new` has anything, and have the first sector, that
    of `first` otherwise, lead there; `new` with the name there too. Where there is no room, or no name,
    nothing is done."""
    header = Header.unpack(old)
    size = header.backing_file_size
    if not header.backing_file_offset or not size:
        return new
    name = old[header.backing_file_offset : header.backing_file_offset + size]
    end = max(len(old.rstrip(b"\0")), len(new.rstrip(b"\0")))
    place = -(-end // _SECTOR) * _SECTOR
    if place + size > len(new):
        return new
    kept = new[:place] + name + new[place + size :]
    _write(file, kept, [at for at in _differing(new, kept) if at])
    field = Header.offset_of("backing_file_offset")
    _write(file, first[:field] + place.to_bytes(8, "big") + first[field + 8 :], [0])
    return kept
