"""check: the places of blocks; a log that waits is what can be repaired (vhdx sheet 6)."""

from __future__ import annotations

from qimg.findings import ErrorFinding
from qimg.formats.base import CheckResult
from qimg.formats.tables import WordTable
from qimg.formats.vhdx.bat import Checker, find_problems
from qimg.formats.vhdx.structs import INVALID, MIB, PARTIAL, PRESENT, STATE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.vhdx.image import VhdxImage

#: Bytes of a file of which it is remembered what lies there twice; no image of 64 TiB is longer.
_REMEMBERED = 128 << 40


def check(image: VhdxImage, report: Callable[[str], None], fix: str | None) -> CheckResult:
    """Look at all words of the BAT; with `fix` the log is applied first."""
    result = CheckResult()
    if fix is not None and image.replay():
        result.corruptions_fixed = 1
        return result  # it is checked again

    def tell(line: str) -> None:
        report(ErrorFinding(line))

    checker = Checker(image.file, image.cluster_size, image.size, image.regions.taken)
    result.corruptions += find_problems(image.bat, checker, tell)
    result.corruptions += _find_shared(image, tell)
    result.corruptions += _find_states(image, tell)
    return result


def _find_shared(image: VhdxImage, tell: Callable[[str], None]) -> int:
    """Blocks that lie where another one does."""
    end = min(image.file.size, _REMEMBERED)
    seen = bytearray(-(-end // MIB))
    count = 0
    for index, length, place in image.bat.scan():
        low = place // MIB
        high = min(low + (length or image.cluster_size) // MIB, len(seen))
        if low >= high:
            continue
        if seen.find(1, low, high) >= 0:
            tell(f"VHDX BAT entry {index} at offset {place} lies on another one")
            count += 1
        seen[low:high] = b"\1" * (high - low)
    return count


def _find_states(image: VhdxImage, tell: Callable[[str], None]) -> int:
    """Words in states that they cannot have."""
    bat = image.bat
    wrong = (INVALID,) if image.bat.parent else (INVALID, PARTIAL)
    count = 0
    for low, high in bat.filled():
        words = WordTable.words(bat, low, high)
        head = words[0]
        if head & STATE not in wrong and words.count(head) == len(words):
            continue
        for index, word in enumerate(words, low):
            state = word & STATE
            bitmap = index % (bat.ratio + 1) == bat.ratio
            if state in wrong or (bitmap and state not in (0, PRESENT) and bat.parent):
                tell(f"VHDX BAT entry {index} has the invalid state {state}")
                count += 1
    return count
