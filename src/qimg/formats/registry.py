"""Every format by name. Adding one is one line in FORMATS (and one in SIGNATURES, if it has a magic).

Modules are imported on first use, so a command pays only for what it opens.
"""

from __future__ import annotations

from qimg.errors import NotSupported, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import Format

# name -> "module:class"; None: known by name and signature, not written yet.
FORMATS: dict[str, str | None] = {
    "bochs": "qimg.formats.bochs:Bochs",
    "cloop": "qimg.formats.cloop:Cloop",
    "dmg": "qimg.formats.dmg:Dmg",
    "luks": "qimg.formats.luks:Luks",
    "parallels": "qimg.formats.parallels.format:Parallels",
    "qcow": "qimg.formats.qcow:Qcow",
    "qcow2": "qimg.formats.qcow2.format:Qcow2",
    "qed": "qimg.formats.qed:Qed",
    "raw": "qimg.formats.raw:Raw",
    "vdi": "qimg.formats.vdi:Vdi",
    "vhdx": "qimg.formats.vhdx.format:Vhdx",
    "vmdk": "qimg.formats.vmdk.format:Vmdk",
    "vpc": "qimg.formats.vpc.format:Vpc",
}

#: Accepted in place of a format's own name.
ALIASES = {"vhd": "vpc"}

_loaded: dict[str, Format] = {}


def supported() -> list[str]:
    """Names of the formats that can be opened, sorted."""
    return sorted(name for name, place in FORMATS.items() if place is not None)


def own_name(name: str) -> str:
    """`name`, or the name of the format that it is another word for."""
    return ALIASES.get(name, name)


def get(name: str) -> Format:
    """The format called `name`. Raises OptionError (no such driver), NotSupported (not written yet)."""
    name = own_name(name)
    known = _loaded.get(name)
    if known is not None:
        return known
    if name not in FORMATS:
        raise OptionError(f"Unknown driver '{name}'", option="driver")
    place = FORMATS[name]
    if place is None:
        raise NotSupported(f"Format '{name}' is not supported yet")
    module_name, _, class_name = place.partition(":")
    module = __import__(module_name, fromlist=[class_name])
    found: Format = getattr(module, class_name)()
    _loaded[name] = found
    return found
