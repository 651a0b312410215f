"""qed: QEMU enhanced disk (qed sheet). All integers little-endian.

New clusters go to the end of the file, whose length is all that says what is in use. qimg writes data
before the tables that lead to it, so the bit that asks for a check after a crash is never set.
"""

from __future__ import annotations

from array import array
from errno import EINVAL

from qimg.errors import CorruptImage, FormatError, LimitError, NotSupported, OptionError, UnsupportedFeature
from qimg.extent import HOLE, ZERO
from qimg.formats.base import CheckResult, Format, Measure, Reference
from qimg.formats.blocks import BlockCode, BlockImage, TwoLevels
from qimg.formats.refusal import refuse
from qimg.formats.tables import WordTable
from qimg.ondisk import U32, U64, Struct
from qimg.options import SIZE, STR, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from qimg.context import Context
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage

MAGIC = 0x00444551
BACKING_FILE, NEED_CHECK, BACKING_RAW = 1, 2, 4
_KNOWN = BACKING_FILE | NEED_CHECK | BACKING_RAW
MIN_CLUSTER, MAX_CLUSTER = 4 << 10, 64 << 20
TABLE_SIZES = (1, 2, 4, 8, 16)
MAX_NAME = 4095
ABSENT, ZERO_CLUSTER = 0, 1
#: Clusters of a file that can be checked; each takes a byte of memory.
MAX_CHECKED = 1 << 27
#: Entries of a table that are looked at together.
_STEP = 1 << 16
_WORD = 8


class Header(Struct, order="<"):
    """Section 1. Sizes of cluster and image in bytes, of tables and header in clusters."""

    magic: U32
    cluster_size: U32
    table_size: U32
    header_size: U32
    features: U64
    compat_features: U64
    autoclear_features: U64
    l1_table_offset: U64
    image_size: U64
    backing_offset: U32
    backing_size: U32

    @property
    def table_bytes(self) -> int:
        """Bytes of the L1 table and of every L2 table."""
        return self.table_size * self.cluster_size

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return self.table_bytes // _WORD

    @property
    def max_size(self) -> int:
        """Guest bytes that the tables can describe, in whole sectors of 63 bits."""
        return min(self.entries * self.entries * self.cluster_size, (1 << 63) - SECTOR)


class QedImage(BlockImage):
    """One layer. An entry is a host offset, or 1 for a cluster of zeros."""

    format_name = "qed"
    can_mark_zero = True
    #: The bit that asks for a check is never shown.
    dirty = False

    def __init__(
        self, file: Storage, header: Header, backing: Reference | None, *, new: bool = False
    ) -> None:
        """`new`: `header` is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.header = header
        self.size = header.image_size
        self.cluster_size = header.cluster_size
        self.lookup_span = header.entries * header.cluster_size
        self.backing = backing
        whole = backing is not None or file.fixed_size
        self.granularity = header.cluster_size if whole else SECTOR
        self.can_write = not new
        self.zero_init = new and file.zero_init
        self.code = BlockCode(header.cluster_size, unit=1, special={ABSENT: HOLE, ZERO_CLUSTER: ZERO})
        l1 = WordTable(file, header.l1_table_offset, header.entries, size=_WORD, big=False)
        self._map = TwoLevels(
            l1, header.entries, size=_WORD, big=False, place=self._place_table, check=self._check_table
        )
        self._pending = new
        self._end: int | None = None  # end of the clusters in use; None: the file's length says it
        if new:
            self._end = header.header_size * header.cluster_size + header.table_bytes

    # -- the map

    @property
    def end(self) -> int:
        """End of the clusters in use, in bytes."""
        if self._end is None:
            return self.file.size // self.cluster_size * self.cluster_size
        return self._end

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return self._map.pieces(first, last, create=create)

    def levels(self) -> list[list[WordTable]]:
        return self._map.levels()

    def is_valid(self, host: int, length: int) -> bool:
        """Whether clusters can lie at ``host .. host + length``."""
        first = self.header.header_size * self.cluster_size
        return host % self.cluster_size == 0 and first <= host and host + length <= self.end

    def _check_table(self, index: int, host: int) -> None:
        if not self.is_valid(host, self.header.table_bytes):
            self._corrupt("L2 table offset", host, index * self.header.entries * self.cluster_size)

    def validate(self, block: int, count: int, host: int) -> None:
        if not self.is_valid(host, count * self.cluster_size):
            self._corrupt("Cluster offset", host, block * self.cluster_size)

    def _corrupt(self, what: str, host: int, guest: int) -> NoReturn:
        error = CorruptImage(f"{what} {host:#x} is not valid", file=self.file.name, offset=host, guest=guest)
        error.errno = EINVAL
        raise error

    # -- writing

    def begin(self) -> None:
        unknown = self.header.autoclear_features
        if unknown:
            self.header.autoclear_features = 0
            self._pending = True

    def _append(self, length: int) -> int:
        """Host offset of `length` new bytes of zeros at the end."""
        host = self._end = self.end
        if host < self.file.size:
            self.file.zero(host, min(length, self.file.size - host))
        elif self.file.fixed_size:
            raise LimitError("No space left on device")
        self._end = host + length
        return host

    def place(self, block: int, count: int) -> tuple[int, int]:
        return self._append(count * self.cluster_size), count

    def _place_table(self, index: int) -> int:
        return self._append(self.header.table_bytes)

    def zero_absent(self, start: int, length: int) -> None:
        size = self.cluster_size
        first, last = start // size, -(-(start + length) // size)
        for _base, table, low, high in self.pieces(first, last, create=True):
            words = table.words(low, high)
            table.put(low, array("Q", (word or ZERO_CLUSTER for word in words)))

    def settle(self) -> None:
        if self._end is not None and not self.file.fixed_size and self.file.size < self._end:
            self.file.resize(self._end)

    def finish(self) -> None:
        if self._pending:
            self._write_header()
            self.file.flush()
            self._pending = False

    def _write_header(self) -> None:
        header, place = self.header, self.header.backing_offset
        name = b"" if self.backing is None else self.backing.name.encode("utf-8", "surrogateescape")
        if not name or place == Header.SIZE:
            together = header.pack() + name
            if len(together) > SECTOR:
                self.file.write(together[SECTOR:], SECTOR)
                self.file.flush()
            self.file.write(together[:SECTOR], 0)
            return
        self.file.write(name, place)
        self.file.flush()
        self.file.write(header.pack(), 0)

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode '{preallocation}'")
        if size < self.size:
            raise NotSupported("Shrinking images is currently not supported")
        if size % SECTOR or size > self.header.max_size:
            raise OptionError("Invalid image size specified", option="size")
        old, cluster = self.size, self.cluster_size
        self.clear_end()
        settle = getattr(size, "settle", None)
        if settle is not None and old % cluster:
            settle(old, shown > old)
        first = round_up(old, cluster)
        self.size = int(size)
        if first < min(shown, size):
            # Whole clusters behind the old end hide what the backing file has there.
            self.mark_zero(first, min(round_up(shown, cluster), self.size) - first)
        self.flush()
        self.header.image_size = self.size
        self._pending = True
        self.flush()

    def change_backing(self, backing: Reference | None) -> None:
        if backing is None and self.backing is None:
            return
        if self.header.compat_features:
            raise NotSupported("Operation not supported")
        header = self.header
        name = b"" if backing is None else backing.name.encode("utf-8", "surrogateescape")
        room = header.header_size * header.cluster_size
        if len(name) > MAX_NAME or Header.SIZE + len(name) > room:
            raise LimitError("No space left in the file header")
        if backing is not None:
            header.backing_offset = self._name_place(len(name), room)
        header.features &= NEED_CHECK
        header.backing_size = len(name)
        if backing is not None:
            header.features |= BACKING_FILE | (BACKING_RAW if backing.format == "raw" else 0)
        self.backing = backing
        self._pending = True
        self.flush()

    def _name_place(self, length: int, room: int) -> int:
        """Where a backing name goes: behind the header if one write of a sector can hold both, else where it
        overwrites no other, so that the header alone switches."""
        header = self.header
        if Header.SIZE + length <= SECTOR or not header.features & BACKING_FILE:
            return Header.SIZE
        end = round_up(header.backing_offset + header.backing_size, SECTOR)
        if end + length <= room:
            return end
        return SECTOR if SECTOR + length <= header.backing_offset else Header.SIZE

    # -- check

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        return _Check(self, fix is not None).run()


class _Check:
    """One walk over the tables (section 6)."""

    def __init__(self, image: QedImage, fix: bool) -> None:
        self.image = image
        self.fix = fix
        self.result = CheckResult()
        self.size = image.cluster_size
        self.clusters = image.end // self.size
        if self.clusters > MAX_CHECKED:
            raise LimitError(f"The file is too large to check: {self.clusters} clusters")
        self.used = bytearray(self.clusters)
        self.allocated = self.fragmented = 0

    def run(self) -> CheckResult:
        """Check, and with `fix` clear what leads nowhere."""
        image, result = self.image, self.result
        header = image.header
        # The header's clusters are in use; whether they or the L1 table lie in the file was checked.
        first = min(header.header_size, self.clusters)
        self.used[:first] = b"\1" * first
        self._use(header.l1_table_offset, header.table_bytes)
        self._walk_l1()
        result.leaks = self.used.count(0)
        result.total_clusters = -(-image.size // self.size)
        result.allocated_clusters = self.allocated
        result.fragmented_clusters = self.fragmented
        result.compressed_clusters = 0
        if self.fix:
            self._settle()
        return result

    def _use(self, host: int, length: int) -> bool:
        """Count clusters as used; False if one was already."""
        first, last = host // self.size, (host + length) // self.size
        twice = sum(self.used[first:last])
        self.result.corruptions += twice
        self.used[first:last] = b"\1" * (last - first)
        return not twice

    def _walk_l1(self) -> None:
        image = self.image
        length = image.header.table_bytes
        l1 = image.levels()[-1][0]
        for first in range(0, l1.count, 512):
            for index, host in enumerate(l1.words(first, min(first + 512, l1.count)), first):
                if not host:
                    continue
                if not image.is_valid(host, length):
                    self._bad(l1, index)
                elif self._use(host, length):
                    self._walk_l2(WordTable(image.file, host, l1.count, size=_WORD, big=False))

    def _walk_l2(self, table: WordTable) -> None:
        last = 0
        for first in range(0, table.count, _STEP):
            words = table.words(first, min(first + _STEP, table.count))
            for at, stop, _flags, place in self.image.code.runs(words):
                if place is None:
                    continue
                self.allocated += stop - at
                self.fragmented += bool(last) and place != last + self.size
                last = words[stop - 1]
                self._use_run(table, first + at, place, stop - at)
            table.write()

    def _use_run(self, table: WordTable, index: int, host: int, count: int) -> None:
        """Count the clusters that `count` entries from `index` on lead to, the first of them at `host`."""
        if self.image.is_valid(host, count * self.size):
            self._use(host, count * self.size)
            return
        for number in range(count):
            if self.image.is_valid(host + number * self.size, self.size):
                self._use(host + number * self.size, self.size)
            else:
                self._bad(table, index + number)

    def _bad(self, table: WordTable, index: int) -> None:
        self.result.corruptions += 1
        if self.fix:
            table.put(index, array("Q", [ABSENT]))
            self.result.corruptions_fixed += 1

    def _settle(self) -> None:
        image, result = self.image, self.result
        image.flush()
        if result.corruptions == result.corruptions_fixed and image.header.features & NEED_CHECK:
            image.header.features &= ~NEED_CHECK
            image.file.write(image.header.pack(), 0)
        image.file.flush()


def parse(file: Storage) -> tuple[Header, Reference | None]:
    """Read and validate the header, in the order of section 4. Raises FormatError, UnsupportedFeature."""
    header = Header.unpack(bytes(file.read(0, Header.SIZE)))
    if header.magic != MAGIC:
        refuse(file, header, "Image not in QED format", "magic")
    if header.features & ~_KNOWN:
        text = f"Unsupported QED features: {header.features & ~_KNOWN:x}"
        refuse(file, header, text, "features", kind=UnsupportedFeature)
    if not _is_cluster_size(header.cluster_size):
        refuse(file, header, "QED cluster size is invalid", "cluster_size")
    if header.table_size not in TABLE_SIZES:
        refuse(file, header, "QED table size is invalid", "table_size")
    if header.image_size % SECTOR or header.image_size > header.max_size:
        refuse(file, header, "QED image size is invalid", "image_size")
    first, end = (
        header.header_size * header.cluster_size,
        file.size // header.cluster_size * header.cluster_size,
    )
    offset = header.l1_table_offset
    if offset % header.cluster_size or offset < first or offset + header.table_bytes > end:
        refuse(file, header, "QED table offset is invalid", "l1_table_offset")
    if first > 0xFFFFFFFF:
        refuse(file, header, "QED header size is too large", "header_size")
    return header, _backing(file, header)


def _backing(file: Storage, header: Header) -> Reference | None:
    if not header.features & BACKING_FILE:
        return None
    if header.backing_offset + header.backing_size > header.header_size * header.cluster_size:
        refuse(file, header, "QED backing filename offset is invalid", "backing_offset")
    if header.backing_size > MAX_NAME:
        refuse(file, header, "Failed to read backing filename", "backing_size")
    raw = bytes(file.read(header.backing_offset, header.backing_size)).split(b"\0", 1)[0]
    name = raw.decode("utf-8", "surrogateescape")
    return Reference(name, "raw" if header.features & BACKING_RAW else None) if name else None


def _is_cluster_size(size: int) -> bool:
    return MIN_CLUSTER <= size <= MAX_CLUSTER and size & (size - 1) == 0


class Qed(Format):
    """The driver."""

    name = "qed"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size (in bytes)"),
        Option("backing_file", STR, None, "File name of a base image"),
        Option("backing_fmt", STR, None, "Image format of the base image"),
        Option("cluster_size", SIZE, 65536, "Cluster size (in bytes)"),
        Option("table_size", SIZE, None, "L1/L2 table size (in clusters)"),
    )
    can_create = True
    can_check = True
    can_measure = True
    can_backing = True

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> QedImage:
        header, backing = parse(file)
        image = QedImage(file, header, backing)
        if writable and not for_check and header.features & NEED_CHECK:
            result = image.check(lambda line: None, "all")
            if result.corruptions > result.corruptions_fixed:
                raise FormatError("Image corrupted", file=file.name)
            header.features &= ~NEED_CHECK
        return image

    def _header(self, size: int, options: dict[str, Value]) -> Header:
        cluster, table = int(options.get("cluster_size", 65536)), int(options.get("table_size", 4))
        if not _is_cluster_size(cluster):
            raise OptionError(
                f"QED cluster size must be within range [{MIN_CLUSTER}, {MAX_CLUSTER}] and power of 2",
                option="cluster_size",
            )
        if table not in TABLE_SIZES:
            raise OptionError(
                "QED table size must be within range [1, 16] and power of 2", option="table_size"
            )
        header = Header(
            magic=MAGIC,
            cluster_size=cluster,
            table_size=table,
            header_size=1,
            l1_table_offset=cluster,
            image_size=size,
        )
        if size > header.max_size:
            raise LimitError(
                "QED image size must be a non-zero multiple of cluster size and less than"
                f" {header.max_size} bytes"
            )
        return header

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        if options.get("preallocation") == "metadata":
            raise NotSupported("Unsupported preallocation mode: metadata")
        header = self._header(size, options)
        name = str(options.get("backing_file", "")).encode("utf-8", "surrogateescape")
        if len(name) > MAX_NAME or Header.SIZE + len(name) > header.cluster_size:
            raise LimitError("No space left in the file header")

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> QedImage:
        self.validate_create(size, options)
        header = self._header(size, options)
        backing = None
        if options.get("backing_file"):
            format = options.get("backing_fmt")
            backing = Reference(str(options["backing_file"]), None if format is None else str(format))
            name = backing.name.encode("utf-8", "surrogateescape")
            header.features = BACKING_FILE | (BACKING_RAW if backing.format == "raw" else 0)
            header.backing_offset, header.backing_size = Header.SIZE, len(name)
        file.write(bytes(SECTOR), 0)  # no header yet
        end = header.cluster_size + header.table_bytes
        if file.fixed_size:
            file.zero(0, end)
        else:
            file.resize(end)
        return QedImage(file, header, backing, new=True)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        size = round_up(source.size, SECTOR)
        header = self._header(size, options)
        cluster, span = header.cluster_size, header.cluster_size * header.entries
        fixed = cluster + header.table_bytes
        full = fixed + round_up(size, cluster) + -(-size // span) * header.table_bytes
        used, tables = source.touched(cluster, span)
        return Measure(fixed + used * cluster + tables * header.table_bytes, full)
