"""map: which guest range lies where."""

from __future__ import annotations

from qimg.errors import CorruptImage, QimgError, StorageError, hide_passwords
from qimg.extent import ABSENT, COMPRESSED, is_data, is_present, is_zero
from qimg.graph.disk import Disk
from qimg.graph.open import open_disk
from qimg.records import record
from qimg.storage.base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NamedTuple

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.graph.open import ImageSpec

if TYPE_CHECKING:

    class MapEntry(NamedTuple):
        """One row of the map; `offset` in the file `filename`, both None where nothing lies verbatim."""

        start: int
        length: int
        depth: int
        present: bool
        zero: bool
        data: bool
        compressed: bool
        offset: int | None
        filename: str | None

else:
    MapEntry = record(
        "MapEntry",
        ("start", "length", "depth", "present", "zero", "data", "compressed", "offset", "filename"),
    )


class MetadataError(QimgError):
    """What a range is could not be found out."""


def _entry(extent: Extent) -> MapEntry:
    source = extent.source
    if extent.flags & ABSENT:
        return MapEntry(*extent[:2], extent.depth, False, False, False, False, None, None)
    return MapEntry(
        extent.start,
        extent.length,
        extent.depth,
        is_present(extent),
        is_zero(extent),
        is_data(extent),
        bool(extent.flags & COMPRESSED),
        extent.host if source is None or source.addressed else None,
        None if source is None else hide_passwords(source.name),
    )


def _resolved(disk: Disk, extent: Extent) -> Iterator[Extent]:
    """The extent, or where a raw image or a filter stands on another image, what that one says."""
    format_name = disk.layers[extent.depth].image.format_name
    source = extent.source
    filtered = isinstance(source, Filter) and source.driver == format_name
    while isinstance(source, Filter) and source.children:
        source = source.child
    below = getattr(source, "disk", None)
    if not (filtered or format_name == "raw") or not isinstance(below, Disk) or extent.host is None:
        yield extent
        return
    moved = extent.start - extent.host
    for inner in below.extents(extent.host, extent.length):
        for part in _resolved(below, inner):
            # A filter is no layer; a raw image is, and hides those below it.
            depth = part.depth if filtered else extent.depth
            yield part._replace(start=part.start + moved, depth=depth)


def _entries(disk: Disk, start: int, length: int) -> Iterator[MapEntry]:
    """The map with neighbours as they come. Raises MetadataError."""
    try:
        for window in disk.windows(start, length):
            for extent in window:
                for part in _resolved(disk, extent):
                    yield _entry(part)
    except (CorruptImage, StorageError) as error:
        raise MetadataError(f"Could not read file metadata: {error.reason}") from error


def disk_map(disk: Disk, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
    """The map of ``start .. start + length`` (clipped to the disk), neighbours of one kind joined.

    Raises MetadataError."""
    end = disk.size if length is None else min(disk.size, start + length)
    if start >= end:
        yield MapEntry(start, 0, 0, False, False, False, False, None, None)
        return
    last: MapEntry | None = None
    for entry in _entries(disk, start, end - start):
        if last is None:
            last = entry
        elif _joins(last, entry):
            last = last._replace(length=last.length + entry.length)
        else:
            yield last
            last = entry
    assert last is not None
    yield last


def _joins(last: MapEntry, entry: MapEntry) -> bool:
    if last[2:7] != entry[2:7] or last.filename != entry.filename:
        return False
    if last.offset is None or entry.offset is None:
        return last.offset is entry.offset
    return last.offset + last.length == entry.offset


def map_extents(
    spec: ImageSpec, *, start: int = 0, length: int | None = None, context: Context
) -> Iterator[MapEntry]:
    """The map of the image and its chain; opened at the first entry, closed after the last.

    Raises OpenError, MetadataError."""
    with open_disk(spec, context=context, raw_shares_all=True) as disk:
        disk.tells_all = True
        yield from disk_map(disk, start, length)
