"""Two-level mapping tables of 8- or 16-byte big-endian entries, decoded by numpy into extents.

The fast twin of `qimg.formats.qcow2.mapping.Decoder`, which defines what entries mean. What this one finds
odd it does not explain: it gives up, and the plain path finds the words.
"""

from __future__ import annotations

from qimg.extent import COMPRESSED, HOLE, MAPPED, ZERO, Extent
from qimg.vec.door import np

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from qimg.storage.base import Storage

    Words = NDArray[np.uint64]
    Offsets = NDArray[np.int64]
    Flags = NDArray[np.uint8]
    Bools = NDArray[np.bool_]

_COPIED = np.uint64(1 << 63)
_COMPRESSED = np.uint64(1 << 62)
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_ONE = np.uint64(1)
_ALL = np.uint64((1 << 32) - 1)
_SUBCLUSTERS = 32
_NOWHERE = -1  # host of what has none
_ODD = 0x7F00_0000_0000_01FF  # bits that the entries of one simple run do not have
_RUN = 64  # tables of fewer entries are not worth a look for one run
#: Flags of a cluster whose subclusters are all of one kind, by its bitmap.
_WHOLE = {0: HOLE, (1 << 32) - 1: MAPPED, ((1 << 32) - 1) << 32: ZERO}


class TableDecoder:
    """Collects runs from tables fed in ascending guest order; `extents` gives the result.

    Sizes in bytes. `zero_clusters`: bit 0 may say "reads as zeros". `data_file`: guest data lies in a file
    of its own, at host offsets equal to the guest's.
    """

    def __init__(self, cluster_size: int, *, extended: bool, zero_clusters: bool, data_file: bool) -> None:
        self.cluster_size = cluster_size
        self.extended = extended
        self.zero_clusters = zero_clusters
        self.data_file = data_file
        self._runs: list[tuple[Offsets, Offsets, Flags, Offsets]] = []

    def feed(self, raw: bytes | bytearray | memoryview, guests: Sequence[int], counts: Sequence[int]) -> bool:
        """Decode `raw`: for each i, ``counts[i]`` entries of which the first is the cluster at
        ``guests[i]``. False if any of it is damaged."""
        words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
        step = 2 if self.extended else 1
        waiting = 0  # tables from here on are still to be decoded
        at = [0]
        for count in counts:
            at.append(at[-1] + count * step)
        for number, count in enumerate(counts):
            run = self._one_run(words[at[number] : at[number + 1]]) if count >= _RUN else None
            if run is None or (self.data_file and run[1] != guests[number]):
                continue
            if not self._feed_several(words[at[waiting] : at[number]], guests, counts, waiting, number):
                return False
            waiting = number + 1
            self._add_run(guests[number], count * self.cluster_size, *run)
        return self._feed_several(words[at[waiting] :], guests, counts, waiting, len(counts))

    def _one_run(self, words: Words) -> tuple[int, int] | None:
        """(flags, host) if the table is one run of clusters in file order, all of one kind."""
        flags = MAPPED
        if self.extended:
            bitmap, words = words[1::2], words[0::2]
            kind = _WHOLE.get(int(bitmap[0]))
            if kind is None or (bitmap != bitmap[0]).any():
                return None
            flags = kind
        first, last = int(words[0]), int(words[-1])
        if last - first != (len(words) - 1) * self.cluster_size or first & _ODD:
            return None
        host = first & int(_OFFSET)
        if host == 0 or host & (self.cluster_size - 1) or not self._ascends(words):
            return None
        return flags, host

    def _ascends(self, words: Words) -> bool:
        return not bool((words[1:] - words[:-1] != self.cluster_size).any())

    def _add_run(self, start: int, length: int, flags: int, host: int) -> None:
        self._runs.append(
            (
                np.array([start], dtype=np.int64),
                np.array([length], dtype=np.int64),
                np.array([flags], dtype=np.uint8),
                np.array([host], dtype=np.int64),
            )
        )

    def _feed_several(
        self, words: Words, guests: Sequence[int], counts: Sequence[int], first: int, last: int
    ) -> bool:
        """Decode the tables ``first .. last``, whose words are `words`."""
        if first == last:
            return True
        number = np.asarray(counts[first:last], dtype=np.int64)
        before = np.cumsum(number) - number
        shift = np.asarray(guests[first:last], dtype=np.int64) - before * self.cluster_size
        guest = np.repeat(shift, number) + np.arange(int(number.sum()), dtype=np.int64) * self.cluster_size
        if self.extended:
            return self._feed_extended(words[0::2], words[1::2], guest)
        return self._feed_standard(words, guest)

    def _feed_standard(self, words: Words, guest: Offsets) -> bool:
        some = np.flatnonzero(words)
        if len(some) == 0:
            return True
        if len(some) < len(words):
            words, guest = words[some], guest[some]
        compressed = (words & _COMPRESSED) != 0
        zero = ((words & _ONE) != 0) & ~compressed
        offset = words & _OFFSET
        normal = ~(compressed | zero) & self._has_place(words, offset)
        placed = normal | (zero & (offset != 0))
        host = np.where(placed, offset, 0).astype(np.int64)
        if self._damaged(compressed, zero if not self.zero_clusters else None, host, placed, guest):
            return False
        host[~placed] = _NOWHERE
        flags = np.full(len(words), HOLE, dtype=np.uint8)
        flags[normal] = MAPPED
        flags[zero] = ZERO
        flags[compressed] = COMPRESSED
        self._add(guest, None, flags, host)
        return True

    def _has_place(self, words: Words, offset: Words) -> Bools:
        placed: Bools = offset != 0
        if self.data_file:
            placed |= (words & _COPIED) != 0
        return placed

    def _damaged(
        self, compressed: Bools, old_zero: Bools | None, host: Offsets, placed: Bools, guest: Offsets
    ) -> bool:
        if (host & (self.cluster_size - 1)).any():
            return True
        if old_zero is not None and old_zero.any():
            return True
        return self.data_file and bool(compressed.any() or (placed & (host != guest)).any())

    def _feed_extended(self, words: Words, bitmap: Words, guest: Offsets) -> bool:
        some = np.flatnonzero(words | bitmap)
        if len(some) == 0:
            return True
        words, bitmap, guest = words[some], bitmap[some], guest[some]
        compressed = (words & _COMPRESSED) != 0
        bitmap = np.where(compressed, np.uint64(0), bitmap)
        offset = words & _OFFSET
        placed = self._has_place(words, offset) & ~compressed
        host = np.where(placed, offset, 0).astype(np.int64)
        allocated, zero = bitmap & _ALL, bitmap >> np.uint64(32)
        wrong = ((allocated & zero) != 0) | ((allocated != 0) & ~placed)
        if wrong.any() or self._damaged(compressed, None, host, placed, guest):
            return False
        host[~placed] = _NOWHERE
        flags = np.full(len(words), HOLE, dtype=np.uint8)
        flags[allocated == _ALL] = MAPPED
        flags[zero == _ALL] = ZERO
        flags[compressed] = COMPRESSED
        mixed = (bitmap != 0) & (flags == HOLE)
        if mixed.any():
            self._add_mixed(guest, flags, host, allocated, zero, mixed)
        else:
            self._add(guest, None, flags, host)
        return True

    def _add_mixed(
        self, guest: Offsets, flags: Flags, host: Offsets, allocated: Words, zero: Words, mixed: Bools
    ) -> None:
        """Add clusters of which the `mixed` ones fall apart into subclusters."""
        counts = np.where(mixed, _SUBCLUSTERS, 1)
        source = np.repeat(np.arange(len(counts)), counts)
        bit = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
        size = self.cluster_size // _SUBCLUSTERS
        split = mixed[source]
        length = np.where(split, size, self.cluster_size).astype(np.int64)
        start = guest[source] + bit * size
        place = host[source]
        place = np.where(place == _NOWHERE, _NOWHERE, place + bit * size)
        shift = bit.astype(np.uint64)
        kind = flags[source]
        kind[split & (((allocated[source] >> shift) & _ONE) != 0)] = MAPPED
        kind[split & (((zero[source] >> shift) & _ONE) != 0)] = ZERO
        self._add(start, length, kind, place)

    def _add(self, start: Offsets, length: Offsets | None, flags: Flags, host: Offsets) -> None:
        """Join neighbours and keep the runs. `length` None: every piece is one cluster."""
        if length is None:
            length = np.full(len(start), self.cluster_size, dtype=np.int64)
        self._runs.append(_joined(start, length, flags, host))

    def extents(self, start: int, length: int, source: Storage) -> list[Extent]:
        """The runs inside ``start .. start + length``, and HOLE where there are none."""
        end = start + length
        if not self._runs:
            return [Extent(start, length, HOLE)] if length > 0 else []
        begin, size, flags, host = (
            np.concatenate([run[column] for run in self._runs]) for column in range(4)
        )
        keep = (begin < end) & (begin + size > start) & ((flags != HOLE) | (host != _NOWHERE))
        begin, size, flags, host = _joined(begin[keep], size[keep], flags[keep], host[keep])
        cut = np.maximum(start - begin, 0)
        stop = np.minimum(begin + size, end)
        begin = begin + cut
        host = np.where(host == _NOWHERE, _NOWHERE, host + cut)
        return _with_gaps(begin, stop, flags, host, start, end, source)


def _joined(
    start: Offsets, length: Offsets, flags: Flags, host: Offsets
) -> tuple[Offsets, Offsets, Flags, Offsets]:
    if len(start) < 2:
        return start, length, flags, host
    before = length[:-1]
    expected = np.where(host[:-1] == _NOWHERE, _NOWHERE, host[:-1] + before)
    apart = flags[1:] != flags[:-1]
    apart |= start[1:] != start[:-1] + before
    apart |= host[1:] != expected
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    return start[first], np.add.reduceat(length, first), flags[first], host[first]


def _with_gaps(
    begin: Offsets, stop: Offsets, flags: Flags, host: Offsets, start: int, end: int, source: Storage
) -> list[Extent]:
    """Extents of the runs, the gaps between ``start``, them and ``end`` filled with HOLE."""
    out: list[Extent] = []
    append = out.append
    at = start
    for low, high, kind, place in zip(
        begin.tolist(), stop.tolist(), flags.tolist(), host.tolist(), strict=True
    ):
        if low > at:
            append(Extent(at, low - at, HOLE))
        if place == _NOWHERE:
            append(Extent(low, high - low, kind))
        else:
            append(Extent(low, high - low, kind, 0, place, source))
        at = high
    if at < end:
        append(Extent(at, end - at, HOLE))
    return out
