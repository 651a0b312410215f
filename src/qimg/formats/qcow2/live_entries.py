"""What allocating and clearing do to the entries of L2 tables that have a past (sheet, sections 5 and 13).

As in `entries`, tables are arrays of native words and a piece is the range of entries ``low .. high``. Here
an entry may point to a cluster that an internal snapshot has too (no COPIED): it is never written to,
and given up for a new one. Units of the methods: bytes, unless said.
"""

from __future__ import annotations

from array import array

from qimg.extent import HOLE, MAPPED
from qimg.formats.qcow2.entries import arithmetic, is_blank
from qimg.formats.qcow2.structs import COPIED, L2_COMPRESSED, L2_ZERO, OFFSET_MASK, SUBCLUSTERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.extent import Runs
    from qimg.formats.qcow2.live_refcounts import LiveRefcounts
    from qimg.storage.base import Storage

ALL = (1 << SUBCLUSTERS) - 1


class LivePlacement:
    """Where new guest clusters go, and what becomes of those given up: the image file, wherever there is
    room.

    source   the storage that holds the guest's data.
    drop     called with the descriptor of a compressed cluster that is given up.
    guard    called with a run of host clusters that is about to be overwritten in place.
    """

    def __init__(
        self,
        source: Storage,
        refcounts: LiveRefcounts,
        cluster_bits: int,
        drop: Callable[[int], None],
        guard: Callable[[int, int, int], None],
    ) -> None:
        self.source = source
        self._refcounts = refcounts
        self._bits = cluster_bits
        self._drop = drop
        self._guard = guard

    def take(self, guest: int, count: int) -> Iterator[tuple[int, int]]:
        """(host offset, clusters) of `count` new clusters for the guest clusters from `guest` on."""
        for first, clusters in self._refcounts.take_any(count):
            yield first << self._bits, clusters

    def keep(self, host: int, clusters: int, guest: int) -> None:
        """The guest is going to write over `clusters` at `host`. Raises CorruptImage."""
        self._guard(host, clusters, guest)

    def give_up(self, word: int, clusters: int = 1) -> None:
        """The entry `word`, and others like it for the following host clusters, have been replaced."""
        if word & L2_COMPRESSED:
            self._drop(word)
        elif word & OFFSET_MASK:
            self._refcounts.release((word & OFFSET_MASK) >> self._bits, clusters)

    def clear(self, guest: int, length: int) -> None:
        """Zeros were asked for where the data lies one to one."""


class LiveOneToOne(LivePlacement):
    """An external data file: each cluster at its guest offset, not counted. `raw`: alone it is a valid raw
    image, so zeros are written there too (section 6). `size` is the guest's."""

    def __init__(self, source: Storage, refcounts: LiveRefcounts, bits: int, *, raw: bool, size: int) -> None:
        super().__init__(source, refcounts, bits, _nothing, _no_guard)
        self._raw = raw
        self.size = size

    def take(self, guest: int, count: int) -> Iterator[tuple[int, int]]:
        yield guest, count

    def give_up(self, word: int, clusters: int = 1) -> None:
        pass

    def clear(self, guest: int, length: int) -> None:
        if self._raw:
            self.source.zero(guest, min(length, self.size - guest))


def _nothing(word: int) -> None:
    """A data file has no compressed clusters."""


def _no_guard(host: int, clusters: int, guest: int) -> None:
    """A data file has no tables."""


class LivePlain:
    """Standard entries, one word each."""

    words = 1

    def __init__(self, placement: LivePlacement, cluster_size: int, *, zero_flag: bool) -> None:
        """`zero_flag`: the format knows zero clusters (version 3)."""
        self.placement = placement
        self.cluster_size = cluster_size
        self.sub_size = cluster_size
        self._nothing = L2_ZERO if zero_flag else 0
        self._one_to_one = isinstance(placement, LiveOneToOne)

    # -- data

    def in_place(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, runs: Runs
    ) -> None:
        """Add what of entries `low` .. `high` can be overwritten as it is (MAPPED)."""
        for at, stop, host in self._same(table, low, high):
            if table[at] & COPIED and not table[at] & L2_ZERO:
                here = guest + (at - low) * self.cluster_size
                runs.append(here, (stop - at) * self.cluster_size, MAPPED, host, self.placement.source)

    def allocate(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, runs: Runs
    ) -> None:
        """Give entries `low` .. `high` clusters of their own, and add their MAPPED runs."""
        if is_blank(table[low:high]):
            self._place(table, low, high, guest, runs)
            return
        for at, stop, host in self._same(table, low, high):
            here = guest + (at - low) * self.cluster_size
            if not table[at] & COPIED:
                given_up = table[at]
                self._place(table, at, stop, here, runs)
                self.placement.give_up(given_up, stop - at)
                continue
            self.placement.keep(host, stop - at, here)
            if table[at] & L2_ZERO:
                table[at:stop] = arithmetic(host | COPIED, stop - at, self.cluster_size)
            runs.append(here, (stop - at) * self.cluster_size, MAPPED, host, self.placement.source)

    def _place(self, table: array[int], low: int, high: int, guest: int, runs: Runs) -> None:
        for host, clusters in self.placement.take(guest, high - low):
            table[low : low + clusters] = arithmetic(host | COPIED, clusters, self.cluster_size)
            runs.append(guest, clusters * self.cluster_size, MAPPED, host, self.placement.source)
            low += clusters
            guest += clusters * self.cluster_size

    def _same(self, table: array[int], low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(first, stop, host offset) of runs of entries that are alike: all without a place, or neighbours
        with the same bits. A compressed cluster is a run of its own."""
        size = self.cluster_size
        if table[low] & OFFSET_MASK and not table[low] & L2_COMPRESSED:
            count = high - low
            if table[high - 1] - table[low] == (count - 1) * size and table[low:high] == arithmetic(
                table[low], count, size
            ):
                yield low, high, table[low] & OFFSET_MASK
                return
        while low < high:
            word = table[low]
            stop = low + 1
            if not word & L2_COMPRESSED:
                step = size if word & OFFSET_MASK or (self._one_to_one and word & COPIED) else 0
                while stop < high and table[stop] == word + (stop - low) * step:
                    stop += 1
            yield low, stop, word & OFFSET_MASK
            low = stop

    # -- zeros

    def mark_zero(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, covered: bool
    ) -> None:
        """Make entries `low` .. `high` read as zeros and give up their clusters. `covered`: a backing file
        would show through an empty entry."""
        nothing = self._nothing if covered else 0
        for at, stop, _host in self._same(table, low, high):
            word = table[at]
            if self._one_to_one and word & COPIED:
                self._clear_data(table, at, stop, guest + (at - low) * self.cluster_size)
            elif word & ~L2_ZERO:
                table[at:stop] = array("Q", [self._nothing]) * (stop - at)
                self.placement.give_up(word, stop - at)
            elif not word:
                table[at:stop] = array("Q", [nothing]) * (stop - at)

    def _clear_data(self, table: array[int], at: int, stop: int, guest: int) -> None:
        """Clusters of a data file keep their places."""
        self.placement.clear(guest, (stop - at) * self.cluster_size)
        for index in range(at, stop):
            table[index] |= L2_ZERO

    # -- whole entries

    def set_compressed(self, table: array[int], index: int, descriptor: int) -> int:
        """Store a compressed cluster's descriptor; the word that was there before."""
        before = table[index]
        table[index] = descriptor
        return before

    def forget(self, table: array[int], low: int, high: int) -> None:
        """Give up whatever entries `low` .. `high` have, and leave them empty."""
        for at, stop, _host in self._same(table, low, high):
            word = table[at]
            if word & ~L2_ZERO:
                self.placement.give_up(word, stop - at)
        table[low:high] = array("Q", bytes(8 * (high - low)))


class LiveExtended(LivePlain):
    """Two words an entry: the second holds 32 allocation bits and 32 zero bits, for the subclusters.

    move     called with (guest offset of a cluster, its old word, new host offset, bits): copies the
             subclusters `bits` to the new place.
    """

    words = 2

    def __init__(
        self,
        placement: LivePlacement,
        cluster_size: int,
        move: Callable[[int, int, int, int], None],
    ) -> None:
        super().__init__(placement, cluster_size, zero_flag=True)
        self.sub_size = cluster_size // SUBCLUSTERS
        self._move = move

    def _mask(self, guest: int, start: int, end: int) -> int:
        """Bits of the subclusters of the cluster at `guest` that ``start .. end`` touches."""
        first = max(0, start - guest) // self.sub_size
        last = -(-min(self.cluster_size, end - guest) // self.sub_size)
        return (1 << last) - (1 << first)

    def in_place(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, runs: Runs
    ) -> None:
        for index in range(low, high):
            word, bits = table[2 * index], table[2 * index + 1]
            host = word & OFFSET_MASK
            here = guest + (index - low) * self.cluster_size
            if word & L2_COMPRESSED or not word & COPIED:
                runs.append(here, self.cluster_size, HOLE)
                continue
            for sub in range(SUBCLUSTERS):
                at = sub * self.sub_size
                if bits >> sub & 1:
                    runs.append(here + at, self.sub_size, MAPPED, host + at, self.placement.source)

    def allocate(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, runs: Runs
    ) -> None:
        count = high - low
        size = self.cluster_size
        if start <= guest and end >= guest + count * size and is_blank(table[2 * low : 2 * high]):
            for host, clusters in self.placement.take(guest, count):
                stop = low + clusters
                table[2 * low : 2 * stop : 2] = arithmetic(host | COPIED, clusters, size)
                table[2 * low + 1 : 2 * stop : 2] = array("Q", [ALL]) * clusters
                runs.append(guest, clusters * size, MAPPED, host, self.placement.source)
                low = stop
                guest += clusters * size
            return
        for index in range(low, high):
            here = guest + (index - low) * size
            host = self._allocate_one(table, 2 * index, here, self._mask(here, start, end))
            runs.append(here, size, MAPPED, host, self.placement.source)

    def _allocate_one(self, table: array[int], at: int, guest: int, mask: int) -> int:
        word, bits = table[at], table[at + 1]
        if word & COPIED and not word & L2_COMPRESSED:
            host = word & OFFSET_MASK
            self.placement.keep(host, 1, guest)
        else:
            ((host, _count),) = self.placement.take(guest, 1)
            # Of a compressed cluster all is data, of another one what the bits say.
            kept = (ALL if word & L2_COMPRESSED else bits & ALL) & ~mask
            if kept:
                self._move(guest, word, host, kept)
            if word & L2_COMPRESSED:
                bits = ALL
            table[at] = host | COPIED
            self.placement.give_up(word)
        table[at + 1] = (bits | mask) & ~(mask << SUBCLUSTERS)
        return host

    def mark_zero(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, covered: bool
    ) -> None:
        for index in range(low, high):
            here = guest + (index - low) * self.cluster_size
            self._zero_one(table, 2 * index, here, self._mask(here, start, end), covered)

    def _zero_one(self, table: array[int], at: int, guest: int, mask: int, covered: bool) -> None:
        word, bits = table[at], table[at + 1]
        if not word and not bits and not covered:
            return
        if word & L2_COMPRESSED:
            if mask != ALL:
                self._allocate_one(table, at, guest, mask)
            else:
                table[at] = 0
                self.placement.give_up(word)
            bits = table[at + 1]
        bits = bits & ~mask | mask << SUBCLUSTERS
        first = ((mask & -mask).bit_length() - 1) * self.sub_size
        if self._one_to_one:
            self.placement.clear(guest + first, mask.bit_count() * self.sub_size)
        elif not bits & ALL and table[at] & OFFSET_MASK:
            self.placement.give_up(table[at])
            table[at] = 0
        table[at + 1] = bits

    def set_compressed(self, table: array[int], index: int, descriptor: int) -> int:
        before = table[2 * index]
        table[2 * index] = descriptor
        table[2 * index + 1] = 0
        return before

    def forget(self, table: array[int], low: int, high: int) -> None:
        for index in range(low, high):
            if table[2 * index]:
                self.placement.give_up(table[2 * index])
        table[2 * low : 2 * high] = array("Q", bytes(16 * (high - low)))
