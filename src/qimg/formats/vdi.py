"""vdi: VirtualBox disk images, dynamic and static (vdi sheet). All integers little-endian."""

from __future__ import annotations

from qimg.errors import FormatError, LimitError, NotSupported
from qimg.extent import MAPPED, ZERO, Runs
from qimg.formats.base import CheckResult, Format, Measure
from qimg.formats.blocks import BlockCode, BlockImage, pieces_of
from qimg.formats.tables import WordTable
from qimg.identity import guid_bytes, random_uuid
from qimg.ondisk import U32, U64, Struct
from qimg.options import BOOL, SIZE, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Annotated, NoReturn

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
        self._pending = new
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
        """Data blocks in use. The header's number may be too small, and then trusting it would overwrite."""
        used = self.header.blocks_allocated
        for _first, table, low, high in self.pieces(0, self.header.blocks, create=False):
            words = [word for word in table.words(low, high) if word < DISCARDED]
            used = max(used, *words, 0) if not words else max(used, max(words) + 1)
        return used

    def settle(self) -> None:
        if self._next is not None and not self.file.fixed_size:
            end = self.code.base + self._next * BLOCK
            if self._next and self.file.size < end:
                self.file.resize(end)

    def finish(self) -> None:
        header = self.header
        if self._next is not None and header.blocks_allocated != self._next:
            header.blocks_allocated = self._next
            self._pending = True
        if self._pending:
            self.file.write(header.pack(), 0)
            self.file.flush()
            self._pending = False

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """Grow (qimg only): inside the room that the map has, or by moving nothing but the header's numbers
        as long as the map's entries fit before the data."""
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
        size = round_up(size, SECTOR)
        if size < self.size:
            raise NotSupported("Shrinking images is currently not supported")
        blocks = -(-size // BLOCK)
        room = (self.header.data_offset - self.header.map_offset) // _WORD
        if blocks > MAX_BLOCKS:
            raise LimitError(f"The image size is too large for file format 'vdi' (at most {MAX_SIZE} bytes)")
        if blocks > room:
            self._make_room(blocks)
        self._append_absent(blocks)
        self.header.disk_size = self.size = size
        self._pending = True
        self.flush()

    def _append_absent(self, blocks: int) -> None:
        from array import array

        more = blocks - self.header.blocks
        if more > 0:
            fresh = WordTable(self.file, self.header.map_offset, blocks, size=_WORD, big=False)
            fresh.put(self.header.blocks, array("I", [ABSENT]) * more)
            self._map = fresh
            self.header.blocks = blocks

    def _make_room(self, blocks: int) -> None:
        """The map is to grow into the data area: its first blocks move to the end, one by one."""
        raise NotSupported("The block map has no room for a disk of this size")

    # -- check

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        if fix is not None:
            raise NotSupported("This image format does not support checks")
        result = CheckResult()
        seen: set[int] = set()
        allocated = 0
        blocks = self.header.blocks
        for first, table, low, high in self.pieces(0, blocks, create=False):
            for number, word in enumerate(table.words(low, high), first):
                if word >= DISCARDED:
                    continue
                if word >= blocks:
                    report(f"ERROR: block index {number} too large, is {word}")
                    result.corruptions += 1
                    continue
                allocated += 1
                if word in seen:
                    report(f"ERROR: block index {word} also used by {word}")
                    result.corruptions += 1
                seen.add(word)
        if allocated != self.header.blocks_allocated:
            report(
                f"ERROR: allocated blocks mismatch, is {allocated}, should be {self.header.blocks_allocated}"
            )
            result.corruptions += 1
        return result


def _fail(file: Storage, header: Header, message: str, field: str, expected: object = None) -> NoReturn:
    raise FormatError(
        message,
        file=file.name,
        field=f"header.{field}",
        offset=Header.offset_of(field),
        expected=expected,
        found=getattr(header, field),
    )


def parse(file: Storage) -> Header:
    """Read and validate the header in the order of section 7. Raises FormatError, UnsupportedFeature."""
    header = Header.unpack(bytes(file.read(0, Header.SIZE)))
    if header.disk_size > MAX_SIZE:
        text = f"Unsupported VDI image size (size is {header.disk_size:#x}, max supported is {MAX_SIZE:#x})"
        _fail(file, header, text, "disk_size")
    if header.signature != SIGNATURE:
        text = f"Image not in VDI format (bad signature {header.signature:08x})"
        _fail(file, header, text, "signature", f"{SIGNATURE:#x}")
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
            _fail(file, header, f"unsupported VDI image ({what})", field)
    if header.map_offset < Header.SIZE or header.map_offset + _WORD * header.blocks > header.data_offset:
        _fail(file, header, "unsupported VDI image (block map overlaps header or data)", "map_offset")
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
        if options.get("static") or source.data_runs is None:
            return Measure(full if options.get("static") else fixed, full)
        used, last = 0, -1
        for start, length in source.data_runs:
            first, stop = max(start // BLOCK, last + 1), -(-(start + length) // BLOCK)
            used += max(0, stop - first)
            last = max(last, stop - 1)
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
