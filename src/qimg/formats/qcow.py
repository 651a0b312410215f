"""qcow: version 1 of QEMU's copy-on-write format (qcow1 sheet). All integers big-endian.

New clusters and tables go to the end of the file; nothing is ever given back. Data is written before the
tables that lead to it.
"""

from __future__ import annotations

from array import array
from errno import EFBIG, EIO

from qimg.context import Notice
from qimg.errors import (
    CorruptImage,
    LimitError,
    NotSupported,
    OptionError,
    StorageError,
)
from qimg.extent import HOLE
from qimg.formats.base import Format, Measure, Reference
from qimg.formats.blocks import BlockCode, BlockImage, TwoLevels
from qimg.formats.protection import (
    AES_WARNING,
    KEY_OPTION,
    check_open_options,
    legacy_aes,
    require_key,
)
from qimg.formats.refusal import refuse
from qimg.formats.tables import WordTable
from qimg.ondisk import U8, U16, U32, U64, Struct
from qimg.options import BOOL, SIZE, STR, Option
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.formats.protection import Protection
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage

MAGIC = 0x514649FB
VERSION = 1
COMPRESSED = 1 << 63
MAX_NAME = 1023
#: Bytes of the L1 table (section 5).
MAX_L1_BYTES = (1 << 31) - 1
CRYPT_NONE, CRYPT_AES = 0, 1
_WORD = 8
# Geometry of new images: cluster and table bits without and with a backing file (section 1).
_PLAIN, _OVERLAY = (12, 9), (9, 12)


class Header(Struct, order=">"):
    """Section 1."""

    magic: U32
    version: U32
    backing_offset: U64
    backing_size: U32
    mtime: U32
    size: U64
    cluster_bits: U8
    l2_bits: U8
    padding: U16
    crypt_method: U32
    l1_table_offset: U64

    @property
    def span(self) -> int:
        """Guest bytes of one L1 entry."""
        return 1 << (self.cluster_bits + self.l2_bits)

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table, which no field tells."""
        return -(-self.size // self.span)


class QcowImage(BlockImage):
    """One layer. An entry is a host offset, or offset and length of a compressed cluster."""

    format_name = "qcow"
    can_mark_zero = True
    dirty = False

    def __init__(
        self,
        file: Storage,
        header: Header,
        backing: Reference | None,
        *,
        protection: Protection | None = None,
        new: bool = False,
    ) -> None:
        """`protection`: what encrypts the data; None for encrypted images, too, of which only info is wanted.
        `new`: `header` is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.header = header
        self.size = header.size // SECTOR * SECTOR
        self.cluster_size = self.lookup_span = 1 << header.cluster_bits
        self.backing = backing
        self.encrypted = header.crypt_method != CRYPT_NONE
        self.protection = protection
        self.can_compress = not self.encrypted  # compressed clusters are never encrypted
        self.can_write = not new
        fresh = new and backing is None and not file.fixed_size and not self.encrypted
        self.granularity = SECTOR if fresh else self.cluster_size
        self.zero_init = new and file.zero_init and not self.encrypted
        self.code = BlockCode(self.cluster_size, unit=1, special={0: HOLE}, compressed=COMPRESSED)
        self._map = self._new_map()
        self._pending = new
        self._end = header.l1_table_offset + round_up(_WORD * header.l1_entries, SECTOR) if new else file.size
        self._compress: Callable[[Bytes], bytes] | None = None
        self._decompress: Callable[[Bytes, int], bytes] | None = None

    # -- the map

    def _new_map(self) -> TwoLevels:
        header = self.header
        l1 = WordTable(self.file, header.l1_table_offset, header.l1_entries, size=_WORD, big=True)
        entries = 1 << header.l2_bits
        return TwoLevels(l1, entries, size=_WORD, big=True, place=self._place_table, check=self._check_table)

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return self._map.pieces(first, last, create=create)

    def levels(self) -> list[list[WordTable]]:
        return self._map.levels()

    def _check_table(self, index: int, host: int) -> None:
        if host >> 63:
            self._damaged("L2 table offset", host, index * self.header.span)

    def validate(self, block: int, count: int, host: int) -> None:
        if host % SECTOR:
            self._damaged("cluster offset", host, block * self.cluster_size)

    def _damaged(self, what: str, found: int, guest: int) -> NoReturn:
        raise CorruptImage(
            f"Input/output error: {what} {found:#x} is not valid",
            file=self.file.name,
            offset=found,
            guest=guest,
        )

    def extents(self, start: int, length: int) -> list[Extent]:
        return self._uncover(super().extents(start, length))

    def allocate(self, start: int, length: int) -> list[Extent]:
        return self._uncover(super().allocate(start, length))

    def _uncover(self, extents: list[Extent]) -> list[Extent]:
        return extents if self.protection is None else self.protection.uncover(extents)

    # -- compressed clusters

    def read_into(self, buf: Buffer, guest: int) -> None:
        view = memoryview(buf)
        size = self.cluster_size
        end = guest + len(view)
        first, last = guest // size, -(-end // size)
        for base, table, low, high in self.pieces(first, last, create=False):
            for number, word in enumerate(table.words(low, high), base):
                data = self._inflate(word, number * size)
                start, stop = max(number * size, guest), min((number + 1) * size, end)
                view[start - guest : stop - guest] = memoryview(data)[
                    start - number * size : stop - number * size
                ]

    def _inflate(self, word: int, guest: int) -> bytes:
        from qimg.codec import CodecError, codec

        if self._decompress is None:
            self._decompress = codec("deflate").decompress
        offset, length = self.compressed_range(word)
        try:
            return self._decompress(self.file.read(offset, length), self.cluster_size)
        except CodecError as error:
            raise CorruptImage(
                f"Input/output error: cannot decompress the guest cluster at {guest:#x}: {error}",
                file=self.file.name,
                offset=offset,
                guest=guest,
            ) from error

    def compressed_range(self, word: int) -> tuple[int, int]:
        """(host offset, bytes) of the compressed cluster that `word` describes (section 2)."""
        shift = 63 - self.header.cluster_bits
        return word & ((1 << shift) - 1), word >> shift & (self.cluster_size - 1)

    def encode(self, data: Bytes) -> bytes | None:
        if self._compress is None:
            from qimg.codec import codec

            self._compress = codec("deflate").compress
        if len(data) < self.cluster_size:
            data = bytes(data).ljust(self.cluster_size, b"\0")
        packed = self._compress(data)
        return packed if len(packed) < self.cluster_size else None

    def write_encoded(self, guest: int, data: bytes) -> None:
        self.begin()
        shift = 63 - self.header.cluster_bits
        offset = self._end = round_up(self._end, SECTOR)
        if (offset + len(data)) >> shift:
            raise StorageError("File too large", errno=EFBIG)
        self.file.write(data, offset)
        self._end = offset + len(data)
        block = guest // self.cluster_size
        ((_base, table, low, _high),) = self.pieces(block, block + 1, create=True)
        table.put(low, array("Q", [COMPRESSED | len(data) << shift | offset]))

    # -- writing

    def _append(self, length: int, unit: int) -> int:
        """Host offset of `length` new bytes of zeros at the end."""
        host = round_up(self._end, unit)
        if host < self.file.size:
            self.file.zero(host, min(length, self.file.size - host))
        self._end = host + length
        return host

    def place(self, block: int, count: int) -> tuple[int, int]:
        return self._append(count * self.cluster_size, self.cluster_size), count

    def _place_table(self, index: int) -> int:
        return self._append(_WORD << self.header.l2_bits, self.cluster_size)

    def zero_absent(self, start: int, length: int) -> None:
        # The format has no word for zeros.
        for place in self.allocate(start, length):
            assert place.source is not None
            assert place.host is not None
            place.source.zero(place.host, place.length)

    def settle(self) -> None:
        if not self.file.fixed_size and self.file.size < self._end:
            self.file.resize(self._end)

    def finish(self) -> None:
        if self._pending:
            name = b"" if self.backing is None else self.backing.name.encode("utf-8", "surrogateescape")
            self.file.write(self.header.pack() + name, 0)
            self.file.flush()
            self._pending = False

    def make_empty(self) -> None:
        self.flush()
        l1 = self.levels()[-1][0]
        step = 1 << 16
        for first in range(0, l1.count, step):
            l1.put(first, array("Q", bytes(_WORD * min(step, l1.count - first))))
            l1.write()
        self.file.flush()
        end = self.header.l1_table_offset + _WORD * l1.count
        if not self.file.fixed_size:
            self.file.resize(end)
            self.file.flush()
        self._map = self._new_map()
        self._end = self.file.size


def parse(file: Storage) -> tuple[Header, Reference | None]:
    """Read and validate the header, in the order of section 5. Raises FormatError, StorageError."""
    header = Header.unpack(bytes(file.read(0, Header.SIZE)))
    if header.magic != MAGIC:
        refuse(file, header, "Image not in qcow format", "magic")
    if header.version != VERSION:
        hint = "Try the 'qcow2' driver instead." if header.version in (2, 3) else None
        text = f"qcow (v1) does not support qcow version {header.version}"
        refuse(file, header, text, "version", hint=hint)
    if header.size <= 1:
        refuse(file, header, "Image size is too small (must be at least 2 bytes)", "size")
    if not 9 <= header.cluster_bits <= 16:
        refuse(file, header, "Cluster size must be between 512 and 64k", "cluster_bits")
    if not 6 <= header.l2_bits <= 13:
        refuse(file, header, "L2 table size must be between 512 and 64k", "l2_bits")
    if header.crypt_method > CRYPT_AES:
        refuse(file, header, "invalid encryption method in qcow header", "crypt_method")
    if header.size > (1 << 64) - 1 - header.span or _WORD * header.l1_entries > MAX_L1_BYTES:
        refuse(file, header, "Image too large", "size")
    if header.l1_table_offset >> 63:
        raise StorageError("Input/output error", errno=EIO, offset=Header.offset_of("l1_table_offset"))
    if not header.backing_offset:
        return header, None
    if header.backing_size > MAX_NAME:
        refuse(file, header, "Backing file name too long", "backing_size")
    raw = bytes(file.read(header.backing_offset, header.backing_size)).split(b"\0", 1)[0]
    return header, Reference(raw.decode("utf-8", "surrogateescape")) if raw else None


def _encrypted(options: dict[str, Value]) -> bool:
    return bool(options.get("encryption")) or "encrypt.format" in options


def _check_encryption(options: dict[str, Value]) -> None:
    """Raise OptionError for options of creation that do not go together."""
    if "encryption" in options and "encrypt.format" in options:
        raise OptionError(
            "'encrypt.format' and its alias 'encryption' can't be used at the same time", option="encryption"
        )
    kind = options.get("encrypt.format", "aes")
    if kind not in ("aes", "luks"):
        raise OptionError(f"Parameter 'format' does not accept value '{kind}'", option="encrypt.format")
    if kind != "aes":
        raise OptionError("Unsupported encryption format", option="encrypt.format")
    if _encrypted(options):
        require_key(options)
    elif KEY_OPTION in options:
        raise OptionError("Parameter 'encrypt.format' is missing", option="encrypt.format")


class Qcow(Format):
    """The driver."""

    name = "qcow"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option("backing_file", STR, None, "File name of a base image"),
        Option("backing_fmt", STR, None, "Format of the backing image"),
        Option("encryption", BOOL, None, "Encrypt the image with format 'aes'. (Deprecated)"),
        Option("encrypt.format", STR, None, "Encrypt the image, format choices: 'aes'"),
        Option("encrypt.key-secret", STR, None, "ID of secret providing qcow AES key or LUKS passphrase"),
    )
    open_options = (Option("encrypt.*", STR, None, "How the data is encrypted: format (aes) and key-secret"),)
    can_create = True
    can_compress = True
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
    ) -> QcowImage:
        header, backing = parse(file)
        options = options or {}
        protection = None
        if header.crypt_method != CRYPT_NONE:
            check_open_options(options, "aes")
            if not for_info:
                protection = legacy_aes(context.secret(require_key(options)))
        elif "encrypt.format" in options:
            raise OptionError(
                f"No encryption in image header, but options specified format '{options['encrypt.format']}'",
                option="encrypt.format",
            )
        return QcowImage(file, header, backing, protection=protection)

    def _header(self, size: int, options: dict[str, Value]) -> Header:
        name = str(options.get("backing_file") or "").encode("utf-8", "surrogateescape")
        bits = _OVERLAY if name else _PLAIN
        return Header(
            magic=MAGIC,
            version=VERSION,
            backing_offset=Header.SIZE if name else 0,
            backing_size=len(name),
            size=size,
            cluster_bits=bits[0],
            l2_bits=bits[1],
            crypt_method=CRYPT_AES if _encrypted(options) else CRYPT_NONE,
            l1_table_offset=Header.SIZE + round_up(len(name), 8),
        )

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        if options.get("preallocation") == "metadata":
            raise NotSupported("Unsupported preallocation mode: metadata")
        if size == 0:
            raise OptionError("Image size is too small, cannot be zero length", option="size")
        _check_encryption(options)
        header = self._header(size, options)
        if header.backing_size > MAX_NAME:
            raise LimitError("Backing file name too long")
        if size > (1 << 64) - 1 - header.span or _WORD * header.l1_entries > MAX_L1_BYTES:
            raise LimitError("The image size is too large for file format 'qcow'")

    def check_secrets(self, options: dict[str, Value], context: Context) -> None:
        if _encrypted(options):
            context.secret(require_key(options))

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> QcowImage:
        self.validate_create(size, options)
        protection = None
        if _encrypted(options):
            protection = legacy_aes(help.context.secret(require_key(options)))
            help.context.warn(Notice(AES_WARNING))
        header = self._header(size, options)
        backing = None
        if header.backing_offset:
            backing = Reference(str(options["backing_file"]))
        end = header.l1_table_offset + round_up(_WORD * header.l1_entries, SECTOR)
        if file.fixed_size:
            file.zero(0, end)
        else:
            file.write(bytes(SECTOR), 0)  # no header yet
            file.resize(end)
        return QcowImage(file, header, backing, protection=protection, new=True)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        size = round_up(source.size, SECTOR)
        header = self._header(size, options)
        cluster, table = 1 << header.cluster_bits, _WORD << header.l2_bits
        start = round_up(header.l1_table_offset + round_up(_WORD * header.l1_entries, SECTOR), cluster)
        full = start + round_up(size, cluster) + header.l1_entries * table
        used, tables = source.touched(cluster, header.span)
        return Measure(start + used * cluster + tables * table, full)
