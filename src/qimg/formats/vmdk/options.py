"""Creation options, and what they mean (vmdk sheet 4.3)."""

from __future__ import annotations

from qimg.errors import LimitError, OptionError
from qimg.formats.vmdk import descriptor as text
from qimg.formats.vmdk.structs import GRAIN, MAX_DIRECTORY, SPLIT, TABLE_ENTRIES
from qimg.options import BOOL, SIZE, STR, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.options import Value

ADAPTERS = ("ide", "buslogic", "lsilogic", "legacyESX")
SUBFORMATS = (
    text.MONOLITHIC_SPARSE,
    text.MONOLITHIC_FLAT,
    text.SPLIT_SPARSE,
    text.SPLIT_FLAT,
    text.STREAM,
)
_FLAT = (text.MONOLITHIC_FLAT, text.SPLIT_FLAT)
_UNDEFINED = "undefined"
_HARDWARE, _HARDWARE_6 = "4", "6"
_TOOLS = "2147483647"
#: A directory has that many entries at most.
MAX_SPARSE = MAX_DIRECTORY * TABLE_ENTRIES * GRAIN
#: About what a descriptor of 1 MiB can name.
_MAX_SPLIT = 20000 * SPLIT

CREATE_OPTIONS = (
    Option("size", SIZE, None, "Virtual disk size"),
    Option("adapter_type", STR, None, "Disk adapter: ide (default), lsilogic, buslogic or legacyESX"),
    Option("backing_file", STR, None, "File name of the parent image"),
    Option("backing_fmt", STR, None, "Format of the parent image, which has to be vmdk"),
    Option("compat6", BOOL, False, "Virtual hardware version 6"),
    Option("hwversion", STR, _UNDEFINED, "Virtual hardware version"),
    Option("toolsversion", STR, None, "Version of the guest tools"),
    Option("subformat", STR, None, f"Kind of image: {', '.join(SUBFORMATS)}"),
    Option("zeroed_grain", BOOL, None, "Note zeros in grain tables instead of writing them"),
)


class Plan:
    """Checked options of a new image. Raises OptionError, LimitError."""

    def __init__(self, size: int, options: dict[str, Value]) -> None:
        self.size = size
        self.kind = str(options.get("subformat", text.MONOLITHIC_SPARSE))
        self.adapter = str(options.get("adapter_type", ADAPTERS[0]))
        self.zeroed_grain = bool(options.get("zeroed_grain", False))
        hint = options.get("backing_file")
        self.hint = None if hint is None else str(hint)
        if self.adapter not in ADAPTERS:
            raise OptionError(f"invalid parameter value: {self.adapter}", option="adapter_type")
        if self.kind not in SUBFORMATS:
            raise OptionError(f"invalid parameter value: {self.kind}", option="subformat")
        self.hardware = self._hardware(options)
        self.tools = str(options.get("toolsversion", _TOOLS))
        if self.hint is not None and options.get("backing_fmt", "vmdk") != "vmdk":
            raise OptionError("backing_file must be a vmdk image", option="backing_fmt")
        if self.flat and self.hint is not None:
            raise OptionError("Flat image can't have backing file", option="backing_file")
        if self.flat and self.zeroed_grain:
            raise OptionError("Flat image can't enable zeroed grain", option="zeroed_grain")
        for name, value in (
            ("hwversion", self.hardware),
            ("toolsversion", self.tools),
            ("backing_file", self.hint or ""),
        ):
            text.check_value(name, value)
        limit = _MAX_SPLIT if self.split else MAX_SPARSE
        if size > limit and self.kind != text.MONOLITHIC_FLAT:
            raise LimitError(
                f"The image size is too large for file format 'vmdk' ({self.kind}: at most {limit} bytes)"
            )

    @staticmethod
    def _hardware(options: dict[str, Value]) -> str:
        version = str(options.get("hwversion", _UNDEFINED))
        compat6 = bool(options.get("compat6", False))
        if compat6 and version != _UNDEFINED:
            raise OptionError("compat6 cannot be enabled with hwversion set", option="compat6")
        if version != _UNDEFINED:
            return version
        return _HARDWARE_6 if compat6 else _HARDWARE

    @property
    def flat(self) -> bool:
        """Extents are plain bytes."""
        return self.kind in _FLAT

    @property
    def split(self) -> bool:
        """Extents of 2 GiB."""
        return self.kind in (text.SPLIT_SPARSE, text.SPLIT_FLAT)

    @property
    def separate(self) -> bool:
        """The descriptor is a file of its own."""
        return self.flat or self.split
