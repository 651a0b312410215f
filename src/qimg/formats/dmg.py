"""dmg: Apple's disk images (UDIF), read only (dmg sheet). All integers big-endian.

At the end of the file a trailer tells where the block lists are, in a resource fork or an XML property list.
Each block list says of ranges of sectors how they are stored.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from struct import Struct as Packer

from qimg.context import Notice
from qimg.errors import CorruptImage, FormatError, LimitError, NotSupported
from qimg.extent import Extent
from qimg.formats.base import Format, Image
from qimg.formats.chunks import DecodedChunks, pieces
from qimg.ondisk import U32, U64, Struct
from qimg.units import GIB, INT64_MAX, SECTOR, UINT64_MAX, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Annotated, NoReturn

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Storage

SIGNATURE = b"koly"
#: Limits of section 3: sectors and stored bytes of a chunk, bytes of the XML.
MAX_SECTORS = 131072
MAX_STORED = 64 << 20
MAX_XML = 16 << 20
#: Bytes of block lists in a resource fork, which the format does not bound: 800000 chunks, hundreds of GiB.
MAX_LISTS = 32 << 20
MAX_SIZE = round_down(INT64_MAX, GIB)

# Kinds of chunks (section 3).
ZERO, RAW, IGNORE = 0, 1, 2
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF
_CODECS = {
    0x80000004: "adc",
    0x80000005: "zlib",
    0x80000006: "bzip2",
    0x80000007: "lzfse",
    0x80000008: "xz",
}
_ZEROS = (ZERO, IGNORE)
_KNOWN = (*_ZEROS, RAW, *_CODECS)

#: Kinds of unknown chunks that are named.
_TOLD = 4
_LIST_SIGNATURE = b"mish"
#: A block list with one chunk.
_SHORTEST_LIST = 244


class Trailer(Struct, order=">"):
    """Section 2, called ``koly`` after its signature."""

    signature: Annotated[bytes, 4]
    version: U32
    header_size: U32
    flags: U32
    running_offset: U64
    data_offset: U64
    data_length: U64
    fork_offset: U64
    fork_length: U64
    segment: U32
    segments: U32
    segment_id: Annotated[bytes, 16]
    data_checksum: Annotated[bytes, 136]
    xml_offset: U64
    xml_length: U64
    reserved1: Annotated[bytes, 120]
    checksum: Annotated[bytes, 136]
    variant: U32
    sectors: U64
    reserved2: Annotated[bytes, 12]


class BlockList(Struct, order=">"):
    """The head of a block list (section 3), called ``mish`` after its signature; chunks follow."""

    signature: Annotated[bytes, 4]
    version: U32
    first_sector: U64
    sectors: U64
    data_offset: U64
    buffers: U32
    descriptor: U32
    reserved: Annotated[bytes, 24]
    checksum: Annotated[bytes, 136]
    chunks: U32


_CHUNK = Packer(">I4xQQQQ")  # kind, sector, sectors, offset, stored bytes


class Chunks:
    """All chunks as columns by ascending sector: kind, first sector, sectors, place and bytes in the file."""

    def __init__(self) -> None:
        self.kinds = array("I")
        self.starts = array("Q")
        self.counts = array("Q")
        self.places = array("Q")
        self.lengths = array("Q")

    def add(self, kind: int, start: int, count: int, place: int, length: int) -> None:
        """Add a chunk behind the others."""
        self.kinds.append(kind)
        self.starts.append(start)
        self.counts.append(count)
        self.places.append(place)
        self.lengths.append(length)

    def sort(self) -> None:
        """Put them in order, if they are not."""
        starts = self.starts.tolist()
        if starts == sorted(starts):
            return
        order = sorted(range(len(starts)), key=starts.__getitem__)
        for name in ("kinds", "starts", "counts", "places", "lengths"):
            column = getattr(self, name)
            setattr(self, name, array(column.typecode, map(column.__getitem__, order)))

    def find(self, sector: int) -> int:
        """Number of the chunk that holds `sector`, -1 where none does."""
        number = bisect_right(self.starts, sector) - 1
        if number < 0 or sector >= self.starts[number] + self.counts[number]:
            return -1
        return number


class DmgImage(Image):
    """One image. To everyone but `read_into` it is data all over, as to the real program."""

    format_name = "dmg"

    def __init__(self, file: Storage, size: int, chunks: Chunks) -> None:
        self.file = file
        self.size = size
        self._chunks = chunks
        self._decoded = DecodedChunks(self._decode)

    def extents(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, 0)] if length else []

    def read_into(self, buf: Buffer, guest: int) -> None:
        view = memoryview(buf)
        chunks = self._chunks
        while view:
            number = chunks.find(guest // SECTOR)
            if number < 0:
                raise CorruptImage(
                    f"Input/output error: no chunk has the guest sector {guest // SECTOR}",
                    file=self.file.name,
                    field="mish.chunks",
                    guest=guest,
                )
            inner = guest - chunks.starts[number] * SECTOR
            step = min(len(view), chunks.counts[number] * SECTOR - inner)
            self._read_chunk(number, view[:step], inner)
            view = view[step:]
            guest += step

    def _read_chunk(self, number: int, view: memoryview, inner: int) -> None:
        """Fill `view` with the bytes from `inner` on of a chunk."""
        kind = self._chunks.kinds[number]
        if kind in _ZEROS:
            view[:] = bytes(len(view))
        elif kind == RAW:
            self._read_raw(number, view, inner)
        else:
            size = self._chunks.counts[number] * SECTOR
            if len(view) == size:
                self._decoded.fill(number, view)
            else:
                view[:] = self._decoded.get(number, size)[inner : inner + len(view)]

    def _read_raw(self, number: int, view: memoryview, inner: int) -> None:
        """What the chunk has less than its sectors reads as zeros."""
        place, length = self._place(number)
        stored = max(0, min(len(view), length - inner))
        if stored:
            self.file.read_into(view[:stored], place + inner)
        view[stored:] = bytes(len(view) - stored)

    def _decode(self, number: int, out: memoryview) -> None:
        from qimg.codec import CodecError, unpack

        place, length = self._place(number)
        try:
            unpack(_CODECS[self._chunks.kinds[number]], pieces(self.file, place, length), out)
        except CodecError as error:
            raise CorruptImage(
                f"Input/output error: cannot decompress the chunk at {place:#x}: {error}",
                file=self.file.name,
                offset=place,
                guest=self._chunks.starts[number] * SECTOR,
            ) from error

    def _place(self, number: int) -> tuple[int, int]:
        """Where the chunk is in the file, and its stored bytes. Raises CorruptImage for what is not there."""
        place, length = self._chunks.places[number], self._chunks.lengths[number]
        if place + length > self.file.size:
            raise CorruptImage(
                f"Input/output error: the chunk at {place:#x} lies beyond the end of the file",
                file=self.file.name,
                field="mish.chunks.offset",
                offset=place,
                expected=f"{length} bytes",
                guest=self._chunks.starts[number] * SECTOR,
            )
        return place, length


# -- opening


def _find_trailer(file: Storage) -> int:
    """Offset of the trailer. Odd lengths count as rounded up, as with the real program."""
    end = round_up(file.size, SECTOR)
    if end < Trailer.SIZE:
        raise FormatError("dmg file must be at least 512 bytes long", file=file.name)
    low = max(0, end - 2 * SECTOR + 1)
    found = file.read(low, end - low).find(SIGNATURE, 0, end - SECTOR + len(SIGNATURE) - low)
    if found < 0:
        raise FormatError(
            "Could not locate UDIF trailer in dmg file", file=file.name, field="koly.signature", offset=low
        )
    return low + found


def _fail(file: Storage, at: int, trailer: Trailer, field: str, why: str) -> NoReturn:
    raise FormatError(
        f"Invalid UDIF trailer: {field} {getattr(trailer, field)} {why}",
        file=file.name,
        field=f"koly.{field}",
        offset=at + Trailer.offset_of(field),
        found=getattr(trailer, field),
    )


def _read_trailer(file: Storage) -> Trailer:
    at = _find_trailer(file)
    trailer = Trailer.unpack(file.read(at, Trailer.SIZE))
    if trailer.data_offset > at:
        _fail(file, at, trailer, "data_offset", f"lies behind the trailer at {at}")
    for part in ("fork", "xml"):
        offset, length = getattr(trailer, f"{part}_offset"), getattr(trailer, f"{part}_length")
        if offset >= at:
            _fail(file, at, trailer, f"{part}_offset", f"lies behind the trailer at {at}")
        if length > at - offset:
            _fail(file, at, trailer, f"{part}_length", f"reaches behind the trailer at {at}")
    if not trailer.fork_length and not trailer.xml_length:
        _fail(file, at, trailer, "xml_length", "and no resource fork")
    if not trailer.fork_length and trailer.xml_length > MAX_XML:
        _fail(file, at, trailer, "xml_length", f"is larger than {MAX_XML}")
    if trailer.sectors > INT64_MAX:
        _fail(file, at, trailer, "sectors", "is too large")
    if trailer.sectors * SECTOR > MAX_SIZE:
        raise LimitError("Could not refresh total sector count: File too large")
    return trailer


def _xml_lists(file: Storage, trailer: Trailer) -> Iterator[bytes]:
    """What stands in the XML's data elements, wherever they are: other plists than the usual ones exist."""
    from binascii import Error, a2b_base64

    text = bytes(file.read(trailer.xml_offset, trailer.xml_length))
    at = 0
    while (at := text.find(b"<data>", at)) >= 0:
        at += len(b"<data>")
        end = text.find(b"</data>", at)
        if end < 0:
            raise FormatError(
                "Invalid property list: a data element without end",
                file=file.name,
                field="koly.xml_offset",
                offset=trailer.xml_offset + at,
            )
        try:
            yield a2b_base64(text[at:end])
        except Error:
            pass  # Not one of ours: the property list holds other things as well.
        at = end


def _fork_lists(file: Storage, trailer: Trailer) -> Iterator[bytes]:
    """What the resource fork holds: lengths, each with so many bytes behind it."""
    start, length = trailer.fork_offset, trailer.fork_length
    head = file.read(start, 12)
    at = int.from_bytes(head[:4], "big")
    data_length = int.from_bytes(head[8:12], "big")
    if not data_length or at + data_length > length:
        raise FormatError(
            f"Invalid resource fork: {data_length} bytes of data at {at}, of {length} in all",
            file=file.name,
            field="fork.data_length",
            offset=start + 8,
            found=data_length,
        )
    if data_length > MAX_LISTS:
        raise FormatError(
            f"Invalid resource fork: {data_length} bytes of data are more than {MAX_LISTS}",
            file=file.name,
            field="fork.data_length",
            offset=start + 8,
            found=data_length,
        )
    data = bytes(file.read(start + at, data_length))
    inner = 0
    while inner < data_length:
        count = int.from_bytes(data[inner : inner + 4], "big")
        if not count or count > data_length - inner - 4:
            raise FormatError(
                f"Invalid resource fork: a resource of {count} bytes at {at + inner}",
                file=file.name,
                field="fork.length",
                offset=start + at + inner,
                found=count,
            )
        yield data[inner + 4 : inner + 4 + count]
        inner += 4 + count


def _add_chunks(file: Storage, data: bytes, base: int, chunks: Chunks, unknown: set[int]) -> None:
    """Add what the block list `data` tells of, if it is one; kinds that nobody knows go to `unknown`. `base`:
    offset of the data fork. Raises FormatError."""
    if len(data) < _SHORTEST_LIST or not data.startswith(_LIST_SIGNATURE):
        return
    head = BlockList.unpack(data)
    base += head.data_offset
    rows = len(data) - (len(data) - BlockList.SIZE) % _CHUNK.size
    for number, row in enumerate(_CHUNK.iter_unpack(memoryview(data)[BlockList.SIZE : rows])):
        kind, start, count, place, length = row
        if kind in (COMMENT, END) or not count:
            continue
        if kind not in _KNOWN:
            unknown.add(kind)
            continue
        start += head.first_sector
        if kind not in _ZEROS:
            _check_chunk(file, number, count, length)
            place += base
        # What is counted beyond 64 bits is beyond any file, and any disk: such a chunk is never found.
        if start + count > UINT64_MAX:
            continue
        chunks.add(kind, start, count, min(place, UINT64_MAX), length)


def _check_chunk(file: Storage, number: int, count: int, length: int) -> None:
    if count > MAX_SECTORS:
        raise FormatError(
            f"sector count {count} for chunk {number} is larger than max ({MAX_SECTORS})",
            file=file.name,
            field="mish.chunks.sectors",
            expected=f"at most {MAX_SECTORS}",
            found=count,
        )
    if length > MAX_STORED:
        raise FormatError(
            f"length {length} for chunk {number} is larger than max ({MAX_STORED})",
            file=file.name,
            field="mish.chunks.length",
            expected=f"at most {MAX_STORED}",
            found=length,
        )


class Dmg(Format):
    """The driver."""

    name = "dmg"

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> DmgImage:
        if writable:
            raise NotSupported("Image is read-only")
        trailer = _read_trailer(file)
        chunks = Chunks()
        unknown: set[int] = set()
        lists = _fork_lists if trailer.fork_length else _xml_lists
        for data in lists(file, trailer):
            _add_chunks(file, data, trailer.data_offset, chunks, unknown)
        for kind in sorted(unknown)[:_TOLD]:
            text = (
                f"Image contains chunks of unknown type {kind:08x}, accessing them will result in I/O errors"
            )
            context.warn(Notice(text))
        chunks.sort()
        return DmgImage(file, trailer.sectors * SECTOR, chunks)
