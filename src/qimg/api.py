"""The public functions, over the same jobs as the command line."""

from __future__ import annotations

import io
import os

from qimg.context import Context
from qimg.errors import QimgError
from qimg.graph.open import ImageSpec, open_disk
from qimg.jobs import amend as _amend
from qimg.jobs import bench as _bench
from qimg.jobs import bitmap as _bitmap
from qimg.jobs import check as _check
from qimg.jobs import commit as _commit
from qimg.jobs import compare as _compare
from qimg.jobs import convert as _convert
from qimg.jobs import create as _create
from qimg.jobs import dd as _dd
from qimg.jobs import info as _info
from qimg.jobs import map as _map
from qimg.jobs import measure as _measure
from qimg.jobs import rebase as _rebase
from qimg.jobs import resize as _resize
from qimg.jobs import snapshot as _snapshot
from qimg.jobs.progress import Callback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from qimg.formats.base import BitmapData, CheckResult, Measure, SnapshotInfo
    from qimg.graph.disk import Disk as GraphDisk
    from qimg.jobs.compare import Comparison
    from qimg.jobs.info import ImageInfo
    from qimg.jobs.map import MapEntry

    Where = str | os.PathLike[str]
    ProgressFunction = Callable[[int, int], None]
    CancelFunction = Callable[[], bool]


def _spec(
    where: Where, format: str | None = None, *, cache: str = "writeback", share: bool = False
) -> ImageSpec:
    return ImageSpec(os.fspath(where), format=format, cache=cache, force_share=share)


def _pairs(options: Mapping[str, object] | None) -> list[tuple[str, str]]:
    pairs = []
    for key, value in (options or {}).items():
        text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        pairs.append((key, text))
    return pairs


def _progress(function: ProgressFunction | None) -> Callback | None:
    return None if function is None else Callback(function)


class Disk:
    """An opened disk: the guest's view of an image and its backing chain. Offsets and sizes in bytes.

    Made by `open`. Reading may go on in several threads at once."""

    def __init__(self, disk: GraphDisk) -> None:
        self._disk = disk

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self._disk.size

    @property
    def format(self) -> str:
        """Format of the top image."""
        return self._disk.top.format_name

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on; fewer only at the end of the disk."""
        length = max(0, min(length, self.size - offset))
        buf = bytearray(length)
        self.read_into(buf, offset)
        return bytes(buf)

    def read_into(self, buf: bytearray | memoryview, offset: int) -> int:
        """Fill `buf` from `offset` on; returns the number of bytes read, fewer only at the end."""
        if offset < 0:
            raise ValueError("negative offset")
        view = memoryview(buf).cast("B")
        length = max(0, min(len(view), self.size - offset))
        if length:
            self._disk.read_into(view[:length], offset)
        return length

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
        """What each range is (`start`, `length`, `depth`, `present`, `zero`, `data`, `compressed`, `offset`,
        `filename`), ascending, covering the disk or ``start .. start + length``."""
        if self.size:
            yield from _map.disk_map(self._disk, start, length)

    def file(self) -> DiskFile:
        """A read-only binary file object over the whole disk; closing it leaves the disk open."""
        return DiskFile(self)

    def close(self) -> None:
        """Close the disk. A second call does nothing."""
        self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DiskFile(io.RawIOBase):
    """A disk as a read-only, seekable binary file (wrap it in io.BufferedReader for small reads)."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        done = self._disk.read_into(view, self._position)
        self._position += done
        return done


def open(
    where: Where,
    *,
    format: str | None = None,
    share: bool = False,
    cache: str = "writeback",
    context: Context | None = None,
) -> Disk:
    """Open the image at `where` (file name, ``json:{...}``) for reading, with its backing chain.

    `format` forces the format instead of probing; `share` reads an image that a running program writes.
    Raises OpenError and other QimgErrors."""
    return Disk(open_disk(_spec(where, format, cache=cache, share=share), context=context or Context()))


def create(
    where: Where,
    *,
    format: str = "raw",
    size: int | None = None,
    options: Mapping[str, object] | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    context: Context | None = None,
) -> None:
    """Create an image of `size` bytes (default: the backing file's size). Raises QimgError."""
    context = context or Context()
    plan = _create.plan_create(
        os.fspath(where),
        format=format,
        size=size,
        options=_pairs(options),
        backing=backing,
        backing_format=backing_format,
        context=context,
    )
    _create.run_create(plan, context=context)


def convert(
    sources: Where | Iterable[Where],
    target: Where,
    *,
    format: str = "raw",
    source_format: str | None = None,
    options: Mapping[str, object] | None = None,
    compress: bool = False,
    backing: str | None = None,
    backing_format: str | None = None,
    snapshot: str | None = None,
    sparse_size: int = 4096,
    create: bool = True,
    bitmaps: bool = False,
    share: bool = False,
    cache: str = "unsafe",
    progress: ProgressFunction | None = None,
    cancelled: CancelFunction | None = None,
    context: Context | None = None,
) -> None:
    """Copy one disk, or several one after the other, into a new image of `format` (or, without `create`,
    into the existing `target`).

    `snapshot`: id or name of an internal snapshot to copy. `sparse_size`: zero-detection block in bytes, 0
    writes everything. `progress` is called with (done, total) in bytes; `cancelled` is asked now and then
    and raises Cancelled when true. Raises QimgError; the target then does not claim to be whole."""
    wheres = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not wheres:
        raise QimgError("Must specify image file name")
    request = _convert.ConvertRequest(
        [_spec(where, source_format, share=share) for where in wheres],
        os.fspath(target),
        output_format=format,
        options=_pairs(options),
        create=create,
        compress=compress,
        backing=backing,
        backing_format=backing_format,
        snapshot=None if snapshot is None else _convert.SnapshotParam(id_or_name=snapshot),
        sparse_size=sparse_size,
        bitmaps=bitmaps,
        cache=cache,
    )
    _convert.convert(request, progress=_progress(progress), cancelled=cancelled, context=context or Context())


def bench(
    where: Where,
    *,
    count: int = _bench.COUNT,
    depth: int = _bench.DEPTH,
    size: int = _bench.SIZE,
    step: int = 0,
    offset: int = 0,
    write: bool = False,
    pattern: int = 0,
    flush_interval: int = 0,
    drain: bool = True,
    format: str | None = None,
    share: bool = False,
    cache: str = "writeback",
    native: bool = False,
    context: Context | None = None,
) -> float:
    """Send `count` requests of `size` bytes, `depth` at once, to the image at `where`, the first at `offset`,
    each `step` bytes (0: `size`) behind the one before, in bytes; the seconds that took. With `write` they
    overwrite the guest's bytes with the value `pattern`, with a flush after every `flush_interval` of them.

    Raises StorageError where a request fails, and other QimgErrors."""
    request = _bench.BenchRequest(
        ImageSpec(os.fspath(where), format=format, cache=cache, force_share=share, native=native),
        count=count,
        depth=depth,
        size=size,
        step=step,
        offset=offset,
        write=write,
        pattern=pattern,
        flush_interval=flush_interval,
        drain=drain,
    )
    return _bench.bench(request, context=context or Context())


def dd(
    source: Where,
    target: Where,
    *,
    format: str = "raw",
    source_format: str | None = None,
    block_size: int = _dd.BLOCK,
    count: int | None = None,
    skip: int = 0,
    share: bool = False,
    cancelled: CancelFunction | None = None,
    context: Context | None = None,
) -> bool:
    """Copy blocks of the disk at `source` into a new image of `format`, zeros as well as data. `count` (None:
    all) and `skip` are in blocks of `block_size` bytes; `count` is taken first, so that ``skip=2, count=3``
    copies one block. False where `skip` lies behind what there is to copy: the new image is then empty.

    Raises QimgError, Cancelled; the target then does not claim to be whole."""
    request = _dd.DdRequest(
        _spec(source, source_format, share=share),
        os.fspath(target),
        output_format=format,
        block_size=block_size,
        count=count,
        skip=skip,
    )
    return _dd.dd(request, cancelled=cancelled, context=context or Context())


def compare(
    first: Where,
    second: Where,
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    strict: bool = False,
    share: bool = False,
    progress: ProgressFunction | None = None,
    cancelled: CancelFunction | None = None,
    context: Context | None = None,
) -> Comparison:
    """Compare what a guest would see; see `Comparison` (`verdict`, `offset`, `sizes_differ`)."""
    return _compare.compare(
        _spec(first, first_format, share=share),
        _spec(second, second_format, share=share),
        strict=strict,
        progress=_progress(progress),
        cancelled=cancelled,
        context=context or Context(),
    )


def check(
    where: Where,
    *,
    format: str | None = None,
    share: bool = False,
    fix: str | None = None,
    report: Callable[[str], None] | None = None,
    context: Context | None = None,
) -> CheckResult:
    """Check an image's consistency; `report` gets every finding as one line. Nothing is changed, unless
    `fix` says to repair ``leaks`` or ``all`` that can be repaired; the result then tells what was fixed
    (``corruptions_fixed``, ``leaks_fixed``) and what is left.

    Raises NotSupported where the format has no check or no repair, QimgError for another `fix`."""
    if fix not in (None, "leaks", "all"):
        raise QimgError(f"Unknown kind of repair (expecting 'leaks' or 'all'): {fix}")
    outcome = _check.check(
        _spec(where, format, share=share),
        fix=fix,
        report=report or (lambda line: None),
        context=context or Context(),
    )
    return outcome.result


def info(
    where: Where, *, format: str | None = None, share: bool = False, context: Context | None = None
) -> ImageInfo:
    """What the image at `where` says of itself. Opens neither its backing file nor its data."""
    return _info.info(_spec(where, format, share=share), context=context or Context())[0]


def map(
    where: Where,
    *,
    start: int = 0,
    length: int | None = None,
    format: str | None = None,
    share: bool = False,
    context: Context | None = None,
) -> Iterator[MapEntry]:
    """Which guest range lies where; rows as `Disk.extents` gives them."""
    return _map.map_extents(
        _spec(where, format, share=share), start=start, length=length, context=context or Context()
    )


def measure(
    where: Where | None = None,
    *,
    size: int | None = None,
    output_format: str = "raw",
    options: Mapping[str, object] | None = None,
    format: str | None = None,
    snapshot: str | None = None,
    share: bool = False,
    context: Context | None = None,
) -> Measure:
    """Sizes in bytes that converting `where` (or a full disk of `size`) to `output_format` would need."""
    if (where is None) == (size is None):
        raise QimgError("Either a size or one image must be given")
    return _measure.measure(
        None if where is None else _spec(where, format, share=share),
        size=size,
        output_format=output_format,
        options=_pairs(options),
        snapshot=None if snapshot is None else _convert.SnapshotParam(id_or_name=snapshot),
        context=context or Context(),
    )


def resize(
    where: Where,
    size: int,
    *,
    relative: bool = False,
    shrink: bool = False,
    preallocation: str = "off",
    format: str | None = None,
    context: Context | None = None,
) -> None:
    """Give the disk of the image at `where` a size of `size` bytes, or with `relative` that many more.

    A smaller size needs `shrink`: what lies behind it is lost. `preallocation` (off, metadata, falloc, full)
    says how added space is reserved. Raises QimgError."""
    _resize.resize(
        _spec(where, format),
        size,
        relative=relative,
        shrink=shrink,
        preallocation=preallocation,
        context=context or Context(),
    )


def amend(
    where: Where,
    options: Mapping[str, object],
    *,
    format: str | None = None,
    force: bool = False,
    cache: str = "writeback",
    progress: ProgressFunction | None = None,
    context: Context | None = None,
) -> None:
    """Give options of creation of the image at `where` new values (``qemu-img amend -o help`` lists them);
    what is not named stays as it is. Raises QimgError, before any change where an option is wrong."""
    _amend.amend(
        _spec(where, format, cache=cache),
        _pairs(options),
        force=force,
        progress=_progress(progress),
        context=context or Context(),
    )


def snapshots(
    where: Where, *, format: str | None = None, share: bool = False, context: Context | None = None
) -> list[SnapshotInfo]:
    """The internal snapshots of the image at `where`, oldest first: `id`, `name`, `date_sec` and `date_nsec`
    (Unix time), `vm_state_size`, `vm_clock_nsec`, `icount`. None where the format has none."""
    return _snapshot.snapshots(_spec(where, format, share=share), context=context or Context())


def create_snapshot(
    where: Where,
    name: str,
    *,
    now_ns: int | None = None,
    format: str | None = None,
    context: Context | None = None,
) -> None:
    """Add an internal snapshot of the disk as it is, dated `now_ns` (Unix time in nanoseconds; None: now).
    Names need not be unique. Durable when it returns, whole or not there after a crash. Raises QimgError."""
    _snapshot.create_snapshot(_spec(where, format), name, now_ns=now_ns, context=context or Context())


def apply_snapshot(
    where: Where, which: str, *, format: str | None = None, context: Context | None = None
) -> None:
    """Go back to the internal snapshot with the id `which`, else with that name: the disk's content and size.
    What the disk holds now is lost unless a snapshot has it. Raises QimgError."""
    _snapshot.apply_snapshot(_spec(where, format), which, context=context or Context())


def delete_snapshot(
    where: Where, name: str, *, format: str | None = None, context: Context | None = None
) -> None:
    """Remove the first internal snapshot called `name` and give its space back. Raises QimgError."""
    _snapshot.delete_snapshot(_spec(where, format), name, context=context or Context())


def bitmaps(
    where: Where, *, format: str | None = None, share: bool = False, context: Context | None = None
) -> list[BitmapData]:
    """The persistent dirty bitmaps of the image at `where`, oldest first: `name`, `granularity` (bytes a bit
    stands for), `enabled` (it records), `inconsistent` (its bits mean nothing), `bits` (bit n is bit n % 8 of
    byte n // 8; a tail of clear bits may be missing). Raises NotSupported where the format has none."""
    return _bitmap.bitmaps(_spec(where, format, share=share), context=context or Context())


def add_bitmap(
    where: Where,
    name: str,
    *,
    granularity: int | None = None,
    enabled: bool = True,
    format: str | None = None,
    context: Context | None = None,
) -> None:
    """Add an empty bitmap, one bit for `granularity` bytes (a power of two from 512 on; None: a cluster).

    Raises QimgError."""
    actions = [_bitmap.Action(_bitmap.ADD)]
    if not enabled:
        actions.append(_bitmap.Action(_bitmap.DISABLE))
    _bitmap.bitmap(_spec(where, format), name, actions, granularity=granularity, context=context or Context())


def remove_bitmap(
    where: Where, name: str, *, format: str | None = None, context: Context | None = None
) -> None:
    """Remove a bitmap, also one that is inconsistent. Raises QimgError."""
    _bitmap.bitmap(_spec(where, format), name, [_bitmap.Action(_bitmap.REMOVE)], context=context or Context())


def change_bitmap(
    where: Where,
    name: str,
    *,
    clear: bool = False,
    merge: Iterable[str] = (),
    source: Where | None = None,
    enabled: bool | None = None,
    format: str | None = None,
    source_format: str | None = None,
    context: Context | None = None,
) -> None:
    """Clear a bitmap, then set the bits of the bitmaps called `merge` in it (which are in the image `source`
    if one is given), then switch it on or off. Each step is durable before the next. Raises QimgError."""
    actions = [_bitmap.Action(_bitmap.CLEAR)] if clear else []
    actions += [_bitmap.Action(_bitmap.MERGE, other) for other in merge]
    if enabled is not None:
        actions.append(_bitmap.Action(_bitmap.ENABLE if enabled else _bitmap.DISABLE))
    _bitmap.bitmap(
        _spec(where, format),
        name,
        actions,
        source=None if source is None else _spec(source, source_format),
        context=context or Context(),
    )


def commit(
    where: Where,
    *,
    base: str | None = None,
    keep: bool = False,
    format: str | None = None,
    rate_limit: int = 0,
    cache: str = "writeback",
    progress: ProgressFunction | None = None,
    cancelled: CancelFunction | None = None,
    context: Context | None = None,
) -> None:
    """Write what the image at `where` holds into its backing file, and empty the image unless `keep`.

    `base`: another image of the backing chain, by name; what lies between goes there too, and the image keeps
    its content. `rate_limit`: bytes a second, 0 for none. Raises QimgError; `where` then reads as before."""
    _commit.commit(
        _spec(where, format, cache=cache),
        base=base,
        keep=keep or base is not None,
        rate_limit=rate_limit,
        progress=_progress(progress),
        cancelled=cancelled,
        context=context or Context(),
    )


def rebase(
    where: Where,
    backing: str | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    compress: bool = False,
    format: str | None = None,
    share: bool = False,
    cache: str = "writeback",
    progress: ProgressFunction | None = None,
    cancelled: CancelFunction | None = None,
    context: Context | None = None,
) -> None:
    """Give the image at `where` another backing file (None: none), named as its header is to have it.

    The image reads as before, unless `unsafe`: then only its header is changed, and nothing else is opened.
    `compress`: what has to be written is compressed; `share`: the new backing file may be in use. Raises
    QimgError; the image then has its old backing file and reads as before."""
    _rebase.rebase(
        _spec(where, format, cache=cache),
        backing,
        backing_format=backing_format,
        unsafe=unsafe,
        compress=compress,
        share=share,
        progress=_progress(progress),
        cancelled=cancelled,
        context=context or Context(),
    )
