"""convert: one or several disks, or an internal snapshot, into a new or an existing image."""

from __future__ import annotations

from errno import EAGAIN

from qimg.context import Notice
from qimg.errors import (
    CorruptImage,
    LockError,
    NotSupported,
    OpenError,
    OptionError,
    QimgError,
    StorageError,
)
from qimg.graph.open import ImageSpec, Target, open_disk, resolve_relative, target
from qimg.jobs.create import check_backing, create_image, find_format, plan_target
from qimg.jobs.engine import Meter, default_workers, run
from qimg.jobs.plan import Policy, chunks, long_clear, plan_copy
from qimg.jobs.source import Source
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from qimg.context import Context
    from qimg.formats.base import BitmapData, Image
    from qimg.graph.disk import Disk
    from qimg.jobs.create import CreatePlan
    from qimg.jobs.plan import Row
    from qimg.jobs.progress import Progress

#: Bytes moved at once by one worker.
CHUNK = 2 << 20
#: The same when the kernel copies.
OFFLOAD_CHUNK = 64 << 20
#: Below this many guest bytes one worker is quicker than starting several.
SMALL = 8 << 20


class SnapshotParam:
    """Which internal snapshot: by `id` and/or `name`, or `id_or_name` (an id wins)."""

    __slots__ = ("id", "id_or_name", "name")

    def __init__(
        self, *, id: str | None = None, name: str | None = None, id_or_name: str | None = None
    ) -> None:
        self.id = id
        self.name = name
        self.id_or_name = id_or_name

    def load(self, image: Image) -> None:
        """Make `image` read from the snapshot. Raises QimgError."""
        try:
            if self.id_or_name is None:
                image.load_snapshot(id=self.id, name=self.name)
                return
            known = image.snapshots()
            if any(snapshot.id == self.id_or_name for snapshot in known):
                image.load_snapshot(id=self.id_or_name)
            else:
                image.load_snapshot(name=self.id_or_name)
        except QimgError as error:
            raise type(error)(f"Failed to load snapshot: {error}") from error


class ConvertRequest:
    """What to convert and how. Sizes in bytes; defaults are the command's.

    sources          at least one; concatenated in this order.
    target           file name, or option string with `target_image_opts`.
    output_format    None: raw for a new target; what the target is for an existing one.
    options          creation options as (name, text).
    create           False: write into the existing target (``-n``).
    sparse_size      zero-detection block; 0 writes everything.
    workers          parallel requests (``-m``); out_of_order: ``-W``; copy_offload: ``-C``.
    rate_limit       bytes a second, 0: none.
    cache            the target's cache mode.
    quiet            leave out the warnings of `salvage`.
    """

    def __init__(
        self,
        sources: list[ImageSpec],
        target: str,
        *,
        target_image_opts: bool = False,
        output_format: str | None = None,
        options: list[tuple[str, str]] | None = None,
        create: bool = True,
        compress: bool = False,
        backing: str | None = None,
        backing_format: str | None = None,
        snapshot: SnapshotParam | None = None,
        sparse_size: int = 4096,
        workers: int = 8,
        out_of_order: bool = False,
        copy_offload: bool = False,
        rate_limit: int = 0,
        salvage: bool = False,
        target_is_zero: bool = False,
        bitmaps: bool = False,
        skip_broken_bitmaps: bool = False,
        cache: str = "unsafe",
        quiet: bool = False,
    ) -> None:
        self.sources = sources
        self.target = target
        self.target_image_opts = target_image_opts
        self.output_format = output_format
        self.options = options or []
        self.create = create
        self.compress = compress
        self.backing = backing
        self.backing_format = backing_format
        self.snapshot = snapshot
        self.sparse_size = sparse_size
        self.workers = workers
        self.out_of_order = out_of_order
        self.copy_offload = copy_offload
        self.rate_limit = rate_limit
        self.salvage = salvage
        self.target_is_zero = target_is_zero
        self.bitmaps = bitmaps
        self.skip_broken_bitmaps = skip_broken_bitmaps
        self.cache = cache
        self.quiet = quiet


def convert(
    request: ConvertRequest,
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    context: Context,
) -> None:
    """Do it. Everything about the sources is checked before the target is touched.

    Raises QimgError subclasses; a target that was begun is then left in a state that does not claim to be
    whole (its header says so, or it is shorter than the disk)."""
    with _Closing() as opened:
        disks = []
        for spec in request.sources:
            disk = open_disk(spec, context=context)
            opened.add(disk)
            disks.append(disk)
        if request.snapshot is not None:
            if len(disks) > 1:
                raise OptionError("No support for concatenating multiple snapshot")
            request.snapshot.load(disks[0].top)
        source = Source(disks)
        work = _NewTarget if request.create else _ExistingTarget
        work(request, source, opened, context).execute(Meter(progress, cancelled))


class _Closing:
    """Closes what was added, last first; after success what was changed takes effect before."""

    def __init__(self) -> None:
        self._things: list[Disk | Image] = []

    def add(self, thing: Disk | Image) -> None:
        self._things.append(thing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for thing in reversed(self._things):
                    thing.publish()
        finally:
            while self._things:
                self._things.pop().close()


class _Conversion:
    """What both kinds of target share: the checks, the copy itself, the bitmaps."""

    def __init__(self, request: ConvertRequest, source: Source, opened: _Closing, context: Context) -> None:
        self.request = request
        self.source = source
        self.opened = opened
        self.context = context

    def execute(self, meter: Meter) -> None:
        raise NotImplementedError

    def source_bitmaps(self) -> list[BitmapData]:
        """The bitmaps to copy. Raises QimgError for what `convert --bitmaps` refuses."""
        if not self.request.bitmaps:
            return []
        if len(self.source.disks) > 1:
            raise OptionError("Copying bitmaps only possible with single source")
        kept = []
        for bitmap in self.source.disks[0].top.bitmaps():
            if not bitmap.inconsistent:
                kept.append(bitmap)
            elif self.request.skip_broken_bitmaps:
                self.context.warn(Notice(f"Skipping inconsistent bitmap '{bitmap.name}'"))
            else:
                raise QimgError(
                    f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                    hint="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
                )
        return kept

    def copy(
        self,
        image: Image,
        policy: Policy,
        meter: Meter,
        *,
        under: Disk | None,
        clear: bool,
        in_place: bool = False,
    ) -> None:
        """Move the data. `clear`: zeros found in it must be made in the target. `in_place`: the target
        existed, and `under` is its own disk."""
        from qimg.jobs.copy import Copier, Limited
        from qimg.jobs.inplace import InPlace

        request = self.request
        copier = Copier(
            self.source,
            image,
            sparse=0 if request.copy_offload else request.sparse_size,
            clear=clear,
            under=under,
            in_place=in_place,
            compress=(request.compress and image.can_compress) or image.must_compress,
            ordered=not request.out_of_order and image.cluster_size is not None,
            offload=request.copy_offload,
            salvage=self._salvaged if request.salvage else None,
        )
        size = self.source.size
        meter.total = size
        if meter.progress is not None and meter.progress.exact:
            meter.total = sum(row.length for row in self._rows(policy))
        chunk = OFFLOAD_CHUNK if request.copy_offload else CHUNK
        if request.sparse_size > chunk:
            chunk = round_up(request.sparse_size, CHUNK)
        items = chunks(self._rows(policy), chunk, size, long_clear=long_clear(image))
        workers = 1 if size <= SMALL else min(request.workers, default_workers(*self.source.disks, image))
        if request.rate_limit:
            workers = 1
        meter.tick()
        if in_place:
            batches = InPlace(
                image,
                meter,
                workers=workers,
                rate=request.rate_limit,
                flush=lambda: _finish(image, request.target),
            )
            batches.run(items, copier)
        else:
            run(items, Limited(copier, request.rate_limit), workers=workers, meter=meter)
        meter.done = meter.total
        meter.tick()

    def _rows(self, policy: Policy) -> Iterator[Row]:
        at = 0
        windows = self.source.windows(self._unknown if self.request.salvage else None)
        while True:
            try:
                window = next(windows)
            except StopIteration:
                return
            except (StorageError, CorruptImage) as error:
                raise StorageError(
                    f"error while reading block status at offset {at}: {error.reason}", errno=error.errno
                ) from error
            yield from plan_copy(window, policy)
            at = window[-1].start + window[-1].length if window else at

    def _unknown(self, offset: int, error: StorageError | CorruptImage) -> None:
        if not self.request.quiet:
            self.context.warn(Notice(f"error while reading block status at offset {offset}: {error.reason}"))

    def _salvaged(self, offset: int, error: StorageError | CorruptImage) -> None:
        if not self.request.quiet:
            self.context.warn(Notice(f"error while reading offset {offset}: {error.reason}"))


class _NewTarget(_Conversion):
    """Create the target, then copy."""

    def execute(self, meter: Meter) -> None:
        plan = self._plan()
        bitmaps = self.source_bitmaps()
        failing = f"{plan.name}: error while converting {plan.format}: "
        try:
            plan.driver.validate_create(plan.size, plan.values)
            self._check_place(plan)
        except QimgError as error:
            raise _prefixed(failing, error) from error
        under = self._open_under(plan)
        try:
            image = create_image(plan, context=self.context, cache=self.request.cache, filling=True)
        except QimgError as error:
            raise _prefixed(failing, error) from error
        self.opened.add(image)
        everything = self.request.sparse_size == 0
        policy = Policy(
            everything=everything,
            top_only=under is not None,
            clear=under is not None or (not everything and not image.zero_init),
            zero_from=None if under is None else round_up(under.size, image.cluster_size or 1),
        )
        try:
            self.copy(image, policy, meter, under=under, clear=policy.clear)
            if bitmaps:
                image.store_bitmaps(bitmaps)
            _finish(image, plan.name)
        except BaseException:
            image.abandon()
            raise

    def _check_place(self, plan: CreatePlan) -> None:
        """Refuse to write over what is being read, also where locks do not help (``-U``, ``locking=off``).

        Raises LockError, LocationError."""
        places = [plan.place]
        if "data_file" in plan.values:
            places.append(target(str(plan.values["data_file"]), context=self.context))
        further = plan.driver.further_files(plan.name, plan.size, plan.values)
        places += [Target(name, "file", {"filename": name}) for name in further]
        for place in places:
            if any(place.is_part_of(disk) for disk in self.source.disks):
                raise LockError(
                    'Failed to get "write" lock',
                    errno=EAGAIN,
                    hint=f"Is another process using the image [{place.name}]?",
                )

    def _plan(self) -> CreatePlan:
        request = self.request
        context = self.context
        plan = plan_target(
            request.target,
            request.output_format or "raw",
            request.options,
            backing=request.backing,
            backing_format=request.backing_format,
            context=context,
        )
        plan.set_size(self.source.size)
        plan.values.pop("size", None)
        file = plan.values.get("backing_file")
        if file is not None:
            if request.target_is_zero:
                raise OptionError("Cannot use --target-is-zero when the destination image has a backing file")
            if len(self.source.disks) > 1:
                raise OptionError(
                    "Having a backing file for the target makes no sense when concatenating multiple"
                    " input images"
                )
        if request.compress:
            self._check_compress(plan)
        if request.bitmaps and (not plan.driver.can_bitmaps or plan.values.get("compat") in ("0.10", "v2")):
            raise NotSupported(f"Format driver '{plan.format}' does not support bitmaps")
        return plan

    def _check_compress(self, plan: CreatePlan) -> None:
        if not plan.driver.can_compress:
            raise NotSupported("Compression not supported for this file format")
        if plan.values.get("encryption") or plan.values.get("encrypt.format"):
            raise OptionError("Compression and encryption not supported at the same time")
        if plan.values.get("preallocation", "off") != "off":
            raise OptionError("Compression and preallocation not supported at the same time")
        if "data_file" in plan.values:
            raise OptionError("Compression and an external data file not supported at the same time")
        plan.driver.validate_compress(plan.values)

    def _open_under(self, plan: CreatePlan) -> Disk | None:
        """The new image's backing disk: what partly written clusters are filled up from."""
        file = plan.values.get("backing_file")
        if file is None:
            return None
        if not file:
            raise OptionError("Expected backing file name, got empty string", option="backing_file")
        try:
            if plan.values.get("backing_fmt") is None:
                check_backing(plan, str(file), unsafe=False, context=self.context)
            recorded = plan.values.get("backing_fmt")
            spec = ImageSpec(
                resolve_relative(plan.name, str(file)),
                format=None if recorded is None else str(recorded),
            )
            disk = open_disk(spec, context=self.context, raw_shares_all=True)
        except QimgError as error:
            # The image itself is what the words are about, as if it had been created and then opened.
            reason, hint = (error.reason, error.hint) if isinstance(error, OpenError) else (error, None)
            raise OpenError(plan.name, f"Could not open backing file: {reason}", hint=hint) from error
        self.opened.add(disk)
        return disk


class _ExistingTarget(_Conversion):
    """Copy into an image that is there already (``-n``)."""

    def execute(self, meter: Meter) -> None:
        request = self.request
        bitmaps = self.source_bitmaps()
        spec = ImageSpec(
            request.target,
            format=None if request.target_image_opts else request.output_format or "raw",
            image_opts=request.target_image_opts,
            cache=request.cache,
        )
        if spec.format is not None:
            find_format(spec.format)
        disk = open_disk(spec, writable=True, context=self.context)
        self.opened.add(disk)
        image = disk.top
        if disk.size < self.source.size:
            raise QimgError("output file is smaller than input file")
        if request.bitmaps:
            from qimg.jobs.bitmap import check_target

            check_target(disk, bitmaps, self.source.size)
        if not image.can_write:
            raise NotSupported(f"Writing to this kind of {image.format_name} image is not supported")
        if request.compress and not image.can_compress:
            raise NotSupported("Compression not supported for this file format")
        has_backing = len(disk.layers) > 1
        given_backing = request.backing is not None
        everything = request.sparse_size == 0
        clear = not request.target_is_zero or has_backing
        policy = Policy(everything=everything, top_only=given_backing, clear=clear and not everything)
        self.copy(image, policy, meter, under=disk, clear=policy.clear, in_place=True)
        if bitmaps:
            image.store_bitmaps(bitmaps)  # only now: they are not to record what is copied
        _finish(image, request.target)


def _finish(image: Image, name: str) -> None:
    """Write what belongs to the image beside its data. Raises StorageError."""
    try:
        image.flush()
    except StorageError as error:
        raise StorageError(
            f"{name}: error while completing the image: {error.reason}", errno=error.errno
        ) from error


def _prefixed(prefix: str, error: QimgError) -> QimgError:
    """An error that says `prefix` and then what `error` says, with its hint."""
    return QimgError(prefix + str(error), hint=error.hint)
