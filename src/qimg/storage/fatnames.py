"""Names in FAT directories: the short one that every entry has, and the entries that hold the long one.

The rules are those of Microsoft's description of the FAT file system. Where it has a choice, the names are
those that the real program's ``fat:`` directories show.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

#: What a short name may hold besides letters and digits.
_ALLOWED = frozenset(b"$%'-_@~`!(){}^#&ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_BASE, _EXTENSION = 8, 3
_DOT = ord(".")
#: Characters of a long name in one entry.
_PART = 13
_LAST = 0x40
_LONG = 0x0F


def short_name(name: bytes, taken: Container[bytes]) -> bytes:
    """The 11 bytes of the short name for `name`: in capitals, without what no short name can hold, cut, and
    with a number if that loses anything or gives a name in `taken`."""
    base, extension, lossy = _shorten(name)
    whole = base.ljust(_BASE) + extension
    number = 1
    while lossy or whole in taken:
        tail = b"~%d" % number
        whole = (base[: _BASE - len(tail)] + tail).ljust(_BASE) + extension
        lossy = False
        number += 1
    return whole


def _shorten(name: bytes) -> tuple[bytes, bytes, bool]:
    """The part of `name` before the dot, the padded extension, and whether anything is lost."""
    upper = name.upper()
    base = bytearray()
    lossy = False
    at = 0
    while at < len(upper) and len(base) < _BASE:
        letter = upper[at]
        if letter in _ALLOWED:
            base.append(letter)
        elif letter == _DOT and base:
            break
        else:
            lossy = True
        at += 1
    dot = upper.rfind(b".")
    if dot < at:
        return bytes(base), bytes(_EXTENSION).replace(b"\0", b" "), lossy or at < len(upper)
    lossy = lossy or dot != at
    kept = bytes(letter for letter in upper[dot + 1 :] if letter in _ALLOWED)
    lossy = lossy or len(kept) < len(upper) - dot - 1 or len(kept) > _EXTENSION
    return bytes(base), kept[:_EXTENSION].ljust(_EXTENSION), lossy


def checksum(short: bytes) -> int:
    """What ties the entries of a long name to the short one."""
    total = 0
    for letter in short:
        total = ((total & 1) << 7 | total >> 1) + letter & 0xFF
    return total


def long_entries(name: str, short: bytes) -> bytes:
    """The directory entries of the long name `name`, last part first."""
    text = name.encode("utf-16-le")
    length = 2 * _PART
    count = -(-len(text) // length)
    if len(text) < count * length:
        text = (text + b"\0\0").ljust(count * length, b"\xff")
    total = checksum(short)
    entries = bytearray()
    for number in range(count, 0, -1):
        part = text[(number - 1) * length : number * length]
        order = number | (_LAST if number == count else 0)
        entries += bytes((order,)) + part[:10] + bytes((_LONG, 0, total)) + part[10:22] + bytes(2) + part[22:]
    return bytes(entries)
