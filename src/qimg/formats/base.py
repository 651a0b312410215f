"""Formats: what every image format offers, and nothing about a concrete one.

An image is a map from guest bytes to host bytes. `Image` answers where a guest range lies and makes room
for new data; the copy engine moves the bytes. Only what is not stored verbatim (compressed data) passes
through the format.
"""

from __future__ import annotations

from qimg.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from typing import NoReturn, Self

    from qimg.context import Context
    from qimg.errors import StorageError
    from qimg.extent import Extent
    from qimg.options import Option, Value
    from qimg.storage.base import Buffer, Bytes, Storage


class Reference:
    """What an image names: another image or file, not opened. `format` is None where none is recorded."""

    __slots__ = ("format", "name")

    def __init__(self, name: str, format: str | None = None) -> None:
        self.name = name
        self.format = format


class SnapshotInfo:
    """An internal snapshot. Times: `date_sec`/`date_nsec` Unix time; `vm_clock_nsec` the guest's clock."""

    __slots__ = ("date_nsec", "date_sec", "icount", "id", "name", "vm_clock_nsec", "vm_state_size")

    def __init__(
        self,
        *,
        id: str,
        name: str,
        vm_state_size: int,
        date_sec: int,
        date_nsec: int,
        vm_clock_nsec: int,
        icount: int | None,
    ) -> None:
        self.id = id
        self.name = name
        self.vm_state_size = vm_state_size
        self.date_sec = date_sec
        self.date_nsec = date_nsec
        self.vm_clock_nsec = vm_clock_nsec
        self.icount = icount


class CheckResult:
    """Outcome of a consistency check. Counts are of clusters; `image_end_offset` in bytes or None.

    Clusters counted are guest clusters (`total`, `allocated`, `fragmented`, `compressed`); None: unknown.
    """

    def __init__(self) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.image_end_offset: int | None = None
        self.total_clusters: int | None = None
        self.allocated_clusters: int | None = None
        self.fragmented_clusters: int | None = None
        self.compressed_clusters: int | None = None


class Measure:
    """Predicted sizes of a new image in bytes: `required`, `fully_allocated`, and `bitmaps` or None."""

    __slots__ = ("bitmaps", "fully_allocated", "required")

    def __init__(self, required: int, fully_allocated: int, bitmaps: int | None = None) -> None:
        self.required = required
        self.fully_allocated = fully_allocated
        self.bitmaps = bitmaps


class BitmapData:
    """A dirty bitmap in memory. `bits` holds one bit per `granularity` bytes, bit n of byte n // 8 counted
    from the least significant; None bytes are not allowed, all-clear tails may be missing."""

    __slots__ = ("bits", "enabled", "granularity", "inconsistent", "name")

    def __init__(
        self, name: str, granularity: int, bits: bytes, *, enabled: bool, inconsistent: bool = False
    ) -> None:
        self.name = name
        self.granularity = granularity
        self.bits = bits
        self.enabled = enabled
        self.inconsistent = inconsistent


class Image:
    """An opened image of one format: this layer only, never its backing file.

    format_name  the driver's name, as ``file format:`` prints it.
    size         guest bytes; a multiple of 512.
    cluster_size allocation unit in bytes, None for formats without one.
    shows_cluster_size  `info` tells `cluster_size`.
    granularity  smallest unit that `allocate` takes (a subcluster with extended L2), 1 for raw.
    backing      what the header names, or None. The graph decides whether to open it.
    data_file    what holds the guest's data when it is not `file`; attach it with `attach_data_file`.
    files        names of further files that hold parts of the disk, plain names relative to the folder of
                 `file`; whoever opens the image opens them and calls `attach_files` before anything else.
    content_id   a number that changes with the content, which overlays record; None: no such thing.
    distrust     why what is below must not be read (see `meet_backing`), or None.
    encrypted    data needs a key.
    lookup_span  guest bytes that one look into the tables tells of, counted from 0; None: any number.
    """

    format_name: str
    file: Storage
    size: int
    cluster_size: int | None = None
    shows_cluster_size: bool = True
    granularity: int = 1
    backing: Reference | None = None
    data_file: Reference | None = None
    files: Sequence[str] = ()
    content_id: int | None = None
    distrust: StorageError | None = None
    encrypted: bool = False
    lookup_span: int | None = None
    #: None where the format has no such flag.
    dirty: bool | None = None
    #: An image that was opened, not created, can be written to as well.
    can_write: bool = False
    #: Writing: what `allocate` gives reads as zeros until written to.
    zero_init: bool = False
    #: Writing: `encode` and `write_encoded` work.
    can_compress: bool = False
    #: Writing: `encode` and `write_encoded` are the only way to store data.
    must_compress: bool = False
    #: Writing: guest ranges can be made to read as zeros over a backing file without writing data.
    can_mark_zero: bool = False
    #: Writing: `mark_zero` stages nothing, but has the storage do it at once; threads need not take turns.
    zeroes_at_once: bool = False
    #: Writing: so much is staged that the job should finish the bytes in flight and call `flush`.
    wants_flush: bool = False

    @property
    def remote(self) -> bool:
        """Whether its file is reached over a network."""
        return self.file.limits.remote

    # -- reading

    def extents(self, start: int, length: int) -> list[Extent]:
        """What this layer says of ``start .. start + length`` (inside `size`), ascending, contiguous,
        coalesced, clipped, ``depth`` 0. What it does not decide is HOLE.

        Bounded memory: callers ask for windows. Raises CorruptImage, StorageError.
        """
        raise NotImplementedError

    def read_into(self, buf: Buffer, guest: int) -> None:
        """Fill `buf` with guest bytes from `guest` on, for a range whose extents are neither HOLE, ZERO
        nor MAPPED (compressed data). May be called from several threads. Raises CorruptImage,
        StorageError, UnsupportedFeature (encrypted)."""
        raise NotSupported(f"{self.format_name} stores everything verbatim")

    def snapshots(self) -> list[SnapshotInfo]:
        """The internal snapshots in table order."""
        return []

    def load_snapshot(self, *, id: str | None = None, name: str | None = None) -> None:
        """Read from the internal snapshot with this id and/or name from now on (`size` stays the
        current one). Raises QimgError where there is none."""
        raise NotSupported(
            f"Block format '{self.format_name}' used by device '' does not support temporarily loading"
            " internal snapshots"
        )

    def bitmaps(self) -> list[BitmapData]:
        """Persistent dirty bitmaps with their contents, in directory order. Raises NotSupported."""
        raise NotSupported("Source lacks bitmap support")

    def format_specific(self) -> dict[str, object] | None:
        """What ``Format specific information`` shows: JSON keys in order, values JSON-like. None: nothing."""
        return None

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        """Check consistency; every finding goes to `report` as one line. Without `fix` nothing is changed;
        ``leaks`` and ``all`` repair (the image was opened writable and `for_check`), and the counts of the
        result tell what was found on the way and what was fixed; check again to see what is left.

        Raises NotSupported where the format cannot be checked or repaired, QimgError where the check
        cannot run."""
        raise NotSupported("This image format does not support checks")

    # -- writing: staged tables, bytes moved by the engine. Calls come from one thread at a time.

    def allocate(self, start: int, length: int) -> list[Extent]:
        """Make room for ``start .. start + length`` (multiples of `granularity`, or ending at `size`), and
        say where: MAPPED extents that cover the range, ascending. Ranges that are allocated already keep
        their place. Tables are staged in memory; nothing refers to the new space before `flush`."""
        raise NotSupported(f"Writing to {self.format_name} images is not supported")

    def in_place(self, start: int, length: int) -> list[Extent]:
        """Where ``start .. start + length`` can be overwritten without a new place: MAPPED extents. What
        `allocate` would move or make room for is HOLE; of that, every byte has to be written. Changes
        nothing: `allocate` has to be asked all the same, it records what changes."""
        raise NotSupported(f"Writing to {self.format_name} images is not supported")

    def mark_zero(self, start: int, length: int) -> None:
        """Make ``start .. start + length`` (multiples of `granularity`, or up to `size`) read as zeros."""
        raise NotSupported(f"Writing zeros to {self.format_name} images is not supported")

    def discard(self, start: int, length: int) -> None:
        """Say that a range's content no longer matters. Whole units read as zeros afterwards and give their
        space back; what is less is left alone."""

    def encode(self, data: Bytes) -> bytes | None:
        """One cluster compressed, or None where that saves nothing. Pure: call it from many threads."""
        raise NotSupported("Compression not supported for this file format")

    def write_encoded(self, guest: int, data: bytes) -> None:
        """Store the result of `encode` for the cluster at `guest`, packed after the previous one."""
        raise NotSupported("Compression not supported for this file format")

    def store_bitmaps(self, bitmaps: Iterable[BitmapData]) -> None:
        """Add persistent bitmaps; they are written by `flush`. Raises NotSupported."""
        raise NotSupported(f"Format driver '{self.format_name}' does not support bitmaps")

    def flush(self) -> None:
        """Make the staged state the image's: data, barrier, tables, barrier, header last."""

    # -- changes of the whole: each is durable when it returns, and whole or not there after a crash.

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """Set the guest's size (rounded as the format does). Growth reads as zeros, also where a backing
        disk of `shown` bytes would show through. Raises NotSupported, OptionError, LimitError, StorageError.
        """
        raise NotSupported("Image format driver does not support resize")

    def change_backing(self, backing: Reference | None) -> None:
        """Record another backing file, or none. Raises NotSupported, LimitError, OptionError."""
        raise NotSupported("Operation not supported")

    def make_empty(self) -> None:
        """Drop this layer's clusters: everything shows through from below. Raises NotSupported."""
        raise NotSupported("Operation not supported")

    def create_snapshot(self, name: str, *, date_sec: int, date_nsec: int) -> None:
        """Add an internal snapshot of the present state. Raises NotSupported, LimitError, StorageError."""
        raise NotSupported("Operation not supported")

    def apply_snapshot(self, which: str) -> None:
        """Go back to the snapshot with this id, else name (`size` too). Raises QimgError."""
        raise NotSupported("Block driver does not support snapshots")

    def delete_snapshot(self, name: str) -> None:
        """Remove the first snapshot of this name. Raises QimgError."""
        raise NotSupported("snapshot not found")

    def amend(
        self, options: dict[str, Value], *, force: bool = False, progress: Callable[[int, int], None]
    ) -> None:
        """Change options of creation; `progress(done, total)`. Raises OptionError before any change."""
        raise NotSupported(f"Format driver '{self.format_name}' does not support option amendment")

    def add_bitmap(self, name: str, granularity: int | None) -> None:
        """Add an enabled, empty persistent bitmap; None: the format's default granularity."""
        raise NotSupported("Operation not supported")

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap, also an inconsistent one."""
        raise NotSupported("Operation not supported")

    def change_bitmap(
        self, name: str, *, enabled: bool | None = None, clear: bool = False, merge: BitmapData | None = None
    ) -> None:
        """Switch a bitmap on or off, clear it, or set the bits of `merge` in it."""
        raise NotSupported("Operation not supported")

    def abandon(self) -> None:
        """A failed job's last call before `close`, instead of `flush`: leave a file that does not claim to
        be whole. Never raises."""

    def attach_data_file(self, storage: Storage) -> None:
        """Give the image the storage that `data_file` names. It is closed with the image."""
        raise NotSupported("'data-file' can only be set for images with an external data file")

    def attach_files(self, storages: list[Storage]) -> None:
        """Give the image the storages that `files` names, in order. They are closed with the image from then
        on; when this raises, the caller still owns them. Raises FormatError, StorageError."""

    def attached(self) -> list[tuple[str, Storage]]:
        """(name of the node, storage) of what was attached by `attach_files`."""
        return []

    def meet_backing(self, below: Image) -> None:
        """Look at the image below, now open: set `distrust` if it is not what this one was made for."""

    def record_backing(self, below: Image) -> None:
        """The image below was changed by a job after which this one still fits: record its `content_id`.
        Durable when it returns. Raises StorageError."""

    def publish(self) -> None:
        """The last call of a job that succeeded, before `close`: what was flushed takes effect where storages
        have to be told (`Storage.publish`). Raises StorageError."""
        for _, storage in self.attached():
            storage.publish()
        self.file.publish()

    def close(self) -> None:
        """Close the storage(s). Never raises. Does not flush."""
        self.file.close()

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


class CreateHelp:
    """What creating an image may need from outside the format: files it names are opened by the caller.

    open_data_file(name, size, preallocation) creates the external data file and returns it opened.
    open_file(name, size) does the same for a further file of the image (`Image.files`): `name` is the path of
    a plain file, never a protocol's.
    backing_id() is the `content_id` of the planned backing file; opens it. Raises QimgError.
    filling: data follows, in ascending order of guest offsets, before the first flush, and none afterwards.

    When the creation fails, the caller removes files that were not there before.
    """

    __slots__ = ("backing_id", "context", "filling", "open_data_file", "open_file")

    def __init__(
        self,
        context: Context,
        open_data_file: Callable[[str, int, str], Storage],
        *,
        open_file: Callable[[str, int], Storage] | None = None,
        backing_id: Callable[[], int | None] | None = None,
        filling: bool = False,
    ) -> None:
        def none(*_: object) -> NoReturn:
            raise NotSupported("No further files here")

        self.context = context
        self.open_data_file = open_data_file
        self.open_file = none if open_file is None else open_file
        self.backing_id = (lambda: None) if backing_id is None else backing_id
        self.filling = filling


class MeasureSource:
    """What `Format.measure` is told of a source: `size` in guest bytes; `data_runs`, ascending, are (start,
    length) of every run that holds data not known to be zero, None where only the size is known; `bitmaps`
    (granularity, name) or None where the source cannot hold any."""

    __slots__ = ("bitmaps", "data_runs", "size")

    def __init__(
        self,
        size: int,
        data_runs: Iterable[tuple[int, int]] | None,
        bitmaps: list[tuple[int, str]] | None,
    ) -> None:
        self.size = size
        self.data_runs = data_runs
        self.bitmaps = bitmaps

    def touched(self, *units: int) -> list[int]:
        """For each of `units` (bytes), how many of the units that the disk is made of hold data. Uses up
        `data_runs`. Raises CorruptImage, StorageError."""
        counts = [0] * len(units)
        ends = [0] * len(units)  # first unit not looked at yet
        for start, length in self.data_runs or ():
            for at, unit in enumerate(units):
                first, stop = max(start // unit, ends[at]), -(-(start + length) // unit)
                if stop > first:
                    counts[at] += stop - first
                    ends[at] = stop
        return counts


class Format:
    """A format driver: stateless, one instance in the registry."""

    name: str
    #: Options of creation, in the order in which ``Formatting ...`` prints them. `size` is one of them.
    create_options: tuple[Option, ...] = ()
    #: Options of opening (``json:``, ``--image-opts``) beyond those that every node has.
    open_options: tuple[Option, ...] = ()
    can_create = False
    can_compress = False
    can_check = False
    can_amend = False
    #: Options that `Image.amend` takes, as ``amend -o help`` shows them.
    amend_options: tuple[Option, ...] = ()
    can_measure = False
    can_backing = False
    can_bitmaps = False

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> Image:
        """Read and validate the header. Never writes. `for_check` lets damage through that `check` is
        there to report; `for_info` opens images that cannot be read (encrypted without a key).

        The image owns `file` from then on; when this raises, the caller still does.
        Raises FormatError, UnsupportedFeature, StorageError, OptionError.
        """
        raise NotImplementedError

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        """Raise OptionError or LimitError for what `create` would refuse. No I/O."""

    def check_secrets(self, options: dict[str, Value], context: Context) -> None:
        """Raise OptionError where `create` would not get a secret that the options name."""

    def validate_compress(self, options: dict[str, Value]) -> None:
        """Raise OptionError where images with these options cannot be made with compressed data."""

    def further_files(self, name: str, size: int, options: dict[str, Value]) -> Iterable[str]:
        """Names of the plain files that creating `name` makes beside it."""
        return ()

    def check_place(self, file: Storage, size: int, options: dict[str, Value]) -> None:
        """Raise NotSupported where `file`, opened but with its old content, cannot hold a new image. Changes
        nothing."""

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> Image:
        """Write a minimal valid empty image of `size` guest bytes into the empty `file` and return it open
        for writing. `options` are typed values of `create_options` (only those given, plus defaults)."""
        raise NotSupported(f"Format driver '{self.name}' does not support image creation")

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        """Sizes that an image with these creation options would have. Raises OptionError, NotSupported."""
        raise NotSupported(f"Block driver '{self.name}' does not support size measurement")
