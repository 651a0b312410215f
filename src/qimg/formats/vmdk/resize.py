"""Growing a sparse image (qimg only; vmdk sheet 4).

Where the grain tables do not suffice, new directories and the missing tables go behind the data; then one
write of the first sector switches to them and to the new size. The old directories stay behind, unused.
"""

from __future__ import annotations

from array import array

from qimg.errors import LimitError, NotSupported
from qimg.extent import MAPPED
from qimg.formats.vmdk.header import parse_sparse
from qimg.formats.vmdk.options import MAX_SPARSE
from qimg.formats.vmdk.sparse import SparsePart
from qimg.formats.vmdk.structs import KDMV, SECTOR, SparseHeader
from qimg.formats.vmdk.writing import little
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    image.set_parts([part])
    _update_text(image, size)


def _part(image: VmdkImage) -> SparsePart:
    """The one extent. Raises NotSupported where there are more, or of another kind."""
    part = image.parts[0] if len(image.parts) == 1 and not image.attached() else None
    if not isinstance(part, SparsePart) or part.compressed or not image.can_write:
        raise NotSupported("Image format driver does not support resize")
    if bytes(part.file.read(0, 4)) != KDMV:
        raise NotSupported("Image format driver does not support resize")
    return part


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
