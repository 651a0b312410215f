"""Options of opening a qcow2 image (``json:``, ``--image-opts``) and what may be wrong with them.

Most tune the reference program's caches and discards: they are checked as it does and then have nothing to
change here.
"""

from __future__ import annotations

from qimg.errors import OptionError
from qimg.formats.qcow2.structs import CRYPT_NONE
from qimg.options import BOOL, NUM, SIZE, STR, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.options import Value

_TEMPLATES = ("none", "constant", "cached", "all")
_AREAS = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)

OPEN_OPTIONS: tuple[Option, ...] = (
    Option("data-file", STR, None, "The external data file; its options have this prefix"),
    Option("lazy-refcounts", BOOL, None, "Postpone refcount updates"),
    Option("pass-discard-request", BOOL, None, "Pass guest discard requests to the layer below"),
    Option("pass-discard-snapshot", BOOL, None, "Discard what deleting a snapshot frees"),
    Option("pass-discard-other", BOOL, None, "Discard whatever else becomes free"),
    Option("discard-no-unref", BOOL, None, "Keep clusters that the guest discards"),
    Option("overlap-check", STR, None, "Which writes to check for overlap (none, constant, cached, all)"),
    Option("overlap-check.template", STR, None, "The same"),
    *(Option(f"overlap-check.{area}", BOOL, None, "Check for overlap with this area") for area in _AREAS),
    Option("cache-size", SIZE, None, "Most memory of both metadata caches"),
    Option("l2-cache-size", SIZE, None, "Most memory of the L2 table cache"),
    Option("l2-cache-entry-size", SIZE, None, "Size of one entry of the L2 table cache"),
    Option("refcount-cache-size", SIZE, None, "Most memory of the refcount block cache"),
    Option("cache-clean-interval", NUM, None, "Seconds after which unused cache entries go"),
    Option("encrypt.*", STR, None, "How the data is encrypted: format (aes, luks) and key-secret"),
)


def check_open_options(values: dict[str, Value], header: ParsedHeader) -> None:
    """Raise OptionError for values that the image cannot be opened with, in the real program's order."""
    _check_caches(values, header.cluster_size)
    if int(values.get("cache-clean-interval", 0)) >= 1 << 32:
        raise OptionError("Cache clean interval too big", option="cache-clean-interval")
    if values.get("lazy-refcounts") and header.version < 3:
        raise OptionError(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            option="lazy-refcounts",
        )
    _check_overlap(values)
    if "encrypt.format" in values and header.header.crypt_method == CRYPT_NONE:
        raise OptionError(
            f"No encryption in image header, but options specified format '{values['encrypt.format']}'",
            option="encrypt.format",
        )


def _check_caches(values: dict[str, Value], cluster_size: int) -> None:
    total, tables, blocks = (
        None if name not in values else int(values[name])
        for name in ("cache-size", "l2-cache-size", "refcount-cache-size")
    )
    if total is not None:
        if tables is not None and blocks is not None:
            message = "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            raise OptionError(message, option="cache-size")
        if tables is not None and tables > total:
            raise OptionError("l2-cache-size may not exceed cache-size", option="l2-cache-size")
        if blocks is not None and blocks > total:
            raise OptionError("refcount-cache-size may not exceed cache-size", option="refcount-cache-size")
    entry = int(values.get("l2-cache-entry-size", cluster_size))
    if not 512 <= entry <= cluster_size or entry & (entry - 1):
        raise OptionError(
            f"L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})",
            option="l2-cache-entry-size",
        )


def _check_overlap(values: dict[str, Value]) -> None:
    short, long = values.get("overlap-check"), values.get("overlap-check.template")
    if short is not None and long is not None and short != long:
        raise OptionError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{short}') and"
            f" 'overlap-check.template' ('{long}')",
            option="overlap-check",
        )
    template = short if short is not None else long
    if template is not None and template not in _TEMPLATES:
        raise OptionError(
            f"Unsupported value '{template}' for qcow2 option 'overlap-check'."
            f" Allowed are any of the following: {', '.join(_TEMPLATES)}",
            option="overlap-check",
        )
