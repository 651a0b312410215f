"""Other values for options of creation (qcow2 sheet, section 17), and another backing file.

Everything is checked first: `_Plan` knows the image as it is and as it is to be. Then come the changes in
the order of the sheet, each whole or not there after a power cut: keys, upgrade, refcount width, what stands
in the header only, size, downgrade.
"""

from __future__ import annotations

from qimg.errors import LimitError, NotSupported, OptionError
from qimg.formats.qcow2.encryption import PREFIX, change_keys
from qimg.formats.qcow2.header import parse
from qimg.formats.qcow2.refcounts import counters_per_block, unpack_counts
from qimg.formats.qcow2.resize import ResizeChanges, check_resize
from qimg.formats.qcow2.snapshot import V3_EXTRA, read_snapshots
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPAT_LAZY_REFCOUNTS,
    CRYPT_LUKS,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    NO_ICOUNT,
    SnapshotExtra,
)
from qimg.guest_size import GuestSize
from qimg.units import INT64_MAX, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.base import Reference
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.snapshot import Snapshot
    from qimg.formats.qcow2.write import WritableQcow2
    from qimg.options import Value

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_NEEDS_V3 = "(use compat=1.1 or greater)"
_STATE = "encrypt.state"


class AmendChanges:
    """What `WritableQcow2` does to its header; `image` is the writer."""

    @staticmethod
    def amend(
        image: WritableQcow2,
        options: dict[str, Value],
        *,
        force: bool = False,
        progress: Callable[[int, int], None],
    ) -> None:
        """`Image.amend`. `options["size"]` may be a GuestSize."""
        plan = _Plan(image, options)
        plan.check()
        if plan.keys:
            # First: what else is to be refused of it is refused before the first change.
            change_keys(image, options, force=force)
        image.begin()
        plan.carry_out(progress)

    @staticmethod
    def change_backing(image: WritableQcow2, backing: Reference | None) -> None:
        """`Image.change_backing`: by one write of the header."""
        name = None if backing is None else backing.name.encode("utf-8", "surrogateescape")
        kind = None
        if backing is not None and backing.format is not None:
            kind = backing.format.encode("utf-8", "surrogateescape")
        if len(name or b"") > MAX_BACKING_NAME or len(kind or b"") > MAX_BACKING_FORMAT:
            raise LimitError("Invalid argument")
        if name is not None and image.header.data_file_raw:
            raise NotSupported("Invalid argument")
        trial = parse(image.file, writable=True)
        trial.backing_name, trial.backing_format = name, kind
        try:
            trial.pack()
        except LimitError as error:
            raise LimitError("No space left in the file header") from error
        image.begin()
        image.header.backing_name, image.header.backing_format = name, kind
        image.header_changed = True
        image.flush()
        image.backing = backing
        image.reload()


class _Plan:
    """The image as it is to be. What is not named keeps its value."""

    def __init__(self, image: WritableQcow2, options: dict[str, Value]) -> None:
        self.image = image
        self.options = options
        self.before = image.header.version
        self.version = self.before
        self.bits = int(options.get("refcount_bits", 1 << image.header.header.refcount_order))
        given = options.get("size") or image.size
        self.size = given if isinstance(given, GuestSize) else GuestSize(given)
        #: Key slots change.
        self.keys = any(name.startswith(PREFIX) for name in options)

    # -- checks, in the order in which the real program comes upon them

    def check(self) -> None:
        """Raise OptionError, NotSupported or LimitError for what cannot be done."""
        self._check_compat()
        self._check_encryption()
        self._check_data_file()
        self._check_refcount_bits()
        self._check_backing()
        if self.options.get("lazy_refcounts") and self.version < 3:
            raise OptionError(
                f"Lazy refcounts only supported with compatibility level 1.1 and above {_NEEDS_V3}",
                option="lazy_refcounts",
            )
        if self.options.get("size"):
            if self.size > INT64_MAX:
                raise OptionError("Image size cannot be negative", option="size")
            version = max(self.before, self.version)
            check_resize(self.image, self.size, "off", shown=self.size.shown, version=version)
        if self.version < self.before:
            from qimg.formats.qcow2.amend_downgrade import check_downgrade

            check_downgrade(self.image, bits=self.bits, size=self.size)
        self._check_header()

    def _check_compat(self) -> None:
        if "compat" in self.options:
            level = str(self.options["compat"])
            if level not in _VERSIONS:
                raise OptionError(f"Unknown compatibility level {level}", option="compat")
            self.version = _VERSIONS[level]

    def _check_encryption(self) -> None:
        if not self.keys:
            return
        if not self.image.encrypted:
            raise OptionError("Can't amend encryption options - encryption not present", option=_STATE)
        if self.image.header.header.crypt_method != CRYPT_LUKS:
            raise OptionError("Only LUKS encryption options can be amended", option=_STATE)

    def _check_data_file(self) -> None:
        header = self.image.header
        if "data_file" in self.options and not header.has_data_file:
            raise OptionError(
                "data-file can only be set for images that use an external data file", option="data_file"
            )
        if self.options.get("data_file_raw") and not header.data_file_raw:
            raise OptionError("data-file-raw cannot be set on existing images", option="data_file_raw")

    def _check_refcount_bits(self) -> None:
        bits = self.bits
        if not 1 <= bits <= 64 or bits & (bits - 1):
            raise OptionError(
                "Refcount width must be a power of two and may not exceed 64 bits", option="refcount_bits"
            )
        if "refcount_bits" in self.options and bits != 16 and self.version < 3:
            raise OptionError(
                f"Refcount widths other than 16 bits require compatibility level 1.1 or above {_NEEDS_V3}",
                option="refcount_bits",
            )
        if bits < 1 << self.image.header.header.refcount_order:
            _check_counts_fit(self.image, bits)

    def _check_backing(self) -> None:
        if not {"backing_file", "backing_fmt"} & self.options.keys():
            return
        now = self.image.backing
        name, kind = (None, None) if now is None else (now.name, now.format)
        if (self.options.get("backing_file"), self.options.get("backing_fmt")) != (name, kind):
            raise OptionError(
                "Cannot amend the backing file",
                option="backing_file",
                hint="You can use 'qemu-img rebase' instead.",
            )

    def _check_header(self) -> None:
        """Whether the new header fits into its cluster."""
        trial = parse(self.image.file, writable=True)
        if self.version != trial.version:
            trial.header.version = self.version
        self._set_header_options(trial)
        try:
            trial.pack()
        except LimitError as error:
            raise LimitError(f"Failed to update the image header: {error}") from error

    # -- changes

    def carry_out(self, progress: Callable[[int, int], None]) -> None:
        """Make the changes that `check` has allowed."""
        image = self.image
        if self.version > self.before:
            self._upgrade()
        if self.bits != 1 << image.header.header.refcount_order:
            from qimg.formats.qcow2.shadow_refcounts import rewrite_refcounts

            image.flush()
            rewrite_refcounts(image, self.bits, progress)
            image.reload()
        self._set_header_options(image.header)
        image.header_changed = True
        image.flush()
        image.reload()
        if self.size != image.size:
            ResizeChanges.resize(image, self.size, shown=self.size.shown)
        if self.version < self.before:
            from qimg.formats.qcow2.amend_downgrade import downgrade

            downgrade(image, progress)

    def _set_header_options(self, header: ParsedHeader) -> None:
        """What stands in the header and nowhere else."""
        options, fixed = self.options, header.header
        if "data_file" in options:
            header.data_file_name = str(options["data_file"]).encode("utf-8", "surrogateescape") or None
        if options.get("data_file_raw") is False:
            fixed.autoclear_features &= ~AUTOCLEAR_DATA_FILE_RAW
        if "lazy_refcounts" in options and header.version >= 3:
            fixed.compatible_features &= ~COMPAT_LAZY_REFCOUNTS
            fixed.compatible_features |= COMPAT_LAZY_REFCOUNTS if options["lazy_refcounts"] else 0

    def _upgrade(self) -> None:
        """To version 3: snapshots say how large their disk is, the header gets its new fields."""
        image, fixed = self.image, self.image.header.header
        snapshots = image.snapshot_entries()
        if any(len(snapshot.extra) < V3_EXTRA for snapshot in snapshots):
            old = fixed.snapshots_offset, read_snapshots(image.file, image.header).length
            table = b"".join(_with_extra(snapshot, image.size) for snapshot in snapshots)
            size = image.cluster_size
            first = image.refcounts.take(-(-len(table) // size))
            image.file.write(table, first * size)
            fixed.snapshots_offset = first * size
            image.refcounts.release(old[0] // size, -(-old[1] // size))
        fixed.version = 3
        image.header_changed = True
        image.flush()
        image.reload()


def _check_counts_fit(image: WritableQcow2, bits: int) -> None:
    """Raise NotSupported where a count needs more than `bits` bits."""
    width, limit = 1 << image.header.header.refcount_order, (1 << bits) - 1
    per_block = counters_per_block(image.cluster_size, width)
    for block, place in enumerate(image.refcounts.table):
        if not place:
            continue
        counts = unpack_counts(width, image.file.read(place, image.cluster_size))
        if max(counts) <= limit:
            continue
        slot, count = next((slot, count) for slot, count in enumerate(counts) if count > limit)
        raise NotSupported(
            f"Cannot decrease refcount entry width to {bits} bits: Cluster at offset"
            f" {(block * per_block + slot) * image.cluster_size:#x} has a refcount of {count}"
        )


def _with_extra(snapshot: Snapshot, size: int) -> bytes:
    """A table entry with all the extra data that version 3 knows; `size`: bytes of the disk, which the
    entry stands for where it does not say."""
    entry = snapshot.entry
    extra = SnapshotExtra(
        vm_state_size=snapshot.vm_state_size,
        disk_size=snapshot.disk_size(size),
        icount=NO_ICOUNT if snapshot.icount is None else snapshot.icount,
    ).pack()
    extra += snapshot.extra[len(extra) :]
    entry.extra_data_size = len(extra)
    raw = entry.pack() + extra + snapshot.id + snapshot.name
    return raw.ljust(round_up(len(raw), 8), b"\0")
