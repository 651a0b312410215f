"""vdi: VirtualBox disk images, dynamic and static (vdi sheet). All integers little-endian."""

from __future__ import annotations

from array import array

from qimg.errors import CorruptImage, LimitError, NotSupported
from qimg.extent import MAPPED, ZERO, Runs
from qimg.formats.base import CheckResult, Format, Measure
from qimg.formats.blocks import BlockCode, BlockImage, pieces_of
from qimg.formats.refusal import refuse
from qimg.formats.tables import WordTable
from qimg.identity import guid_bytes, random_uuid
from qimg.ondisk import U32, U64, Struct
from qimg.options import BOOL, SIZE, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Annotated

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage

SIGNATURE = 0xBEDA107F
VERSION = 0x00010001
BLOCK = 1 << 20
DYNAMIC, STATIC = 1, 2
TEXT = b"<<< QEMU VM Virtual Disk Image >>>\n"
#: Map entries of blocks without a place.
ABSENT, DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
#: The map's bytes, rounded up to sectors, have to fit 31 bits (section 7).
MAX_BLOCKS = 536870784
MAX_SIZE = MAX_BLOCKS * BLOCK
_WORD = 4
_NO_UUID = bytes(16)


class Header(Struct, order="<"):
    """The first sector (section 1)."""

    text: Annotated[bytes, 64]
    signature: U32
    version: U32
    header_size: U32
    type: U32
    flags: U32
    description: Annotated[bytes, 256]
    map_offset: U32
    data_offset: U32
    cylinders: U32
    heads: U32
    sectors: U32
    sector_size: U32
    unused1: U32
    disk_size: U64
    block_size: U32
    block_extra: U32
    blocks: U32
    blocks_allocated: U32
    uuid: Annotated[bytes, 16]
    uuid_snapshot: Annotated[bytes, 16]
    uuid_link: Annotated[bytes, 16]
    uuid_parent: Annotated[bytes, 16]
    unused2: Annotated[bytes, 56]


class VdiImage(BlockImage):
    """One image. The map entry of a block is its number in the data area."""

    format_name = "vdi"
    cluster_size = BLOCK
    lookup_span = BLOCK
    can_mark_zero = True
    dirty = False

    def __init__(self, file: Storage, header: Header, *, new: bool = False) -> None:
        """`new`: `header` is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.header = header
        self.size = round_up(header.disk_size, SECTOR)
        self.granularity = BLOCK if file.fixed_size else SECTOR
        self.can_write = not new
        self.zero_init = new and file.zero_init
        self.code = BlockCode(
            BLOCK, unit=BLOCK, base=header.data_offset, special={ABSENT: ZERO, DISCARDED: ZERO}
        )
        self._map = WordTable(file, header.map_offset, header.blocks, size=_WORD, big=False)
        self._new = new
        self._next: int | None = header.blocks_allocated if new else None  # data blocks in use

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return pieces_of(self._map, first, last)

    def levels(self) -> list[list[WordTable]]:
        return [[self._map]]

    def extents(self, start: int, length: int) -> list[Extent]:
        found = super().extents(start, length)
        if self.header.type != STATIC:
            return found
        # All blocks of a static image have a place; what was never written is a hole of the file.
        runs = Runs(start, length)
        for extent in found:
            if not extent.flags & MAPPED or extent.source is None or extent.host is None:
                runs.extend((extent,))
                continue
            for part in self.file.extents(extent.host, extent.length):
                flags = MAPPED | part.flags & ZERO
                runs.append(
                    part.start - extent.host + extent.start, part.length, flags, part.start, self.file
                )
        return runs.take()

    # -- writing

    def place(self, block: int, count: int) -> tuple[int, int]:
        if self._next is None:
            self._next = self._used()
        host = self.code.base + self._next * BLOCK
        if self._next + count > MAX_BLOCKS:
            raise LimitError("The image has no more room for blocks")
        if host < self.file.size:
            self.file.zero(host, min(count * BLOCK, self.file.size - host))
        self._next += count
        return host, count

    def _used(self) -> int:
        """Data blocks in use, by the map: the header's number may be too small, and then trusting it would
        overwrite blocks. Raises CorruptImage, StorageError."""
        used = 0
        for first, table, low, high in self.pieces(0, self.header.blocks, create=False):
            words = [word for word in table.words(low, high) if word < DISCARDED]
            used = max(used, 1 + max(words, default=-1))
            if used > MAX_BLOCKS:
                raise CorruptImage(
                    f"Block index {used - 1} in the block map is too large",
                    file=self.file.name,
                    field="map",
                    offset=self.header.map_offset + _WORD * first,
                )
        return used

    def settle(self) -> None:
        if self._next is None:
            return
        if self._next and not self.file.fixed_size:
            end = self.code.base + self._next * BLOCK
            if self.file.size < end:
                self.file.resize(end)
        if not self._new and self.header.blocks_allocated != self._next:
            # Before the map: the real program puts new blocks where this number says, so it must never be
            # too small.
            self.header.blocks_allocated = self._next
            self.file.write(self.header.pack(), 0)

    def finish(self) -> None:
        if self._new:
            self.header.blocks_allocated = self._next or 0
            self.file.write(self.header.pack(), 0)
            self.file.flush()
            self._new = False

    # -- growing

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """Grow (qimg only). The map grows into the room behind it, or moves into the place of the first data
        blocks, which go to the end before; one write of the header switches."""
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
        if size < self.size:
            raise NotSupported("Shrinking images is currently not supported")
        if size > MAX_SIZE:
            text = f"Unsupported VDI image size (size is {int(size):#x}, max supported is {MAX_SIZE:#x})"
            raise LimitError(text)
        if self.file.fixed_size:
            raise NotSupported("Cannot resize device files")
        self.clear_end()
        self.flush()
        header = self.header
        size = round_up(size, SECTOR)
        blocks = max(-(-size // BLOCK), header.blocks)
        place, shift = header.map_offset, 0
        if blocks > (header.data_offset - place) // _WORD:
            place, shift = self._make_room(blocks)
        table = self._longer_map(place, blocks, shift)
        self.file.flush()
        header.map_offset, header.blocks, header.disk_size = place, blocks, size
        header.data_offset += shift * BLOCK
        header.blocks_allocated = self._next or 0
        self.file.write(header.pack(), 0)
        self.file.flush()
        self._map, self.size, self.code.base = table, size, header.data_offset

    def _make_room(self, blocks: int) -> tuple[int, int]:
        """Free the first blocks of the data area for a map of `blocks` entries: (its place, how many)."""
        length = round_up(_WORD * blocks, SECTOR)
        place, shift = self.header.data_offset, -(-length // BLOCK)
        if place + shift * BLOCK >= 1 << 32:
            raise LimitError("The block map has no room for a disk of this size")
        if self._next is None:
            self._next = self._used()
        self._next = max(self._next, shift)
        for first, table, low, high in self.pieces(0, self.header.blocks, create=False):
            for index, word in enumerate(table.words(low, high), first):
                if word < shift:
                    self.move_block(index, word)
        self.flush()
        self.file.zero(place, shift * BLOCK)
        return place, shift

    def move_block(self, index: int, word: int, to: int | None = None) -> None:
        """Copy data block `word`, which block `index` has, to data block `to` (None: a new one at the end),
        and stage that the block is there."""
        content = self.file.read(self.code.host(word), BLOCK)
        host = self.place(index, 1)[0] if to is None else self.code.host(to)
        if any(content):
            self.file.write(content, host)
        elif host < self.file.size:
            self.file.zero(host, min(BLOCK, self.file.size - host))
        self._map.put(index, self.code.words(host, 1, "I"))

    def _longer_map(self, place: int, blocks: int, shift: int) -> WordTable:
        """A map at `place` with the present entries, lowered by `shift`, and those of new blocks."""
        old = self.header.blocks
        if self._next is None:
            self._next = self._used()
        self._next -= shift
        table = WordTable(self.file, place, blocks, size=_WORD, big=False)
        if shift:
            for first, source, low, high in self.pieces(0, old, create=False):
                words = source.words(low, high)
                table.put(first, array("I", (w - shift if w < DISCARDED else w for w in words)))
                table.write()
        for first in range(old, blocks, 1 << 16):
            count = min(1 << 16, blocks - first)
            words = array("I", [ABSENT]) * count
            if self.header.type == STATIC:
                words = array("I", range(self._next, self._next + count))
                self._next += count
            table.put(first, words)
            table.write()
        if self.header.type == STATIC:
            end = self.header.data_offset + (self._next + shift) * BLOCK
            self.file.resize(max(self.file.size, end))
        return table

    # -- check

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        from qimg.formats.vdi_check import Checker

        return Checker(self, report, fix).run()

    def clear_entry(self, index: int) -> None:
        """Stage that block `index` has no place."""
        self._map.put(index, array("I", [ABSENT]))

    def set_allocated(self, count: int) -> None:
        """Say, durably, that the first `count` data blocks are in use; the file ends behind them then."""
        self._next = self.header.blocks_allocated = count
        self.file.write(self.header.pack(), 0)
        self.file.flush()
        end = self.code.base + count * BLOCK
        if self.header.type == DYNAMIC and not self.file.fixed_size and self.file.size > end:
            self.file.resize(end)
            self.file.flush()


def parse(file: Storage) -> Header:
    """Read and validate the header in the order of section 7. Raises FormatError, UnsupportedFeature."""
    header = Header.unpack(bytes(file.read(0, Header.SIZE)))
    if header.disk_size > MAX_SIZE:
        text = f"Unsupported VDI image size (size is {header.disk_size:#x}, max supported is {MAX_SIZE:#x})"
        refuse(file, header, text, "disk_size")
    if header.signature != SIGNATURE:
        text = f"Image not in VDI format (bad signature {header.signature:08x})"
        refuse(file, header, text, "signature", expected=f"{SIGNATURE:#x}")
    wrong: tuple[tuple[bool, str, str], ...] = (
        (header.version != VERSION, f"version {header.version >> 16}.{header.version & 0xFFFF}", "version"),
        (
            header.map_offset % SECTOR != 0,
            f"unaligned block map offset {header.map_offset:#x}",
            "map_offset",
        ),
        (header.data_offset % SECTOR != 0, f"unaligned data offset {header.data_offset:#x}", "data_offset"),
        (header.sector_size != SECTOR, f"sector size {header.sector_size} is not {SECTOR}", "sector_size"),
        (header.block_size != BLOCK, f"block size {header.block_size} is not {BLOCK}", "block_size"),
        (
            header.disk_size > header.blocks * BLOCK,
            f"disk size {header.disk_size}, image bitmap has room for {header.blocks * BLOCK}",
            "disk_size",
        ),
        (header.uuid_link != _NO_UUID, "non-NULL link UUID", "uuid_link"),
        (header.uuid_parent != _NO_UUID, "non-NULL parent UUID", "uuid_parent"),
        (
            header.blocks > MAX_BLOCKS,
            f"too many blocks {header.blocks}, max is {MAX_BLOCKS}",
            "blocks",
        ),
        (header.type not in (DYNAMIC, STATIC), f"type {header.type}", "type"),
        (header.block_extra != 0, f"{header.block_extra} extra bytes per block", "block_extra"),
    )
    for is_wrong, what, field in wrong:
        if is_wrong:
            refuse(file, header, f"unsupported VDI image ({what})", field)
    if header.map_offset + _WORD * header.blocks > round_up(file.size, SECTOR):
        text = "unsupported VDI image (block map reaches past the end of the file)"
        refuse(file, header, text, "map_offset")
    if header.map_offset < Header.SIZE or header.map_offset + _WORD * header.blocks > header.data_offset:
        refuse(file, header, "unsupported VDI image (block map overlaps header or data)", "map_offset")
    return header


class Vdi(Format):
    """The driver."""

    name = "vdi"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("static", BOOL, False, "Give every block its place at once"),
    )
    can_create = True
    can_check = True
    can_measure = True

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> VdiImage:
        return VdiImage(file, parse(file))

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        if size > MAX_SIZE:
            raise LimitError(
                f"Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})"
            )
        mode = str(options.get("preallocation", "off"))
        if mode == "metadata":
            raise NotSupported("Unsupported preallocation mode: metadata")

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> VdiImage:
        self.validate_create(size, options)
        static = bool(options.get("static", False))
        blocks = -(-size // BLOCK)
        header = Header(
            text=TEXT,
            signature=SIGNATURE,
            version=VERSION,
            header_size=0x180,
            type=STATIC if static else DYNAMIC,
            flags=0,
            description=b"",
            map_offset=Header.SIZE,
            data_offset=Header.SIZE + round_up(_WORD * blocks, SECTOR),
            cylinders=0,
            heads=0,
            sectors=0,
            sector_size=SECTOR,
            unused1=0,
            disk_size=size,
            block_size=BLOCK,
            block_extra=0,
            blocks=blocks,
            blocks_allocated=blocks if static else 0,
            uuid=guid_bytes(random_uuid("vdi", size)),
            uuid_snapshot=guid_bytes(random_uuid("vdi snapshot", size)),
            uuid_link=_NO_UUID,
            uuid_parent=_NO_UUID,
            unused2=b"",
        )
        _write_map(file, header, static=static)
        return VdiImage(file, header, new=True)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        size = round_up(source.size, SECTOR)
        blocks = -(-size // BLOCK)
        fixed = Header.SIZE + round_up(_WORD * blocks, SECTOR)
        full = fixed + blocks * BLOCK
        if options.get("static"):
            return Measure(full, full)
        (used,) = source.touched(BLOCK)
        return Measure(fixed + used * BLOCK, full)


def _write_map(file: Storage, header: Header, *, static: bool) -> None:
    """A map of absent blocks, or of all blocks in order, and the file's length."""
    step = 1 << 16
    file.write(bytes(SECTOR), 0)  # no header yet
    for first in range(0, header.blocks, step):
        count = min(step, header.blocks - first)
        raw = b"\xff" * (_WORD * count)
        if static:
            raw = b"".join(number.to_bytes(_WORD, "little") for number in range(first, first + count))
        file.write(raw, header.map_offset + _WORD * first)
    if not file.fixed_size:
        file.resize(header.data_offset + (header.blocks * BLOCK if static else 0))
