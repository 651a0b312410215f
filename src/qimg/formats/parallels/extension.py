"""The format extension of parallels images: dirty bitmaps, read only (parallels sheet, section 11)."""

from __future__ import annotations

from struct import unpack

from qimg.errors import FormatError
from qimg.formats.base import BitmapData
from qimg.ondisk import U32, U64, Struct
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

    from qimg.formats.parallels.structs import Header
    from qimg.storage.base import Storage

MAGIC = 0xAB234CEF23DCEA87
BITMAP = 0x20385FAE252CB34A
ALL_CLEAR, ALL_SET = 0, 1
_FEATURE_END = 0
#: Bytes of all bitmaps, and of the cluster that describes them, at most: more than anyone has, and no file of
#: a few bytes may ask for more.
MAX_BITMAPS = 64 << 20
MAX_CLUSTER = 64 << 20


class ExtensionHeader(Struct, order="<"):
    """First bytes of the extension's cluster; the checksum is that of all that follows."""

    magic: U64
    md5: Annotated[bytes, 16]


class Feature(Struct, order="<"):
    """Followed by `data_size` bytes; each begins at a multiple of 8."""

    magic: U64
    flags: U64
    data_size: U32
    padding: U32


class BitmapFeature(Struct, order="<"):
    """A dirty bitmap; L1 entries of 8 bytes follow. `size` and `granularity` in sectors."""

    size: U64
    id: Annotated[bytes, 16]
    granularity: U32
    l1_size: U32


def read_bitmaps(file: Storage, header: Header) -> list[BitmapData]:
    """The bitmaps of the image's format extension. Raises FormatError, StorageError."""
    if not header.ext_offset:
        return []
    reader = _Reader(file, header)
    return [reader.load(*found) for found in reader.run()]


def validate(file: Storage, header: Header) -> None:
    """Raises FormatError where the format extension is not as it should be; reads no bitmap's contents."""
    if header.ext_offset:
        _Reader(file, header).run()


def extension_end(file: Storage, header: Header) -> int:
    """End of the last cluster that the format extension uses, in bytes; 0: there is none. An extension that
    cannot be read may use the whole file."""
    if not header.ext_offset:
        return 0
    try:
        reader = _Reader(file, header)
        places = [word for _feature, words in reader.run() for word in words if word > ALL_SET]
    except FormatError:
        return file.size
    return max([header.ext_offset, *places]) * SECTOR + header.cluster_size


class _Reader:
    """One extension."""

    def __init__(self, file: Storage, header: Header) -> None:
        self.file = file
        self.header = header
        self.start = header.ext_offset * SECTOR
        self._total = 0
        if header.cluster_size > MAX_CLUSTER:
            raise self.fail(f"A Format Extension of {header.cluster_size} bytes is too large", 0)
        self.cluster = bytes(file.read(self.start, header.cluster_size))

    def fail(self, message: str, at: int) -> FormatError:
        """An error about what stands at byte `at` of the extension."""
        return FormatError(message, file=self.file.name, field="extension", offset=self.start + at)

    def run(self) -> list[tuple[BitmapFeature, tuple[int, ...]]]:
        """All bitmaps and their L1 tables."""
        from hashlib import md5

        size = len(self.cluster)
        head = ExtensionHeader.unpack(self.cluster.ljust(ExtensionHeader.SIZE, b"\0"))
        if head.magic != MAGIC:
            raise self.fail(
                f"Wrong parallels Format Extension magic: {head.magic:#x}, expected: {MAGIC:#x}", 0
            )
        if md5(self.cluster[ExtensionHeader.SIZE :], usedforsecurity=False).digest() != head.md5:
            raise self.fail("Wrong checksum in Format Extension header. Format extension is corrupted.", 8)
        found: list[tuple[BitmapFeature, tuple[int, ...]]] = []
        at = ExtensionHeader.SIZE
        while at + Feature.SIZE <= size:
            feature = Feature.unpack(self.cluster, at)
            if feature.magic == _FEATURE_END:
                break
            at += Feature.SIZE
            if feature.flags:
                raise self.fail("Flags for extension feature are unsupported", at)
            if feature.data_size > size - at:
                raise self.fail("Feature data_size exceedes Format Extension cluster", at)
            if feature.magic != BITMAP:
                raise self.fail(f"Unknown feature: {feature.magic:#x}", at)
            found.append(self._bitmap(at, feature.data_size))
            at = (at + feature.data_size + 7) & ~7
        return found

    def _bitmap(self, at: int, length: int) -> tuple[BitmapFeature, tuple[int, ...]]:
        if length < BitmapFeature.SIZE:
            raise self.fail("Bitmaps feature corrupted: it is too short", at)
        feature = BitmapFeature.unpack(self.cluster, at)
        header = self.header
        if feature.size * SECTOR != header.size:
            raise self.fail(
                f"Bitmap size (in sectors) {feature.size} differs from disk size in sectors"
                f" {header.size // SECTOR}",
                at,
            )
        if not feature.granularity or feature.granularity & (feature.granularity - 1):
            raise self.fail("Bitmaps feature corrupted: the granularity is no power of two", at)
        if feature.l1_size * 8 > length - BitmapFeature.SIZE:
            raise self.fail("Bitmaps feature corrupted: l1 table exceeds extension data_size", at)
        size = _bytes_of(feature)
        expected = -(-size // header.cluster_size)
        if feature.l1_size != expected:
            raise self.fail(
                f"Bitmap table size {feature.l1_size} does not correspond to bitmap size and cluster size."
                f" Expected {expected}",
                at,
            )
        self._total += size
        if self._total > MAX_BITMAPS:
            raise self.fail(f"Bitmaps of {self._total} bytes are too large", at)
        table = self.cluster[at + BitmapFeature.SIZE :][: 8 * feature.l1_size]
        return feature, unpack(f"<{feature.l1_size}Q", table)

    def load(self, feature: BitmapFeature, words: tuple[int, ...]) -> BitmapData:
        """A bitmap with its contents."""
        bits = self._bits(words, _bytes_of(feature))
        return BitmapData(_uuid(feature.id), feature.granularity * SECTOR, bits, enabled=True)

    def _bits(self, words: tuple[int, ...], size: int) -> bytes:
        cluster = self.header.cluster_size
        out = bytearray()
        for word in words:
            length = min(cluster, size - len(out))
            if word in (ALL_CLEAR, ALL_SET):
                out += (b"\xff" if word else b"\0") * length
            else:
                out += self.file.read(word * SECTOR, length)
        return bytes(out)


def _bytes_of(feature: BitmapFeature) -> int:
    """Bytes that the bits of a bitmap take."""
    bits = -(-feature.size // feature.granularity)
    return -(-bits // 8)


def _uuid(raw: bytes) -> str:
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
