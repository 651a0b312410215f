"""Making new images (vmdk sheet 3.1, 3.2, 4, 4.3).

What makes a file an image comes last: an extent gets its header, and a descriptor that stands apart its
text, in the first flush.
"""

from __future__ import annotations

from array import array

from qimg.formats.vmdk import descriptor as text
from qimg.formats.vmdk import names
from qimg.formats.vmdk.header import Geometry
from qimg.formats.vmdk.image import VmdkImage
from qimg.formats.vmdk.options import Plan
from qimg.formats.vmdk.part import FlatPart
from qimg.formats.vmdk.place import DescriptorPlace, new_cid
from qimg.formats.vmdk.sparse import SparsePart
from qimg.formats.vmdk.structs import (
    COMPRESSED,
    DEFLATE,
    DESCRIPTOR_SECTOR,
    DESCRIPTOR_SECTORS,
    GRAIN,
    GRAIN_SECTORS,
    KDMV,
    MARKERS,
    NEWLINE_TEST,
    NEWLINES,
    REDUNDANT,
    REDUNDANT_SECTOR,
    SECTOR,
    SPLIT,
    TABLE_ENTRIES,
    TABLE_SECTORS,
    ZEROED_GRAIN,
    SparseHeader,
)
from qimg.formats.vmdk.writing import little
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.formats.base import CreateHelp
    from qimg.formats.vmdk.descriptor import ExtentLine
    from qimg.formats.vmdk.part import Part
    from qimg.options import Value
    from qimg.storage.base import Storage

#: Directory entries written at once.
_STEP = 1 << 18


def extent_sizes(plan: Plan, path: str) -> Iterator[tuple[str, int]]:
    """(path, guest bytes) of the extent files of an image whose descriptor is a file called `path`."""
    if not plan.split:
        if plan.size:
            yield names.flat_name(path), plan.size
        return
    letter = "f" if plan.flat else "s"
    for number, start in enumerate(range(0, plan.size, SPLIT), 1):
        yield names.split_name(path, letter, number), min(SPLIT, plan.size - start)


def create(file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> VmdkImage:
    """A new image, open for writing. Raises OptionError, LimitError, StorageError, QimgError (parent)."""
    plan = Plan(size, options)
    parent = text.NO_PARENT if plan.hint is None else help.backing_id()
    if parent is None:
        from qimg.errors import QimgError

        raise QimgError("Invalid backing file format. Must be vmdk")
    lines = [_line(plan, name, length) for name, length in _extents(plan, file.name)]
    found = text.Descriptor(new_cid(plan.kind, size), parent, plan.kind, plan.hint, lines)
    data = text.DiskData(size, adapter=plan.adapter, hardware=plan.hardware, tools=plan.tools)
    raw = text.render(found, data)
    if plan.separate:
        return _create_separate(file, plan, found, raw, help)
    return _create_embedded(file, plan, found, raw, help)


def _extents(plan: Plan, path: str) -> Iterator[tuple[str, int]]:
    if plan.separate:
        yield from extent_sizes(plan, path)
    else:
        yield path, plan.size


def _line(plan: Plan, path: str, size: int) -> ExtentLine:
    name = names.base_name(path)
    if plan.separate:
        text.check_value("filename", name)
    else:  # nobody opens it by this name
        name = "".join("_" if letter in '"\n\r\0' else letter for letter in name)
    return text.ExtentLine(text.READ_WRITE, size // SECTOR, text.FLAT if plan.flat else text.SPARSE, name)


def _create_separate(
    file: Storage, plan: Plan, found: text.Descriptor, raw: bytes, help: CreateHelp
) -> VmdkImage:
    image = VmdkImage(file, found, DescriptorPlace(file, 0, None), new=raw)
    parts: list[Part] = []
    try:
        for path, size in extent_sizes(plan, file.name):
            storage = help.open_file(path, size if plan.flat else 0)
            try:
                parts.append(_new_part(storage, plan, size))
            except BaseException:
                storage.close()
                raise
    except BaseException:
        for part in parts:
            part.file.close()
        raise
    image.set_parts(parts)
    image.own([part.file for part in parts])
    return image


def _new_part(storage: Storage, plan: Plan, size: int) -> Part:
    if plan.flat:
        return FlatPart(storage, size, 0, kind=text.FLAT, new=True)
    return new_sparse(storage, size, b"", plan, covered=plan.hint is not None)


def _create_embedded(
    file: Storage, plan: Plan, found: text.Descriptor, raw: bytes, help: CreateHelp
) -> VmdkImage:
    image = VmdkImage(file, found, DescriptorPlace.embedded(file), new=b"")
    covered = plan.hint is not None
    part: Part
    if plan.kind == text.STREAM and help.filling and not file.fixed_size:
        from qimg.formats.vmdk.fresh_stream import FreshStream

        header = _header(plan.size, plan, front=False)
        padded = raw.ljust(DESCRIPTOR_SECTORS * SECTOR, b"\0")
        part = FreshStream(file, header, padded, zeroed_grain=plan.zeroed_grain, covered=covered)
    else:
        part = new_sparse(file, plan.size, raw, plan, covered=covered)
    image.set_parts([part])
    return image


def _header(size: int, plan: Plan, *, front: bool) -> SparseHeader:
    """The header of a sparse extent of `size` bytes; `front`: with both directories in front of the data."""
    capacity = size // SECTOR
    flags = NEWLINE_TEST | (ZEROED_GRAIN if plan.zeroed_grain else 0)
    version = 2 if plan.zeroed_grain else 1
    compressed = plan.kind == text.STREAM
    if compressed:
        flags |= COMPRESSED | MARKERS
        version = 3
    redundant, directory, overhead = 0, 0, round_up(REDUNDANT_SECTOR, GRAIN_SECTORS)
    if front:
        flags |= REDUNDANT
        redundant, directory, overhead = front_layout(capacity)
    return SparseHeader(
        magic=KDMV,
        version=version,
        flags=flags,
        capacity=capacity,
        grain_size=GRAIN_SECTORS,
        descriptor_offset=DESCRIPTOR_SECTOR,
        descriptor_size=DESCRIPTOR_SECTORS,
        table_entries=TABLE_ENTRIES,
        redundant_offset=redundant,
        directory_offset=directory,
        overhead=overhead,
        newlines=NEWLINES,
        compression=DEFLATE if compressed else 0,
    )


def front_layout(capacity: int) -> tuple[int, int, int]:
    """Sectors of the redundant directory, the directory and the first grain (sheet 4)."""
    tables = table_count(capacity)
    size = directory_sectors(tables) + TABLE_SECTORS * tables
    return (
        REDUNDANT_SECTOR,
        REDUNDANT_SECTOR + size,
        round_up(REDUNDANT_SECTOR + 2 * size, GRAIN_SECTORS),
    )


def table_count(capacity: int) -> int:
    """Grain tables of so many sectors."""
    return -(-capacity // (GRAIN_SECTORS * TABLE_ENTRIES))


def directory_sectors(tables: int) -> int:
    """Sectors of a directory of so many grain tables."""
    return -(-tables * 4 // SECTOR)


def new_sparse(file: Storage, size: int, raw: bytes, plan: Plan, *, covered: bool) -> SparsePart:
    """An extent with empty tables in the empty `file`; `raw` is the embedded descriptor. The header is
    written by the first flush. `covered`: something lies below."""
    header = _header(size, plan, front=True)
    tables = table_count(header.capacity)
    file.write(bytes(SECTOR), 0)
    if raw:
        file.write(raw.ljust(DESCRIPTOR_SECTORS * SECTOR, b"\0"), DESCRIPTOR_SECTOR * SECTOR)
    for sector in (header.redundant_offset, header.directory_offset):
        write_directory(file, sector, tables, sector + directory_sectors(tables))
    end = header.overhead * SECTOR
    if file.fixed_size:
        for sector in (header.redundant_offset, header.directory_offset):
            start = sector + directory_sectors(tables)
            file.zero(start * SECTOR, tables * TABLE_SECTORS * SECTOR)
    else:
        file.resize(end)
    geometry = Geometry(
        size=size,
        grain=GRAIN,
        per_table=TABLE_ENTRIES,
        directory=header.directory_offset * SECTOR,
        redundant=header.redundant_offset * SECTOR,
        data_start=end,
        zeroed_grain=plan.zeroed_grain,
        compressed=plan.kind == text.STREAM,
        markers=plan.kind == text.STREAM,
    )
    kind: type[SparsePart] = SparsePart
    if geometry.compressed:
        from qimg.formats.vmdk.stream import StreamPart

        kind = StreamPart
    return kind(
        file,
        geometry,
        kind=text.SPARSE if plan.separate else "",
        covered=covered,
        header=header.pack(),
    )


def write_directory(file: Storage, sector: int, tables: int, first: int) -> None:
    """A directory at `sector` of `tables` grain tables that follow each other from sector `first` on."""
    for number in range(0, tables, _STEP):
        count = min(_STEP, tables - number)
        start = first + number * TABLE_SECTORS
        words = array("I", range(start, start + count * TABLE_SECTORS, TABLE_SECTORS))
        raw = little(words)
        file.write(raw + bytes(-len(raw) % SECTOR), sector * SECTOR + number * 4)
