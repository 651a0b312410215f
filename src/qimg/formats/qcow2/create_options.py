"""Options of creating a qcow2 image, in the order of the ``Formatting`` line (sheet, section 12)."""

from __future__ import annotations

from qimg.formats.keyslots import creation_options
from qimg.options import BOOL, NUM, SIZE, STR, Option

DEFAULT_CLUSTER_SIZE = 65536
DEFAULT_REFCOUNT_BITS = 16

#: Options that ask for encryption.
ENCRYPTION_OPTIONS = (
    Option("encryption", BOOL, None, "Old spelling of encrypt.format=aes"),
    Option("encrypt.format", STR, None, "Encrypt the guest data: 'luks', or the obsolete 'aes'"),
    Option("encrypt.key-secret", STR, None, "ID of the secret object that holds the passphrase"),
    *creation_options("encrypt."),
)

CREATE_OPTIONS: tuple[Option, ...] = (
    *ENCRYPTION_OPTIONS,
    Option("cluster_size", SIZE, DEFAULT_CLUSTER_SIZE, "Unit of allocation, a power of two, 512 to 2M"),
    Option("extended_l2", BOOL, False, "Allocate in 32nds of a cluster (subclusters)"),
    Option("preallocation", STR, None, "What to reserve at once: off, metadata, falloc or full"),
    Option("compression_type", STR, "zlib", "How compressed clusters are stored: zlib or zstd"),
    Option("size", SIZE, None, "Size of the guest's disk"),
    Option("compat", STR, None, "Version of the format: 0.10 (v2) or 1.1 (v3)"),
    Option("backing_file", STR, None, "Image that shows through where nothing was written"),
    Option("backing_fmt", STR, None, "Format of the backing file"),
    Option("data_file", STR, None, "Keep the guest's data in this file of its own"),
    Option("data_file_raw", BOOL, None, "The data file stays a valid raw image by itself"),
    Option("lazy_refcounts", BOOL, False, "Let writers update reference counts late"),
    Option("refcount_bits", NUM, DEFAULT_REFCOUNT_BITS, "Width of a reference count: 1, 2, 4 ... 64 bits"),
)
