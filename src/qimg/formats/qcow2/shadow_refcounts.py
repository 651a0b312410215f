"""Refcounts of another width (``amend -o refcount_bits``; qcow2 sheet, sections 4 and 17)."""

from __future__ import annotations

from array import array

from qimg.errors import NotSupported
from qimg.formats.qcow2.shadow import Shadow
from qimg.formats.qcow2.shadow_counts import ShadowCounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.qcow2.image import Qcow2Image


def rewrite_refcounts(image: Qcow2Image, bits: int, progress: Callable[[int, int], None]) -> None:
    """Store the counts of `image` (opened writable, flushed) in `bits` bits each, 1 to 64.

    One write of the header switches to the new structure. `progress(done, total)` counts refcount blocks.
    Raises NotSupported (a count does not fit, or version 2), StorageError, CorruptImage. The caller
    reloads the image afterwards.
    """
    header = image.header.header
    if bits == 1 << header.refcount_order:
        return
    if header.version < 3:
        raise NotSupported(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or"
            " greater)"
        )
    with Shadow(image) as shadow:
        counts = _Converted(image.file, shadow.stored, shadow.space, bits)
        shadow.counts = counts
        blocks = counts.needed()
        for number, block in enumerate(blocks):
            progress(number, len(blocks))
            counts.change(block)
        counts.leave_all()
        shadow.set(refcount_order=bits.bit_length() - 1)
        shadow.commit()
        progress(len(blocks), len(blocks))


class _Converted(ShadowCounts):
    """Counts of another width than the stored ones: no block stays where it is."""

    def needed(self) -> list[int]:
        """The blocks that have a count other than 0. Raises NotSupported where one does not fit."""
        stored = self._stored
        blocks: dict[int, None] = {}
        for index in range(len(stored.table)):
            counts = stored.counts(index)
            if counts is None:
                continue
            if self.maximum < stored.maximum:
                self._check_fits(index, counts)
            first = index * stored.per_block
            for block in range(first // self.per_block, (first + stored.per_block - 1) // self.per_block + 1):
                low = max(block * self.per_block - first, 0)
                if any(counts[low : (block + 1) * self.per_block - first].tobytes()):
                    blocks[block] = None
        return list(blocks)

    def _check_fits(self, index: int, counts: array[int]) -> None:
        if max(counts) <= self.maximum:
            return
        slot, value = next((slot, value) for slot, value in enumerate(counts) if value > self.maximum)
        offset = (index * self._stored.per_block + slot) * self._cluster_size
        raise NotSupported(
            f"Cannot decrease refcount entry width to {self.bits} bits: Cluster at offset {offset:#x} has a"
            f" refcount of {value}"
        )

    def leave_all(self) -> None:
        """Every stored block is given up."""
        for index in range(len(self._stored.table)):
            self._give_up(index)

    def _give_up(self, index: int) -> None:
        place = self._stored.place(index)
        if place:
            self.lower(place // self._cluster_size)

    def _leave(self, block: int) -> None:
        pass

    def _stored_counts(self, block: int) -> array[int]:
        found = array(self.typecode)
        at, stop = block * self.per_block, (block + 1) * self.per_block
        while at < stop:
            index, slot = divmod(at, self._stored.per_block)
            count = min(self._stored.per_block - slot, stop - at)
            counts = self._stored.counts(index)
            if counts is None:
                found.frombytes(bytes(count * found.itemsize))
            else:
                found.extend(array(self.typecode, counts[slot : slot + count]))
            at += count
        return found

    def _kept_entries(self) -> int:
        return 0

    def _kept_table(self) -> array[int]:
        return array("Q")
