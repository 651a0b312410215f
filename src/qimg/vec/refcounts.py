"""Reference counts of clusters in bulk: counting what L2 tables refer to, comparing with what is stored.

Everything here is all or nothing: a function that meets something odd changes nothing and says so, and the
plain path, which knows meaning and words, goes through the same tables entry by entry.
"""

from __future__ import annotations

from qimg.vec.door import np

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from numpy.typing import NDArray

    Counts = NDArray[Any]
    Words = NDArray[np.uint64]
    Clusters = NDArray[np.int64]

_COPIED = np.uint64(1 << 63)
_COMPRESSED = np.uint64(1 << 62)
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_RESERVED = np.uint64(0x3F00_0000_0000_01FE)
_ONE = np.uint64(1)
_LOW = np.uint64(0xFFFF_FFFF)
_HALF = np.uint64(32)
_NINE = np.uint64(9)
_STEP = 1 << 20  # counters compared at once
_RUN = 64  # tables of fewer entries are not worth a look for one long run


def new_counts(clusters: int, width: int) -> Counts:
    """Zeros, one a cluster, wide enough for counters of `width` bits (32 of 64 are always enough)."""
    kind = np.uint8 if width <= 8 else np.uint16 if width == 16 else np.uint32
    return np.zeros(clusters, dtype=kind)


def add_range(counts: Counts, first: int, stop: int, limit: int) -> list[int]:
    """Count ``first .. stop``; indices of those that stand at `limit` already and stay there."""
    part = counts[first:stop]
    full = np.flatnonzero(part >= limit)
    if len(full) == 0:
        part += 1
        return []
    part[part < limit] += 1
    return [first + int(index) for index in full]


class TableScan:
    """Counts and checks L2 tables of one image. Sizes in bytes; `counts` are those of the clusters from
    number `start` on."""

    def __init__(
        self,
        *,
        cluster_bits: int,
        extended: bool,
        data_file: bool,
        file_size: int,
        count_shift: int,
        width: int,
    ) -> None:
        self.bits = np.uint64(cluster_bits)
        self.cluster_size = 1 << cluster_bits
        self.inside = np.uint64((1 << cluster_bits) - 1)
        self.extended = extended
        self.data_file = data_file
        self.file_size = file_size
        self.count_shift = np.uint64(count_shift)
        self.compressed_mask = np.uint64((1 << count_shift) - 1)
        self.count_mask = np.uint64((1 << (62 - count_shift)) - 1)
        self.limit = min((1 << width) - 1, (1 << 32) - 1)
        #: Of the last call of `walk`: lowest and highest cluster referred to, and guest clusters seen.
        self.span = (0, 0)
        self.allocated = self.compressed = self.fragmented = 0

    def _words(self, raw: bytearray | memoryview) -> tuple[Words, Words | None]:
        words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
        return (words[0::2], words[1::2]) if self.extended else (words, None)

    def _one_run(self, words: Words, bitmap: Words | None) -> tuple[int, int] | None:
        """(first word, entries) if the table is one run of clusters in file order, all with the same bits."""
        if len(words) < _RUN or (bitmap is not None and bitmap.any()):
            return None
        first, last = int(words[0]), int(words[-1])
        if first & 0x7F00_0000_0000_01FF or last - first != (len(words) - 1) * self.cluster_size:
            return None
        if not first & int(_OFFSET) or first & (self.cluster_size - 1):
            return None
        if (words[1:] - words[:-1] != self.cluster_size).any():
            return None
        return first, len(words)

    def walk(self, raw: bytearray, entries: int, counts: Counts, start: int) -> bool:
        """Count the references of the tables in `raw`, each of `entries` entries. False: nothing done."""
        words, bitmap = self._words(raw)
        self.allocated = self.compressed = self.fragmented = 0
        self.span = (1, 0)
        if len(words) == entries:
            run = self._one_run(words, bitmap)
            if run is not None:
                return self._walk_run(run[0] & int(_OFFSET), run[1], counts, start)
        some = np.flatnonzero(words if bitmap is None else words | bitmap)
        if len(some) == 0:
            return True
        words = words[some]
        compressed = (words & _COMPRESSED) != 0
        if not self._sound(words, None if bitmap is None else bitmap[some], compressed):
            return False
        offset = words & _OFFSET
        placed = self._placed(words, offset, compressed)
        clusters = self._clusters(words, offset, placed, compressed)
        if clusters is None or not self._add(clusters, counts, start):
            return False
        self._statistics(some // entries, offset, placed, compressed)
        return True

    def _walk_run(self, offset: int, length: int, counts: Counts, start: int) -> bool:
        first = offset // self.cluster_size
        self.allocated = length
        if self.data_file:
            return True
        if offset + (length - 1) * self.cluster_size >= self.file_size:
            return False
        low, high = max(first - start, 0), min(first - start + length, len(counts))
        if low < high:
            part = counts[low:high]
            if part.max() >= self.limit:
                return False
            part += 1
        self.span = (first, first + length - 1)
        return True

    def _placed(self, words: Words, offset: Words, compressed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        placed: NDArray[np.bool_] = offset != 0
        if self.data_file:
            real = (words & _COPIED) != 0
            placed |= real if self.extended else real & ((words & _ONE) == 0)
        return placed & ~compressed

    def _sound(self, words: Words, bitmap: Words | None, compressed: NDArray[np.bool_]) -> bool:
        """Whether there is nothing to report about the entries themselves."""
        plain = words[~compressed]
        if (plain & _RESERVED).any() or (plain & _OFFSET & self.inside).any():
            return False
        if compressed.any() and (self.data_file or (words[compressed] & _COPIED).any()):
            return False
        if bitmap is None:
            return True
        if bitmap[compressed].any():
            return False
        bitmap = bitmap[~compressed]
        allocated = bitmap & _LOW
        if (allocated & (bitmap >> _HALF)).any():
            return False
        without = (plain & _OFFSET) == 0
        if self.data_file:
            without &= (plain & _COPIED) == 0
        return not allocated[without].any()

    def _clusters(
        self, words: Words, offset: Words, placed: NDArray[np.bool_], compressed: NDArray[np.bool_]
    ) -> Clusters | None:
        """Host clusters referred to, each as often as it is; None if any is past the end of the file."""
        if self.data_file:
            return np.empty(0, dtype=np.int64)
        offset = offset[placed]
        if len(offset) and int(offset.max()) >= self.file_size:
            return None
        clusters = (offset >> self.bits).astype(np.int64)
        if not compressed.any():
            return clusters
        words = words[compressed]
        begin = words & self.compressed_mask
        sectors = ((words >> self.count_shift) & self.count_mask) + _ONE
        end = ((begin >> _NINE) + sectors) << _NINE
        if int(end.max()) - self.file_size >= self.cluster_size:
            return None
        first, last = (begin >> self.bits).astype(np.int64), ((end - _ONE) >> self.bits).astype(np.int64)
        longest = int((last - first).max())
        behind = [first[first + more <= last] + more for more in range(1, longest + 1)]
        return np.concatenate([clusters, first, *behind])

    def _add(self, clusters: Clusters, counts: Counts, start: int) -> bool:
        if len(clusters) == 0:
            return True
        low, high = int(clusters.min()), int(clusters.max())
        if low < start or high >= start + len(counts):
            clusters = clusters[(clusters >= start) & (clusters < start + len(counts))]
        clusters = clusters - start
        if len(clusters):
            if (clusters[1:] > clusters[:-1]).all():
                values = counts[clusters]
                if int(values.max()) >= self.limit:
                    return False
                counts[clusters] = values + 1
            else:
                which, more = np.unique(clusters, return_counts=True)
                values = counts[which]
                if (values.astype(np.int64) + more > self.limit).any():
                    return False
                counts[which] = values + more.astype(values.dtype)
        self.span = (low, high)
        return True

    def _statistics(
        self, table: Clusters, offset: Words, placed: NDArray[np.bool_], compressed: NDArray[np.bool_]
    ) -> None:
        self.compressed = int(np.count_nonzero(compressed))
        self.allocated = int(np.count_nonzero(placed)) + self.compressed
        offset, table = offset[placed], table[placed]
        apart = offset[1:] != offset[:-1] + np.uint64(self.cluster_size)
        apart &= table[1:] == table[:-1]
        # an offset that wrapped to 0 would not count; no sound one does
        self.fragmented = int(np.count_nonzero(apart)) + self.compressed

    def copied(self, raw: bytearray, stored: Counts, start: int, clusters: int) -> bool:
        """Whether every COPIED bit of the tables in `raw` is right as far as this partition can tell:
        `stored` are the counts of the clusters from `start` on, of `clusters` in the file."""
        words, bitmap = self._words(raw)
        run = self._one_run(words, bitmap)
        self.span = (1, 0)
        if run is not None:
            return self._run_copied(run[0], run[1], stored, start, clusters)
        words = words[(words & _COMPRESSED) == 0]
        words = words[self._placed(words, words & _OFFSET, np.zeros(len(words), dtype=bool))]
        if len(words) == 0:
            return True
        flag = (words & _COPIED) != 0
        if self.data_file:
            return bool(flag.all())
        place = ((words & _OFFSET) >> self.bits).astype(np.int64)
        low, high = int(place.min()), int(place.max())
        if high >= clusters:
            return False
        self.span = (low, high)
        if low < start or high >= start + len(stored):
            here = (place >= start) & (place < start + len(stored))
            place, flag = place[here], flag[here]
        return bool(((stored[place - start] == 1) == flag).all())

    def suspects(self, raw: bytearray | memoryview, stored: Counts, start: int, clusters: int) -> list[int]:
        """Numbers of the entries of the table `raw` that `copied` may object to."""
        words, _bitmap = self._words(raw)
        flag = (words & _COPIED) != 0
        place = ((words & _OFFSET) >> self.bits).astype(np.int64)
        looked_at = self._placed(words, words & _OFFSET, (words & _COMPRESSED) != 0)
        if self.data_file:
            return np.flatnonzero(looked_at & ~flag).tolist()
        here = looked_at & (place >= start) & (place < min(start + len(stored), clusters))
        wrong = looked_at & (place >= clusters)
        wrong[here] = (stored[place[here] - start] == 1) != flag[here]
        return np.flatnonzero(wrong).tolist()

    def _run_copied(self, word: int, length: int, stored: Counts, start: int, clusters: int) -> bool:
        flag = bool(word >> 63)
        if self.data_file:
            return flag
        first = (word & int(_OFFSET)) // self.cluster_size
        if first + length > clusters:
            return False
        self.span = (first, first + length - 1)
        part = stored[max(first - start, 0) : max(first - start + length, 0)]
        return bool(((part == 1) == flag).all())


def unpack(raw: bytes | bytearray | memoryview, width: int) -> Counts:
    """Counters of `width` bits as a refcount block stores them."""
    if width >= 8:
        return np.frombuffer(raw, dtype=f">u{width // 8}")
    octets = np.frombuffer(raw, dtype=np.uint8)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return ((octets[:, None] >> shifts) & np.uint8((1 << width) - 1)).reshape(-1)


def last_in_use(counts: Counts, raw: bytes | bytearray | None, width: int) -> int:
    """Number of the last cluster that is referred to or has a stored count, plus one; 0: there is none."""
    for at in range((len(counts) - 1) // _STEP * _STEP, -1, -_STEP):
        used = counts[at : at + _STEP] != 0
        if raw is not None:
            used |= _stored(raw, width, at, len(used)) != 0
        if used[-1]:
            return at + len(used)
        if used.any():
            return at + int(np.flatnonzero(used)[-1]) + 1
    return 0


def _stored(raw: bytes | bytearray, width: int, at: int, count: int) -> Counts:
    part = memoryview(raw)[at * width // 8 : ((at + count) * width + 7) // 8]
    return unpack(part, width)[:count]


def compare(counts: Counts, raw: bytes | bytearray | None, width: int) -> Iterator[tuple[int, int, int]]:
    """(index, stored, references) wherever they differ."""
    for at in range(0, len(counts), _STEP):
        part = counts[at : at + _STEP]
        if raw is None:
            for index in np.flatnonzero(part).tolist():
                yield at + index, 0, int(part[index])
            continue
        stored = _stored(raw, width, at, len(part))
        for index in np.flatnonzero(stored != part).tolist():
            yield at + index, int(stored[index]), int(part[index])


def load(counts: Counts, raw: bytes | bytearray | None, width: int) -> None:
    """Let `counts` hold what is stored."""
    if raw is None:
        counts[:] = 0
        return
    for at in range(0, len(counts), _STEP):
        part = counts[at : at + _STEP]
        stored = _stored(raw, width, at, len(part))
        part[:] = np.minimum(stored, np.iinfo(part.dtype).max) if stored.itemsize > part.itemsize else stored


def mended(counts: Counts, raw: bytes | bytearray, width: int, *, lower: bool) -> bytes | None:
    """What is stored, with what is too high lowered to `counts`, or what is too low raised; None: nothing
    is. Counters behind those of `counts` stay."""
    stored = unpack(raw, width).astype(_native(width))
    part = stored[: len(counts)]
    wrong = part > counts if lower else part < counts
    if not wrong.any():
        return None
    part[wrong] = counts[wrong]
    return pack(stored, width)


def freed(counts: Counts, raw: bytes | bytearray, width: int) -> list[tuple[int, int]]:
    """(index, length) of the runs of counters that are not 0 in `raw` and 0 in `counts`."""
    found = np.flatnonzero((unpack(raw, width)[: len(counts)] != 0) & (counts == 0))
    if len(found) == 0:
        return []
    ends = np.flatnonzero(np.diff(found) != 1)
    firsts = found[np.concatenate([[0], ends + 1])]
    lasts = found[np.concatenate([ends, [len(found) - 1]])]
    return list(zip(firsts.tolist(), (lasts - firsts + 1).tolist(), strict=True))


def packed(counts: Counts, length: int, ones: Sequence[int], width: int) -> bytes:
    """A refcount block of `length` counters: `counts`, then zeros, and 1 at the indices `ones`."""
    block = np.zeros(length, dtype=_native(width))
    block[: len(counts)] = counts
    block[list(ones)] = 1
    return pack(block, width)


def pack(counts: Counts, width: int) -> bytes:
    """Counters as a refcount block stores them: the reverse of `unpack`."""
    if width >= 8:
        return bytes(counts.astype(f">u{width // 8}").data)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    apart = counts.reshape(-1, 8 // width) << shifts
    octets: Counts = np.bitwise_or.reduce(apart, axis=1).astype(np.uint8)
    return octets.tobytes()


def _native(width: int) -> str:
    return f"u{max(width, 8) // 8}"


def next_zero(counts: Counts, start: int) -> int | None:
    """Index of the first 0 from `start` on."""
    step = 1 << 12
    while start < len(counts):
        free = np.flatnonzero(counts[start : start + step] == 0)
        if len(free):
            return start + int(free[0])
        start += step
        step = min(step * 2, _STEP)
    return None
