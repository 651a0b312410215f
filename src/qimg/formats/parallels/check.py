"""check, and the repair of what it finds (parallels sheet, section 8)."""

from __future__ import annotations

from array import array

from qimg.formats.base import CheckResult
from qimg.formats.parallels.extension import extension_end
from qimg.formats.parallels.structs import IN_USE, Header, data_offset_is_valid
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.parallels.image import ParallelsImage


class Checker:
    """Section 8, in its order. `fix`: None, ``leaks`` or ``all``."""

    def __init__(self, image: ParallelsImage, report: Callable[[str], None], fix: str | None) -> None:
        self.image = image
        self.report = report
        self.fix = fix
        self.result = CheckResult()
        self.size = image.cluster_size

    def run(self) -> CheckResult:
        """Check, and repair as far as `fix` says."""
        self._unclean()
        self._data_offset()
        end = self._places()
        self._leak(end)
        self._duplicates()
        self._count(end)
        if self.fix is not None:
            self.image.flush()
            if self.image.header.in_use and self.fix == "all":
                self.image.mark(0)
            elif self.image.header.in_use:
                self.image.close_clean()  # the check that follows still tells of it
        return self.result

    def _found(self, text: str, *, repair: bool) -> bool:
        """Report a corruption; whether it is to be repaired."""
        self.report(f"{'Repairing' if repair else 'ERROR'} {text}")
        self.result.corruptions += 1
        if repair:
            self.result.corruptions_fixed += 1
        return repair

    def _unclean(self) -> None:
        if self.image.header.in_use == IN_USE:
            self._found("image was not closed correctly", repair=self.fix == "all")

    def _data_offset(self) -> None:
        header = self.image.header
        if not data_offset_is_wrong(self.image):
            return
        if self._found("data_off field has incorrect value", repair=self.fix == "all"):
            header.data_offset = header.least_data_offset // SECTOR
            value = header.data_offset.to_bytes(4, "little")
            if not self.image.file.fixed_size and self.image.file.size < header.least_data_offset:
                self.image.file.resize(header.least_data_offset)
                self.image.file.flush()
            self.image.file.write(value, Header.offset_of("data_offset"))

    def _places(self) -> int:
        """Clusters outside the file or inside the header; the end of the last one in the file."""
        image = self.image
        first = image.header.least_data_offset
        end = max(first, min(image.header.data_start(), image.file.size))
        end = max(end, extension_end(image.file, image.header))
        bat = image.levels()[0][0]
        for number, word in image.words():
            host = image.code.host(word)
            if host + self.size <= image.file.size and host >= first:
                end = max(end, host + self.size)
                continue
            where = "outside image" if host >= first else "inside the header"
            if self._found(f"cluster {number} is {where}", repair=self.fix == "all"):
                bat.put(number, array("I", [0]))
        return end

    def _leak(self, end: int) -> None:
        image = self.image
        if image.file.fixed_size or image.file.size <= end:
            return
        length = round_up(image.file.size, SECTOR) - end
        self.report(
            f"{'ERROR' if self.fix is None else 'Repairing'} space leaked at the end of the image {length}"
        )
        self.result.leaks = -(-length // self.size)
        if self.fix is not None:
            image.levels()[0][0].write()
            image.file.resize(end)
            self.result.leaks_fixed = self.result.leaks

    def _duplicates(self) -> None:
        image = self.image
        bat = image.levels()[0][0]
        seen = _Seen()
        for number, word in image.words():
            if seen.add(image.code.host(word) // self.size):
                continue
            if self._found(f"duplicate offset in BAT entry {number}", repair=self.fix == "all"):
                place, _count = image.place(number, 1)
                image.copy_cluster(image.code.host(word), place)
                image.settle()
                image.file.flush()
                bat.put(number, array("I", [image.code.word(place)]))

    def _count(self, end: int) -> None:
        image, result = self.image, self.result
        allocated = fragmented = 0
        last_number, last_host = -2, 0
        for number, word in image.words():
            host = image.code.host(word)
            allocated += 1
            fragmented += last_number == number - 1 and host != last_host + self.size
            last_number, last_host = number, host
        result.total_clusters = image.header.bat_entries
        result.allocated_clusters = allocated
        result.fragmented_clusters = fragmented
        result.compressed_clusters = 0
        result.image_end_offset = end


class _Seen:
    """A set of numbers, most of them near each other."""

    def __init__(self) -> None:
        self._parts: dict[int, int] = {}

    def add(self, number: int) -> bool:
        """Put it in; whether it was not there."""
        part, bit = number >> 8, 1 << (number & 255)
        held = self._parts.get(part, 0)
        self._parts[part] = held | bit
        return not held & bit


def data_offset_is_wrong(image: ParallelsImage) -> bool:
    """Whether data cannot begin where the header says. Where clusters lie before it, they are right: trusting
    the header instead would cost them."""
    header = image.header
    if not data_offset_is_valid(header, image.file.size):
        return True
    start, least = header.data_start(), header.least_data_offset
    if start == least:
        return False
    return any(least <= image.code.host(word) < start for _number, word in image.words())


def is_damaged(image: ParallelsImage) -> bool:
    """Whether clusters lie outside the file or are used twice, or the data area is not where it can be."""
    first, end = image.header.least_data_offset, image.file.size
    if data_offset_is_wrong(image):
        return True
    seen = _Seen()
    for _number, word in image.words():
        host = image.code.host(word)
        if host < first or host + image.cluster_size > end or not seen.add(host // image.cluster_size):
            return True
    return False
