"""Regular files of this machine: the protocol ``file`` (raw sheet 3-5); devices build on it.

Opening looks at the kind of the node first, so that a FIFO never blocks. Every request is a `pread` or
`pwrite` of its own, so one descriptor serves all threads.
"""

from __future__ import annotations

import errno
import os
import stat
from _thread import allocate_lock

from qimg.context import Context, Notice
from qimg.errors import LocationError, NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.options import BOOL, NUM, SIZE, STR, Option
from qimg.storage import hostcalls, lock
from qimg.storage.base import Limits, Storage
from qimg.storage.hostio import PAGE, BufferedIO, DirectIO, failed, probe_alignment
from qimg.storage.registry import protocol_of
from qimg.units import INT64_MAX, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import ClassVar, Self

    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes

# name -> (past the page cache, every write synchronous, flushes dropped); common sheet 12.
# The last one has no name on the command line, only cache.direct=on,cache.no-flush=on.
CACHE_MODES = {
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, True, False),
    "writethrough": (False, True, False),
    "writeback": (False, False, False),
    "unsafe": (False, False, True),
    "direct-unsafe": (True, False, True),
}

#: Given to a new file unless the user says otherwise (raw sheet 4).
EXTENT_SIZE_HINT = 1 << 20
_EXTENT_SIZE_MAX = (1 << 32) - 1
#: Written as zeros at the start of a file that grows from nothing, as the real program does.
_FIRST_BLOCK = 4096
_CHUNK = bytes(1 << 20)
#: A buffered write that covers a whole aligned huge page makes Linux look for one to cache it, which can take
#: longer than the write (measured in a virtual machine: three times). Large writes are cut at this place.
_HUGE = 2 << 20
_BORDER = 320 << 10

_ONE_OF = {"locking": ("auto", "on", "off"), "aio": ("threads", "native", "io_uring")}


def node_driver(filename: str) -> str:
    """``host_device`` where `filename` is a character or block device, else ``file``. Never blocks."""
    try:
        mode = os.stat(filename).st_mode
    except (OSError, ValueError):
        return "file"
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def check_preallocation(mode: object) -> None:
    """Raise OptionError unless `mode` is off, falloc or full."""
    if mode == "metadata":
        raise OptionError("Unsupported preallocation mode: metadata", option="preallocation")
    if mode not in ("off", "falloc", "full"):
        raise OptionError(f"invalid parameter value: {mode}", option="preallocation")


def _check_choice(name: str, value: str) -> None:
    if value not in _ONE_OF[name]:
        raise OptionError(f"invalid parameter value: {value}", option=name)


def _reason(prefix: str, error: OSError) -> StorageError:
    number = error.errno or errno.EIO
    return StorageError(f"{prefix}: {os.strerror(number)}", errno=number)


class PosixFile(Storage):
    """A regular file. Get one from `open` or `from_options`."""

    driver = "file"
    can_create: ClassVar[bool] = True
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("filename", STR, None, "File name of the image"),
        Option("locking", STR, "auto", "Lock the file against other users (on, off, auto)"),
        Option("aio", STR, "threads", "Way of asynchronous I/O (threads, native, io_uring)"),
        Option("aio-max-batch", NUM, 0, "Largest batch of asynchronous requests"),
        Option("pr-manager", STR, None, "Id of the persistent reservation manager"),
        Option("drop-cache", BOOL, True, "Drop cached pages when another host takes over"),
        Option("x-check-cache-dropped", BOOL, False, "Check that they were dropped"),
    )
    create_options: ClassVar[tuple[Option, ...]] = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("nocow", BOOL, None, "Switch copy-on-write of the file off (btrfs)"),
        Option("preallocation", STR, None, "How space is allocated (off, falloc, full)"),
        Option("extent_size_hint", SIZE, None, "Extent size hint for the file system, 0 for none"),
    )
    zero_init = True

    def __init__(self, fd: int, name: str, *, writable: bool, cache: str, discard: bool = True) -> None:
        """Own `fd`, which was opened as `cache` wants it. Call `open` instead."""
        self._fd = fd
        self.name = name
        self.writable = writable
        direct, sync, no_flush = CACHE_MODES[cache]
        self._sync = sync
        self._no_flush = no_flush or not writable
        self._discard = discard
        self._flush_error: StorageError | None = None
        self._resizing = allocate_lock()
        self._lock: lock.ImageLock | None = None
        self._io: BufferedIO | DirectIO
        if direct:
            alignment = self._direct_alignment()
            self._io = DirectIO(fd, alignment, device=self.fixed_size)
            self.limits = Limits(request_alignment=alignment, memory_alignment=PAGE)
        else:
            self._io = BufferedIO(fd)
            self.limits = Limits()

    # -- opening

    @classmethod
    def open(
        cls,
        filename: str,
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        locking: str = "auto",
        aio: str = "threads",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        """Open `filename`, nothing locked yet. `create` opens for writing and makes the file if it does not
        exist, without cutting it: lock it, then call `start_new`.

        Raises StorageError, whose text is all that follows ``Could not open 'x': ``; LocationError,
        OptionError.
        """
        writable = writable or create
        if not filename:
            raise LocationError(f"The '{cls.driver}' block driver requires a file name")
        cls._check_options(locking, aio, cache)
        if "\0" in filename:
            raise StorageError(
                f"Could not open '{filename}': {os.strerror(errno.ENOENT)}", errno=errno.ENOENT
            )
        cls._check_node(filename, create)
        existed = os.path.lexists(filename)
        fd = cls._open_node(filename, writable, create, cache)
        try:
            cls._check_aio(aio, cache)
            cls._check_mode(filename, os.fstat(fd).st_mode)
            os.set_blocking(fd, True)
            new = cls(fd, filename, writable=writable, cache=cache, discard=discard)
            new.created = create and not existed
            new._check_device()
            new._lock = lock.for_file(fd, filename, locking, context if context is not None else Context())
        except BaseException:
            os.close(fd)
            raise
        return new

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        """The path without ``file:`` (or what the driver is called); ``./`` is put before what then has a
        prefix."""
        prefix = cls.driver + ":"
        if name.startswith(prefix):
            name = name[len(prefix) :]
            if protocol_of(name) is not None:
                name = "./" + name
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
    ) -> Self:
        """`open` with typed values of `open_options`. Raises as `open` does."""
        if values.get("pr-manager") is not None:
            manager = values["pr-manager"]
            raise OptionError(f"No persistent reservation manager with id '{manager}'", option="pr-manager")
        return cls.open(
            str(values.get("filename", "")),
            writable=writable,
            create=create,
            cache=cache,
            locking=str(values.get("locking", "auto")),
            aio=str(values.get("aio", "threads")),
            discard=discard,
            context=context,
        )

    @staticmethod
    def _check_options(locking: str, aio: str, cache: str) -> None:
        _check_choice("locking", locking)
        _check_choice("aio", aio)
        if cache not in CACHE_MODES:
            raise OptionError(f"Invalid cache option: {cache}", option="cache")

    @staticmethod
    def _check_aio(aio: str, cache: str) -> None:
        """Whether the cache mode suits this way of asynchronous I/O; for a node that can be opened."""
        if aio == "native" and not CACHE_MODES[cache][0]:
            message = "aio=native was specified, but it requires cache.direct=on, which was not specified."
            raise OptionError(message, option="aio")

    @classmethod
    def _check_node(cls, filename: str, create: bool) -> None:
        """Refuse a node of the wrong kind before anything opens it. What cannot be seen is left to open."""
        try:
            mode = os.stat(filename).st_mode
        except OSError:
            return
        if not (create and stat.S_ISDIR(mode)):
            cls._check_mode(filename, mode)

    @classmethod
    def _check_mode(cls, filename: str, mode: int) -> None:
        if not stat.S_ISREG(mode):
            message = f"'{cls.driver}' driver requires '{filename}' to be a regular file"
            raise StorageError(message, errno=errno.EINVAL)

    @classmethod
    def _open_node(cls, filename: str, writable: bool, create: bool, cache: str) -> int:
        direct, sync, _ = CACHE_MODES[cache]
        flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        flags |= os.O_RDWR if writable else os.O_RDONLY
        flags |= os.O_CREAT if create else 0
        flags |= os.O_DIRECT if direct else 0
        flags |= os.O_DSYNC if sync and writable else 0
        verb = "create" if create else "open"
        try:
            return os.open(filename, flags, 0o644)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                message = f"Could not {verb} '{filename}': filesystem does not support O_DIRECT"
                raise StorageError(message, errno=errno.EINVAL) from error
            raise _reason(f"Could not {verb} '{filename}'", error) from error

    def _check_device(self) -> None:
        """Look at the opened node more closely. Raises StorageError."""

    def _direct_alignment(self) -> int:
        return probe_alignment(self._fd)

    def fileno(self) -> int:
        """The descriptor, for calls between two files of this machine; -1 once closed."""
        return self._fd

    # -- reading and writing

    @property
    def size(self) -> int:
        try:
            return self._io.size()
        except OSError as error:
            raise failed(error) from error

    def read_into(self, buf: Buffer, offset: int) -> None:
        self._io.read_into(buf, offset)

    def write(self, buf: Bytes, offset: int) -> None:
        length = len(buf)
        if length < _HUGE:
            self._io.write(buf, offset)
            return
        view = memoryview(buf)
        done = 0
        while done < length:
            # Up to the next border, of which no write reaches both and a whole aligned _HUGE in between.
            step = min(_HUGE - (offset + done - _BORDER) % _HUGE, length - done)
            self._io.write(view[done : done + step], offset + done)
            done += step

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if length <= 0:
            return
        end = offset + length
        inside = max(offset, min(end, self.size))
        if inside > offset:
            self._zero_inside(offset, inside - offset, unmap and self._discard)
        if end > inside:
            self._grow_to(inside, end)
        if self._sync:
            self.flush()

    def _zero_inside(self, offset: int, length: int, unmap: bool) -> None:
        ways = (hostcalls.zero_range, hostcalls.punch_hole)
        for way in reversed(ways) if unmap else ways:
            try:
                way(self._fd, offset, length)
            except OSError as error:
                if error.errno not in hostcalls.UNSUPPORTED:
                    raise failed(error, offset) from error
            else:
                return
        super().zero(offset, length, unmap)

    def _grow_to(self, start: int, end: int) -> None:
        """Lengthen the file to `end` with a hole from `start` on.

        By a write, for `ftruncate` would cut off what another thread has just put behind `end`."""
        self._io.write(b"\0", end - 1)
        start = max(start, round_down(end - 1, PAGE))
        try:
            hostcalls.punch_hole(self._fd, start, end - start)
        except OSError:
            pass  # It reads as zeros all the same.

    def discard(self, offset: int, length: int) -> None:
        length = min(offset + length, self.size) - offset
        if not self._discard or length <= 0:
            return
        try:
            hostcalls.punch_hole(self._fd, offset, length)
        except OSError as error:
            if error.errno not in hostcalls.UNSUPPORTED:
                raise failed(error, offset) from error

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = max(start, min(end, self.size))
        yield from self._inside_extents(start, inside)
        if inside < end:
            yield Extent(inside, end - inside, ZERO, 0, inside, self)

    def _inside_extents(self, start: int, end: int) -> Iterator[Extent]:
        while start < end:
            data = min(self._seek(start, os.SEEK_DATA, end), end)
            if data > start:
                yield Extent(start, data - start, ZERO, 0, start, self)
            if data >= end:
                return
            start = min(max(self._seek(data, os.SEEK_HOLE, end), data + 1), end)
            yield Extent(data, start - data, MAPPED, 0, data, self)

    def _seek(self, offset: int, what: int, end: int) -> int:
        """The next data or hole at or behind `offset`, `end` if there is none; a file system that does not
        know says that all is data."""
        try:
            return os.lseek(self._fd, offset, what)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end
            if error.errno in hostcalls.UNSUPPORTED:
                return offset if what == os.SEEK_DATA else end
            raise failed(error, offset) from error

    def copy_from(self, source: Storage, source_offset: int, offset: int, length: int) -> None:
        if not isinstance(source, PosixFile) or source.fixed_size or self.fixed_size:
            raise NotSupported("copy offload")
        inside = max(0, min(length, source.size - source_offset))
        done = 0
        while done < inside:
            try:
                count = os.copy_file_range(
                    source.fileno(), self._fd, inside - done, source_offset + done, offset + done
                )
            except OSError as error:
                if done == 0 and error.errno in (*hostcalls.UNSUPPORTED, errno.EXDEV, errno.EPERM):
                    raise NotSupported("copy offload") from error
                raise failed(error, offset + done) from error
            if count == 0:
                break
            done += count
        self._io.grew(offset + done)
        if done < length:
            self.zero(offset + done, length - done)

    # -- length and space

    def resize(self, size: int, preallocation: str = "off") -> None:
        check_preallocation(preallocation)
        if not 0 <= size <= INT64_MAX:
            number = errno.EINVAL
            raise StorageError(f"Could not resize file: {os.strerror(number)}", errno=number)
        with self._resizing:
            old = self.size
            if preallocation != "off" and size < old:
                raise NotSupported("Cannot use preallocation for shrinking files")
            self._io.trim()
            if preallocation == "falloc" and size > old:
                self._allocate(old, size)
            elif preallocation == "full" and size > old:
                self._write_full(old, size)
            else:
                self._set_length(size)
        if old == 0 and size > 0 and preallocation != "full":
            self.write(bytes(_FIRST_BLOCK if size >= _FIRST_BLOCK else min(512, size)), 0)
        if self._sync:
            self.flush()

    def _set_length(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise _reason("Could not resize file", error) from error
        if not size:
            self._settle_truncation()

    def _allocate(self, old: int, size: int) -> None:
        try:
            os.posix_fallocate(self._fd, old, size - old)
        except OSError as error:
            self._restore_length(old)
            raise _reason("Could not preallocate new data", error) from error

    def _write_full(self, old: int, size: int) -> None:
        self._set_length(size)
        doing = "Could not write zeros for preallocation"
        try:
            offset = old
            while offset < size:
                step = min(size, round_up(offset + 1, len(_CHUNK))) - offset
                self._io.write(_CHUNK[:step], offset)
                offset += step
            doing = "Could not flush file to disk"
            os.fsync(self._fd)
        except (OSError, StorageError) as error:
            self._restore_length(old)
            number = error.errno or errno.EIO
            raise StorageError(f"{doing}: {os.strerror(number)}", errno=number) from error

    def _restore_length(self, old: int) -> None:
        try:
            os.ftruncate(self._fd, old)
        except OSError:
            pass  # The first error is the one to tell.

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        """Forget the old content, to hold a new image from now on: cut a file to length 0 and give it the
        creation options `nocow` and `extent_size_hint`; clear the first sector of a device. Lock it before.

        Raises OptionError (before any change), StorageError.
        """
        given = values.get("extent_size_hint")
        hint = EXTENT_SIZE_HINT if given is None else int(given)
        if hint > _EXTENT_SIZE_MAX:
            raise OptionError("Extent size hint is too large", option="extent_size_hint")
        self._set_length(0)
        if hint > 0:
            try:
                hostcalls.set_extent_size_hint(self._fd, hint)
            except OSError as error:
                if given is not None:
                    context.warn(Notice(str(_reason("Failed to set extent size hint", error))))
        if values.get("nocow"):
            try:
                hostcalls.set_no_cow(self._fd)
            except OSError:
                pass  # Only some file systems have it; it is a wish for speed.

    @classmethod
    def remove(cls, values: dict[str, Value], *, context: Context) -> None:  # noqa: ARG003
        filename = str(values["filename"])
        try:
            os.unlink(filename)
        except OSError as error:
            raise _reason(f"Could not delete '{filename}'", error) from error

    def _settle_truncation(self) -> None:
        """Close the file once more after cutting it to nothing.

        Some file systems (ext4 with auto_da_alloc) take that for a file being replaced and write everything
        out at the next close; let that close be now, while there is nothing to write, and not at the end."""
        try:
            os.close(os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            pass  # It is about speed only.

    def extent_size_hint(self) -> int | None:
        """The file's extent size hint in bytes, None where there is none."""
        try:
            return hostcalls.get_extent_size_hint(self._fd) or None
        except OSError:
            return None

    def flush(self) -> None:
        if self._no_flush:
            return
        if self._flush_error is not None:
            raise self._flush_error
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # The kernel may have dropped the pages that it could not write: no later success counts.
            self._flush_error = failed(error)
            raise self._flush_error from error

    def allocated_bytes(self) -> int | None:
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError:
            return None

    def lock(self, use: int, share: int) -> None:
        if self._lock is not None:
            self._lock.change(use, share)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            self._io.trim()
        except StorageError:
            pass  # A few zeros too many at the end.
        try:
            os.close(fd)
        except OSError:
            pass  # Whoever needs to know has called flush.
