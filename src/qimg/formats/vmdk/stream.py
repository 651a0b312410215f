"""Compressed extents: reading them, and adding grains (vmdk sheet 4.2).

Two layouts exist. Tables at the front: grains are appended in any order and the tables are written at the
end, so such an image can take more later. Tables at the end, found by a footer: what streams have, which
are written from front to back without a step backwards (`FreshStream`).
"""

from __future__ import annotations

import errno
from array import array

from qimg.codec import CodecError, codec
from qimg.errors import CorruptImage, NotSupported, StorageError
from qimg.extent import COMPRESSED
from qimg.formats.vmdk.sparse import SparsePart
from qimg.formats.vmdk.structs import GRAIN_MARKER, SECTOR, Marker
from qimg.formats.vmdk.writing import BatchWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.extent import Extent
    from qimg.formats.vmdk.header import Geometry
    from qimg.storage.base import Buffer, Bytes, Storage

#: Bytes read at once where grains follow each other.
READ_AHEAD = 4 << 20
#: Bytes between two grains that are read along rather than skipped.
_GAP = 32 << 10


def encode_grain(data: Bytes) -> bytes:
    """One grain deflated, in zlib's wrapping. Pure: for many threads."""
    return codec("zlib").compress(data)


def with_marker(guest: int, code: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """A deflated grain as it stands in the file: marker, data, zeros up to the next sector."""
    head = (guest // SECTOR).to_bytes(8, "little") + len(code).to_bytes(4, "little")
    return head, code, bytes(-(GRAIN_MARKER + len(code)) % SECTOR)


class StreamPart(SparsePart):
    """A compressed extent. Grains can be added where there are none, if the tables are at the front."""

    def __init__(self, file: Storage, geometry: Geometry, *, writable: bool = False, **more: object) -> None:
        super().__init__(file, geometry, writable=writable, **more)  # type: ignore[arg-type]
        self.read_only = geometry.footer or not geometry.markers
        self.can_compress = not self.read_only
        self._writer = BatchWriter(file)

    # -- reading

    def read_into(self, buf: Buffer, guest: int) -> None:
        view = memoryview(buf)
        size = self.cluster_size
        first, last = guest // size, -(-(guest + len(view)) // size)
        decompress = codec("zlib").decompress
        for block, word, raw in self._grains(first, last):
            start = block * size
            low, high = max(start, guest), min(start + size, guest + len(view))
            wanted = high - start
            data = self._decoded(decompress, block, word, raw, wanted)
            view[low - guest : high - guest] = data if high - low == wanted else data[low - start :]

    def _decoded(self, decompress: object, block: int, word: int, raw: memoryview, wanted: int) -> bytes:
        """The first `wanted` bytes of a grain."""
        body = raw
        if self.geometry.markers:
            size = int.from_bytes(raw[8:12], "little")
            if not 0 < size <= 2 * self.cluster_size:
                raise self._damaged(block, word, f"marker says {size} bytes")
            body = raw[GRAIN_MARKER : GRAIN_MARKER + size]
        try:
            return decompress(body, wanted)  # type: ignore[operator, no-any-return]
        except CodecError as error:
            raise self._damaged(block, word, str(error)) from error

    def _damaged(self, block: int, word: int, what: str) -> CorruptImage:
        guest = block * self.cluster_size
        return CorruptImage(
            f"Cannot decompress the grain at guest offset {guest:#x}: {what}",
            file=self.file.name,
            offset=word * SECTOR,
            guest=guest,
        )

    def _grains(self, first: int, last: int) -> Iterator[tuple[int, int, memoryview]]:
        """(number, table entry, bytes from its place on) of the grains `first` .. `last`, all there."""
        if self._writer.pending:
            self._writer.flush()
        for base, table, low, high in self.pieces(first, last, create=False):
            words = table.words(low, high)
            at = 0
            while at < len(words):
                count, start, raw = self._read_run(words, at)
                for number in range(at, at + count):
                    yield base + number, words[number], raw[words[number] * SECTOR - start :]
                at += count

    def _read_run(self, words: array[int], at: int) -> tuple[int, int, memoryview]:
        """Read grain `at` and those after it that lie close behind: how many, where, and the bytes."""
        # A marker of 12 bytes and up to twice the grain, from where the last of them starts.
        longest = GRAIN_MARKER + 2 * self.cluster_size if self.geometry.markers else self.cluster_size
        start = words[at] * SECTOR
        count = 1
        last = start
        while at + count < len(words):
            place = words[at + count] * SECTOR
            if not last < place <= last + longest + _GAP or place + longest - start > READ_AHEAD:
                break
            last = place
            count += 1
        length = last - start + longest
        if at + count < len(words) and last < words[at + count] * SECTOR < last + longest:
            length = words[at + count] * SECTOR - start  # the next one begins there
        length = min(length, max(self.file.size - start, 0))
        raw = memoryview(self.file.read(start, length)) if length > 0 else memoryview(b"")
        return count, start, raw if len(raw) > last - start else memoryview(bytes(last - start + longest))

    # -- writing

    def encode(self, data: Bytes) -> bytes:
        return encode_grain(data)

    def write_encoded(self, guest: int, data: bytes) -> None:
        self.begin()
        block = guest // self.cluster_size
        (_first, table, low, _high), *_ = self.pieces(block, block + 1, create=True)
        if table.words(low, low + 1)[0]:
            raise _written(guest)
        record = with_marker(guest, data)
        host = self.take(sum(map(len, record)), SECTOR)
        self._writer.put(host, *record)
        table.put(low, array("I", [host // SECTOR]))

    def allocate(self, start: int, length: int) -> list[Extent]:
        raise NotSupported("Compressed extents take whole compressed grains only")

    def zero_absent(self, start: int, length: int) -> None:
        if any(extent.flags & COMPRESSED for extent in self.extents(start, length)):
            raise _written(start)
        super().zero_absent(start, length)

    def settle(self) -> None:
        self._writer.flush()
        super().settle()


def _written(guest: int) -> StorageError:
    message = "Could not write to allocated cluster for streamOptimized"
    return StorageError(message, errno=errno.EIO, offset=guest)


def marker(value: int, type: int) -> bytes:
    """The sector of a metadata marker."""
    return Marker(value=value, type=type).pack().ljust(SECTOR, b"\0")
