"""Reading compressed clusters (qcow2 sheet, section 5)."""

from __future__ import annotations

from qimg.codec import CodecError, codec
from qimg.errors import CorruptImage
from qimg.formats.qcow2.structs import COMPRESSION_ZLIB, L2_COMPRESSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qimg.formats.qcow2.mapping import Mapping
    from qimg.storage.base import Buffer, Bytes

#: Compressed bytes read at once where clusters follow each other in the file.
READ_AHEAD = 4 << 20
#: Bytes between two compressed clusters that are read along rather than skipped.
_GAP = 16 << 10


def codec_name(compression_type: int) -> str:
    """Name in `qimg.codec` of a header's compression type."""
    return "deflate" if compression_type == COMPRESSION_ZLIB else "zstd"


class CompressedReader:
    """Reads guest ranges that consist of compressed clusters. Holds no state between calls, so any number
    of threads may use one."""

    def __init__(self, mapping: Mapping, compression_type: int) -> None:
        self._mapping = mapping
        self._codec = codec_name(compression_type)

    def read_into(self, buf: Buffer, guest: int) -> None:
        """Fill `buf` with the guest bytes from `guest` on. Raises CorruptImage, StorageError."""
        view = memoryview(buf)
        end = guest + len(view)
        size = self._mapping.geometry.cluster_size
        decompress = codec(self._codec).decompress
        first = guest & -size
        words = self._mapping.entries(guest, end)
        at = 0
        while at < len(words):
            count, offset, raw = self._read(words, at, first)
            for number in range(at, at + count):
                cluster = first + number * size
                data = self._decode(decompress, words[number], offset, raw, cluster)
                low, high = max(cluster, guest), min(cluster + size, end)
                if high - low == size:
                    view[low - guest : high - guest] = data
                else:
                    view[low - guest : high - guest] = memoryview(data)[low - cluster : high - cluster]
            at += count

    def _read(self, words: Sequence[int], at: int, first: int) -> tuple[int, int, memoryview]:
        """Read the data of cluster `at` and of those after it that lie close behind: how many they are, the
        file offset of what was read, and the bytes."""
        geometry = self._mapping.geometry
        start, length = geometry.compressed_range(self._checked(words[at], first, at))
        end = start + length
        count = 1
        while at + count < len(words):
            offset, length = geometry.compressed_range(self._checked(words[at + count], first, at + count))
            if not start <= offset <= end + _GAP or offset + length - start > READ_AHEAD:
                break
            end = max(end, offset + length)
            count += 1
        return count, start, memoryview(self._mapping.file.read(start, end - start))

    def _checked(self, word: int, first: int, number: int) -> int:
        if not word & L2_COMPRESSED:
            guest = first + number * self._mapping.geometry.cluster_size
            raise CorruptImage(f"Guest cluster at {guest:#x} is not compressed", guest=guest)
        return word

    def _decode(
        self,
        decompress: Callable[[Bytes, int], bytes],
        word: int,
        start: int,
        raw: memoryview,
        guest: int,
    ) -> bytes:
        geometry = self._mapping.geometry
        offset, length = geometry.compressed_range(word)
        try:
            return decompress(raw[offset - start : offset - start + length], geometry.cluster_size)
        except CodecError as error:
            raise CorruptImage(
                f"Cannot decompress the guest cluster at {guest:#x}: {error}",
                file=self._mapping.file.name,
                offset=offset,
                guest=guest,
            ) from error
