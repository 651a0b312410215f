"""raw: the guest's bytes as they are, optionally a window of the file (raw sheet).

The virtual size is the file's length rounded up to whole sectors; what the file lacks reads as zeros. A
new image gets its full length only at `flush`, whatever the order of writes, so that an interrupted job
leaves a file that is too short instead of one that looks whole.
"""

from __future__ import annotations

import errno
import os

from qimg.errors import LimitError, NotSupported, OptionError, QimgError, StorageError
from qimg.extent import ABSENT, MAPPED, ZERO, Extent, Runs
from qimg.formats.base import Format, Image, Measure, SnapshotInfo
from qimg.options import SIZE, Option
from qimg.storage.base import Filter
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage

#: Zeros at the start of a new image whose first block is a hole: the real program's images have them.
_FIRST_BLOCK = 4096


class RawImage(Image):
    """Guest offset g lies at ``offset + g`` of the file."""

    format_name = "raw"
    granularity = 1
    can_mark_zero = True
    zeroes_at_once = True
    can_write = True

    def __init__(
        self,
        file: Storage,
        size: int,
        *,
        offset: int = 0,
        fixed: bool = False,
        new: bool = False,
        preallocation: str = "off",
    ) -> None:
        """`size` guest bytes at `offset` of `file`. `fixed`: the user's options say so, whatever the file's
        length is. `new`: the file holds nothing yet, see the module; `preallocation`: how its space, all but
        the last block, has been allocated; it is to stay so."""
        self.file = file
        self.size = size
        self.offset = offset
        self._fixed = fixed
        self._new = new
        self._reserved = preallocation != "off"
        self._late_end: _LateEnd | None = None
        if new and not file.fixed_size and file.size < size:
            self.file = self._late_end = _LateEnd(file, size, preallocation)
        self.zero_init = new and file.zero_init

    def guard_first_sector(self, probe: Callable[[bytes], str]) -> None:
        """Refuse writes after which `probe` (first sector -> format name) would not say ``raw`` any more.

        For images whose format was guessed (raw sheet 2.3): else a guest could turn its disk into an
        image of another format, and name any file of the host in there."""
        self.file = _FirstSectorGuard(self.file, self.offset, probe)

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        for extent in self.file.extents(self.offset + start, length):
            runs.append(
                extent.start - self.offset,
                extent.length,
                extent.flags & (MAPPED | ZERO | ABSENT),
                extent.start,
                self.file,
            )
        return runs.take()

    def allocate(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, MAPPED, 0, self.offset + start, self.file)]

    def mark_zero(self, start: int, length: int) -> None:
        if self._late_end is not None and self.file.zero_init:
            # Nothing is there yet behind the end, and the new length will read as zeros.
            length = min(length, self.file.size - start)
        if length > 0:
            self.file.zero(self.offset + start, length, unmap=not self._reserved)

    def snapshots(self) -> list[SnapshotInfo]:
        return [
            SnapshotInfo(
                id=name,
                name=name,
                vm_state_size=size,
                date_sec=0,
                date_nsec=0,
                vm_clock_nsec=0,
                icount=0,
            )
            for name, size in self.file.snapshots()
        ]

    def create_snapshot(self, name: str, *, date_sec: int, date_nsec: int) -> None:
        self.file.create_snapshot(name)

    def apply_snapshot(self, which: str) -> None:
        self.file.apply_snapshot(which)
        self.size = round_up(self.file.size - self.offset, SECTOR)

    def delete_snapshot(self, name: str) -> None:
        if name not in [known for known, _ in self.file.snapshots()]:
            raise QimgError("snapshot not found")
        self.file.delete_snapshot(name)

    def flush(self) -> None:
        if self._late_end is not None:
            self._late_end.finish(self.size)
            self._late_end = None
        self.file.flush()

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """To the byte, not to whole sectors, as the real program does (raw sheet 7)."""
        if self._fixed:
            raise NotSupported("Cannot resize fixed-size raw disks")
        if not self.file.fixed_size:
            if preallocation == "metadata":
                raise NotSupported("Unsupported preallocation mode: metadata")
            self.file.resize(self.offset + size, preallocation)
        elif preallocation != "off":
            raise NotSupported(f"Preallocation mode '{preallocation}' unsupported for this non-regular file")
        elif self.offset + size != self.file.size:
            raise NotSupported(f"Cannot resize {_called(self.file)}")
        self.file.flush()
        self.size = round_up(size, SECTOR)

    def abandon(self) -> None:
        if not self._new or self.file.fixed_size:
            return
        try:
            if self.file.size >= self.size:
                self.file.resize(0)
        except QimgError:
            pass  # The job's own error is the one to tell.


class _LateEnd(Filter):
    """Keeps the last bytes of a new image in memory until `finish`: until then the file is too short,
    whichever of its parts are written first."""

    def __init__(self, child: Storage, end: int, preallocation: str) -> None:
        """`end`: the full length. What is kept back is one block that the child can write."""
        super().__init__(child)
        self._preallocation = preallocation
        self._start = _last_block(child, end)
        self._kept = bytearray(end - self._start)
        self._written = False
        self._finished = False

    @property
    def size(self) -> int:
        return self._start + len(self._kept) if self._written else self.child.size

    def _split(self, offset: int, length: int) -> int:
        """How many of `length` bytes from `offset` on lie before the part kept back."""
        return length if self._finished else max(0, min(length, self._start - offset))

    def _keep(self, offset: int, data: Bytes) -> None:
        at = offset - self._start
        self._kept[at : at + len(data)] = data
        self._written = True

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        before = self._split(offset, len(view))
        if before:
            self.child.read_into(view[:before], offset)
        if before < len(view):
            at = max(0, offset - self._start)
            kept = self._kept[at : at + len(view) - before]
            view[before : before + len(kept)] = kept
            view[before + len(kept) :] = bytes(len(view) - before - len(kept))

    def write(self, buf: Bytes, offset: int) -> None:
        view = memoryview(buf)
        before = self._split(offset, len(view))
        if before:
            self.child.write(view[:before], offset)
        if before < len(view):
            self._keep(offset + before, view[before:])

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        before = self._split(offset, length)
        if before:
            self.child.zero(offset, before, unmap)
        if before < length:
            self._keep(offset + before, bytes(length - before))

    def copy_from(self, source: Storage, source_offset: int, offset: int, length: int) -> None:
        before = self._split(offset, length)
        if before:
            self.child.copy_from(source, source_offset, offset, before)
        if before < length:
            self._keep(offset + before, source.read(source_offset + before, length - before))

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        before = self._split(start, length)
        if before:
            yield from super().extents(start, before)
        if before < length:
            flags = MAPPED if self._written else ZERO
            yield Extent(start + before, length - before, flags, 0, start + before, self)

    def finish(self, size: int) -> None:
        """Give the file its full length, as the last change, between two barriers. Raises StorageError."""
        file = self.child
        first = min(_FIRST_BLOCK, self._start)
        if file.size:
            if file.size >= first and all(extent.flags & ZERO for extent in file.extents(0, first)):
                file.write(bytes(first), 0)
            file.flush()
        if self._written:
            file.write(self._kept, self._start)
        else:
            file.resize(size, self._preallocation)
        self._finished = True
        self._written = False


class _FirstSectorGuard(Filter):
    """Refuses writes that would make sector 0, at `offset` of the file, the header of some format."""

    def __init__(self, child: Storage, offset: int, probe: Callable[[bytes], str]) -> None:
        super().__init__(child)
        self._offset = offset
        self._probe = probe

    def write(self, buf: Bytes, offset: int) -> None:
        if offset < self._offset + SECTOR and offset + len(buf) > self._offset:
            self._check(buf, offset - self._offset)
        super().write(buf, offset)

    def _check(self, buf: Bytes, at: int) -> None:
        """`buf` is to be written at `at` of the image, which may be negative. Raises StorageError."""
        sector = self.child.read(self._offset, SECTOR)
        low, high = max(at, 0), min(at + len(buf), SECTOR)
        sector[low:high] = memoryview(buf)[low - at : high - at]
        if self._probe(bytes(sector)) != "raw":
            number = errno.EPERM
            raise StorageError(os.strerror(number), errno=number, offset=self._offset + low)


class Raw(Format):
    """The driver. How space is allocated is an option of the storage, merged in by whoever creates."""

    name = "raw"
    create_options = (Option("size", SIZE, None, "Virtual disk size"),)
    open_options = (
        Option("offset", SIZE, 0, "Where in the file the image starts"),
        Option("size", SIZE, None, "Virtual disk size; the rest of the file if not given"),
    )
    can_create = True
    can_measure = True

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> RawImage:
        given = options or {}
        offset = int(given.get("offset", 0))
        whole = round_up(file.size, SECTOR)
        if offset > whole:
            raise OptionError(
                f"Offset ({offset}) cannot be greater than size of the containing file ({whole})",
                option="offset",
            )
        if given.get("size") is None:
            return RawImage(file, round_up(whole - offset, SECTOR), offset=offset)
        size = int(given["size"])
        if size % SECTOR:
            raise OptionError(f"Specified size is not multiple of {SECTOR}", option="size")
        if offset + size > whole:
            # Two blanks before "actual": the real program's words.
            raise OptionError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the"
                f"  actual size of the containing file ({whole})",
                option="size",
            )
        return RawImage(file, size, offset=offset, fixed=True)

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        mode = options.get("preallocation", "off")
        if mode == "metadata":
            raise OptionError("Unsupported preallocation mode: metadata", option="preallocation")
        if mode not in ("off", "falloc", "full"):
            raise OptionError(f"invalid parameter value: {mode}", option="preallocation")
        if int(options.get("extent_size_hint", 0)) > 0xFFFFFFFF:
            raise OptionError("Extent size hint is too large", option="extent_size_hint")

    def check_place(self, file: Storage, size: int, options: dict[str, Value]) -> None:
        size = round_up(size, SECTOR)
        if file.fixed_size:
            _check_place(file, size, str(options.get("preallocation", "off")))
        elif 0 < file.size < size:
            old = file.size
            try:
                _resize(file, size, "off")
            finally:
                file.resize(old)

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> RawImage:
        self.validate_create(size, options)
        self.check_place(file, size, options)
        size = round_up(size, SECTOR)
        mode = str(options.get("preallocation", "off"))
        if file.fixed_size:
            return RawImage(file, size, new=True)
        # Not to the full length: whatever happens now, the file does not look whole.
        _resize(file, _last_block(file, size) if size else 0, mode)
        if mode == "off":
            _cut(file)
        if help.filling:
            file.write_once(size)
        return RawImage(file, size, new=True, preallocation=mode)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        size = round_up(source.size, SECTOR)
        return Measure(size, size)


def _resize(file: Storage, size: int, preallocation: str) -> None:
    try:
        file.resize(size, preallocation)
    except StorageError as error:
        if error.errno == errno.EFBIG:
            raise LimitError("The image size is too large for file format 'raw'") from error
        raise


def _last_block(file: Storage, size: int) -> int:
    """Where the last block of `size` bytes begins that `file` can write."""
    unit = max(SECTOR, file.limits.request_alignment)
    return (size - 1) // unit * unit


def _called(file: Storage) -> str:
    """What messages call a place whose length stays."""
    return f"'{file.name}'" if file.plural is None else file.plural


def _cut(file: Storage) -> None:
    """Back to length 0: the other one was only to learn in time whether the place can take it."""
    try:
        file.resize(0)
    except StorageError:
        try:
            file.resize(0)  # There is no image yet that could be abandoned, so this is the place to insist.
        except StorageError:
            pass
        raise


def _check_place(file: Storage, size: int, mode: str) -> None:
    """Whether a place of fixed length can hold a new image. Raises NotSupported."""
    if mode != "off":
        raise NotSupported(f"Unsupported preallocation mode '{mode}'")
    if size > file.size:
        raise NotSupported(f"Cannot grow {_called(file)}")
