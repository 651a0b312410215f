"""Opening: from what the user typed to a `Disk`, and from a target's name to an empty storage."""

from __future__ import annotations

import errno
import os
import stat

from qimg.errors import (
    GateError,
    LocationError,
    NotSupported,
    OpenError,
    OptionError,
    QimgError,
    StorageError,
)
from qimg.graph.chain import BackingError, Base, open_chain, place_of
from qimg.graph.gate import OPEN
from qimg.graph.location import (
    Location,
    find_protocol,
    parse_option_string,
    resolve_relative,
)
from qimg.graph.nodes import (
    CREATE,
    NO_USE,
    NO_USE_EXCLUDING_WRITERS,
    READ_ALONE,
    READ_EXCLUDING_WRITERS,
    READ_SHARED,
    WRITE_EXCLUSIVE,
    WRITE_RESIZING,
    WRITE_SHARED,
    Builder,
    Mode,
    value_text,
)
from qimg.options import parse_bool
from qimg.storage import registry as storages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.formats.base import Image
    from qimg.graph.disk import Disk
    from qimg.graph.gate import Gate
    from qimg.graph.nodes import Node
    from qimg.options import Option, Value
    from qimg.storage.base import Storage

__all__ = [
    "CREATE",
    "NO_USE",
    "NO_USE_EXCLUDING_WRITERS",
    "READ_EXCLUDING_WRITERS",
    "READ_SHARED",
    "WRITE_EXCLUSIVE",
    "WRITE_SHARED",
    "ImageSpec",
    "Target",
    "backing_location",
    "open_disk",
    "open_with_base",
    "resolve_relative",
    "target",
]


_MUST_EXIST = (
    "Protocol driver '{}' does not support creating new images, so an existing image must be selected as the"
    " target; however, opening the given target as an existing image failed: {}"
)


class ImageSpec:
    """One image operand as the user gave it.

    text        a file name, ``protocol:...``, ``json:{...}``, or an option string when `image_opts`.
    format      forces the format of the top image (``-f``); None: what the description says, else probed.
    cache       none, off, writeback, writethrough, directsync, unsafe.
    force_share ``-U``.
    native      ``-n`` of bench: the kernel's asynchronous I/O, which wants a cache mode without page cache.
    """

    __slots__ = ("cache", "force_share", "format", "image_opts", "native", "text")

    def __init__(
        self,
        text: str,
        *,
        format: str | None = None,
        image_opts: bool = False,
        cache: str = "writeback",
        force_share: bool = False,
        native: bool = False,
    ) -> None:
        self.text = text
        self.format = format
        self.image_opts = image_opts
        self.cache = cache
        self.force_share = force_share
        self.native = native


def open_disk(
    spec: ImageSpec,
    *,
    context: Context,
    writable: bool = False,
    backing: bool = True,
    for_check: bool = False,
    for_info: bool = False,
    keyless: bool = False,
    raw_shares_all: bool = False,
    gate: Gate = OPEN,
) -> Disk:
    """Open an image and, with `backing`, everything below it, each implicit open through the gate.

    Read-only unless `writable` (which applies to the top image only). Locks as the common sheet says
    (section 11); `raw_shares_all`: raw images, also as backing files, let others write meanwhile, as with
    every command of the real program but convert, whose sources exclude writers; `keyless`: no data is going
    to be read, so encrypted images need no key.
    Raises OpenError (whose text is the whole message of the real program), OptionError, LocationError,
    GateError (not wrapped).
    """
    location = _operand(spec, context)
    builder = Builder(
        context,
        gate=gate,
        for_check=for_check,
        for_info=for_info,
        keyless=keyless,
        open_chain=_open_child,
    )
    try:
        mode = Mode(writable=writable, force_share=spec.force_share, cache=spec.cache)
        mode.native = spec.native
        disk = open_chain(builder, location, mode, backing=backing)[0]
        if not (raw_shares_all or writable or for_info or builder.shared):
            _exclude_writers(disk, builder.data_files)
        return disk
    except (GateError, OpenError):
        raise
    except QimgError as error:
        raise OpenError(spec.text, error) from error


def open_with_base(spec: ImageSpec, base: str | None, *, context: Context) -> tuple[Disk, int | None]:
    """Open an image and its backing chain for a commit: the top image and the backing image `base` (as
    `chain.Base` understands the name, None: the first one) for writing, the ones between so that nobody else
    can use them. Gives the disk and the depth of `base`, None where there is no such image.

    Raises as `open_disk`; LockError where others use the base."""
    location = _operand(spec, context)
    builder = Builder(context, open_chain=_open_child)
    found = Base(base)
    try:
        mode = Mode(writable=True, force_share=spec.force_share, cache=spec.cache)
        disk = open_chain(builder, location, mode, base=found)[0]
    except (GateError, OpenError):
        raise
    except QimgError as error:
        if isinstance(error, BackingError) and error.depth == found.depth:
            reason = error.reason
            if isinstance(reason, StorageError) and reason.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise reason from error  # it could be read
        raise OpenError(spec.text, error) from error
    try:
        if found.depth is not None:
            _lock_for_commit(disk, found.depth)
    except BaseException:
        disk.close()
        raise
    return disk, found.depth


def _lock_for_commit(disk: Disk, depth: int) -> None:
    for number in range(depth, 0, -1):
        image = disk.layers[number].image
        raw = image.format_name in ("raw", image.file.driver)
        written = WRITE_RESIZING if raw else WRITE_EXCLUSIVE
        for storage in (image.file, *(storage for _, storage in image.attached())):
            storage.lock(*(READ_ALONE if number < depth else written))


def _exclude_writers(disk: Disk, data_files: list[Storage]) -> None:
    """Take from others the right to write to raw images of the chain and to data files; other formats have
    done so."""
    images = [layer.image for layer in disk.layers]
    raw = [image.file for image in images if image.format_name in ("raw", image.file.driver)]
    try:
        for storage in (*raw, *data_files):
            storage.lock(*READ_EXCLUDING_WRITERS)
    except BaseException:
        disk.close()
        raise


def _open_child(builder: Builder, location: Location, mode: Mode, named_by: str | None) -> tuple[Disk, Node]:
    """A format node below another one. Its data is what counts, so its chain belongs to it, even for info."""
    for_info, builder.for_info = builder.for_info, False
    try:
        return open_chain(builder, location, mode, named_by=named_by)
    finally:
        builder.for_info = for_info


def _operand(spec: ImageSpec, context: Context) -> Location:
    """The location that the user gave. Raises OptionError for what no file name would go in front of."""
    if not spec.image_opts:
        location = Location(spec.text)
    else:
        location = Location(None, parse_option_string(spec.text, context.warn))
        if spec.force_share and "force-share" in location.options:
            _check_share(value_text(location.options["force-share"]))
    if spec.format is not None:
        location.options["driver"] = spec.format
    if spec.force_share:
        # Wins over what a json: name says.
        location.options["force-share"] = True
    return location


def _check_share(text: str | None) -> None:
    try:
        if text is not None and parse_bool("force-share", text):
            return
    except OptionError:
        pass
    raise OptionError("--force-share/-U conflicts with image options", option="force-share")


class Target:
    """Where a new image will be: a parsed name whose protocol can create, nothing opened yet.

    name     as the user typed it.
    options  creation options of the protocol (for ``file``: extent_size_hint, nocow, preallocation, size).
    """

    def __init__(self, name: str, driver: str, values: dict[str, Value]) -> None:
        """`values`: the options by which the storage `driver` opens the place. Use `target`."""
        self.name = name
        self._kind = storages.get(driver)
        self._values = values
        self._filename = str(values.get("filename", name))
        self._made = False
        if not self._kind.can_create:
            raise NotSupported(f"Protocol driver '{driver}' does not support image creation")
        self.options: tuple[Option, ...] = self._kind.create_options

    def create(
        self,
        values: dict[str, Value],
        context: Context,
        *,
        cache: str = "writeback",
        check: Callable[[Storage], None] | None = None,
    ) -> Storage:
        """Open for writing, creating it if need be, lock it, and only then cut it to length 0 (a block
        device keeps its length). `values`: typed protocol options (``nocow``, ``extent_size_hint``); `check`
        looks at the locked place and may refuse it while its content is still there.

        Raises LockError, StorageError with the words of create's stage 2 errors."""
        if not self._filename:
            raise StorageError(f"Could not create '': {os.strerror(errno.ENOENT)}", errno=errno.ENOENT)
        storage = self._open(cache, context)
        self._made = storage.created
        try:
            storage.lock(*CREATE)
            if check is not None:
                check(storage)
            storage.start_new(values, context)
        except BaseException:
            storage.close()
            raise
        return storage

    def _open(self, cache: str, context: Context) -> Storage:
        kind = self._kind
        try:
            return kind.from_options(self._values, writable=True, create=True, cache=cache, context=context)
        except QimgError as error:
            if not kind.must_exist:
                raise
            message = _MUST_EXIST.format(kind.driver, error)
            number = error.errno if isinstance(error, StorageError) else errno.EINVAL
            raise StorageError(message, errno=number, hint=error.hint) from error

    def is_part_of(self, disk: Disk) -> bool:
        """Whether the place is a file that `disk` is read from, by whatever name; on another machine, by this
        one."""
        here = _identity(self._filename)
        if here is None:
            return self._filename in _file_names(disk)
        return any(here == _identity(name) for name in _file_names(disk))

    def remove_if_new(self, context: Context) -> None:
        """Delete the place if `create` made it (not one that existed before). Never raises."""
        if not self._made:
            return
        try:
            self._kind.remove(self._values, context=context)
        except QimgError:
            pass  # The failure that made it unwanted is the one to tell.


def _identity(filename: str) -> tuple[int, int] | None:
    """What tells whether two names mean one regular file or block device; None: no such thing."""
    try:
        status = os.stat(filename)
    except (OSError, ValueError):
        return None
    if stat.S_ISREG(status.st_mode):
        return status.st_dev, status.st_ino
    return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _file_names(disk: Disk) -> Iterator[str]:
    """Names of the files of a disk and its backing chain."""
    for layer in disk.layers:
        image = layer.image
        if image.data_file is not None:
            yield image.data_file.name
        for storage in (image.file, *(storage for _, storage in image.attached())):
            yield from _names(storage)


def _names(storage: Storage) -> Iterator[str]:
    yield storage.name
    for _, below in storage.below():
        yield from _names(below)
    disk = getattr(storage, "disk", None)  # where an image stands on another one
    if disk is not None:
        yield from _file_names(disk)


def target(name: str, *, context: Context) -> Target:  # noqa: ARG001
    """Parse the name of a new image. No I/O beyond looking at the node's kind.

    Raises LocationError (``Unknown protocol 'x'``), NotSupported (protocol cannot create)."""
    driver = find_protocol(name)
    return Target(name, driver, storages.get(driver).parse(name))


def backing_location(image: Image) -> str | None:
    """What ``full-backing-filename`` shows for an image with a backing file; None: cannot be told."""
    assert image.backing is not None
    try:
        return resolve_relative(place_of(image.file), image.backing.name)
    except LocationError:
        return None
