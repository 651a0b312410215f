"""cloop: compressed loop images, version 2.0, read only (cloop sheet). All integers big-endian.

A table of offsets follows the head; block n is a zlib stream between offsets n and n + 1.
"""

from __future__ import annotations

from array import array
from operator import sub
from sys import byteorder

from qimg.errors import CorruptImage, FormatError, LimitError, NotSupported
from qimg.extent import Extent
from qimg.formats.base import Format, Image
from qimg.formats.chunks import DecodedChunks, pieces
from qimg.formats.refusal import refuse
from qimg.ondisk import U32, Struct
from qimg.units import GIB, INT64_MAX, SECTOR, round_down

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated, NoReturn

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Storage

#: Limits of the sheet.
MAX_BLOCK = 64 << 20
MAX_BLOCKS = (1 << 32) // 8 - 1
MAX_TABLE = 512 << 20
MAX_STORED = 128 << 20
MAX_SIZE = round_down(INT64_MAX, GIB)
_WORD = 8
#: Offsets looked at in one go.
_STEP = 1 << 17


class Header(Struct, order=">"):
    """The table of `blocks` + 1 offsets follows."""

    preamble: Annotated[bytes, 128]
    block_size: U32
    blocks: U32


class CloopImage(Image):
    """One image. To everyone but `read_into` it is data all over, as to the real program."""

    format_name = "cloop"

    def __init__(self, file: Storage, header: Header) -> None:
        self.file = file
        self.header = header
        self.size = header.blocks * header.block_size
        self._decoded = DecodedChunks(self._decode)

    def extents(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, 0)] if length else []

    def read_into(self, buf: Buffer, guest: int) -> None:
        view = memoryview(buf)
        size = self.header.block_size
        while view:
            number, inner = divmod(guest, size)
            step = min(len(view), size - inner)
            if step == size:
                self._decoded.fill(number, view[:step])
            else:
                view[:step] = self._decoded.get(number, size)[inner : inner + step]
            view = view[step:]
            guest += step

    def _decode(self, number: int, out: memoryview) -> None:
        from qimg.codec import CodecError, unpack

        start, end = _offsets(self.file, number, 2)
        if end > self.file.size:
            self._damaged(number, start, "it lies beyond the end of the file")
        try:
            unpack("zlib", pieces(self.file, start, end - start), out)
        except CodecError as error:
            self._damaged(number, start, str(error))

    def _damaged(self, number: int, offset: int, why: str) -> NoReturn:
        raise CorruptImage(
            f"Input/output error: cannot decompress block {number} at {offset:#x}: {why}",
            file=self.file.name,
            field="offsets",
            offset=offset,
            guest=number * self.header.block_size,
        )


def _offsets(file: Storage, first: int, count: int) -> array[int]:
    """`count` offsets from number `first` on."""
    return _words(file.read(Header.SIZE + _WORD * first, _WORD * count))


def _words(raw: bytearray) -> array[int]:
    words = array("Q", bytes(raw))
    if byteorder == "little":
        words.byteswap()
    return words


def _check_offsets(file: Storage, header: Header) -> None:
    """Offsets have to ascend, by no more than a block may take. Raises FormatError."""
    total = header.blocks + 1
    for first in range(0, total - 1, _STEP):
        raw = file.read(Header.SIZE + _WORD * first, _WORD * min(_STEP + 1, total - first))
        if raw.count(0) == len(raw):
            continue  # a hole: cheap to make, so let it be cheap to pass over
        words = _words(raw).tolist()
        lengths = list(map(sub, words[1:], words))
        if min(lengths) >= 0 and max(lengths) <= MAX_STORED:
            continue
        for index, length in enumerate(lengths, first + 1):
            if 0 <= length <= MAX_STORED:
                continue
            what = "offsets not monotonically increasing" if length < 0 else "invalid compressed block size"
            raise FormatError(
                f"{what} at index {index}, image file is corrupt",
                file=file.name,
                field="offsets",
                offset=Header.SIZE + _WORD * index,
                found=words[index - first],
            )


def parse(file: Storage) -> Header:
    """Read and validate the head and the offsets. Raises FormatError, LimitError."""
    header = Header.unpack(file.read(0, Header.SIZE))
    size, blocks = header.block_size, header.blocks
    if size % SECTOR:
        refuse(file, header, f"block_size {size} must be a multiple of {SECTOR}", "block_size")
    if not size:
        refuse(file, header, "block_size cannot be zero", "block_size")
    if size > MAX_BLOCK:
        refuse(file, header, f"block_size {size} must be {MAX_BLOCK >> 20} MB or less", "block_size")
    if blocks > MAX_BLOCKS:
        refuse(file, header, f"n_blocks {blocks} must be {MAX_BLOCKS} or less", "blocks")
    if _WORD * (blocks + 1) > MAX_TABLE:
        refuse(file, header, "image requires too many offsets, try increasing block size", "blocks")
    if Header.SIZE + _WORD * (blocks + 1) > file.size:
        refuse(file, header, f"The offsets of {blocks} blocks reach beyond the end of the file", "blocks")
    if blocks * size > MAX_SIZE:
        raise LimitError("Could not refresh total sector count: File too large")
    _check_offsets(file, header)
    return header


class Cloop(Format):
    """The driver."""

    name = "cloop"

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> CloopImage:
        if writable:
            raise NotSupported("Image is read-only")
        return CloopImage(file, parse(file))
