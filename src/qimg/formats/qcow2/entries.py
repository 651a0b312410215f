"""What the entries of staged L2 tables say, and how allocating changes them (sheet, section 5).

Tables are arrays of native 64-bit words: one word an entry, or two with extended L2. A piece of a table
is the range of entries ``low .. high``; `guest` is the guest offset of its first entry. Places for new
clusters come from a `Placement`.

Every entry of an image being written that has a host cluster carries COPIED (nothing is shared), which
also tells a data file's cluster 0 from an unallocated one.
"""

from __future__ import annotations

import sys
from array import array

from qimg.errors import NotSupported
from qimg.extent import MAPPED
from qimg.formats.qcow2.structs import COPIED, L2_COMPRESSED, L2_ZERO, OFFSET_MASK, SUBCLUSTERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.extent import Runs
    from qimg.formats.protection import Protection
    from qimg.formats.qcow2.alloc import HostSpace
    from qimg.storage.base import Storage

#: Words from which on numpy is faster, and from which on even its import pays.
_SOME, _MANY = 256, 1 << 20


def arithmetic(first: int, count: int, step: int) -> array[int]:
    """``first, first + step, ...``: the words of neighbouring host clusters.

    By numpy where it is loaded already, or where so many words come that its import pays."""
    if count >= _SOME and ("numpy" in sys.modules or count >= _MANY):
        from qimg.vec.build import arithmetic as vectored

        return vectored(first, count, step)
    return array("Q", range(first, first + count * step, step))


def is_blank(words: array[int]) -> bool:
    """Whether all are zero."""
    return words.tobytes() == bytes(words.itemsize * len(words))


class Placement:
    """Where new guest clusters go: into the image file, wherever there is room.

    source        the storage that holds the guest's data.
    protection    what encrypts the data, or None.
    keeps_zeros   new clusters read as zeros until written to.
    drop          called with the descriptor of a compressed cluster that is given up.
    """

    def __init__(
        self,
        source: Storage,
        space: HostSpace,
        cluster_size: int,
        drop: Callable[[int], None],
        protection: Protection | None = None,
    ) -> None:
        self.source = source
        self.protection = protection
        self.keeps_zeros = source.zero_init and protection is None
        self.drop = drop
        self._space = space
        self._cluster_size = cluster_size
        #: End of the last data cluster, in bytes.
        self.end = 0

    def take(self, guest: int, count: int) -> int:
        """Host byte offset of `count` neighbouring clusters for the guest clusters from `guest` on."""
        host = self._space.take(count) * self._cluster_size
        self.end = self._space.end * self._cluster_size
        return host

    def zero(self, guest: int, host: int, length: int) -> None:
        """Make ``host .. host + length`` read as zeros, where the guest's bytes from `guest` on lie."""
        source = self.source
        if self.protection is not None:
            source = self.protection.storage(source, guest, host)
        source.zero(host, length)


class OneToOne(Placement):
    """Into an external data file, each cluster at its guest offset (section 6). `size` is the guest's."""

    size: int

    def take(self, guest: int, count: int) -> int:
        return guest

    def zero(self, guest: int, host: int, length: int) -> None:
        super().zero(guest, host, min(length, self.size - host))


class PlainEntries:
    """Standard entries, one word each."""

    words = 1

    def __init__(self, placement: Placement, cluster_size: int, *, zero_flag: bool, fill_zero: bool) -> None:
        """`zero_flag`: the format knows zero clusters (version 3). `fill_zero`: zeros are written to the
        data file as well (a raw external data file)."""
        self.placement = placement
        self.cluster_size = cluster_size
        self.zero_flag = zero_flag
        self.fill_zero = fill_zero
        self.sub_size = cluster_size

    # -- allocate

    def allocate(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, runs: Runs
    ) -> None:
        """Give entries `low` .. `high` room and add their MAPPED runs; guest bytes `start` .. `end` are
        what the caller is going to write."""
        if is_blank(table[low:high]):
            self._fresh(table, low, high, guest, runs)
            return
        at = low
        while at < high:
            stop = self._same_kind(table, at, high)
            here = guest + (at - low) * self.cluster_size
            if table[at] & COPIED:
                self._keep(table, at, stop, here, runs)
            else:
                for index in range(at, stop):
                    if table[index] & L2_COMPRESSED:
                        self.placement.drop(table[index])
                self._fresh(table, at, stop, here, runs)
            at = stop

    @staticmethod
    def _same_kind(table: array[int], at: int, high: int) -> int:
        placed = table[at] & COPIED
        stop = at + 1
        while stop < high and table[stop] & COPIED == placed:
            stop += 1
        return stop

    def _fresh(self, table: array[int], low: int, high: int, guest: int, runs: Runs) -> None:
        count = high - low
        host = self.placement.take(guest, count)
        table[low:high] = arithmetic(host | COPIED, count, self.cluster_size)
        runs.append(guest, count * self.cluster_size, MAPPED, host, self.placement.source)

    def _keep(self, table: array[int], low: int, high: int, guest: int, runs: Runs) -> None:
        size = self.cluster_size
        for index in range(low, high):
            entry = table[index]
            host = entry & OFFSET_MASK
            if entry & L2_ZERO:
                self._forget_content(guest + (index - low) * size, host, size)
                table[index] = entry & ~L2_ZERO
            runs.append(guest + (index - low) * size, size, MAPPED, host, self.placement.source)

    def _forget_content(self, guest: int, host: int, length: int) -> None:
        """What is about to be shown again must read as zeros where the caller does not write."""
        if self.placement.keeps_zeros:
            self.placement.zero(guest, host, length)

    # -- zeros

    def mark_zero(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, covered: bool
    ) -> None:
        """Make entries `low` .. `high` read as zeros. `covered`: a backing file would show through."""
        nothing = L2_ZERO if covered else 0
        if is_blank(table[low:high]):
            table[low:high] = array("Q", [nothing]) * (high - low)
            return
        for index in range(low, high):
            entry = table[index]
            if entry & L2_COMPRESSED:
                self.placement.drop(entry)
                table[index] = nothing
            elif not entry & COPIED:
                table[index] = entry or nothing
            else:
                table[index] = self._zero_placed(guest + (index - low) * self.cluster_size, entry)

    def _zero_placed(self, guest: int, entry: int) -> int:
        if self.fill_zero or not self.zero_flag:
            self.placement.zero(guest, entry & OFFSET_MASK, self.cluster_size)
        return entry | L2_ZERO if self.zero_flag else entry

    # -- whole tables

    def preallocate(self, table: array[int], low: int, high: int, host: int, *, zero: bool) -> None:
        """Reserve the clusters from byte offset `host` on for entries `low` .. `high`; `zero` if what lies
        there may be anything."""
        first = host | COPIED | (L2_ZERO if zero else 0)
        table[low:high] = arithmetic(first, high - low, self.cluster_size)

    def set_compressed(self, table: array[int], index: int, descriptor: int) -> int:
        """Store a compressed cluster's descriptor; the word that was there before."""
        before = table[index]
        table[index] = descriptor
        return before


class ExtendedEntries(PlainEntries):
    """Two words an entry: the second holds 32 allocation bits and 32 zero bits, for the subclusters."""

    words = 2
    _ALL = (1 << SUBCLUSTERS) - 1

    def __init__(self, placement: Placement, cluster_size: int, *, zero_flag: bool, fill_zero: bool) -> None:
        super().__init__(placement, cluster_size, zero_flag=zero_flag, fill_zero=fill_zero)
        self.sub_size = cluster_size // SUBCLUSTERS

    def _mask(self, guest: int, start: int, end: int) -> int:
        """Bits of the subclusters of the cluster at `guest` that ``start .. end`` touches."""
        first = max(0, start - guest) // self.sub_size
        last = -(-min(self.cluster_size, end - guest) // self.sub_size)
        return (1 << last) - (1 << first)

    def allocate(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, runs: Runs
    ) -> None:
        count = high - low
        whole = start <= guest and end >= guest + count * self.cluster_size
        if whole and is_blank(table[2 * low : 2 * high]):
            host = self.placement.take(guest, count)
            table[2 * low : 2 * high : 2] = arithmetic(host | COPIED, count, self.cluster_size)
            table[2 * low + 1 : 2 * high : 2] = array("Q", [self._ALL]) * count
            runs.append(guest, count * self.cluster_size, MAPPED, host, self.placement.source)
            return
        for index in range(low, high):
            here = guest + (index - low) * self.cluster_size
            host = self._allocate_one(table, 2 * index, here, self._mask(here, start, end))
            runs.append(here, self.cluster_size, MAPPED, host, self.placement.source)

    def _allocate_one(self, table: array[int], word: int, guest: int, mask: int) -> int:
        entry = table[word]
        if entry & L2_COMPRESSED:
            self._give_up(entry, mask)
        if not entry & COPIED:
            entry = self.placement.take(guest, 1) | COPIED
            table[word] = entry
        elif table[word + 1] >> SUBCLUSTERS & mask:
            self._forget(guest, entry & OFFSET_MASK, table[word + 1] >> SUBCLUSTERS & mask)
        table[word + 1] = (table[word + 1] | mask) & ~(mask << SUBCLUSTERS)
        return entry & OFFSET_MASK

    def _give_up(self, descriptor: int, mask: int) -> None:
        if mask != self._ALL:
            raise NotSupported("Cannot change part of a compressed cluster")
        self.placement.drop(descriptor)

    def _forget(self, guest: int, host: int, bits: int) -> None:
        for sub in range(SUBCLUSTERS):
            if bits >> sub & 1:
                at = sub * self.sub_size
                self._forget_content(guest + at, host + at, self.sub_size)

    def mark_zero(
        self, table: array[int], low: int, high: int, guest: int, start: int, end: int, covered: bool
    ) -> None:
        for index in range(low, high):
            here = guest + (index - low) * self.cluster_size
            entry, bits = table[2 * index], table[2 * index + 1]
            mask = self._mask(here, start, end)
            if entry & L2_COMPRESSED:
                self._give_up(entry, mask)
                table[2 * index] = 0
            elif self.fill_zero and entry & COPIED:
                first = max(here, start)
                self.placement.zero(first, first, min(here + self.cluster_size, end) - first)
            if covered or bits or entry & COPIED:
                table[2 * index + 1] = (bits & ~mask) | (mask << SUBCLUSTERS)

    def preallocate(self, table: array[int], low: int, high: int, host: int, *, zero: bool) -> None:
        count = high - low
        table[2 * low : 2 * high : 2] = arithmetic(host | COPIED, count, self.cluster_size)
        if zero:
            table[2 * low + 1 : 2 * high : 2] = array("Q", [self._ALL << SUBCLUSTERS]) * count

    def set_compressed(self, table: array[int], index: int, descriptor: int) -> int:
        before = table[2 * index]
        table[2 * index] = descriptor
        table[2 * index + 1] = 0
        return before
