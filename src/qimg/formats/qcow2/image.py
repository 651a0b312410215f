"""An opened qcow2 image: the reading side."""

from __future__ import annotations

from qimg.context import Notice
from qimg.errors import CorruptImage, FormatError, QimgError
from qimg.extent import MAPPED, ZERO, Extent, Runs
from qimg.formats.base import Image, Reference
from qimg.formats.qcow2.header import parse
from qimg.formats.qcow2.structs import (
    COMPAT_LAZY_REFCOUNTS,
    COMPRESSION_NAMES,
    CRYPT_NONE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from qimg.context import Context
    from qimg.formats.base import BitmapData, CheckResult, SnapshotInfo
    from qimg.formats.protection import Protection
    from qimg.formats.qcow2.bitmap import Bitmap
    from qimg.formats.qcow2.decompress import CompressedReader
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.mapping import Mapping
    from qimg.formats.qcow2.snapshot import SnapshotTable
    from qimg.options import Value
    from qimg.storage.base import Buffer, Storage

#: Bytes of an L2 table that the real program looks at together (`mapping.SLICE`, which is not loaded here).
_LOOKED_AT = 64 << 10


class Qcow2Image(Image):
    """One layer of qcow2. `header` is the parsed header; tables are read when they are needed."""

    format_name = "qcow2"

    def __init__(self, file: Storage, header: ParsedHeader, context: Context) -> None:
        self.file = file
        self.header = header
        self.context = context
        self.options: dict[str, Value] = {}  # those of opening
        self.size = header.virtual_size
        self.cluster_size: int = header.cluster_size
        self.granularity = header.cluster_size // 32 if header.extended_l2 else header.cluster_size
        self.lookup_span = min(header.cluster_size, _LOOKED_AT) // header.l2_entry_size * header.cluster_size
        self.backing = _reference(header.backing_name, header.backing_format)
        self.data_file = _reference(header.data_file_name, None) if header.has_data_file else None
        self.encrypted = header.header.crypt_method != CRYPT_NONE
        #: Of images that are opened for `info` alone there is none, encrypted or not.
        self.protection: Protection | None = None
        self.dirty = header.dirty
        self._data: Storage | None = None  # the attached external data file
        self._active: Mapping | None = None
        self._reader: CompressedReader | None = None
        self._snapshots: SnapshotTable | None = None
        self.directory: list[Bitmap] = []  # of bitmaps; empty if it cannot be trusted
        self._sparse: bool | None = None  # whether holes of the file have to be looked for
        self.warned = False

    @classmethod
    def open(
        cls,
        file: Storage,
        *,
        context: Context,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        for_check: bool = False,
        for_info: bool = False,
    ) -> Self:
        """Validate everything that the real program validates at this point (section 11), in its order.

        `options`: those of encryption, and ``data-file`` (any value): the caller is going to attach a data
        file whatever the header names.
        """
        options = options or {}
        data_file_given = "data-file" in options
        header = parse(file, writable=writable, for_check=for_check, for_info=for_info)
        if data_file_given and not header.has_data_file:
            raise FormatError("'data-file' can only be set for images with an external data file")
        if header.has_data_file and not (for_info or data_file_given or header.data_file_name):
            raise FormatError("'data-file' is required for this image", file=file.name)
        image = cls(file, header, context)
        image.options = options
        if image.encrypted:
            from qimg.formats.qcow2.encryption import protect

            image.protection = protect(file, header, options, context, for_info=for_info)
        image._open_directories(for_check)
        return image

    def _open_directories(self, for_check: bool) -> None:
        """Snapshot table and bitmap directory: damage there keeps an image from being opened."""
        header = self.header
        if header.header.nb_snapshots and not for_check:
            self.snapshot_table()
        if header.bitmaps is not None:
            from qimg.formats.qcow2.bitmap import open_bitmaps

            self.directory = open_bitmaps(self.file, header, self.context.warn)

    # -- where guest data lies

    @property
    def data(self) -> Storage:
        """What holds guest data: the image file or the external data file."""
        if not self.header.has_data_file:
            return self.file
        if self._data is None:
            raise FormatError("'data-file' is required for this image", file=self.file.name)
        return self._data

    def attach_data_file(self, storage: Storage) -> None:
        if not self.header.has_data_file:
            super().attach_data_file(storage)
        self._data = storage

    @property
    def mapping(self) -> Mapping:
        """Tables of the active state, or of the snapshot that was loaded."""
        if self._active is None:
            header = self.header.header
            self._active = self._mapping_of(header.l1_table_offset, header.l1_size)
        return self._active

    def _mapping_of(self, l1_offset: int, l1_size: int) -> Mapping:
        from qimg.formats.qcow2.mapping import Geometry, Mapping

        mapping = Mapping(self.file, Geometry(self.header), l1_offset, l1_size)
        mapping.data = self.data
        return mapping

    def extents(self, start: int, length: int) -> list[Extent]:
        if length <= 0:
            return []
        try:
            found = self.mapping.extents(start, length)
        except CorruptImage as error:
            self._warn_once(error)
            raise
        if self.encrypted:
            return self.uncover(found)
        if self._looks_for_holes() and any(extent.flags & MAPPED for extent in found):
            return self._with_holes(start, length, found)
        return found

    def uncover(self, extents: list[Extent]) -> list[Extent]:
        """`extents` with encrypted data in a storage that decrypts and encrypts."""
        return extents if self.protection is None else self.protection.uncover(extents)

    def guest_storage(self, guest: int, host: int) -> Storage:
        """The storage in which what is at `host` is what the guest has at `guest`."""
        return self.data if self.protection is None else self.protection.storage(self.data, guest, host)

    def _warn_once(self, error: CorruptImage) -> None:
        if not self.warned:
            self.warned = True
            text = f"qcow2: {error}; further non-fatal corruption events will be suppressed"
            self.context.warn(Notice(text, plain=True))

    def _looks_for_holes(self) -> bool:
        """Metadata-preallocated images have clusters that were never written; only there are holes of the
        file looked for (sheet, section 20)."""
        if self._sparse is None:
            if self.header.has_data_file:
                self._sparse = False
            else:
                from qimg.formats.qcow2.refcount_scan import has_unwritten_clusters

                self._sparse = has_unwritten_clusters(self.file, self.header)
        return self._sparse

    def _with_holes(self, start: int, length: int, extents: list[Extent]) -> list[Extent]:
        runs = Runs(start, length)
        for extent in extents:
            if not extent.flags & MAPPED:
                runs.append(extent.start, extent.length, extent.flags, extent.host, extent.source)
                continue
            source, host = extent.source, extent.host
            assert source is not None and host is not None
            shift = extent.start - host
            for part in source.extents(host, extent.length):
                flags = MAPPED | (part.flags & ZERO)
                runs.append(part.start + shift, part.length, flags, part.start, source)
        return runs.take()

    def read_into(self, buf: Buffer, guest: int) -> None:
        if self._reader is None:
            from qimg.formats.qcow2.decompress import CompressedReader

            self._reader = CompressedReader(self.mapping, self.header.header.compression_type)
        try:
            self._reader.read_into(buf, guest)
        except CorruptImage as error:
            if str(error).startswith("Image is corrupt"):
                self._warn_once(error)
            raise

    # -- what else it holds

    def snapshot_table(self) -> SnapshotTable:
        """The snapshot table, read on first use. Raises FormatError, StorageError."""
        if self._snapshots is None:
            from qimg.formats.qcow2.snapshot import read_snapshots

            self._snapshots = read_snapshots(self.file, self.header)
        return self._snapshots

    def snapshots(self) -> list[SnapshotInfo]:
        if not self.header.header.nb_snapshots or self.header.has_data_file:
            return []
        return [snapshot.info() for snapshot in self.snapshot_table().snapshots]

    def load_snapshot(self, *, id: str | None = None, name: str | None = None) -> None:
        found = None
        if self.header.header.nb_snapshots:
            found = self.snapshot_table().find(id, name)
        if found is None:
            raise QimgError("Can't find snapshot")
        from qimg.formats.qcow2.snapshot import validate_l1

        validate_l1(self.file, self.header, found)
        self._active = self._mapping_of(found.entry.l1_table_offset, found.entry.l1_size)
        self._reader = None

    def bitmaps(self) -> list[BitmapData]:
        if self.header.version < 3:
            return super().bitmaps()
        from qimg.formats.qcow2.bitmap import load

        return [load(self.file, self.header, bitmap) for bitmap in self.directory]

    def format_specific(self) -> dict[str, object]:
        """Section 19, JSON names in order."""
        parsed, header = self.header, self.header.header
        shown: dict[str, object] = {
            "compat": "1.1" if parsed.version >= 3 else "0.10",
            "compression-type": COMPRESSION_NAMES[header.compression_type],
        }
        if parsed.version >= 3:
            shown["lazy-refcounts"] = bool(header.compatible_features & COMPAT_LAZY_REFCOUNTS)
            if self.directory:
                shown["bitmaps"] = [bitmap.describe() for bitmap in self.directory]
        shown["refcount-bits"] = 1 << header.refcount_order
        if parsed.version >= 3 and self.data_file is not None:
            shown["data-file"] = self.data_file.name
        if self.encrypted:
            from qimg.formats.qcow2.encryption import describe

            shown["encrypt"] = describe(self.file, parsed)
        if parsed.version >= 3:
            if parsed.has_data_file:
                shown["data-file-raw"] = parsed.data_file_raw
            shown["corrupt"] = parsed.corrupt
            shown["extended-l2"] = parsed.extended_l2
        return shown

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        if fix is not None:
            from qimg.formats.qcow2.repair import repair

            return repair(self, report, fix)
        from qimg.formats.qcow2.check import check

        return check(self, report)

    def publish(self) -> None:
        if self._data is not None:
            self._data.publish()
        super().publish()

    def close(self) -> None:
        if self._data is not None:
            self._data.close()
        self.file.close()


def _reference(name: bytes | None, format: bytes | None) -> Reference | None:
    if name is None:
        return None
    kind = None if format is None else format.decode("utf-8", "surrogateescape")
    return Reference(name.decode("utf-8", "surrogateescape"), kind or None)
