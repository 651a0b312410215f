"""Growing an image of one extent (qimg only; vmdk sheet 3, 4).

A sparse one: where the grain tables do not suffice, new directories and the missing tables go behind the
data; then one write of the first sector switches to them and to the new size. The old directories stay
behind, unused. A flat one: first the extent's file gets longer, then the descriptor says so.
"""

from __future__ import annotations

from array import array

from qimg.errors import LimitError, NotSupported
from qimg.extent import MAPPED, ZERO
from qimg.formats.vmdk.descriptor import FLAT, MONOLITHIC_FLAT
from qimg.formats.vmdk.header import parse_sparse
from qimg.formats.vmdk.options import MAX_SPARSE
from qimg.formats.vmdk.part import FlatPart
from qimg.formats.vmdk.sparse import SparsePart
from qimg.formats.vmdk.structs import KDMV, SECTOR, SparseHeader
from qimg.formats.vmdk.writing import little
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.tables import WordTable
    from qimg.formats.vmdk.image import VmdkImage

#: Directory entries copied at once.
_STEP = 1 << 16


def resize(image: VmdkImage, size: int, preallocation: str, shown: int) -> None:
    """Raises NotSupported, LimitError, StorageError."""
    settle = getattr(size, "settle", None)
    old, size = image.size, round_up(int(size), SECTOR)
    part = _part(image)
    if preallocation != "off":
        raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
    if size < old:
        raise NotSupported("Shrinking images is currently not supported")
    if isinstance(part, FlatPart):
        _grow_flat(image, part, size)
    else:
        _grow_sparse(image, part, size, shown, settle)
    image.set_parts([part])
    _update_text(image, size)


def _grow_flat(image: VmdkImage, part: FlatPart, size: int) -> None:
    """Raises NotSupported, StorageError."""
    file = part.file
    if any(not extent.flags & ZERO for extent in file.extents(part.size, max(0, file.size - part.size))):
        raise NotSupported(f"'{file.name}' holds bytes behind the extent, which would become visible")
    image.begin()
    if file.size < size:
        file.resize(size)
    file.flush()
    part.size = size


def _grow_sparse(
    image: VmdkImage, part: SparsePart, size: int, shown: int, settle: Callable[[int, bool], None] | None
) -> None:
    """Raises NotSupported, LimitError, StorageError. `shown`, `settle`: see `GuestSize`."""
    old = image.size
    if size > MAX_SPARSE:
        raise LimitError(f"The image size is too large for file format 'vmdk' (at most {MAX_SPARSE} bytes)")
    if shown > old and size > old and not part.geometry.zeroed_grain:
        raise NotSupported("A disk without zeroed grains cannot grow over a longer backing file")
    image.begin()
    if settle is not None:
        settle(old, shown > old)
    _clear_tail(part, old)
    image.flush()
    header = _grow(part, size, shown)
    part.file.write(header.pack(), 0)
    part.file.flush()


def _part(image: VmdkImage) -> SparsePart | FlatPart:
    """The one extent. Raises NotSupported where there are more, or of another kind."""
    part = image.parts[0] if len(image.parts) == 1 and image.can_write else None
    if isinstance(part, FlatPart):
        whole = part.kind == FLAT and not part.offset and not part.file.fixed_size
        if whole and image.descriptor.create_type == MONOLITHIC_FLAT:
            return part
    elif isinstance(part, SparsePart) and not part.compressed:
        hosted = bytes(part.file.read(0, 4)) == KDMV
        if hosted and not image.attached():
            return part
    raise NotSupported("Image format driver does not support resize")


def _clear_tail(part: SparsePart, end: int) -> None:
    """Zeros behind the disk's end in its last grain: nobody has written there, but who knows."""
    start = end - end % part.geometry.grain
    if start == end:
        return
    for extent in part.in_place(start, end - start):
        if extent.flags & MAPPED and extent.host is not None:
            host, length = extent.host + end - start, part.geometry.grain - (end - start)
            if any(part.file.read(host, length)):
                part.file.write(bytes(length), host)


def _grow(part: SparsePart, size: int, shown: int) -> SparseHeader:
    """Write what a disk of `size` bytes needs, durably; the header that switches to it.

    The part looks at the new tables from then on."""
    header, geometry = parse_sparse(part.file, writable=True)
    old_grains, old_tables = geometry.grains, geometry.tables
    tables = -(-size // (geometry.grain * geometry.per_table))
    header.capacity = size // SECTOR
    if tables > old_tables:
        copies = [part.tables.directory]
        if part.tables.redundant is not None:
            copies.append(part.tables.redundant)
        places = [_new_directory(part, copy, old_tables, tables) for copy in copies]
        header.directory_offset = places[0]
        if len(places) > 1:
            header.redundant_offset = places[1]
        part.settle()
        part.file.flush()
    part.adopt(header)
    limit = min(part.geometry.grains, old_tables * geometry.per_table)
    part.clear_entries(old_grains, limit)
    start, stop = round_up(min(shown, geometry.size), geometry.grain), min(shown, size)
    if shown > geometry.size and stop > start:
        part.zero_absent(start, stop - start)
    part.flush()
    return header


def _new_directory(part: SparsePart, old: WordTable, have: int, tables: int) -> int:
    """The sector of a longer copy of a directory, whose further grain tables are new and empty."""
    step = part.geometry.table_bytes // SECTOR
    sectors = -(-tables * 4 // SECTOR)
    start = part.take((sectors + (tables - have) * step) * SECTOR, SECTOR) // SECTOR
    for first in range(0, tables, _STEP):
        last = min(first + _STEP, tables)
        words = old.words(first, min(last, have)) if first < have else array("I")
        fresh = start + sectors + (max(first, have) - have) * step
        words += array("I", range(fresh, fresh + (last - max(first, have)) * step, step))
        part.file.write(little(words), start * SECTOR + first * 4)
    return start


def _update_text(image: VmdkImage, size: int) -> None:
    """Say the new size in the descriptor: readers do not need it, people do."""
    raw = image.place.read().partition(b"\0")[0].decode("utf-8", "surrogateescape")
    heads = next((line for line in raw.split("\n") if line.startswith("ddb.geometry.heads")), "")
    count = heads.partition("=")[2].strip(' "\r')
    values = []
    if count.isascii() and count.isdigit() and int(count):
        values.append(("ddb.geometry.cylinders", f'"{size // (63 * int(count) * SECTOR)}"'))
    image.place.update(values, sectors=size // SECTOR)
