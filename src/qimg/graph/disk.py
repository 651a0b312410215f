"""A disk: an opened image with its backing chain, as a guest would see it."""

from __future__ import annotations

from qimg.errors import CorruptImage, StorageError
from qimg.extent import HOLE, MAPPED, ZERO, Extent, Runs
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from qimg.formats.base import Image
    from qimg.storage.base import Buffer

#: Units of an image that are decoded at once: bounds the memory of every walk over a disk (at worst each
#: unit is an extent of its own, 200 bytes).
WINDOW_UNITS = 1 << 18
#: What counts as a unit of an image that has none, or that tells which parts of its blocks are holes of the
#: file: runs of data and holes in a file are rarely shorter.
_UNIT = 16 << 10


class Layer:
    """One image of a chain. `filename` is what ``info`` calls it; `guessed`: its format was probed."""

    __slots__ = ("filename", "guessed", "image")

    def __init__(self, image: Image, filename: str, *, guessed: bool = False) -> None:
        self.image = image
        self.filename = filename
        self.guessed = guessed


def _unit(image: Image) -> int:
    """Guest bytes of the shortest run that `image` can be expected to tell of. `granularity` does not say it
    where any sector can be written without its neighbours."""
    if image.granularity > SECTOR:
        return image.granularity
    return min(image.cluster_size or _UNIT, _UNIT)


class Disk:
    """The guest's view: `layers` from the top (depth 0) to the deepest backing image. Sizes in bytes."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.size = layers[0].image.size
        #: Where extents lie is told also of layers that must not be read (for `map`, which reads nothing).
        self.tells_all = False
        # The deepest layer that may be read.
        self._trusted = len(layers)
        for depth, layer in enumerate(layers):
            if layer.image.distrust is not None:
                self._trusted = depth
                break
        #: Guest bytes whose tables are decoded at once.
        self.window = WINDOW_UNITS * min(_unit(layer.image) for layer in layers)

    @property
    def top(self) -> Image:
        """The image at depth 0."""
        return self.layers[0].image

    @property
    def filename(self) -> str:
        """What messages call the disk."""
        return self.layers[0].filename

    @property
    def remote(self) -> bool:
        """Whether a part of it is reached over a network."""
        return any(layer.image.remote for layer in self.layers)

    def extents(self, start: int, length: int) -> list[Extent]:
        """What ``start .. start + length`` (inside `size`) is, the whole chain taken together.

        No extent is HOLE alone: what no layer decides is HOLE|ZERO, at the depth of the deepest image
        that reaches so far (map sheet). `depth` tells which layer's `read_into` decodes what is not MAPPED.
        """
        extents = self._extents(0, start, length)
        if self._trusted < len(self.layers) and not self.tells_all:
            return [self._hidden(extent) for extent in extents]
        return extents

    def _hidden(self, extent: Extent) -> Extent:
        """The extent without its place, if its layer must not be read: to read it is to fail."""
        if extent.depth <= self._trusted or extent.flags & ZERO:
            return extent
        return extent._replace(flags=extent.flags & ~MAPPED, host=None, source=None)

    def _extents(self, depth: int, start: int, length: int) -> list[Extent]:
        image = self.layers[depth].image
        if len(self.layers) == 1 and start + length <= image.size:
            found = image.extents(start, length)
            return [extent._replace(flags=HOLE | ZERO) if extent.flags & HOLE else extent for extent in found]
        runs = Runs(start, length, depth)
        end = min(start + length, image.size)
        lower = self.layers[depth + 1].image.size if depth + 1 < len(self.layers) else 0
        for extent in image.extents(start, end - start):
            if not extent.flags & HOLE:
                runs.append(*extent[:3], extent.host, extent.source, depth)
                continue
            shown = min(extent.start + extent.length, lower) - extent.start
            if shown > 0:
                runs.extend(self._extents(depth + 1, extent.start, shown))
            else:
                shown = 0
            if shown < extent.length:
                host = None if extent.host is None else extent.host + shown
                runs.append(
                    extent.start + shown, extent.length - shown, HOLE | ZERO, host, extent.source, depth
                )
        return runs.take()

    def windows(self, start: int, length: int) -> Iterator[list[Extent]]:
        """`extents` of ``start .. start + length`` in pieces of bounded size; runs end at window borders.

        What lies before damage or an unreadable table is given before CorruptImage or StorageError is raised.
        """
        end = start + length
        while start < end:
            step = min(self.window - start % self.window, end - start)
            try:
                window = self.extents(start, step)
            except (CorruptImage, StorageError) as error:
                known = self._known(start, step, error)
                if known:
                    yield known
                raise
            yield window
            start += step

    def _known(self, start: int, length: int, error: CorruptImage | StorageError) -> list[Extent]:
        """The extents from `start` on up to what `error` is about, which is before ``start + length``."""
        guest = error.guest if isinstance(error, CorruptImage) else None
        step = length if guest is None else max(0, guest - start)
        known: list[Extent] = []
        low, high = 0, min(step, length) // SECTOR + 1
        while high - low > 1:
            # At first all that the error says is sound, then by halves.
            middle = high - 1 if not low and high * SECTOR > step else (low + high) // 2
            try:
                known = self.extents(start, middle * SECTOR)
                low = middle
            except (CorruptImage, StorageError):
                high = middle
        return known

    def read_extent(self, extent: Extent, buf: Buffer) -> None:
        """Fill `buf` with the first bytes of `extent` (one that `extents` gave, or a clipped part of it)."""
        if extent.depth > self._trusted:
            error = self.layers[self._trusted].image.distrust
            assert error is not None
            raise error
        if extent.flags & MAPPED:
            assert extent.source is not None and extent.host is not None
            extent.source.read_into(buf, extent.host)
        elif extent.flags & ZERO:
            memoryview(buf)[:] = bytes(len(buf))
        else:
            self.layers[extent.depth].image.read_into(buf, extent.start)

    def read_into(self, buf: Buffer, offset: int) -> None:
        """Fill `buf` with guest bytes from `offset` on; all of it must lie inside `size`."""
        view = memoryview(buf)
        for extent in self.extents(offset, len(view)):
            at = extent.start - offset
            self.read_extent(extent, view[at : at + extent.length])

    def publish(self) -> None:
        """A successful job's last call: what it changed takes effect, from the deepest layer up. Raises
        StorageError."""
        for layer in reversed(self.layers):
            layer.image.publish()

    def close(self) -> None:
        """Close every layer. Never raises; a second call does nothing."""
        for layer in self.layers:
            layer.image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.close()
