"""dd: a part of a disk, counted in blocks, into a new image (dd sheet)."""

from __future__ import annotations

from errno import EAGAIN

from qimg.errors import CorruptImage, LockError, OptionError, QimgError, StorageError
from qimg.graph.open import open_disk
from qimg.jobs.convert import CHUNK, SMALL
from qimg.jobs.create import create_image, plan_target
from qimg.jobs.engine import Meter, default_workers, run
from qimg.jobs.plan import Policy, chunks, plan_copy
from qimg.jobs.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.formats.base import Image
    from qimg.graph.disk import Disk
    from qimg.graph.open import ImageSpec
    from qimg.jobs.create import CreatePlan
    from qimg.jobs.plan import Row
    from qimg.jobs.source import Unknown
    from qimg.storage.base import Buffer

#: Bytes of a block unless the user says otherwise.
BLOCK = 512


class DdRequest:
    """What to copy. `block_size` in bytes; `count` (None: all) and `skip` in blocks."""

    def __init__(
        self,
        source: ImageSpec,
        target: str,
        *,
        output_format: str = "raw",
        block_size: int = BLOCK,
        count: int | None = None,
        skip: int = 0,
    ) -> None:
        """Raises OptionError for numbers that no disk has."""
        if block_size < 1 or skip < 0 or (count is not None and count < 0):
            raise OptionError("The block size must be positive, counts must not be negative")
        self.source = source
        self.target = target
        self.output_format = output_format
        self.block_size = block_size
        self.count = count
        self.skip = skip

    def range(self, size: int) -> tuple[int, int, bool]:
        """(start, length) in bytes of what is to be copied of a disk of `size` bytes, and whether the
        beginning lies inside of what `count` leaves: that is cut off first (dd sheet, size arithmetic)."""
        if self.count is not None:
            size = min(size, self.count * self.block_size)
        start = self.skip * self.block_size
        if start > size:
            return 0, 0, False
        return start, size - start, True


def dd(request: DdRequest, *, cancelled: Callable[[], bool] | None = None, context: Context) -> bool:
    """Copy; every byte is written, zeros too. False where `skip` lies behind what there is to copy: the new
    image is then empty, as it is (and the answer True) where it lies just at the end.

    Raises QimgError subclasses; a target that was begun is then left in a state that does not claim to be
    whole."""
    with open_disk(request.source, raw_shares_all=True, context=context) as disk:
        start, length, inside = request.range(disk.size)
        plan = _plan(request, context)
        plan.set_size(length)
        with _create(plan, disk, context) as image:
            try:
                _copy(_Part(disk, start, length), image, Meter(None, cancelled))
                _finish(image)
            except BaseException:
                image.abandon()
                raise
    return inside


def _plan(request: DdRequest, context: Context) -> CreatePlan:
    try:
        return plan_target(
            request.target, request.output_format, [], backing=None, backing_format=None, context=context
        )
    except OptionError as error:
        if error.option == "format":
            raise OptionError("Unknown file format", option="format") from error
        raise


def _create(plan: CreatePlan, disk: Disk, context: Context) -> Image:
    """The new image. Raises QimgError before anything is cut where `disk` is read from that very file."""
    try:
        if plan.place.is_part_of(disk):
            # Locks would not tell for raw files, and with -U.
            raise LockError(
                'Failed to get "write" lock',
                errno=EAGAIN,
                hint=f"Is another process using the image [{plan.name}]?",
            )
        return create_image(plan, context=context)
    except QimgError as error:
        message = f"{plan.name}: error while creating output image: {error}"
        raise QimgError(message, hint=error.hint) from error


class _ReadError(QimgError):
    """The source failed; what else fails is the target."""


class _Part(Source):
    """`length` bytes of a disk from `start` on, as a source that begins at 0. Raises _ReadError."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        super().__init__([disk])
        self.size = length
        self._disk = disk
        self._start = start

    def windows(self, unknown: Unknown | None = None) -> Iterator[list[Extent]]:
        windows = self._disk.windows(self._start, self.size)
        while True:
            try:
                window = next(windows)
            except StopIteration:
                return
            except (StorageError, CorruptImage) as error:
                raise _reading(error) from error
            yield [extent._replace(start=extent.start - self._start) for extent in window]

    def read_extent(self, extent: Extent, buf: Buffer) -> None:
        try:
            self._disk.read_extent(extent._replace(start=extent.start + self._start), buf)
        except (StorageError, CorruptImage) as error:
            raise _reading(error) from error


def _reading(error: StorageError | CorruptImage) -> _ReadError:
    return _ReadError(f"error while reading from input image file: {error.reason}")


def _copy(source: _Part, image: Image, meter: Meter) -> None:
    """Move everything, in pieces that suit the machine: the blocks of the command line only count bytes."""
    from qimg.jobs.copy import Copier

    copier = Copier(source, image, sparse=0, ordered=image.cluster_size is not None)
    items = chunks(_rows(source), CHUNK, image.size)
    workers = 1 if source.size <= SMALL else default_workers(*source.disks, image)
    try:
        run(items, copier, workers=workers, meter=meter)
    except StorageError as error:
        raise _writing(error) from error


def _rows(source: _Part) -> Iterator[Row]:
    policy = Policy(everything=True)
    for window in source.windows():
        yield from plan_copy(window, policy)


def _finish(image: Image) -> None:
    try:
        image.flush()
    except StorageError as error:
        raise _writing(error) from error


def _writing(error: StorageError) -> StorageError:
    message = f"error while writing to output image file: {error.reason}"
    return StorageError(message, errno=error.errno, offset=error.offset)
