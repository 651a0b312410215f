"""The first cluster: header, header extensions, backing file name (qcow2 sheet, sections 2, 3 and 11).

`parse` reads and validates it in the order of the real program and with its words; `ParsedHeader.pack`
gives the whole first cluster back. What qimg does not know (extensions, a longer header) survives a
rewrite byte for byte.
"""

from __future__ import annotations

from qimg.errors import FormatError, LimitError, StorageError, UnsupportedFeature
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_DATA_FILE_RAW,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_DATA_FILE,
    EXT_END,
    EXT_FEATURE_NAMES,
    FEATURE_NAMES,
    INCOMPAT_COMPRESSION,
    INCOMPAT_CORRUPT,
    INCOMPAT_DATA_FILE,
    INCOMPAT_DIRTY,
    INCOMPAT_EXTENDED_L2,
    INCOMPAT_KNOWN,
    MAGIC,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    SUBCLUSTERS,
    V2_LENGTH,
    V3_LENGTH,
    V3_MIN_LENGTH,
    BitmapsPointer,
    CryptoPointer,
    ExtensionHeader,
    FeatureName,
    Header,
    SnapshotEntry,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from qimg.storage.base import Storage

_MAX_OFFSET = (1 << 63) - 1
_MAX_L1_INDEX = (1 << 31) - 1
_FIRST_READ = 4096
_MIN_SUBCLUSTER = 512
_SECTOR = 512


class ParsedHeader:
    """Header and extensions of one image. Sizes in bytes.

    header          the fixed fields; `size` as stored (`virtual_size` is what guests see).
    tail            header bytes past the 112 known ones, kept verbatim.
    backing_name, backing_format, data_file_name
                    as stored, None where absent.
    crypto, bitmaps pointers to the LUKS header and the bitmap directory, None where absent.
    feature_names   {(set, bit): name} as stored in the image; `pack` writes FEATURE_NAMES.
    unknown         (type, data) of extensions that qimg does not know, in file order.
    """

    def __init__(
        self,
        header: Header,
        *,
        tail: bytes = b"",
        backing_name: bytes | None = None,
        backing_format: bytes | None = None,
        data_file_name: bytes | None = None,
        crypto: CryptoPointer | None = None,
        bitmaps: BitmapsPointer | None = None,
        feature_names: dict[tuple[int, int], bytes] | None = None,
        unknown: list[tuple[int, bytes]] | None = None,
    ) -> None:
        self.header = header
        self.tail = tail
        self.backing_name = backing_name
        self.backing_format = backing_format
        self.data_file_name = data_file_name
        self.crypto = crypto
        self.bitmaps = bitmaps
        self.feature_names = {} if feature_names is None else feature_names
        self.unknown = [] if unknown is None else unknown

    # -- derived values

    @property
    def version(self) -> int:
        """2 or 3."""
        return self.header.version

    @property
    def cluster_bits(self) -> int:
        """log2 of the cluster size."""
        return self.header.cluster_bits

    @property
    def cluster_size(self) -> int:
        """Bytes of a host and of a guest cluster."""
        return 1 << self.header.cluster_bits

    @property
    def virtual_size(self) -> int:
        """Guest bytes: whole sectors of what the header says (section 2)."""
        return self.header.size & ~511

    @property
    def extended_l2(self) -> bool:
        """L2 entries are 16 bytes and describe subclusters."""
        return bool(self.header.incompatible_features & INCOMPAT_EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        """8 or 16 bytes."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def has_data_file(self) -> bool:
        """Guest data lies in an external data file."""
        return bool(self.header.incompatible_features & INCOMPAT_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """The external data file alone is a valid raw image."""
        return self.has_data_file and bool(self.header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW)

    @property
    def dirty(self) -> bool:
        """Refcounts may be stale."""
        return bool(self.header.incompatible_features & INCOMPAT_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Metadata damage was detected earlier."""
        return bool(self.header.incompatible_features & INCOMPAT_CORRUPT)

    # -- writing

    def pack(self) -> bytes:
        """The whole first cluster, in the order of section 3.

        Sets header_length, backing_file_offset and backing_file_size in `header`. Raises LimitError
        (``No space left on device``) if it does not fit.
        """
        header = self.header
        v3 = header.version >= 3
        header.header_length = V3_LENGTH + len(self.tail) if v3 else V2_LENGTH
        extensions = b"".join(_pack_extension(kind, data) for kind, data in self._extensions())
        name = self.backing_name or b""
        header.backing_file_size = len(name)
        header.backing_file_offset = header.header_length + len(extensions) if name else 0
        fixed = header.pack() + self.tail if v3 else header.pack()[:V2_LENGTH]
        cluster = fixed + extensions + name
        if len(cluster) > self.cluster_size:
            raise LimitError("No space left on device")
        return cluster.ljust(self.cluster_size, b"\0")

    def bridge(self, name_at: int) -> bytes | None:
        """The first sector of this header while those behind it change: without feature names, the backing
        file's name at byte `name_at`. None where that takes more than a sector."""
        fixed = Header.unpack(self.header.pack())
        v3 = fixed.version >= 3
        fixed.header_length = V3_LENGTH + len(self.tail) if v3 else V2_LENGTH
        fixed.backing_file_size = len(self.backing_name or b"")
        fixed.backing_file_offset = name_at if self.backing_name else 0
        extensions = (pair for pair in self._extensions() if pair[0] != EXT_FEATURE_NAMES)
        start = fixed.pack() + self.tail if v3 else fixed.pack()[:V2_LENGTH]
        sector = start + b"".join(_pack_extension(kind, data) for kind, data in extensions)
        return sector.ljust(_SECTOR, b"\0") if len(sector) <= _SECTOR else None

    def _extensions(self) -> list[tuple[int, bytes]]:
        known = []
        if self.backing_format is not None:
            known.append((EXT_BACKING_FORMAT, self.backing_format))
        if self.data_file_name is not None:
            known.append((EXT_DATA_FILE, self.data_file_name))
        if self.crypto is not None:
            known.append((EXT_CRYPTO, self.crypto.pack()))
        if self.header.version >= 3 and self.cluster_size > 4096:
            known.append((EXT_FEATURE_NAMES, pack_feature_names()))
        if self.bitmaps is not None:
            known.append((EXT_BITMAPS, self.bitmaps.pack()))
        return [*known, *reversed(self.unknown), (EXT_END, b"")]


def pack_feature_names() -> bytes:
    """The feature name table as it is always written."""
    return b"".join(FeatureName(set=kind, bit=bit, name=name).pack() for kind, bit, name in FEATURE_NAMES)


def _pack_extension(kind: int, data: bytes) -> bytes:
    head = ExtensionHeader(type=kind, length=len(data)).pack()
    return head + data + bytes(-len(data) % 8)


# -- reading


def parse(
    file: Storage, *, writable: bool = False, for_check: bool = False, for_info: bool = False
) -> ParsedHeader:
    """Read and validate the first cluster of `file`, without looking at any table.

    `for_check` lets damage through that a check reports; `for_info` skips what only readers of guest
    data need. Raises FormatError, UnsupportedFeature (section 11), StorageError.
    """
    return _Parser(file).run(writable, for_check, for_info)


class _Parser:
    """One pass over cluster 0; a method a group of rules, in the order of section 11."""

    def __init__(self, file: Storage) -> None:
        self.file = file
        try:
            self.raw = bytes(file.read(0, _FIRST_READ))
        except StorageError as error:
            raise StorageError(
                f"Could not read qcow2 header: {error}", errno=error.errno, offset=0
            ) from error
        self.header = Header.unpack(self.raw)

    def run(self, writable: bool, for_check: bool, for_info: bool) -> ParsedHeader:
        self._version_and_lengths()
        parsed = ParsedHeader(self.header, tail=self._tail())
        self._backing_offset()
        self._compression()
        self._features(writable and not for_check)
        self._tables(for_check)
        self._size()
        self._crypt_method()
        self._extensions(parsed)
        self._consistency(parsed, for_info)
        self._backing_name(parsed)
        return parsed

    def fail(
        self,
        message: str,
        name: str,
        *,
        expected: object = None,
        kind: type[FormatError] = FormatError,
        hint: str | None = None,
    ) -> NoReturn:
        """Raise `kind` for header field `name`."""
        raise kind(
            message,
            file=self.file.name,
            field=f"header.{name}",
            offset=Header.offset_of(name),
            expected=expected,
            found=getattr(self.header, name),
            hint=hint,
        )

    def _version_and_lengths(self) -> None:
        header = self.header
        if header.magic != MAGIC:
            self.fail("Image is not in qcow2 format", "magic", expected=f"{MAGIC:#x}")
        if not 2 <= header.version <= 3:
            self.fail(
                f"Unsupported qcow2 version {header.version}",
                "version",
                expected="2 or 3",
                kind=UnsupportedFeature,
            )
        if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
            self.fail(f"Unsupported cluster size: 2^{header.cluster_bits}", "cluster_bits", expected="9..21")
        cluster_size = 1 << header.cluster_bits
        self.cluster_size = cluster_size
        if header.version == 2:
            self._blank_v3_fields()
        elif header.header_length < V3_MIN_LENGTH:
            self.fail("qcow2 header too short", "header_length", expected=f">= {V3_MIN_LENGTH}")
        elif header.header_length > cluster_size:
            self.fail("qcow2 header exceeds cluster size", "header_length", expected=f"<= {cluster_size}")
        elif header.header_length < V3_LENGTH:
            # Bytes past header_length are extensions, not fields (section 2): read as zero.
            self.header = Header.unpack(self.raw[: header.header_length].ljust(Header.SIZE, b"\0"))

    def _blank_v3_fields(self) -> None:
        self.header = Header.unpack(self.raw[:V2_LENGTH].ljust(Header.SIZE, b"\0"))
        self.header.refcount_order = 4
        self.header.header_length = V2_LENGTH

    def _cluster(self) -> bytes:
        """All of cluster 0. Only as much is read as has to be: most images need no second request."""
        if len(self.raw) < self.cluster_size:
            rest = self.file.read(len(self.raw), self.cluster_size - len(self.raw))
            self.raw += bytes(rest)
        return self.raw

    def bytes_at(self, start: int, length: int) -> bytes:
        """``start .. start + length`` of the file, both inside cluster 0 or a little behind it."""
        if start + length > len(self.raw):
            self._cluster()
        found = self.raw[start : start + length]
        if len(found) < length:
            found += bytes(self.file.read(start + len(found), length - len(found)))
        return found

    def _tail(self) -> bytes:
        length = self.header.header_length
        return self.bytes_at(V3_LENGTH, length - V3_LENGTH) if length > V3_LENGTH else b""

    def _backing_offset(self) -> None:
        if self.header.backing_file_offset > self.cluster_size:
            self.fail(
                "Invalid backing file offset", "backing_file_offset", expected=f"<= {self.cluster_size}"
            )

    def _compression(self) -> None:
        header = self.header
        flagged = bool(header.incompatible_features & INCOMPAT_COMPRESSION)
        if header.compression_type > 1:
            self.fail(
                f"qcow2: unknown compression type: {header.compression_type}",
                "compression_type",
                expected="0 or 1",
                kind=UnsupportedFeature,
            )
        if header.compression_type == 0 and flagged:
            self.fail(
                "qcow2: Compression type incompatible feature bit must not be set", "incompatible_features"
            )
        if header.compression_type != 0 and not flagged:
            self.fail("qcow2: Compression type incompatible feature bit must be set", "incompatible_features")

    def _features(self, writable: bool) -> None:
        header = self.header
        unknown = header.incompatible_features & ~INCOMPAT_KNOWN
        if unknown:
            names = self._names_of(unknown)
            self.fail(
                f"Unsupported qcow2 feature(s): {names}", "incompatible_features", kind=UnsupportedFeature
            )
        if writable and header.incompatible_features & INCOMPAT_CORRUPT:
            self.fail("qcow2: Image is corrupt; cannot be opened read/write", "incompatible_features")
        if header.incompatible_features & INCOMPAT_EXTENDED_L2:
            subcluster = self.cluster_size // SUBCLUSTERS
            if subcluster < _MIN_SUBCLUSTER:
                self.fail(f"Unsupported subcluster size: {subcluster}", "cluster_bits", expected=">= 14")
        if header.refcount_order > 6:
            self.fail(
                "Reference count entry width too large; may not exceed 64 bits",
                "refcount_order",
                expected="<= 6",
            )

    def _names_of(self, mask: int) -> str:
        stored: dict[tuple[int, int], bytes] = {}
        try:
            for kind, data, _offset in self._walk():
                if kind == EXT_FEATURE_NAMES:
                    stored = _feature_names(data)
        except FormatError:
            pass  # the message about the features is the one that helps
        names = []
        for (kind, bit), name in stored.items():
            if kind == 0 and mask >> bit & 1:
                names.append(name.decode("utf-8", "surrogateescape"))
                mask &= ~(1 << bit)
        if mask:
            names.append(f"Unknown incompatible feature: {mask:x}")
        return ", ".join(names)

    def _table(self, what: str, name: str, length: int, limit: int, length_name: str) -> None:
        """A table of `length` bytes: bounded, aligned, inside 2^63."""
        if length > limit:
            self.fail(f"{what} too large", length_name, expected=f"<= {limit} bytes")
        offset = getattr(self.header, name)
        if offset > _MAX_OFFSET - length or offset % self.cluster_size:
            self.fail(f"{what} offset invalid", name, expected="cluster aligned, below 2^63")

    def _tables(self, for_check: bool) -> None:
        header = self.header
        if header.refcount_table_clusters == 0 and not for_check:
            self.fail("Image does not contain a reference count table", "refcount_table_clusters")
        self._table(
            "Reference count table",
            "refcount_table_offset",
            header.refcount_table_clusters * self.cluster_size,
            MAX_REFCOUNT_TABLE_BYTES,
            "refcount_table_clusters",
        )
        if not for_check:
            self._table(
                "Snapshot table",
                "snapshots_offset",
                header.nb_snapshots * SnapshotEntry.SIZE,
                MAX_SNAPSHOTS * SnapshotEntry.SIZE,
                "nb_snapshots",
            )
        self._table("Active L1 table", "l1_table_offset", header.l1_size * 8, MAX_L1_BYTES, "l1_size")

    def _size(self) -> None:
        header = self.header
        wide = header.incompatible_features & INCOMPAT_EXTENDED_L2
        per_l1 = self.cluster_size * (self.cluster_size // (16 if wide else 8))
        needed = -(-header.size // per_l1)
        if needed > _MAX_L1_INDEX:
            self.fail("Image is too big", "size", expected=f"<= {_MAX_L1_INDEX * per_l1}")
        if header.l1_size < needed:
            self.fail("L1 table is too small", "l1_size", expected=f">= {needed}")

    def _crypt_method(self) -> None:
        if self.header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
            self.fail(
                f"Unsupported encryption method {self.header.crypt_method}",
                "crypt_method",
                expected="0, 1 or 2",
                kind=UnsupportedFeature,
            )

    # -- extensions

    def _walk(self) -> Iterator[tuple[int, bytes, int]]:
        """(type, data, offset of the data) of each extension up to the end marker, the backing name or
        the end of the cluster."""
        at = self.header.header_length
        end = self.header.backing_file_offset or self.cluster_size
        while at < end:
            head = ExtensionHeader.unpack(self.bytes_at(at, ExtensionHeader.SIZE))
            at += ExtensionHeader.SIZE
            if head.length > end - at:
                self.extension_fault(
                    "Header extension too large", head.type, at, f"<= {end - at}", head.length
                )
            if head.type == EXT_END:
                break
            yield head.type, self.bytes_at(at, head.length), at
            at += (head.length + 7) & ~7

    def extension_fault(
        self, message: str, kind: int, offset: int, expected: object = None, found: object = None
    ) -> NoReturn:
        """Raise FormatError for the extension of type `kind` whose data starts at `offset`."""
        raise FormatError(
            message,
            file=self.file.name,
            field=f"extension {kind:#010x}",
            offset=offset,
            expected=expected,
            found=found,
        )

    def _extensions(self, parsed: ParsedHeader) -> None:
        for kind, data, offset in self._walk():
            if kind == EXT_BACKING_FORMAT:
                if len(data) > MAX_BACKING_FORMAT:
                    limit = MAX_BACKING_FORMAT + 1
                    text = f"ERROR: ext_backing_format: len={len(data)} too large (>={limit})"
                    self.extension_fault(text, kind, offset, f"< {limit}", len(data))
                parsed.backing_format = data.split(b"\0", 1)[0]
            elif kind == EXT_FEATURE_NAMES:
                parsed.feature_names = _feature_names(data)
            elif kind == EXT_CRYPTO:
                parsed.crypto = self._crypto(data, offset)
            elif kind == EXT_BITMAPS:
                parsed.bitmaps = self._bitmaps(data, offset)
            elif kind == EXT_DATA_FILE:
                parsed.data_file_name = data
            else:
                parsed.unknown.append((kind, data))

    def _crypto(self, data: bytes, offset: int) -> CryptoPointer:
        if self.header.crypt_method != CRYPT_LUKS:
            self.extension_fault(
                "CRYPTO header extension only expected with LUKS encryption method", EXT_CRYPTO, offset
            )
        if len(data) != CryptoPointer.SIZE:
            self.extension_fault(
                f"CRYPTO header extension size {len(data)}, but expected size {CryptoPointer.SIZE}",
                EXT_CRYPTO,
                offset,
                CryptoPointer.SIZE,
                len(data),
            )
        pointer = CryptoPointer.unpack(data)
        if pointer.offset % self.cluster_size:
            self.extension_fault(
                f"Encryption header offset '{pointer.offset}' is not a multiple of cluster size"
                f" '{self.cluster_size}'",
                EXT_CRYPTO,
                offset,
                "cluster aligned",
                pointer.offset,
            )
        return pointer

    def _bitmaps(self, data: bytes, offset: int) -> BitmapsPointer:
        """Section 9. The bit that makes the extension valid is looked at by `bitmap.py`."""
        if len(data) != BitmapsPointer.SIZE:
            self.extension_fault(
                "bitmaps_ext: Invalid extension length", EXT_BITMAPS, offset, BitmapsPointer.SIZE, len(data)
            )
        pointer = BitmapsPointer.unpack(data)
        problem = _bitmaps_problem(pointer, self.cluster_size)
        if problem is not None:
            self.extension_fault(problem, EXT_BITMAPS, offset)
        return pointer

    # -- what ties fields and extensions together

    def _consistency(self, parsed: ParsedHeader, for_info: bool) -> None:
        if self.header.crypt_method == CRYPT_LUKS and parsed.crypto is None:
            self.fail("Missing CRYPTO header for crypt method 2", "crypt_method")
        raw = parsed.header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW
        if raw and not parsed.has_data_file and not for_info:
            self.fail("data-file-raw requires a data file", "autoclear_features")

    def _backing_name(self, parsed: ParsedHeader) -> None:
        header = self.header
        if not header.backing_file_offset:
            return
        limit = min(MAX_BACKING_NAME, self.cluster_size - header.backing_file_offset)
        if header.backing_file_size > limit:
            self.fail("Backing file name too long", "backing_file_size", expected=f"<= {limit}")
        name = self.bytes_at(header.backing_file_offset, header.backing_file_size).split(b"\0", 1)[0]
        parsed.backing_name = name or None


def _feature_names(data: bytes) -> dict[tuple[int, int], bytes]:
    """Rows up to the first without a name, the first of equals; a last row cut short counts."""
    names: dict[tuple[int, int], bytes] = {}
    data += bytes(-len(data) % FeatureName.SIZE)
    for at in range(0, len(data), FeatureName.SIZE):
        row = FeatureName.unpack(data, at)
        name = row.name.split(b"\0", 1)[0]
        if not name:
            break
        if row.bit < 64:
            names.setdefault((row.set, row.bit), name)
    return names


def _bitmaps_problem(pointer: BitmapsPointer, cluster_size: int) -> str | None:
    """What is wrong with the bitmaps extension, in the real program's order and words; None: nothing."""
    if pointer.reserved:
        return "bitmaps_ext: Reserved field is not zero"
    if pointer.count > MAX_BITMAPS:
        return (
            f"bitmaps_ext: Image has {pointer.count} bitmaps, exceeding the QEMU supported maximum of"
            f" {MAX_BITMAPS}"
        )
    if pointer.count == 0:
        return "found bitmaps extension with zero bitmaps"
    if pointer.directory_offset % cluster_size:
        return "bitmaps_ext: invalid bitmap directory offset"
    if pointer.directory_size > MAX_BITMAP_DIRECTORY_BYTES:
        return (
            f"bitmaps_ext: bitmap directory size ({pointer.directory_size}) exceeds the maximum supported"
            f" size ({MAX_BITMAP_DIRECTORY_BYTES})"
        )
    return None
