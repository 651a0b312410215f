"""Parts of the disk: each extent is an image of its own, of a piece of the guest's disk (vmdk sheet 6)."""

from __future__ import annotations

from qimg.errors import NotSupported
from qimg.extent import MAPPED, ZERO, Extent, Runs
from qimg.formats.base import Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.storage.base import Storage


class Part(Image):
    """What the image asks of a part beside what every `Image` has.

    kind        the type word of the extent line; empty where there is no such line.
    compressed  grains are deflated, and written by `write_encoded` only.
    read_only   the extent line, or the kind of extent, says so.
    """

    kind = ""
    compressed = False
    read_only = False

    def check_grains(self, report: Callable[[str], None], first_sector: int) -> int:
        """Look at every grain; findings go to `report` with the disk's sectors, of which this part's first is
        `first_sector`. Gives the number of corruptions. Raises StorageError (EINVAL) for what the real
        program stops at."""
        return 0


class FlatPart(Part):
    """Bytes as they are, from byte `offset` of the file on. What the file lacks reads as zeros."""

    format_name = "vmdk"
    can_write = True
    can_mark_zero = True
    granularity = 512

    def __init__(self, file: Storage, size: int, offset: int, *, kind: str, new: bool = False) -> None:
        """`size` in guest bytes."""
        self.file = file
        self.size = size
        self.offset = offset
        self.kind = kind
        self.zero_init = new and file.zero_init

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        for extent in self.file.extents(self.offset + start, length):
            flags = MAPPED | extent.flags & ZERO
            runs.append(extent.start - self.offset, extent.length, flags, extent.start, self.file)
        return runs.take()

    def in_place(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, MAPPED, 0, self.offset + start, self.file)]

    def allocate(self, start: int, length: int) -> list[Extent]:
        return self.in_place(start, length)

    def mark_zero(self, start: int, length: int) -> None:
        self.file.zero(self.offset + start, length)

    def flush(self) -> None:
        self.file.flush()


class ZeroPart(Part):
    """An extent of type ZERO: no file, reads as zeros."""

    format_name = "vmdk"
    kind = "ZERO"
    read_only = True

    def __init__(self, file: Storage, size: int) -> None:
        """`file`: the descriptor's, which is not looked at."""
        self.file = file
        self.size = size

    def extents(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, ZERO)]

    def allocate(self, start: int, length: int) -> list[Extent]:
        raise NotSupported("An extent of zeros cannot be written to")
