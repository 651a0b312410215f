"""A qcow2 image being filled for the first time.

From the first change on the file says that it is incomplete: its provisional header carries an incompatible
feature bit that nobody knows, with a name that explains it, so every reader refuses it by that name.
All that the final header points to is written first; after a barrier one write of one sector turns the
provisional header into the final one. An interruption before leaves an image that refuses to open, one
after it a whole image.

::

    cluster 0   header
    cluster 1   refcount table (moves to the end where it needs more)
    cluster 2   refcount block 0
    cluster 3.. L1 table
    then        data and L2 tables as they come; other refcount blocks, bitmaps at the end
"""

from __future__ import annotations

from qimg.errors import NotSupported
from qimg.extent import Runs
from qimg.formats.base import Image, Reference
from qimg.formats.qcow2.alloc import HostSpace
from qimg.formats.qcow2.compress import Encoder, FreshPacker
from qimg.formats.qcow2.entries import ExtendedEntries, OneToOne, Placement, PlainEntries
from qimg.formats.qcow2.refcounts import Refcounts, most_clusters
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_BITMAPS,
    COPIED,
    EXT_END,
    EXT_FEATURE_NAMES,
    L2_COMPRESSED,
    MAGIC,
    OFFSET_MASK,
    V3_LENGTH,
    CryptoPointer,
    ExtensionHeader,
    FeatureName,
    Header,
)
from qimg.formats.qcow2.tables import StagedTables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.extent import Extent
    from qimg.formats.base import BitmapData
    from qimg.formats.protection import Protection
    from qimg.formats.qcow2.bitmap_store import BitmapStore
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Buffer, Bytes, Storage

INCOMPLETE_BIT = 63
INCOMPLETE_NAME = b"incomplete image (interrupted conversion)"

_SECTOR = 512
#: From so many clusters on, numpy's import pays.
_MANY = 1 << 20


def provisional_header(final: Header) -> bytes:
    """The first sector of an image that is not whole yet."""
    header = Header.unpack(final.pack())
    header.magic = MAGIC
    header.version = 3
    header.backing_file_offset = header.backing_file_size = 0
    header.incompatible_features = 1 << INCOMPLETE_BIT
    header.compatible_features = header.autoclear_features = 0
    header.compression_type = 0
    header.header_length = V3_LENGTH
    row = FeatureName(set=0, bit=INCOMPLETE_BIT, name=INCOMPLETE_NAME).pack()
    names = ExtensionHeader(type=EXT_FEATURE_NAMES, length=len(row)).pack() + row
    end = ExtensionHeader(type=EXT_END, length=0).pack()
    return (header.pack() + names + end).ljust(_SECTOR, b"\0")


# What the header on disk says.
_EMPTY, _REUSED, _INCOMPLETE, _WHOLE = range(4)


class FreshImage(Image):
    """Made by `create`: takes extents, zeros and compressed clusters until `flush`.

    A later `flush` after more changes works too: the first change makes the header provisional again.
    """

    format_name = "qcow2"

    def __init__(
        self,
        file: Storage,
        header: ParsedHeader,
        data_file: Storage | None,
        protection: Protection | None = None,
    ) -> None:
        """`header` describes the image to be; its L1 table follows cluster 2. `protection` encrypts the data.
        Writes nothing."""
        fixed = header.header
        self.file = file
        self.size = header.virtual_size
        self.cluster_size = header.cluster_size
        self.backing = _reference(header)
        self._header = header
        self._data_file = data_file
        self._protection = protection
        self.encrypted = protection is not None
        self._luks: tuple[int, bytes] | None = None  # offset and content of the LUKS header
        if header.data_file_name is not None:
            self.data_file = Reference(header.data_file_name.decode("utf-8", "surrogateescape"), "raw")
        bits = 1 << fixed.refcount_order
        l1_clusters = -(-8 * fixed.l1_size // header.cluster_size)
        self._space = HostSpace(3 + l1_clusters, most_clusters(header.cluster_size, bits))
        self._refcounts = Refcounts(file, self._space, header.cluster_size, bits)
        self._packer = FreshPacker(file, self._space, self._refcounts, header.cluster_bits)
        self._entries = self._make_entries(data_file)
        self._tables = StagedTables(
            file,
            self._space,
            cluster_size=header.cluster_size,
            words=self._entries.words,
            l1_size=fixed.l1_size,
        )
        self._bitmaps: BitmapStore | None = None
        self.granularity = self._entries.sub_size
        self.zero_init = self._entries.placement.keeps_zeros
        self.can_compress = data_file is None and protection is None
        self.can_mark_zero = header.version >= 3
        self._encode = Encoder(fixed.compression_type, header.cluster_size)
        self._state = _REUSED if file.size else _EMPTY
        self._reader: Image | None = None

    def _make_entries(self, data_file: Storage | None) -> PlainEntries:
        size = self._header.cluster_size
        placement = Placement(self.file, self._space, size, self._packer.drop, self._protection)
        if data_file is not None:
            placement = OneToOne(data_file, self._space, size, self._packer.drop, self._protection)
            placement.size = self.size
        kind = ExtendedEntries if self._header.extended_l2 else PlainEntries
        return kind(
            placement,
            size,
            zero_flag=self._header.version >= 3,
            fill_zero=self._header.data_file_raw,
        )

    def place_luks_header(self, content: bytes) -> None:
        """Give the LUKS header clusters of its own, filled up with zeros."""
        size = self._header.cluster_size
        offset = self._space.take(-(-len(content) // size)) * size
        self._header.crypto = CryptoPointer(offset=offset, length=len(content))
        self._luks = offset, content

    # -- allocation

    def _begin(self) -> None:
        """Say on disk that the image is incomplete, durably, before anything else changes there.

        Raises StorageError."""
        self.file.write(provisional_header(self._header.header), 0)
        self.file.flush()
        if self._state == _REUSED and not self.file.fixed_size:
            self.file.resize(_SECTOR)  # what comes behind it reads as zeros again
        self._state = _INCOMPLETE
        self._reader = None

    def _change(self) -> None:
        if self._state != _INCOMPLETE:
            self._begin()

    def preallocate(self, mode: str) -> None:
        """Give every guest cluster its place: `mode` is metadata, falloc or full. Raises StorageError."""
        size = self._header.cluster_size
        clusters = -(-self.size // size)
        if not clusters:
            return
        self._change()
        placement = self._entries.placement
        host = placement.take(0, clusters)
        if self._data_file is None:
            self._reserve(host, clusters * size, mode)
        if clusters >= _MANY:
            import qimg.vec.build  # noqa: F401 - what builds tables uses numpy once it is there
        # What lies in reused space may be anything, and zeros that are not encrypted are none to the guest;
        # zero clusters say that it does not count.
        unknown = self.encrypted or (mode == "metadata" and not placement.keeps_zeros)
        if unknown and self._header.version < 3:
            placement.zero(0, host, clusters * size)
            unknown = False
        guest = 0
        for index, low, high in self._tables.pieces(0, clusters):
            self._entries.preallocate(self._tables.chunk(index), low, high, host + guest, zero=unknown)
            guest += (high - low) * size

    def _reserve(self, host: int, length: int, mode: str) -> None:
        if not self.file.fixed_size:
            self.file.resize(host + length, "off" if mode == "metadata" else mode)
        elif mode != "metadata":
            self.file.zero(host, length, unmap=False)

    def _range(self, start: int, length: int) -> tuple[int, int, int]:
        """First and last (excluded) guest cluster of a range, and its end rounded up where it is the
        disk's."""
        size = self._header.cluster_size
        last = -(-(start + length) // size)
        end = start + length if start + length < self.size else last * size
        return start // size, last, end

    def allocate(self, start: int, length: int) -> list[Extent]:
        self._change()
        runs = Runs(start, min(length, self.size - start))
        first, last, end = self._range(start, length)
        guest = first * self._header.cluster_size
        for index, low, high in self._tables.pieces(first, last):
            table = self._tables.chunk(index)
            self._entries.allocate(table, low, high, guest, start, end, runs)
            guest += (high - low) * self._header.cluster_size
        extents = runs.take()
        if end > self.size and not self.zero_init and self._data_file is None:
            # The part of the last cluster behind the disk's end would show up when the disk grows.
            tail = extents[-1]
            assert tail.host is not None
            self._entries.placement.zero(self.size, tail.host + tail.length, end - self.size)
        if self._protection is not None:
            extents = self._protection.uncover(extents)
        self._refcounts.settle()
        return extents

    def mark_zero(self, start: int, length: int) -> None:
        covered = self.backing is not None
        if covered and not self.can_mark_zero:
            raise NotSupported("Zero clusters need qcow2 version 3 where there is a backing file")
        self._change()
        first, last, end = self._range(start, length)
        guest = first * self._header.cluster_size
        for index, low, high in self._tables.pieces(first, last):
            if covered or not self._tables.is_blank(index):
                table = self._tables.chunk(index)
                self._entries.mark_zero(table, low, high, guest, start, end, covered)
            guest += (high - low) * self._header.cluster_size
        self._refcounts.settle()

    # -- compression

    def encode(self, data: Bytes) -> bytes | None:
        if not self.can_compress:
            raise NotSupported("Operation not supported")
        return self._encode(data)

    def write_encoded(self, guest: int, data: bytes) -> None:
        self._change()
        clusters = self._tables.chunk_clusters
        index, entry = divmod(guest // self._header.cluster_size, clusters)
        before = self._entries.set_compressed(self._tables.chunk(index), entry, self._packer.put(data))
        if before & L2_COMPRESSED:
            self._packer.drop(before)
        elif before & COPIED:
            self._refcounts.release((before & OFFSET_MASK) // self._header.cluster_size, 1)
        self._refcounts.settle()

    # -- bitmaps

    def store_bitmaps(self, bitmaps: Iterable[BitmapData]) -> None:
        if self._header.version < 3:
            raise NotSupported("Cannot store dirty bitmaps in qcow2 v2 files")
        self._change()
        if self._bitmaps is None:
            from qimg.formats.qcow2.bitmap_store import BitmapStore

            self._bitmaps = BitmapStore(self.file, self._space, self._header.cluster_size, self.size)
        for bitmap in bitmaps:
            self._bitmaps.add(bitmap)

    def _store_bitmaps(self) -> None:
        pointer = None if self._bitmaps is None else self._bitmaps.store()
        if pointer is None:
            return
        size = self._header.cluster_size
        old = self._header.bitmaps
        if old is not None:
            self._refcounts.release(old.directory_offset // size, -(-old.directory_size // size))
        self._header.bitmaps = pointer
        self._header.header.autoclear_features |= AUTOCLEAR_BITMAPS

    # -- the end

    def flush(self) -> None:
        if self._state == _WHOLE:
            return
        if self._state == _REUSED:
            self._begin()  # an older header must be gone before anything else is overwritten
        self._packer.flush()
        self._store_luks_header()
        self._store_bitmaps()
        self._tables.store()
        header = self._header.header
        if header.l1_size:
            # A file ends with the last entry, as the real program's; elsewhere whole sectors.
            self._tables.store_l1(header.l1_table_offset, 1 if self.file.zero_init else _SECTOR)
        self._refcounts.place()
        self._refcounts.store()
        header.refcount_table_offset = self._refcounts.table_offset
        header.refcount_table_clusters = self._refcounts.table_clusters
        cluster = self._header.pack()
        sector = min(len(cluster), max(_SECTOR, self.file.limits.request_alignment))
        if len(cluster) > sector:
            self.file.write(memoryview(cluster)[sector:], sector)
        self._cover_data()
        self.file.flush()
        if self._data_file is not None:
            self._data_file.flush()
        self.file.write(cluster[:sector], 0)
        self.file.flush()
        self._state = _WHOLE

    def _store_luks_header(self) -> None:
        if self._luks is None:
            return
        offset, content = self._luks
        size = self._header.cluster_size
        self.file.write(content.ljust(-(-len(content) // size) * size, b"\0"), offset)
        self._luks = None

    def _cover_data(self) -> None:
        """The file reaches to the end of its last data cluster, written to or not (section 15)."""
        end = self._entries.placement.end
        if not self.file.fixed_size and self.file.size < end:
            self.file.resize(end)

    def abandon(self) -> None:
        """What was not flushed is forgotten; the provisional header stays."""

    def close(self) -> None:
        self.file.close()
        if self._data_file is not None:
            self._data_file.close()

    # -- reading what was flushed

    def _read(self) -> Image:
        if self._state != _WHOLE:
            raise NotSupported("The image cannot be read before it is flushed")
        if self._reader is None:
            from qimg.context import Context
            from qimg.formats.qcow2.image import Qcow2Image
            from qimg.formats.registry import get

            self._reader = get("qcow2").open(self.file, context=Context(), for_info=self.encrypted)
            if isinstance(self._reader, Qcow2Image):
                self._reader.protection = self._protection
            if self._data_file is not None:
                self._reader.attach_data_file(self._data_file)
        return self._reader

    def extents(self, start: int, length: int) -> list[Extent]:
        return self._read().extents(start, length)

    def read_into(self, buf: Buffer, guest: int) -> None:
        self._read().read_into(buf, guest)

    def bitmaps(self) -> list[BitmapData]:
        return self._read().bitmaps()

    def format_specific(self) -> dict[str, object] | None:
        return self._read().format_specific()


def _reference(header: ParsedHeader) -> Reference | None:
    if header.backing_name is None:
        return None
    name = header.backing_name.decode("utf-8", "surrogateescape")
    format = header.backing_format
    return Reference(name, None if format is None else format.decode("utf-8", "surrogateescape"))
