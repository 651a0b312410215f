"""Moving one chunk from a source to an image: read, find zeros, make room in order, write.

For every chunk: the rows to copy are read into a buffer; blocks of zeros drop out; what is left is rounded
out to the target's allocation units, whose remaining bytes are filled in from what the guest sees there;
space is given out in chunk order; the bytes are written. Compression happens before the turn, so that it
runs on all processors, and packing inside it.

A target that holds something already keeps what can be overwritten where it lies; only what needs a new
place is filled up and written whole.
"""

from __future__ import annotations

import mmap

from qimg.errors import CorruptImage, NotSupported, StorageError
from qimg.extent import MAPPED, ZERO, clip
from qimg.jobs.engine import lock_and_local
from qimg.jobs.plan import COPY
from qimg.units import round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.extent import Extent
    from qimg.formats.base import Image
    from qimg.graph.disk import Disk
    from qimg.jobs.engine import Turn
    from qimg.jobs.plan import Chunk, Row
    from qimg.jobs.source import Source

    Run = tuple[int, int]  # (start, length) in guest bytes

SECTOR = 512


class Copier:
    """Copies chunks of `source` into `image`; one instance serves all workers.

    sparse      bytes of a zero-detection block, 0 for none.
    clear       ranges found to be zero must be made to read as zeros.
    under       what the guest sees where the target has nothing: the target's backing disk, or None.
    in_place    the target existed before: `under` is the target's own disk.
    compress    store clusters compressed.
    ordered     give out host space in chunk order.
    offload     try copy offload for rows that lie verbatim at both ends.
    salvage     called with the offset and the error of every unreadable sector, which becomes zeros.
    """

    def __init__(
        self,
        source: Source,
        image: Image,
        *,
        sparse: int,
        clear: bool = False,
        under: Disk | None = None,
        in_place: bool = False,
        compress: bool = False,
        ordered: bool = True,
        offload: bool = False,
        salvage: Callable[[int, StorageError | CorruptImage], None] | None = None,
    ) -> None:
        self.source = source
        self.image = image
        self.sparse = sparse
        self.clear = clear
        self.under = under
        self.compress = compress
        self.ordered = ordered or compress
        self.offload = offload
        self.salvage = salvage
        #: Where the target cannot give out zeroed space, or something shows through, units are written whole.
        self.whole_units = not image.zero_init
        self.unit = (image.cluster_size or 1) if compress else image.granularity
        #: It has places that may be kept, and its tables change under us.
        self.in_place = in_place and image.granularity > 1
        self._image_lock, self._local = lock_and_local()

    def __call__(self, chunk: Chunk, turn: Turn) -> int:
        """Copy `chunk`; returns the bytes of its rows."""
        total = sum(row.length for row in chunk.rows)
        if all(row.action != COPY for row in chunk.rows) and self._clear_only(chunk, turn):
            return total
        if self.offload and self._offload(chunk, turn):
            return total
        # The last unit goes on behind the end of a source that is shorter than the image.
        end = chunk.start + chunk.length
        view = self._buffer(max(min(round_up(end, self.unit), self.image.size), end) - chunk.start)
        data = self._read(chunk, view)
        if self.compress:
            self._store_compressed(chunk, view, data, turn)
        else:
            self._store(chunk, view, data, turn)
        return total

    # -- reading

    def _buffer(self, length: int) -> memoryview:
        """This thread's buffer: page-aligned, so that it serves O_DIRECT."""
        view: memoryview | None = getattr(self._local, "view", None)
        if view is None or len(view) < length:
            size = round_up(length, max(self.unit, mmap.PAGESIZE))
            view = memoryview(mmap.mmap(-1, size))
            self._local.view = view
        return view[:length]

    def _read(self, chunk: Chunk, view: memoryview) -> list[Run]:
        """Read the rows to copy; returns the runs that are not zero, in guest bytes."""
        from qimg.vec.scan import data_runs

        found: list[Run] = []
        for row in chunk.rows:
            if row.action != COPY:
                continue
            at = row.start - chunk.start
            piece = view[at : at + row.length]
            self._read_row(row, piece)
            if not self.sparse:
                found.append((row.start, row.length))
                continue
            first = self.sparse - row.start % self.sparse
            for offset, length in data_runs(piece, self.sparse, first):
                found.append((row.start + offset, length))
        return found

    def _read_row(self, row: Row, piece: memoryview) -> None:
        try:
            self.source.read_extent(row.extent, piece)
        except (StorageError, CorruptImage) as error:
            if self.salvage is None:
                raise StorageError(
                    f"error while reading at byte {row.start}: {error.reason}",
                    errno=error.errno,
                    offset=row.start,
                    hint=_cause(error),
                ) from error
            self._salvage(row, piece)

    def _salvage(self, row: Row, piece: memoryview) -> None:
        assert self.salvage is not None
        for offset in range(0, row.length, SECTOR):
            length = min(SECTOR, row.length - offset)
            (part,) = clip((row.extent,), row.start + offset, length)
            try:
                self.source.read_extent(part, piece[offset : offset + length])
            except (StorageError, CorruptImage) as error:
                piece[offset : offset + length] = bytes(length)
                with self._image_lock:
                    self.salvage(row.start + offset, error)

    def _fill_gaps(self, chunk: Chunk, view: memoryview, start: int, length: int) -> list[Run]:
        """Make the bytes of ``start .. start + length`` that no row copies what the guest sees there now.

        Returns the runs filled with something other than known zeros."""
        filled: list[Run] = []
        position = start
        end = start + length
        covered = [(row.start, row.start + row.length, row.action) for row in chunk.rows]
        covered.append((end, end, COPY))
        for low, high, action in covered:
            if low > position:
                stop = min(low, end)
                if stop > position:
                    part = view[position - chunk.start : stop - chunk.start]
                    if self._read_under(position, part):
                        filled.append((position, stop - position))
            if action != COPY:
                low, high = max(low, start), min(high, end)
                if high > low:
                    view[low - chunk.start : high - chunk.start] = bytes(high - low)
            position = max(position, high)
        return filled

    def _read_under(self, start: int, part: memoryview) -> bool:
        """Fill `part` from the target's backing disk; False where there is nothing but zeros."""
        part[:] = bytes(len(part))
        if self.under is None or start >= self.under.size:
            return False
        shown = min(len(part), self.under.size - start)
        try:
            if self.in_place:
                self._read_own(self.under, part[:shown], start)
            else:
                self.under.read_into(part[:shown], start)
        except (StorageError, CorruptImage) as error:
            raise writing_error(start, error) from error
        return True

    def _read_own(self, disk: Disk, part: memoryview, start: int) -> None:
        """Read from the target itself. Other workers change its tables meanwhile, but not for this range."""
        with self._image_lock:
            extents = disk.extents(start, len(part))
        for extent in extents:
            piece = part[extent.start - start : extent.start - start + extent.length]
            if extent.flags & (MAPPED | ZERO) or extent.depth:
                disk.read_extent(extent, piece)
            else:
                with self._image_lock:
                    disk.read_extent(extent, piece)

    # -- writing

    def _units(self, runs: list[Run]) -> list[Run]:
        """`runs` rounded out to the target's units, joined; clipped to the image."""
        if self.unit == 1:
            return runs
        units: list[Run] = []
        for start, length in runs:
            low = round_down(start, self.unit)
            high = min(round_up(start + length, self.unit), self.image.size)
            if units and low <= units[-1][0] + units[-1][1]:
                low = units[-1][0]
                units[-1] = (low, max(high, units[-1][0] + units[-1][1]) - low)
            else:
                units.append((low, high - low))
        return units

    def _zero_runs(self, chunk: Chunk, data: list[Run]) -> tuple[list[Run], list[Run]]:
        """Ranges to clear: those that fill whole units, and units that have to be written as data since
        something else shows through a part of them."""
        covered = [(row.start, row.length) for row in chunk.rows]
        joined: list[Run] = []
        for start, length in covered:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        whole: list[Run] = []
        ragged: list[Run] = []
        units = self._units(data)
        if self.in_place:  # beside data, in units that may keep their place
            ragged = _intersect([(start, end - start) for start, end in _subtract(joined, data)], units)
        if not self.image.can_mark_zero:
            ragged += [(start, end - start) for start, end in _subtract(joined, units)]
            return whole, self._not_zero(sorted(ragged))
        for start, end in _subtract(joined, units):
            low = min(round_up(start, self.unit), end)
            high = end if end == self.image.size else max(round_down(end, self.unit), low)
            if low >= high and (start % self.unit or end % self.unit) and end != self.image.size:
                ragged.append((start, end - start))
                continue
            if high > low:
                whole.append((low, high - low))
            if low > start:
                ragged.append((start, low - start))
            if end > high:
                ragged.append((high, end - high))
        return whole, self._not_zero(sorted(ragged))

    def _not_zero(self, runs: list[Run]) -> list[Run]:
        """What of `runs` does not read as zeros in the target already, where that can be told."""
        if not self.in_place or not runs:
            return runs
        assert self.under is not None
        left: list[Run] = []
        with self._image_lock:
            for start, length in runs:
                found = self.under.extents(start, length)
                left += [(extent.start, extent.length) for extent in found if not extent.flags & ZERO]
        return _join(left)

    def _store(self, chunk: Chunk, view: memoryview, data: list[Run], turn: Turn) -> None:
        zeros: list[Run] = []
        if self.clear:
            zeros, ragged = self._zero_runs(chunk, data)
            for start, length in ragged:
                view[start - chunk.start : start - chunk.start + length] = bytes(length)
            data = sorted(data + ragged)
        units = self._units(data)
        if self.in_place:
            data = self._with_rest(chunk, view, _join(data), units)
        elif self.unit > 1 or self.clear:
            for start, length in units:
                data = data + self._fill_gaps(chunk, view, start, length)
        places = self._allocate(units, zeros, turn)
        writes = units if self.whole_units and not self.in_place else _join(sorted(data))
        for place, start, length in _placed(places, writes):
            part = view[start - chunk.start : start - chunk.start + length]
            self._write(place, start, part)

    def _with_rest(self, chunk: Chunk, view: memoryview, data: list[Run], units: list[Run]) -> list[Run]:
        """`data`, joined, and the rest of those `units` that get a new place."""
        if data == units:
            return data
        filled: list[Run] = []
        for start, end in _subtract(units, data):
            low = round_down(start, self.unit)
            high = min(round_up(end, self.unit), self.image.size)
            with self._image_lock:
                places = self.image.in_place(low, high - low)
            for place in places:
                at, stop = max(start, place.start), min(end, place.start + place.length)
                if not place.flags & MAPPED and at < stop:
                    self._fill_gaps(chunk, view, at, stop - at)
                    filled.append((at, stop - at))
        return _join(sorted(data + filled))

    def _allocate(self, units: list[Run], zeros: list[Run], turn: Turn) -> list[Extent]:
        if self.ordered:
            turn.take()
        places: list[Extent] = []
        start = 0
        at_once = self.image.zeroes_at_once
        try:
            with self._image_lock:
                for start, length in () if at_once else zeros:
                    self.image.mark_zero(start, length)
                for start, length in units:
                    places.extend(self.image.allocate(start, length))
            turn.done()
            for start, length in zeros if at_once else ():
                self.image.mark_zero(start, length)
        except StorageError as error:
            raise writing_error(start, error) from error
        return places

    def _write(self, place: Extent, start: int, part: memoryview) -> None:
        assert place.source is not None and place.host is not None
        try:
            place.source.write(part, place.host + (start - place.start))
        except StorageError as error:
            raise writing_error(start, error) from error

    def _store_compressed(self, chunk: Chunk, view: memoryview, data: list[Run], turn: Turn) -> None:
        zeros: list[Run] = []
        if self.clear:
            zeros, ragged = self._zero_runs(chunk, data)
            for start, length in ragged:
                view[start - chunk.start : start - chunk.start + length] = bytes(length)
            data = sorted(data + ragged)
        encoded: list[tuple[int, memoryview, bytes | None]] = []
        for start, length in self._units(data):
            self._fill_gaps(chunk, view, start, length)
            for cluster in range(start, start + length, self.unit):
                at = cluster - chunk.start
                part = view[at : min(at + self.unit, len(view))]
                full: bytes | memoryview = part
                if len(part) < self.unit:
                    full = bytes(part) + bytes(self.unit - len(part))
                encoded.append((cluster, part, self.image.encode(full)))
        turn.take()
        with self._image_lock:
            for start, length in zeros:
                try:
                    self.image.mark_zero(start, length)
                except StorageError as error:
                    raise writing_error(start, error) from error
            for cluster, part, code in encoded:
                try:
                    if code is not None:
                        self.image.write_encoded(cluster, code)
                        continue
                    places = self.image.allocate(cluster, len(part))
                except StorageError as error:
                    raise writing_error(cluster, error) from error
                for place in places:
                    at = place.start - cluster
                    self._write(place, place.start, part[at : at + place.length])
        turn.done()

    # -- chunks that need no buffer

    def _clear_only(self, chunk: Chunk, turn: Turn) -> bool:
        """Clear a chunk that consists of nothing else; False if it has ragged ends."""
        whole, ragged = self._zero_runs(chunk, [])
        if ragged:
            return False
        self._allocate([], whole, turn)
        return True

    def _offload(self, chunk: Chunk, turn: Turn) -> bool:
        """Have the kernel copy a chunk whose rows all lie verbatim; False if it cannot be done."""
        rows = chunk.rows
        if any(row.action != COPY or not row.extent.flags & MAPPED for row in rows):
            return False
        if self._units([(row.start, row.length) for row in rows]) != _join(
            [(row.start, row.length) for row in rows]
        ):
            return False
        places = self._allocate([(row.start, row.length) for row in rows], [], turn)
        for row in rows:
            for place in clip(places, row.start, row.length):
                (part,) = clip((row.extent,), place.start, place.length)
                assert place.source is not None and place.host is not None
                assert part.source is not None and part.host is not None
                try:
                    place.source.copy_from(part.source, part.host, place.host, place.length)
                except NotSupported:
                    self.offload = False
                    return False
                except StorageError as error:
                    raise writing_error(place.start, error) from error
        return True


class Limited:
    """Work of the engine held back to `rate` bytes a second. For one worker."""

    def __init__(self, work: Callable[..., int], rate: int, *, wait_first: bool = False) -> None:
        """`rate` 0: not at all. Without `wait_first` the first request is free, and nobody waits for the last
        one's time."""
        self._work = work
        self._rate = rate
        self._wait_first = wait_first
        self._ready = 0.0

    def __call__(self, item: object, turn: Turn) -> int:
        """Do it, when its time has come."""
        if not self._rate:
            return self._work(item, turn)
        import time

        now = time.monotonic()
        if self._ready > now:
            time.sleep(self._ready - now)
        done = self._work(item, turn)
        self._ready = max(self._ready, now) + done / self._rate
        if self._wait_first:
            time.sleep(max(0.0, self._ready - time.monotonic()))
        return done


def writing_error(start: int, error: StorageError | CorruptImage) -> StorageError:
    """What a job says of a write at guest offset `start` that failed with `error`."""
    message = f"error while writing at byte {start}: {error.reason}"
    return StorageError(message, errno=error.errno, offset=start, hint=_cause(error))


def _cause(error: StorageError | CorruptImage) -> str | None:
    """What a place that is no file has to say beside the system's words for the error number."""
    return str(error) if isinstance(error, StorageError) and str(error) != error.reason else None


def _join(runs: list[Run]) -> list[Run]:
    """Ascending `runs` with neighbours and overlaps put together."""
    joined: list[Run] = []
    for start, length in runs:
        if joined and start <= joined[-1][0] + joined[-1][1]:
            first = joined[-1][0]
            joined[-1] = (first, max(start + length, first + joined[-1][1]) - first)
        else:
            joined.append((start, length))
    return joined


def _subtract(runs: list[Run], holes: list[Run]) -> list[tuple[int, int]]:
    """(start, end) of what is in `runs` and not in `holes`, both ascending."""
    left: list[tuple[int, int]] = []
    for start, length in runs:
        end = start + length
        for hole, hole_length in holes:
            if hole + hole_length <= start or hole >= end:
                continue
            if hole > start:
                left.append((start, hole))
            start = max(start, hole + hole_length)
        if start < end:
            left.append((start, end))
    return left


def _intersect(runs: list[Run], others: list[Run]) -> list[Run]:
    """What is in `runs` and in `others`, both ascending."""
    both: list[Run] = []
    number = 0
    for start, length in runs:
        while number < len(others) and sum(others[number]) <= start:
            number += 1
        for other, other_length in others[number:]:
            if other >= start + length:
                break
            low, high = max(start, other), min(start + length, other + other_length)
            both.append((low, high - low))
    return both


def _placed(places: list[Extent], runs: list[Run]) -> list[tuple[Extent, int, int]]:
    """(place, start, length): `runs` cut at the borders of the host extents that hold them."""
    out: list[tuple[Extent, int, int]] = []
    number = 0
    for start, length in runs:
        end = start + length
        while number < len(places) and places[number].start + places[number].length <= start:
            number += 1
        at = number
        while start < end and at < len(places):
            place = places[at]
            stop = min(end, place.start + place.length)
            if stop > start:
                out.append((place, start, stop - start))
            start = max(start, stop)
            at += 1
    return out
