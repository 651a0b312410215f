"""Another size for the guest's disk (qcow2 sheet, section 16).

Growing makes room in the tables first and changes the header's size last; shrinking changes the size first
and gives space back afterwards. So a power cut at any moment leaves the old disk or the new one, and what is
mapped behind its end is never seen: growing clears that before the disk reaches so far.
"""

from __future__ import annotations

from array import array

from qimg.errors import LimitError, NotSupported, OptionError, QimgError
from qimg.formats.qcow2.entries import arithmetic, is_blank
from qimg.formats.qcow2.live_entries import ALL, LiveOneToOne
from qimg.formats.qcow2.refcounts import counters_per_block, unpack_counts
from qimg.formats.qcow2.structs import COPIED, L2_ZERO, MAX_L1_BYTES, OFFSET_MASK, SUBCLUSTERS
from qimg.guest_size import GuestSize
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.qcow2.write import WritableQcow2
    from qimg.storage.base import Storage

_CHUNK = 1 << 20


class ResizeChanges:
    """What `WritableQcow2` does to its size; `image` is the writer."""

    @staticmethod
    def resize(image: WritableQcow2, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """`Image.resize`. With a GuestSize, also the rest of the unit that the end lies in reads as zeros."""
        check_resize(image, size, preallocation, shown=shown, version=image.header.version)
        image.begin()
        if size < image.size:
            _shrink(image, size)
        elif size > image.size:
            _grow(image, size, preallocation, shown)


def check_resize(image: WritableQcow2, size: int, preallocation: str, *, shown: int, version: int) -> None:
    """Raise what stands against this resize of an image that is going to be of `version`, before anything is
    changed: OptionError, NotSupported, LimitError, QimgError (an inconsistent bitmap)."""
    if size % SECTOR:
        raise OptionError(f"The new size must be a multiple of {SECTOR}", option="size")
    _check_resizable(image, version)
    if 8 * _l1_entries(image, size) > MAX_L1_BYTES:
        raise LimitError("Failed to grow the L1 table: File too large")
    if size <= image.size:
        return
    if version < 3 and round_up(image.size, image.cluster_size) < min(shown, size):
        raise NotSupported("Failed to zero out new clusters: Operation not supported")
    if preallocation in ("falloc", "full") and image.data.fixed_size:
        raise NotSupported(
            f"Failed to resize underlying file: Preallocation mode '{preallocation}' unsupported for this"
            " non-regular file"
        )
    if image.header.has_data_file and image.data.fixed_size and image.data.size < size:
        raise NotSupported("Cannot grow device files")


def _check_resizable(image: WritableQcow2, version: int) -> None:
    """Raise what keeps an image, which is going to be of `version`, from being resized at all."""
    if version < 3 and image.header.header.nb_snapshots:
        raise NotSupported("Can't resize a v2 image which has snapshots")
    for bitmap in image.directory:
        if bitmap.in_use:
            raise QimgError(
                f"Bitmap '{bitmap.text}' is inconsistent and cannot be used",
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
            )


def _l1_entries(image: WritableQcow2, size: int) -> int:
    """Entries of the L1 table of a disk of `size` bytes."""
    return -(-size // (image.cluster_size * image.header.l2_entries))


def _set_size(image: WritableQcow2, size: int) -> None:
    """Stage the new size."""
    if image.recorder is not None:
        image.recorder.hold()  # bitmaps are read as the old size wants them
    image.header.header.size = int(size)
    image.header_changed = True
    image.size = int(size)
    placement = image.entries.placement
    if isinstance(placement, LiveOneToOne):
        placement.size = size


def _settle_end(size: int, end: int, *, shows: bool) -> None:
    if isinstance(size, GuestSize) and size.settle is not None:
        size.settle(end, shows)


def _settle(image: WritableQcow2) -> None:
    """End the batch if it has become large."""
    if image.wants_flush:
        image.flush()


# -- growing


def _grow(image: WritableQcow2, size: int, preallocation: str, shown: int) -> None:
    old = image.size
    try:
        _settle_end(size, old, shows=shown > old)
        entries = _l1_entries(image, size)
        if entries > image.header.header.l1_size:
            image.tables.resize_l1(entries)
            image.header_changed = True
        _forget_behind(image, old)
        if image.header.has_data_file:
            _grow_data_file(image, size, preallocation)
        if shown > old:
            _cover(image, old, min(shown, size))
        if preallocation != "off" or image.header.data_file_raw:
            _preallocate(image, old, size, preallocation, covered=shown > old)
        _set_size(image, size)
        image.switch_size()
    except BaseException:
        _undo(image, old)
        raise


def _undo(image: WritableQcow2, size: int) -> None:
    """Give back what a growth that failed has reserved behind the end, if that can be done. Never raises."""
    try:
        image.reload()
        if image.size == size:
            _forget_behind(image, size)
            image.flush()
            _cut(image)
    except (QimgError, OSError):
        pass  # It is unused space; the failure is what has to be told.


def _grow_data_file(image: WritableQcow2, size: int, preallocation: str) -> None:
    """The data file reaches to the disk's end. Bytes that it has behind the old end are dropped, unless it
    is a raw image by itself: then they are what the disk shows there."""
    data = image.data
    mode = "off" if preallocation == "metadata" else preallocation
    if data.fixed_size:
        if not image.header.data_file_raw:
            data.zero(image.size, size - image.size)
        return
    if data.size > image.size and not image.header.data_file_raw:
        data.resize(image.size)
    if data.size < size:
        data.resize(size, mode)


def _cover(image: WritableQcow2, start: int, end: int) -> None:
    """Make ``start .. end`` read as zeros over a backing file, from the first whole unit on."""
    unit, size = image.granularity, image.cluster_size
    start, end = round_up(start, unit), round_up(end, unit)
    first, last = start // size, -(-end // size)
    guest = first * size
    for index, low, high in image.tables.pieces(first, last):
        table = image.tables.change(index, low, high)
        image.entries.mark_zero(table, low, high, guest, start, end, True)
        guest += (high - low) * size
        _settle(image)


def _preallocate(image: WritableQcow2, start: int, end: int, mode: str, *, covered: bool) -> None:
    """Give every whole cluster of ``start .. end`` a place that holds zeros. `covered`: a backing file would
    show through what an extended entry says nothing about."""
    size, words = image.cluster_size, image.entries.words
    first, last = -(-start // size), -(-end // size)
    guest = first
    for index, low, high in image.tables.pieces(first, last):
        table = image.tables.change(index, low, high)
        for host, count in image.entries.placement.take(guest * size, high - low):
            stop = low + count
            table[words * low : words * stop : words] = arithmetic(host | COPIED, count, size)
            if words > 1:
                bits = ALL << SUBCLUSTERS if covered or image.encrypted else 0
                table[2 * low + 1 : 2 * stop : 2] = array("Q", [bits]) * count
            if not image.header.has_data_file:
                _reserve(image.file, host, count * size, mode)
            if image.encrypted and words == 1:
                _hide(image, table, low, stop, guest * size)
            low = stop
            guest += count
        _settle(image)


def _hide(image: WritableQcow2, table: array[int], low: int, stop: int, guest: int) -> None:
    """Zeros that are not encrypted are no zeros to the guest: say that they are, or encrypt some."""
    if image.header.version >= 3:
        for index in range(low, stop):
            table[index] |= L2_ZERO
        return
    host = table[low] & OFFSET_MASK
    image.guest_storage(guest, host).zero(host, (stop - low) * image.cluster_size, unmap=False)


def _reserve(file: Storage, host: int, length: int, mode: str) -> None:
    """Make ``host .. host + length`` of the file hold zeros, its space reserved as `mode` says."""
    inside = length if file.fixed_size else max(0, min(length, file.size - host))
    if mode == "full":
        _write_zeros(file, host, inside)
    elif inside:
        file.zero(host, inside, unmap=mode == "metadata")
    if inside < length:
        file.resize(host + length, "off" if mode == "metadata" else mode)


def _write_zeros(file: Storage, offset: int, length: int) -> None:
    chunk = bytes(min(length, _CHUNK))
    while length > 0:
        step = min(length, len(chunk))
        file.write(chunk[:step], offset)
        offset += step
        length -= step


# -- shrinking


def _shrink(image: WritableQcow2, size: int) -> None:
    _set_size(image, size)
    image.switch_size()
    _settle_end(size, size, shows=False)
    _forget_behind(image, size)
    image.flush()
    data = image.data
    if image.header.has_data_file and not data.fixed_size and data.size > size:
        data.resize(size)
        data.flush()
    _drop_empty_blocks(image)
    _cut(image)


def _forget_behind(image: WritableQcow2, end: int) -> None:
    """Give up all that is mapped behind the guest offset `end`: nothing is seen there, but it would be when
    the disk grows. (Machine state of a snapshot that was gone back to lies there too; the snapshot has it.)
    """
    tables, entries = image.tables, image.entries
    _forget_subclusters(image, end)
    first = -(-end // image.cluster_size)
    index, low = divmod(first, tables.entries)
    stop = image.header.header.l1_size
    while index < stop:
        index = _next_table(tables.l1, index)
        if index >= stop:
            return
        low = max(0, first - index * tables.entries)
        table = tables.look(index)
        assert table is not None
        if not low:
            entries.forget(table, 0, tables.entries)
            tables.drop(index)
        elif not is_blank(table[low * entries.words :]):
            entries.forget(tables.change(index, low, tables.entries), low, tables.entries)
        index += 1
        _settle(image)


def _next_table(l1: bytearray, index: int) -> int:
    """The first entry from `index` on that is not 0; the number of entries if there is none."""
    step = 4096
    for at in range(8 * index, len(l1), step):
        part = l1[at : at + step]
        if part.count(0) < len(part):
            return (at + len(part) - len(part.lstrip(b"\0"))) // 8
    return len(l1) // 8


def _forget_subclusters(image: WritableQcow2, end: int) -> None:
    """The subclusters behind `end` in the cluster that `end` lies in."""
    cluster, rest = divmod(end, image.cluster_size)
    index, low = divmod(cluster, image.tables.entries)
    if image.entries.words == 1 or not rest or not image.tables.l1_entry(index):
        return
    table = image.tables.look(index)
    assert table is not None
    kept = (1 << -(-rest // image.granularity)) - 1
    bits = table[2 * low + 1] & (kept | kept << SUBCLUSTERS)
    if bits != table[2 * low + 1]:
        image.tables.change(index, low, low + 1)[2 * low + 1] = bits


def _drop_empty_blocks(image: WritableQcow2) -> None:
    """Remove the last refcount blocks if they count nothing but themselves: they may hold the file's end."""
    header = image.header.header
    bits, size = 1 << header.refcount_order, image.cluster_size
    per_block = counters_per_block(size, bits)
    table = image.refcounts.table
    dropped: list[int] = []
    changed = False
    for block in range(len(table) - 1, 0, -1):
        if not table[block]:
            continue
        counts = unpack_counts(bits, image.file.read(table[block], size))
        own = table[block] // size - block * per_block
        inside = 0 <= own < per_block and counts[own] == 1
        if len(counts) - counts.count(0) != inside:
            break
        image.file.write(bytes(8), header.refcount_table_offset + 8 * block)
        changed = True
        if not inside:
            dropped.append(table[block] // size)
    if not changed:
        return
    image.file.flush()
    image.reload()
    for cluster in dropped:
        if image.refcounts.get(cluster):
            image.refcounts.release(cluster)
    image.flush()


def _cut(image: WritableQcow2) -> None:
    """End the file with the last cluster in use."""
    end = image.refcounts.used_end() * image.cluster_size
    if not image.file.fixed_size and image.file.size > end:
        image.file.resize(end)
        image.file.flush()
