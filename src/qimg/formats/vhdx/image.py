"""An opened vhdx image: where its blocks are, and how new ones come into being (vhdx sheet 5)."""

from __future__ import annotations

import errno

from qimg.errors import CorruptImage, LimitError, NotSupported, StorageError
from qimg.extent import HOLE, MAPPED, ZERO, Runs, clip
from qimg.formats.base import Reference
from qimg.formats.blocks import BlockImage
from qimg.formats.vhdx.bat import Bat, BatCode
from qimg.formats.vhdx.log import Journal, Overlay
from qimg.formats.vhdx.structs import (
    INVALID,
    MIB,
    NO_GUID,
    NOT_PRESENT,
    PARTIAL,
    REGION_TABLE_BYTES,
    REGION_TABLES,
    STATE,
    UNDEFINED,
    UNMAPPED,
    UNMAPPED_OLD,
    ZEROED,
)
from qimg.units import SECTOR, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from qimg.extent import Extent
    from qimg.formats.base import CheckResult, Image
    from qimg.formats.tables import WordTable
    from qimg.formats.vhdx.header import Headers
    from qimg.formats.vhdx.metadata import Metadata
    from qimg.formats.vhdx.regions import Regions
    from qimg.storage.base import Buffer, Storage

#: What the states mean that are no place; flags 0: the block cannot be read.
_SPECIAL = {
    NOT_PRESENT: HOLE,
    UNDEFINED: ZERO,
    ZEROED: ZERO,
    UNMAPPED: ZERO,
    UNMAPPED_OLD: ZERO,
    INVALID: 0,
    PARTIAL: 0,
}
_LAST_PLACE = 1 << 62


class VhdxImage(BlockImage):
    """A dynamic or fixed image. `overlay`: what its log has to say before anything is written, or None."""

    format_name = "vhdx"
    can_mark_zero = True
    dirty = False

    def __init__(
        self,
        file: Storage,
        headers: Headers,
        regions: Regions,
        metadata: Metadata,
        *,
        overlay: Overlay | None = None,
    ) -> None:
        self.file = file
        self.headers = headers
        self.regions = regions
        self.metadata = metadata
        self.overlay = overlay
        self.size = round_down(metadata.size, SECTOR)
        self.cluster_size = metadata.block_size
        self.can_write = True
        self.granularity = self.cluster_size if file.fixed_size else SECTOR
        self.code = BatCode(self.cluster_size, dict(_SPECIAL))
        self.bat = self.open_bat(regions.bat.offset)
        self.journal = Journal(file, headers)
        self._begun = False
        self._end: int | None = None  # where the next block goes

    def open_bat(self, offset: int) -> Bat:
        """The BAT as `metadata` says, at `offset`."""
        metadata = self.metadata
        return Bat(
            self.file,
            offset,
            metadata.words,
            blocks=metadata.blocks,
            ratio=metadata.ratio,
            parent=metadata.parent is not None,
        )

    @property
    def data_guid(self) -> bytes:
        """What differencing images record of their parent."""
        return self.headers.current.data_guid

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return self.bat.pieces(first, last)

    def levels(self) -> list[list[WordTable]]:
        return [[self.bat]]

    # -- reading

    def extents(self, start: int, length: int) -> list[Extent]:
        runs = Runs(start, length)
        for extent in super().extents(start, length):
            if not extent.flags & MAPPED:
                runs.extend((extent,))
                continue
            # Blocks are large and filled bit by bit: what was never written is a hole of the file.
            assert extent.host is not None
            moved = extent.start - extent.host
            for part in self.file.extents(extent.host, extent.length):
                flags = MAPPED | part.flags & ZERO
                runs.append(part.start + moved, part.length, flags, part.start, self.file)
        return runs.take()

    def read_into(self, buf: Buffer, guest: int) -> None:
        self._unreadable(guest // self.cluster_size)

    def _unreadable(self, block: int) -> NoReturn:
        index = self.bat.index(block)
        raise CorruptImage(
            f"Block {block} is in a state that no block of this image can have",
            file=self.file.name,
            field="bat",
            offset=self.bat.offset + 8 * index,
            found=self.bat.words(index, index + 1)[0] & STATE,
            guest=block * self.cluster_size,
        )

    # -- writing

    def begin(self) -> None:
        """Before the first change: apply the log, make the copies of the region table equal, and give file
        and data new GUIDs."""
        if self._begun:
            return
        if not self.can_write:
            raise NotSupported("Writing to differencing VHDX images is not supported")
        if not self.headers.current.log_length:
            raise NotSupported("The VHDX image has no log, so it cannot be written to")
        self.replay()
        for at in REGION_TABLES:
            if self.file.read(at, REGION_TABLE_BYTES) != self.regions.raw:
                self.file.write(self.regions.raw, at)
                self.file.flush()
        self.headers.renew()
        self._begun = True

    def replay(self) -> bool:
        """Apply the log, and say that it is empty; whether it held anything. Raises StorageError."""
        found = self.overlay is not None
        if self.overlay is not None:
            self.overlay.apply()
            self.overlay = None
        if self.headers.current.log_guid != NO_GUID:
            self.headers.update(log_guid=NO_GUID, both=True)
        return found

    def in_place(self, start: int, length: int) -> list[Extent]:
        self.begin()
        return super().in_place(start, length)

    def allocate(self, start: int, length: int) -> list[Extent]:
        return list(clip(super().allocate(start, length), start, length))

    def _place(self, block: int, count: int, table: WordTable, index: int, runs: Runs) -> None:
        if table.words(index, index + 1)[0] in (INVALID, PARTIAL):
            self._unreadable(block)
        super()._place(block, count, table, index, runs)

    def place(self, block: int, count: int) -> tuple[int, int]:
        host = self.next_place()
        length = count * self.cluster_size
        if host + length > _LAST_PLACE:
            raise LimitError("The image has no more room for blocks")
        if host < self.file.size:
            self.file.zero(host, min(length, self.file.size - host))
        self._end = host + length
        return host, count

    def next_place(self) -> int:
        """Where the next block goes: behind everything that has a place, in whole MiB."""
        if self._end is None:
            end = self.regions.end
            for _index, length, place in self.bat.scan():
                end = max(end, place + (length or self.cluster_size))
            self._end = round_up(end, MIB)
        return self._end

    def take_room(self, length: int) -> int:
        """Room of `length` bytes (whole MiB) for something that is no block; its place."""
        host = self.next_place()
        self._end = host + length
        return host

    def zero_absent(self, start: int, length: int) -> None:
        self._unreadable(start // self.cluster_size)

    def settle(self) -> None:
        if self._end is not None and not self.file.fixed_size and self.file.size < self._end:
            self.file.resize(self._end)

    def flush(self) -> None:
        self.settle()
        self.file.flush()
        self.journal.commit(self.bat.changed_sectors())

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        from qimg.formats.vhdx.resize import grow

        grow(self, size, preallocation)

    # -- check

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        from qimg.formats.vhdx.check import check

        return check(self, report, fix)


class DifferencingImage(VhdxImage):
    """An image over a parent: what a block or a sector of it does not have shows through from there."""

    def __init__(
        self,
        file: Storage,
        headers: Headers,
        regions: Regions,
        metadata: Metadata,
        *,
        overlay: Overlay | None = None,
    ) -> None:
        from qimg.formats.vhdx.parent import linkages, reference

        super().__init__(file, headers, regions, metadata, overlay=overlay)
        self.can_write = False
        assert metadata.parent is not None
        self.backing: Reference | None = reference(file, metadata.parent)
        self._linkages = linkages(metadata.parent)

    def meet_backing(self, below: Image) -> None:
        found = getattr(below, "data_guid", None)
        if self.backing is not None and found not in self._linkages:
            self.distrust = StorageError(
                f"'{below.file.name}' was changed since '{self.file.name}' was made on top of it",
                errno=errno.EINVAL,
            )

    def _add(self, runs: Runs, block: int, count: int, flags: int, host: int | None) -> None:
        if host is None:
            super()._add(runs, block, count, flags, host)
            return
        index = self.bat.index(block)
        if self.bat.words(index, index + 1)[0] & STATE != PARTIAL:
            super()._add(runs, block, count, flags, host)
            return
        for number in range(count):
            self._add_partial(runs, block + number, host + number * self.cluster_size)

    def _add_partial(self, runs: Runs, block: int, host: int) -> None:
        """A block of which the sector bitmap says what is here."""
        from qimg.formats.vhdx.parent import bit_runs

        start, per_block = block * self.cluster_size, self.cluster_size // SECTOR
        first = block % self.bat.ratio * per_block // 8
        bits = bytes(self.file.read(self._bitmap(block) + first, per_block // 8))
        for low, high, here in bit_runs(bits):
            at, length = low * SECTOR, (high - low) * SECTOR
            if here:
                runs.append(start + at, length, MAPPED, host + at, self.data)
            else:
                runs.append(start + at, length, HOLE)

    def _bitmap(self, block: int) -> int:
        """Where the sector bitmap of the block's chunk is."""
        from qimg.formats.vhdx.structs import PLACE, PRESENT

        index = self.bat.bitmap_index(block)
        word = self.bat.words(index, index + 1)[0]
        if word & STATE != PRESENT:
            raise CorruptImage(
                f"Block {block} is partially present, but there is no sector bitmap for it",
                file=self.file.name,
                field="bat",
                offset=self.bat.offset + 8 * index,
                found=word & STATE,
                guest=block * self.cluster_size,
            )
        return word & PLACE
