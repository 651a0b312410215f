"""How large an image will be (sheet, section 18)."""

from __future__ import annotations

from qimg.errors import OptionError, QimgError
from qimg.formats.base import Measure
from qimg.formats.protection import require_key
from qimg.formats.qcow2.bitmap_rules import ceil_div, table_entries
from qimg.formats.qcow2.create_options import DEFAULT_CLUSTER_SIZE, DEFAULT_REFCOUNT_BITS
from qimg.formats.qcow2.structs import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER,
    BitmapEntry,
)
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import MeasureSource
    from qimg.options import Value

_VERSIONS = {"0.10": 2, "1.1": 3}
_PREALLOCATION = ("off", "metadata", "falloc", "full")


def measure(source: MeasureSource, options: dict[str, Value]) -> Measure:
    """What an image made with these creation options for `source` takes, in bytes.

    Raises OptionError and QimgError with the real program's words, which differ from those of `create`.
    """
    shape = _Shape(options)
    size = round_up(source.size, SECTOR)
    shape.check_size(size)
    metadata = shape.metadata(size)
    data = round_up(size, shape.cluster_size)
    required = data
    if not shape.all_data and source.data_runs is not None:
        if "backing_file" not in options:
            required = source.touched(shape.cluster_size)[0] * shape.cluster_size
    elif not shape.all_data:
        required = 0
    bitmaps = None
    if source.bitmaps is not None and shape.version >= 3:
        bitmaps = shape.bitmaps(size, source.bitmaps)
    metadata += shape.luks
    return Measure(metadata + required, metadata + data, bitmaps)


class _Shape:
    """What of the options counts."""

    def __init__(self, options: dict[str, Value]) -> None:
        self.cluster_size = _cluster_size(options)
        self.entry_size = 16 if options.get("extended_l2", False) else 8
        self.version = _version(options)
        self.refcount_bits = _refcount_bits(options, self.version)
        mode = str(options.get("preallocation", "off"))
        if mode not in _PREALLOCATION:
            raise OptionError(f"invalid parameter value: {mode}", option="preallocation")
        #: Space for every guest cluster is taken at once.
        self.all_data = mode in ("falloc", "full")
        #: Bytes of the clusters of a LUKS header.
        self.luks = round_up(_luks_bytes(options), self.cluster_size)

    def check_size(self, size: int) -> None:
        """Raise QimgError for a disk whose L1 table would be too large."""
        per_table = self.cluster_size * (self.cluster_size // self.entry_size)
        if ceil_div(size, per_table) * 8 > MAX_L1_BYTES:
            raise QimgError("The image size is too large (try using a larger cluster size)")

    def metadata(self, size: int) -> int:
        """Bytes of header, L1, L2 and refcounts of an image in which every guest cluster is allocated."""
        cluster = self.cluster_size
        data = round_up(size, cluster)
        l2_entries = round_up(data // cluster, cluster // self.entry_size)
        l2 = l2_entries * self.entry_size
        l1 = round_up(l2 // cluster, cluster // 8) * 8
        total = cluster + l2 + l1
        return total + self._refcounts((total + data) // cluster) * cluster

    def _refcounts(self, clusters: int) -> int:
        """Clusters of refcount blocks and table that describe `clusters` others and themselves."""
        per_block = self.cluster_size * 8 // self.refcount_bits
        blocks = table = 0
        while True:
            needed = ceil_div(clusters + blocks + table, per_block)
            table = ceil_div(needed, self.cluster_size // 8)
            if needed == blocks and ceil_div(clusters + blocks + table, per_block) == blocks:
                return blocks + table
            blocks = needed

    def bitmaps(self, size: int, bitmaps: list[tuple[int, str]]) -> int:
        """Bytes of data, tables and directory of `bitmaps`, all of their data counted."""
        total = directory = 0
        for granularity, name in bitmaps:
            clusters = table_entries(size, granularity, self.cluster_size)
            total += clusters * self.cluster_size + round_up(8 * clusters, self.cluster_size)
            directory += round_up(BitmapEntry.SIZE + len(name.encode("utf-8", "surrogateescape")), 8)
        return total + round_up(directory, self.cluster_size)


def _cluster_size(options: dict[str, Value]) -> int:
    size = int(options.get("cluster_size", DEFAULT_CLUSTER_SIZE))
    if size & (size - 1) or not 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS:
        raise OptionError("Cluster size must be a power of two between 512 and 2048k", option="cluster_size")
    if options.get("extended_l2", False) and size < MIN_EXTENDED_L2_CLUSTER:
        raise OptionError(
            "Extended L2 entries are only supported with cluster sizes of at least"
            f" {MIN_EXTENDED_L2_CLUSTER} bytes",
            option="extended_l2",
        )
    return size


def _version(options: dict[str, Value]) -> int:
    text = str(options.get("compat", "1.1"))
    if text not in _VERSIONS:
        raise OptionError(f"Invalid compatibility level: '{text}'", option="compat")
    return _VERSIONS[text]


def _refcount_bits(options: dict[str, Value], version: int) -> int:
    bits = int(options.get("refcount_bits", DEFAULT_REFCOUNT_BITS))
    if bits & (bits - 1) or not 1 <= bits <= 64:
        raise OptionError(
            "Refcount width must be a power of two and may not exceed 64 bits", option="refcount_bits"
        )
    if bits != 16 and version < 3:
        raise OptionError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above"
            " (use compat=1.1 or greater)",
            option="refcount_bits",
        )
    return bits


def _luks_bytes(options: dict[str, Value]) -> int:
    if options.get("encrypt.format") != "luks":
        return 0  # the obsolete method takes no space
    from qimg.formats.qcow2.encryption import check_new_luks

    require_key(options)
    return check_new_luks(options)
