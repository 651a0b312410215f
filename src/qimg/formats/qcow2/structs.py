"""The on-disk structures of qcow2, declared once. All integers big-endian (qcow2 specification)."""

from __future__ import annotations

from qimg.ondisk import U8, U16, U32, U64, Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

MAGIC = 0x514649FB

# Limits (sheet, section 10)
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA = 1024
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 65535 * 1024
MAX_BITMAP_NAME = 1023
MAX_BITMAP_BYTES = 512 << 20
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MIN_EXTENDED_L2_CLUSTER = 16384
SUBCLUSTERS = 32

# Feature bits
INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
INCOMPAT_KNOWN = (1 << 5) - 1
COMPAT_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

#: Rows of the feature name table in the order in which they are written: (set, bit, name).
FEATURE_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
COMPRESSION_ZLIB, COMPRESSION_ZSTD = 0, 1
COMPRESSION_NAMES = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}

# Header extensions
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

# L1, L2 and refcount table entries
COPIED = 1 << 63
L2_COMPRESSED = 1 << 62
L2_ZERO = 1 << 0
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
REFTABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
REFTABLE_RESERVED = 0x1FF

# Bitmap directory entries and tables
BITMAP_IN_USE = 1 << 0
BITMAP_AUTO = 1 << 1
BITMAP_EXTRA_COMPATIBLE = 1 << 2
BITMAP_TYPE_DIRTY = 1
BITMAP_TABLE_ALL_ONES = 1 << 0


class Header(Struct, order=">"):
    """Version 2: the first 72 bytes. Version 3: `header_length` bytes, zero-extended to this structure."""

    magic: U32
    version: U32
    backing_file_offset: U64
    backing_file_size: U32
    cluster_bits: U32
    size: U64
    crypt_method: U32
    l1_size: U32
    l1_table_offset: U64
    refcount_table_offset: U64
    refcount_table_clusters: U32
    nb_snapshots: U32
    snapshots_offset: U64
    incompatible_features: U64
    compatible_features: U64
    autoclear_features: U64
    refcount_order: U32
    header_length: U32
    compression_type: U8
    padding: Annotated[bytes, 7]


V2_LENGTH = 72
V3_MIN_LENGTH = 104
V3_LENGTH = 112


class ExtensionHeader(Struct, order=">"):
    """Followed by `length` bytes, padded with zeros to a multiple of 8."""

    type: U32
    length: U32


class FeatureName(Struct, order=">"):
    """Row of the feature name table; set: 0 incompatible, 1 compatible, 2 autoclear."""

    set: U8
    bit: U8
    name: Annotated[bytes, 46]


class CryptoPointer(Struct, order=">"):
    """Data of the crypto header extension."""

    offset: U64
    length: U64


class BitmapsPointer(Struct, order=">"):
    """Data of the bitmaps extension."""

    count: U32
    reserved: U32
    directory_size: U64
    directory_offset: U64


class BitmapEntry(Struct, order=">"):
    """Bitmap directory entry; extra data, the name and zeros up to a multiple of 8 follow."""

    table_offset: U64
    table_size: U32
    flags: U32
    type: U8
    granularity_bits: U8
    name_size: U16
    extra_data_size: U32


class SnapshotEntry(Struct, order=">"):
    """Snapshot table entry; extra data, id, name and zeros up to a multiple of 8 follow."""

    l1_table_offset: U64
    l1_size: U32
    id_size: U16
    name_size: U16
    date_sec: U32
    date_nsec: U32
    vm_clock_nsec: U64
    vm_state_size: U32
    extra_data_size: U32


class SnapshotExtra(Struct, order=">"):
    """Known part of a snapshot's extra data; may be cut short."""

    vm_state_size: U64
    disk_size: U64
    icount: U64


NO_ICOUNT = (1 << 64) - 1


def compressed_shift(cluster_bits: int) -> int:
    """Bit at which the sector count of a compressed descriptor starts: 62 - (cluster_bits - 8)."""
    return 70 - cluster_bits
