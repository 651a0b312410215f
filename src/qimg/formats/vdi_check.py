"""check of vdi images (vdi sheet, section 6), and the repair of what it finds (qimg only).

A repair of ``all``: entries that lead nowhere are cleared, blocks that share a place get their own, blocks
move into the gaps of the data area, and the header says how many there are. Until its map is durable every
block lies where it lay, so that the repair can be cut off at any moment and done again.
"""

from __future__ import annotations

from array import array

from qimg.errors import LimitError
from qimg.formats.base import CheckResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.formats.vdi import VdiImage

#: Errors after which a check gives up, and blocks that a repair moves at most; no image is worth more.
MAX_FINDINGS = 1 << 17


class Checker:
    """One check. `fix`: None, ``leaks`` (there are none that can be told from damage) or ``all``."""

    def __init__(self, image: VdiImage, report: Callable[[str], None], fix: str | None) -> None:
        self.image = image
        self.report = report
        self.repair = fix == "all"
        self.result = CheckResult()
        self.map = image.levels()[0][0]
        self.used = bytearray(-(-image.header.blocks // 8))  # a bit for each data block
        self.twice: list[tuple[int, int]] = []  # (block, data block that another one has)

    def run(self) -> CheckResult:
        """Check, and repair. Raises LimitError, StorageError."""
        allocated = sum(self._check_run(first, words) for first, words in self._placed())
        counted = self.image.header.blocks_allocated
        if allocated != counted:
            self._found(f"allocated blocks mismatch, is {allocated}, should be {counted}")
        if self.repair and self.result.corruptions:
            self._mend(allocated)
        return self.result

    def _placed(self) -> Iterator[tuple[int, array[int]]]:
        """(first block, entries) of runs of blocks that have a place."""
        image = self.image
        for base, table, low, high in image.pieces(0, image.header.blocks, create=False):
            words = table.words(low, high)
            for at, stop, _flags, host in image.code.runs(words):
                if host is not None:
                    yield base + at, words[at:stop]

    def _found(self, text: str) -> None:
        self.report(f"{'Repairing' if self.repair else 'ERROR'}: {text}")
        self.result.corruptions += 1
        self.result.corruptions_fixed += self.repair

    def _check_run(self, first: int, words: array[int]) -> int:
        """Look at the entries `words` of blocks from `first` on; how many lie where blocks can lie."""
        if self.result.corruptions > MAX_FINDINGS:
            raise LimitError("There are too many errors in the block map to go on")
        allocated = 0
        for number, word in enumerate(words, first):
            if word >= self.image.header.blocks:
                self._found(f"block index {number} too large, is {word}")
                if self.repair:
                    self.image.clear_entry(number)
                continue
            allocated += 1
            if self.used[word >> 3] >> (word & 7) & 1:
                self._found(f"block index {word} also used by {word}")
                self.twice.append((number, word))
            self.used[word >> 3] |= 1 << (word & 7)
        return allocated

    # -- repair

    def _mend(self, allocated: int) -> None:
        image = self.image
        for number, word in self.twice:
            image.move_block(number, word)
        image.flush()
        gaps = self._gaps(allocated)
        for first, words in self._placed():
            for number, word in enumerate(words, first):
                if word >= allocated:
                    image.move_block(number, word, next(gaps))
        image.flush()
        image.set_allocated(allocated)

    def _gaps(self, count: int) -> Iterator[int]:
        """Of the first `count` data blocks those that nobody has. Raises LimitError where they are many."""
        used = bytearray(-(-count // 8))
        left = count
        for _first, words in self._placed():
            for word in words:
                if word < count:
                    used[word >> 3] |= 1 << (word & 7)
                    left -= 1
        if left > MAX_FINDINGS:
            raise LimitError("There are too many gaps between the blocks to close them")
        return (number for number in range(count) if not used[number >> 3] >> (number & 7) & 1)
