"""Objects in a store: one image is one object, which appears, and changes, as a whole or not at all.

Reading is by ranges, small reads through a few blocks that are kept. Nobody can write into the middle of an
object, so what is written goes into a spool, a sparse temporary file (in ``$TMPDIR``, else ``/var/tmp``), and
`publish` sends the whole of it, in parts. An existing object is fetched into the spool before its first
change. A place that is told that each byte comes once (`write_once`) sends parts while they come and gives
their space in the spool back. Whatever fails, the upload is aborted and the store is as it was before.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from qimg.errors import LimitError, NotSupported, StorageError
from qimg.extent import MAPPED, ZERO, Extent
from qimg.storage.base import Limits, Storage
from qimg.storage.blockcache import BlockCache
from qimg.units import MIB, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ClassVar

    from obstore import WritableFile
    from obstore.store import ObjectStore

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes

#: What small reads fetch.
BLOCK = MIB
#: Bytes of a part, as long as the object has not more of them than stores allow.
PART = 8 * MIB
MAX_PARTS = 10_000
#: 5 TiB, what the large stores take.
MAX_SIZE = 5 << 40
#: Parts on their way at once.
_CONCURRENCY = 8
#: Bytes of the parts on their way, at most, where parts have to be large.
_IN_FLIGHT = 256 * MIB
_LONGEST_REASON = 200

# What stores say where not only the object is missing.
_NO_BUCKET = ("<Code>NoSuchBucket</Code>", "<Code>ContainerNotFound</Code>")
# HTTP status -> what the operating system calls it.
_ERRNO = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 412: errno.ESTALE}


def part_size(size: int) -> int:
    """Bytes of a part of an object of `size` bytes. Raises LimitError where no store would take it."""
    if size > MAX_SIZE:
        raise LimitError(f"An object cannot be larger than {MAX_SIZE} bytes")
    return max(PART, round_up(-(-size // MAX_PARTS), MIB))


def explain(error: BaseException) -> tuple[int, str]:
    """(errno, one line) for what the library raised; bounded and printable whatever the server said."""
    text, _, debug = str(error).partition("\n\nDebug source")
    _, found, answer = text.partition("status code: ")
    if found:
        status, _, body = answer.partition(": ")
        said = body.partition("<Message>")[2].partition("</Message>")[0]
        number = int(status[:3]) if status[:3].isdecimal() else 0
        return _ERRNO.get(number, errno.EIO), _printable(f"{status}: {said}" if said else status)
    cause = debug.partition('message: "')[2].partition('"')[0]  # the operating system's words
    return errno.EIO, _printable(cause or text.rpartition(" - ")[2])


def _printable(text: str) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * _LONGEST_REASON])
    return " ".join(line.split())[:_LONGEST_REASON]


def _failed(doing: str, error: BaseException, offset: int | None = None) -> StorageError:
    number, reason = explain(error)
    return StorageError(f"{doing}: {reason}", errno=number, offset=offset)


def library_errors() -> tuple[type[Exception], ...]:
    """What calls of the library raise."""
    from obstore.exceptions import BaseError

    return BaseError, OSError, ValueError


class _Reader:
    """The object `key` as it was when it was opened: a read after a change by others is an error."""

    def __init__(self, store: ObjectStore, key: str, size: int, tag: str | None) -> None:
        self.size = size
        self._tag = tag
        self._store = store
        self._key = key
        self._cache = BlockCache(self._fill, BLOCK)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on; all of it lies inside the object. Raises StorageError."""
        if len(view) >= BLOCK:
            view[:] = self._fetch(offset, len(view))
        else:
            self._cache.read_into(view, offset)

    def _fill(self, view: memoryview, offset: int) -> int:
        length = min(len(view), self.size - offset)
        view[:length] = self._fetch(offset, length)
        return length

    def _fetch(self, offset: int, length: int) -> memoryview:
        import obstore

        wanted = (offset, offset + length)
        try:
            answer = obstore.get(self._store, self._key, options={"range": wanted, "if_match": self._tag})
            found = memoryview(answer.bytes())
        except library_errors() as error:
            raise _failed("Could not read", error, offset) from error
        if len(found) != length:
            message = f"Could not read: {len(found)} bytes came instead of {length}"
            raise StorageError(message, errno=errno.EIO, offset=offset)
        return found

    def copy_to(self, target: Storage) -> None:
        """Write all of it to `target`. Raises StorageError."""
        import obstore

        done = 0
        try:
            if self.size:
                answer = obstore.get(self._store, self._key, options={"if_match": self._tag})
                for piece in answer.stream(min_chunk_size=BLOCK):
                    target.write(memoryview(piece), done)
                    done += len(piece)
        except library_errors() as error:
            raise _failed("Could not read", error, done) from error
        if done != self.size:
            message = f"Could not read: {done} bytes came instead of {self.size}"
            raise StorageError(message, errno=errno.EIO, offset=done)


class _Stream:
    """Sends a spool from its start while it fills; what is sent is gone from the spool."""

    def __init__(self, open_writer: Callable[[int], WritableFile], spool: Storage, part: int) -> None:
        self.sent = 0
        self._writer = open_writer(part)
        self._spool = spool
        self._part = part
        self._whole = 0  # all before this was written
        self._ahead: dict[int, int] = {}  # start -> end of what was written behind it

    def check(self, offset: int) -> None:
        """Raise StorageError where bytes from `offset` on are on their way already."""
        if offset < self.sent:
            message = f"What was sent already cannot be changed or read, at byte {offset}"
            raise StorageError(message, errno=errno.EIO, offset=offset)

    def wrote(self, start: int, end: int) -> None:
        """Bytes `start` .. `end` are in the spool: send what is complete."""
        self._ahead[start] = max(end, self._ahead.get(start, 0))
        while self._ahead and min(self._ahead) <= self._whole:
            first = min(self._ahead)
            self._whole = max(self._whole, self._ahead.pop(first))
        while self._whole - self.sent >= self._part:
            self._send(self._part)

    def _send(self, length: int) -> None:
        self._writer.write(self._spool.read(self.sent, length))
        self._spool.discard(self.sent, length)
        self.sent += length

    def finish(self) -> None:
        """Send the rest and make the object appear."""
        while self.sent < self._spool.size:
            self._send(min(self._part, self._spool.size - self.sent))
        self._writer.close()

    def abort(self) -> None:
        """Take back what was sent. Never raises."""
        error = InterruptedError()
        try:
            self._writer.__exit__(InterruptedError, error, None)
        except library_errors():
            pass  # The failure that led here is the one to tell.


class ObjectStorage(Storage):
    """An object as a place. A subclass says how its store is reached."""

    zero_init = True
    can_create: ClassVar[bool] = True

    def __init__(self, store: ObjectStore, name: str, key: str, *, writable: bool, create: bool) -> None:
        """Look at the object; with `create` it may be missing. Raises StorageError."""
        self.name = name
        self.writable = writable
        self.limits = Limits(remote=True)
        self._store = store
        self._key = key
        self._spool: Storage | None = None
        self._stream: _Stream | None = None
        self._changed = False
        self._writing = allocate_lock()
        size, self._seen = self._look(missing=create)
        self._reader = _Reader(store, key, size, self._seen)

    def _look(self, *, missing: bool) -> tuple[int, str | None]:
        """Length and version of the object; (0, None) where it is `missing` and may be."""
        import obstore

        try:
            found = obstore.head(self._store, self._key)
        except FileNotFoundError:
            return self._tell_missing(missing)
        except library_errors() as error:
            raise _failed("Could not look at the object", error) from error
        return found["size"], found["e_tag"]

    def _tell_missing(self, may_be: bool) -> tuple[int, None]:
        """Ask again, since the answer to this says what is missing. Raises StorageError."""
        import obstore

        try:
            obstore.get(self._store, self._key, options={"range": (0, 1)})
        except FileNotFoundError as error:
            if not may_be or any(code in str(error) for code in _NO_BUCKET):
                raise _failed("Could not look at the object", error) from error
        except library_errors() as error:
            raise _failed("Could not look at the object", error) from error
        return 0, None

    @property
    def size(self) -> int:
        return self._reader.size if self._spool is None else self._spool.size

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        if self._stream is not None:
            self._stream.check(offset)
        if self._spool is not None:
            self._spool.read_into(view, offset)
            return
        inside = max(0, min(len(view), self.size - offset))
        if inside:
            self._reader.read_into(view[:inside], offset)
        view[inside:] = bytes(len(view) - inside)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = max(start, min(end, self.size))
        if inside > start:
            yield Extent(start, inside - start, MAPPED, 0, start, self)
        if inside < end:
            yield Extent(inside, end - inside, ZERO, 0, inside, self)

    def allocated_bytes(self) -> int | None:
        return self._reader.size

    # -- writing

    def _begin(self) -> Storage:
        """The spool, with the object's content, for a change."""
        with self._writing:
            if self._spool is None:
                spool = _new_spool()
                try:
                    self._reader.copy_to(spool)
                except BaseException:
                    spool.close()
                    raise
                self._spool = spool
            self._changed = True
            return self._spool

    def _change(self, start: int, end: int, change: Callable[[Storage], None]) -> None:
        """Do `change`, of bytes `start` .. `end`, to the spool. Raises StorageError."""
        spool = self._begin()
        if self._stream is None:
            change(spool)
            return
        with self._writing:
            self._stream.check(start)
            change(spool)
            try:
                self._stream.wrote(start, end)
            except library_errors() as error:
                raise _failed("Could not write", error, start) from error

    def write(self, buf: Bytes, offset: int) -> None:
        if len(buf):
            self._change(offset, offset + len(buf), lambda spool: spool.write(buf, offset))

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if length > 0:
            self._change(offset, offset + length, lambda spool: spool.zero(offset, length))

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'")
        part_size(size)
        self._change(min(size, self.size), size, lambda spool: spool.resize(size))

    def start_new(self, values: dict[str, Value], context: Context) -> None:
        with self._writing:
            if self._spool is None:
                self._spool = _new_spool()
            self._changed = True
        self.resize(0)

    def write_once(self, size: int) -> None:
        import obstore

        def open_writer(part: int) -> WritableFile:
            return obstore.open_writer(
                self._store, self._key, buffer_size=part, max_concurrency=_concurrency(part)
            )

        self.zero_init = False  # zeros have to come too, or a part would never be known to be complete
        self._stream = _Stream(open_writer, self._begin(), part_size(size))

    def flush(self) -> None:
        """Nothing: all changes take effect together, with `publish`, so their order does not matter."""

    def publish(self) -> None:
        if not self._changed:
            return
        try:
            if self._stream is not None:
                self._finish_stream(self._stream)
            else:
                self._send()
        except library_errors() as error:
            raise _failed(f"Could not write '{self.name}'", error) from error
        self._changed = False

    def _finish_stream(self, stream: _Stream) -> None:
        stream.finish()
        assert self._spool is not None
        self._spool.close()
        self._stream = self._spool = None
        size, self._seen = self._look(missing=False)
        self._reader = _Reader(self._store, self._key, size, self._seen)

    def _send(self) -> None:
        import obstore

        assert self._spool is not None
        if self._seen is not None and self._look(missing=True)[1] != self._seen:
            raise StorageError("The object was changed by somebody else meanwhile", errno=errno.ESTALE)
        part = part_size(self._spool.size)
        if self._spool.size <= part:
            sent = obstore.put(
                self._store, self._key, bytes(self._spool.read(0, self._spool.size)), use_multipart=False
            )
        else:
            sent = obstore.put(
                self._store,
                self._key,
                _pieces(self._spool, PART),
                chunk_size=part,
                max_concurrency=_concurrency(part),
            )
        self._seen = sent["e_tag"]

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()
        if self._spool is not None:
            self._spool.close()


def _concurrency(part: int) -> int:
    return max(1, min(_CONCURRENCY, _IN_FLIGHT // part))


def _pieces(spool: Storage, step: int) -> Iterator[bytearray]:
    for start in range(0, spool.size, step):
        yield spool.read(start, min(step, spool.size - start))


def _new_spool() -> Storage:
    """An empty place that is gone with its closing, or the end of the process. Raises StorageError."""
    import tempfile

    from qimg.storage.posix import PosixFile

    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        number, path = tempfile.mkstemp(prefix="qimg-", dir=folder)
    except OSError as error:
        message = f"Could not make a temporary file in '{folder}': {error.strerror}"
        raise StorageError(message, errno=error.errno or errno.EIO) from error
    os.close(number)
    try:
        return PosixFile.open(path, writable=True, cache="unsafe", locking="off")
    finally:
        os.unlink(path)
