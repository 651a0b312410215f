"""The parent of a differencing image: how it is named, and what says which sectors are its (vhdx sheet 9)."""

from __future__ import annotations

from qimg.formats.base import Reference
from qimg.formats.parent_path import plain_file
from qimg.formats.vhdx.structs import guid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.storage.base import Storage

_LINKAGES = ("parent_linkage", "parent_linkage2")
_PATHS = ("relative_path", "absolute_win32_path", "volume_path")
_GUID_DIGITS = 32


def linkages(locator: dict[str, str]) -> list[bytes]:
    """Data write GUIDs that the parent may have."""
    found = []
    for key in _LINKAGES:
        digits = locator.get(key, "").strip("{}").replace("-", "")
        if len(digits) == _GUID_DIGITS and all(digit in "0123456789abcdefABCDEF" for digit in digits):
            found.append(guid(digits))
    return found


def reference(file: Storage, locator: dict[str, str]) -> Reference:
    """What the locator names, as a plain file. Raises FormatError."""
    from qimg.formats.vhdx.structs import fail

    name = plain_file(*(locator.get(key, "") for key in _PATHS))
    if not name:
        fail(file, "The differencing image does not name its parent", "parent locator", 0)
    return Reference(name, "vhdx")


def bit_runs(bits: bytes) -> Iterator[tuple[int, int, bool]]:
    """(first, stop, value) of runs of equal bits, the least significant of each byte first."""
    total = len(bits) * 8
    at = 0
    while at < total:
        value = bool(bits[at >> 3] >> (at & 7) & 1)
        stop = _run_end(bits, at, value, total)
        yield at, stop, value
        at = stop


def _run_end(bits: bytes, at: int, value: bool, total: int) -> int:
    whole = 0xFF if value else 0
    at += 1
    while at < total:
        if not at & 7 and bits[at >> 3] == whole:
            rest = bits[at >> 3 :]
            at += 8 * (len(rest) - len(rest.lstrip(bytes([whole]))))
            continue
        if bool(bits[at >> 3] >> (at & 7) & 1) != value:
            break
        at += 1
    return at
