"""An existing qcow2 image opened for writing.

So far only images that hold nothing yet can be written to (``convert -n`` into what ``create`` made): they
are filled as fresh ones, with the options that their header shows. Until the end of that they say that
they are incomplete, as every image does that is being filled.
"""

from __future__ import annotations

from qimg.errors import NotSupported
from qimg.extent import HOLE, Extent
from qimg.formats.qcow2.compress import Encoder
from qimg.formats.qcow2.fresh import FreshImage
from qimg.formats.qcow2.image import Qcow2Image
from qimg.formats.qcow2.structs import INCOMPAT_DIRTY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.context import Context
    from qimg.formats.base import BitmapData
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Bytes, Storage

_STEP = 1 << 20


class WritableQcow2(Qcow2Image):
    """Reads as what was flushed last; the first change makes a fresh image of the same options."""

    def __init__(self, file: Storage, header: ParsedHeader, context: Context) -> None:
        super().__init__(file, header, context)
        # An old data file keeps its bytes.
        self.zero_init = file.zero_init and not header.has_data_file
        self.can_compress = not header.has_data_file
        self.can_mark_zero = header.version >= 3
        self._encode = Encoder(header.header.compression_type, header.cluster_size)
        self._fresh: FreshImage | None = None
        self._changed = False

    def _open_directories(self, for_check: bool) -> None:
        super()._open_directories(for_check)
        header = self.header
        self.can_write = not header.header.nb_snapshots and header.bitmaps is None and not self._has_tables()

    def _has_tables(self) -> bool:
        """Whether the L1 table (32 MiB at most, section 10) names an L2 table."""
        start = self.header.header.l1_table_offset
        end = start + 8 * self.header.header.l1_size
        for offset in range(start, end, _STEP):
            if any(self.file.read(offset, min(_STEP, end - offset))):
                return True
        return False

    # -- writing

    @property
    def _filled(self) -> FreshImage:
        """The fresh image that takes the changes."""
        if not self.can_write:
            raise NotSupported("Writing to qcow2 images that are not empty is not supported yet")
        self._changed = True
        if self._fresh is None:
            self._fresh = FreshImage(self.file, self._emptied(), self._data)
            self._fresh.set_zero_init(self.zero_init)
        return self._fresh

    def _emptied(self) -> ParsedHeader:
        """The header of an empty image of the same options, laid out as a new one (section 12)."""
        header = self.header.header
        span = self.header.l2_entries * self.header.cluster_size
        header.size = self.size
        header.l1_size = -(-self.size // span)
        header.l1_table_offset = 3 * self.header.cluster_size if header.l1_size else 0
        header.refcount_table_offset = self.header.cluster_size
        header.refcount_table_clusters = 1
        header.snapshots_offset = 0
        header.incompatible_features &= ~INCOMPAT_DIRTY  # the counts are made anew
        header.autoclear_features = 0
        return self.header

    def allocate(self, start: int, length: int) -> list[Extent]:
        return self._filled.allocate(start, length)

    def mark_zero(self, start: int, length: int) -> None:
        if self.can_write and self.backing is None and self._fresh is None:
            return  # it reads as zeros already
        self._filled.mark_zero(start, length)

    def encode(self, data: Bytes) -> bytes | None:
        if not self.can_compress:
            raise NotSupported("Operation not supported")
        return self._encode(data)

    def write_encoded(self, guest: int, data: bytes) -> None:
        self._filled.write_encoded(guest, data)

    def store_bitmaps(self, bitmaps: Iterable[BitmapData]) -> None:
        self._filled.store_bitmaps(bitmaps)

    def flush(self) -> None:
        if self._fresh is not None and self._changed:
            self._fresh.flush()
            self._changed = False
            self._active = None
            self._sparse = None
            self._reader = None

    def abandon(self) -> None:
        if self._fresh is not None:
            self._fresh.abandon()

    # -- reading

    def extents(self, start: int, length: int) -> list[Extent]:
        if self._changed:
            # Until the flush it is what it was: empty.
            return [Extent(start, length, HOLE)] if length > 0 else []
        return super().extents(start, length)
