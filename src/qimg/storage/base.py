"""Storage: bytes somewhere. What every kind of place offers, and nothing about image formats.

A storage is addressed by byte offset, has a current length and knows which of its ranges are holes. It
is opened by one call, used from several threads at once (every method but `resize` and `close`), and
carries no position. A driver implements the few calls below; the base class supplies the rest, safely
and slowly.
"""

# ruff: noqa: ARG003  (the interface names what subclasses take)
from __future__ import annotations

from qimg.errors import NotSupported
from qimg.extent import MAPPED, Extent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Option, Value

    Buffer = bytearray | memoryview
    Bytes = bytes | bytearray | memoryview

# What a user of an image does with it, and what it lets others do meanwhile: bits of the same meaning
# as the lock bytes of QEMU (protocols sheet 4): bit i <-> byte 100 + i (used) and 200 + i (not shared).
USE_READ = 1
USE_WRITE = 2
USE_WRITE_UNCHANGED = 4
USE_RESIZE = 8
USE_ALL = USE_READ | USE_WRITE | USE_WRITE_UNCHANGED | USE_RESIZE


class Limits:
    """What requests must look like. All in bytes.

    request_alignment  offsets and lengths of reads and writes must be multiples of it (1: no rule).
    memory_alignment   addresses of buffers too (O_DIRECT); 1: no rule.
    preferred_request  a good size for one sequential request.
    fast_zero          `zero` costs no data transfer.
    parallel           how many requests at once still make it faster.
    remote             requests wait rather than work: more of them at once than there are processors.
    """

    __slots__ = (
        "fast_zero",
        "memory_alignment",
        "parallel",
        "preferred_request",
        "remote",
        "request_alignment",
    )

    def __init__(
        self,
        *,
        request_alignment: int = 1,
        memory_alignment: int = 1,
        preferred_request: int = 2 << 20,
        fast_zero: bool = True,
        parallel: int = 16,
        remote: bool = False,
    ) -> None:
        self.request_alignment = request_alignment
        self.memory_alignment = memory_alignment
        self.preferred_request = preferred_request
        self.fast_zero = fast_zero
        self.parallel = parallel
        self.remote = remote


class Storage:
    """Base class of all storages and filters.

    `name` is what messages and `info` call it; `driver` the protocol's name (``file``,
    ``host_device``, ``nbd`` ...). `writable` tells how it was opened.
    """

    driver: str = "?"
    name: str
    writable: bool = False
    limits: Limits
    #: New space (after `resize`) is known to read as zeros.
    zero_init: bool = False
    #: The place has a fixed length (a block device): `resize` can only keep or shrink.
    fixed_size: bool = False
    #: Offsets in the place mean something outside of it; False: `map` shows none.
    addressed: bool = True
    #: `name` alone opens the same place; False: that takes a description by options.
    named: bool = True
    #: Opening it with `create` made the place.
    created: bool = False
    #: Options of opening (``json:``, ``--image-opts``), names as users write them. ``server.*`` stands for
    #: all options that begin so, taken as text.
    open_options: ClassVar[tuple[Option, ...]] = ()
    #: Which of them say what place it is, in the order in which a description has them, `driver` among them.
    identity: ClassVar[tuple[str, ...]] = ("driver", "filename")
    #: Options of creation, in the order in which they follow the format's own.
    create_options: ClassVar[tuple[Option, ...]] = ()
    #: New images can be made here, if only in an existing place.
    can_create: ClassVar[bool] = False
    #: Only in an existing one: a device, an export.
    must_exist: ClassVar[bool] = False
    #: Relative names beside this place (of a backing file) mean something.
    has_directory: ClassVar[bool] = True
    #: What messages call such places, None: by their name.
    plural: str | None = None
    #: The nodes that it stands on (`over`), by the names of their options; ``children.*``: a list of them.
    children: ClassVar[tuple[str, ...]] = ()
    #: Those of them that are images, whose format is looked for, and not places.
    image_children: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        """The typed options that the file name `name` means: a path, an URL, ``driver:`` and more. No I/O.

        Raises LocationError."""
        return {"filename": name}

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        context: Context | None = None,
    ) -> Storage:
        """Open what typed values of `open_options` describe; nothing is locked yet.

        `create` opens for writing and makes the place if it does not exist, without touching what is
        there: `lock` it, then call `start_new`. `cache` is a cache mode, `discard` whether space may be
        given back. Raises StorageError, LocationError, OptionError, NotSupported.
        """
        raise NotSupported(f"Block driver '{cls.driver}' cannot be opened")

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Storage:
        """A node over `children` (by the names of `cls.children`), which belong to it from then on; when this
        raises, the caller still owns them. Raises OptionError, StorageError, NotSupported."""
        raise NotSupported(f"Block driver '{cls.driver}' stands on nothing")

    def below(self) -> list[tuple[str, Storage]]:
        """The storages that it stands on, with the names that they have as `children`."""
        return []

    @property
    def size(self) -> int:
        """Current length in bytes."""
        raise NotImplementedError

    def read_into(self, buf: Buffer, offset: int) -> None:
        """Fill `buf` from `offset` on. What lies past the end reads as zeros.

        Raises StorageError with `offset`.
        """
        raise NotImplementedError

    def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` on; past the end, zeros."""
        buf = bytearray(length)
        if length:
            self.read_into(buf, offset)
        return buf

    def write(self, buf: Bytes, offset: int) -> None:
        """Write all of `buf` at `offset`, growing a place that can grow. Raises StorageError."""
        raise NotImplementedError

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        """Make a range read as zeros; with `unmap` its space may be given back. May grow the place."""
        chunk = bytes(min(length, 1 << 20))
        while length > 0:
            step = min(length, len(chunk))
            self.write(chunk[:step], offset)
            offset += step
            length -= step

    def discard(self, offset: int, length: int) -> None:
        """Say that a range's content no longer matters. It may read as anything afterwards."""

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Data (MAPPED) and known zeros (ZERO, with MAPPED where they take space) of
        ``start .. start + length``, ascending, contiguous, with ``host == start`` and ``source is self``.
        Past the end: ZERO.

        Coalescing is the consumer's (`Runs`). Cost is proportional to the number of runs.
        """
        yield Extent(start, length, MAPPED, 0, start, self)

    def copy_from(self, source: Storage, source_offset: int, offset: int, length: int) -> None:
        """Copy offload: have the kernel or the server copy. Raises NotSupported before any change if
        the two ends cannot; StorageError if the copy itself fails."""
        raise NotSupported("copy offload")

    def resize(self, size: int, preallocation: str = "off") -> None:
        """Set the length. `preallocation` (off, falloc, full) says how growth is backed.

        Raises NotSupported, StorageError, OptionError (unknown mode).
        """
        raise NotSupported(f"Cannot resize '{self.name}'")

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        """Forget the old content, to hold a new image from now on: cut a file to length 0 and apply those
        of its `create_options` that concern the empty file; clear the first sector of a place that existed.

        Raises OptionError (before any change), StorageError, NotSupported.
        """
        if not self.must_exist:
            raise NotSupported(f"Protocol driver '{self.driver}' does not support image creation")
        self.zero(0, min(512, self.size))

    @classmethod
    def remove(cls, values: dict[str, Value], *, context: Context) -> None:
        """Delete the place that typed values of `open_options` describe, once it is closed: a new image that
        failed. Raises StorageError, NotSupported."""
        raise NotSupported(f"Block driver '{cls.driver}' cannot delete")

    def copy_up(self, offset: int, length: int) -> None:
        """Where the place shows what lower layers of a disk hold, make it hold that itself."""

    def compress_writes(self) -> None:
        """Store compressed what is written from now on. Raises NotSupported."""
        raise NotSupported(f"Compression is not supported for underlying format: {self.driver}")

    def flush(self) -> None:
        """Barrier: everything written so far survives a power cut (unless opened with cache=unsafe)."""

    def snapshots(self) -> list[tuple[str, int]]:
        """Name and length of every snapshot that the place itself keeps."""
        return []

    def create_snapshot(self, name: str) -> None:
        """Keep the present content as a snapshot. Raises NotSupported, StorageError."""
        raise NotSupported("Operation not supported")

    def apply_snapshot(self, name: str) -> None:
        """Go back to a snapshot. Raises NotSupported, StorageError."""
        raise NotSupported("Block driver does not support snapshots")

    def delete_snapshot(self, name: str) -> None:
        """Forget a snapshot. Raises NotSupported, StorageError."""
        raise NotSupported("snapshot not found")

    def publish(self) -> None:
        """Make what was written take effect, in places where writes alone do not (an object in a store
        changes as a whole); `close` without it drops it. Raises StorageError."""

    def write_once(self, size: int) -> None:
        """Told of a new place by who fills it: each of `size` bytes will be written just once before
        `publish`, zeros too unless `zero_init`, more or less from the start on. What comes may be sent on."""

    def allocated_bytes(self) -> int | None:
        """Bytes of host space in use (``disk size``), None if unknown."""
        return None

    def lock(self, use: int, share: int) -> None:
        """Replace what is held by: we use the USE_ bits `use` and let others use the bits `share`.

        Raises LockError. Places without locks do nothing.
        """

    def clone(self) -> Storage:
        """A second handle for another thread, where requests on one would queue. Default: itself."""
        return self

    def close(self) -> None:
        """Give everything back. Never raises; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Filter(Storage):
    """A storage on top of another: passes everything on. Subclasses change what they are about."""

    driver = "filter"

    def __init__(self, child: Storage) -> None:
        self.child = child
        self.name = child.name
        if not self.children:
            self.driver = child.driver
        self.writable = child.writable
        self.limits = child.limits
        self.zero_init = child.zero_init
        self.fixed_size = child.fixed_size
        self.plural = child.plural

    def below(self) -> list[tuple[str, Storage]]:
        return [(self.children[0] if self.children else "file", self.child)]

    @property
    def size(self) -> int:
        return self.child.size

    def read_into(self, buf: Buffer, offset: int) -> None:
        self.child.read_into(buf, offset)

    def write(self, buf: Bytes, offset: int) -> None:
        self.child.write(buf, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self.child.zero(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        self.child.discard(offset, length)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        for extent in self.child.extents(start, length):
            yield extent._replace(host=extent.start, source=self)

    def resize(self, size: int, preallocation: str = "off") -> None:
        self.child.resize(size, preallocation)

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        self.child.start_new(values, context)

    def copy_up(self, offset: int, length: int) -> None:
        self.child.copy_up(offset, length)

    def compress_writes(self) -> None:
        self.child.compress_writes()

    def flush(self) -> None:
        self.child.flush()

    def snapshots(self) -> list[tuple[str, int]]:
        return self.child.snapshots()

    def create_snapshot(self, name: str) -> None:
        self.child.create_snapshot(name)

    def apply_snapshot(self, name: str) -> None:
        self.child.apply_snapshot(name)

    def delete_snapshot(self, name: str) -> None:
        self.child.delete_snapshot(name)

    def publish(self) -> None:
        self.child.publish()

    def write_once(self, size: int) -> None:
        self.child.write_once(size)

    def allocated_bytes(self) -> int | None:
        return self.child.allocated_bytes()

    def lock(self, use: int, share: int) -> None:
        self.child.lock(use, share)

    def close(self) -> None:
        self.child.close()
