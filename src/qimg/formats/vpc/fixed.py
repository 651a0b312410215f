"""Fixed images: the guest's bytes as they are, and the footer behind them (vpc sheet, section 1)."""

from __future__ import annotations

from qimg.errors import LimitError, NotSupported, OptionError
from qimg.extent import MAPPED, ZERO, Extent, Runs
from qimg.formats.base import Image
from qimg.formats.vpc.structs import (
    BY_GEOMETRY,
    MAX_SECTORS,
    Footer,
    sealed,
)
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Storage


class Growing:
    """What both kinds of images that qimg writes share: footer and its size."""

    footer: Footer

    def _set_size(self, size: int) -> None:
        """Record another size. Geometry cannot say it, so it is recorded as the creator does that says sizes
        exactly."""
        self.footer.current_size = size
        self.footer.cylinders, self.footer.heads, self.footer.sectors = 65535, 16, 255
        if self.footer.creator_app in BY_GEOMETRY:
            self.footer.creator_app = b"qem2"


def check_resize(image: Image, size: int, preallocation: str, file: Storage) -> None:
    if preallocation != "off":
        raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
    if size < image.size:
        raise NotSupported("Shrinking images is currently not supported")
    if size % SECTOR:
        raise OptionError(f"The new size must be a multiple of {SECTOR}", option="size")
    if size > MAX_SECTORS * SECTOR:
        raise LimitError("The image size is too large for file format 'vpc'")
    if file.fixed_size:
        raise NotSupported("Cannot resize device files")


class FixedImage(Image, Growing):
    """The guest's bytes as they are, and the footer behind them."""

    format_name = "vpc"
    granularity = SECTOR
    can_mark_zero = True
    dirty = False

    def __init__(self, file: Storage, footer: Footer, size: int, *, new: bool = False) -> None:
        """`new`: the footer is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.footer = footer
        self.size = size
        self.can_write = not new
        self.zero_init = new and file.zero_init
        self._pending = new

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        for part in self.file.extents(start, length):
            # All of it is there; zeros are what the host has not written.
            runs.append(part.start, part.length, MAPPED | (part.flags & ZERO), part.start, self.file)
        return runs.take()

    def in_place(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, MAPPED, 0, start, self.file)]

    def allocate(self, start: int, length: int) -> list[Extent]:
        return self.in_place(start, length)

    def mark_zero(self, start: int, length: int) -> None:
        self.file.zero(start, length)

    def flush(self) -> None:
        if self._pending:
            if not self.file.fixed_size and self.file.size < self.size:
                self.file.resize(self.size)
            self.file.flush()
            self.file.write(sealed(self.footer), self.size)
            self._pending = False
        self.file.flush()

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        check_resize(self, size, preallocation, self.file)
        if size == self.size:
            return
        # The file has to end with a footer at any time. The old one lies where the guest will read zeros, so
        # it may go only when there is a copy at the new end; the copy says the new size last.
        self.file.write(sealed(self.footer), size)
        self.file.flush()
        self.file.zero(self.size, SECTOR)
        self.file.flush()
        self._set_size(size)
        self.file.write(sealed(self.footer), size)
        self.file.flush()
        self.size = size
