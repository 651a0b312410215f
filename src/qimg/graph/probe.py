"""What format an image has, told from its first 512 bytes (common sheet 9, raw sheet 2).

Signatures are data, for all known formats, supported or not: an image of a format that cannot be opened
yet must still never pass for raw.
"""

from __future__ import annotations

#: Bytes that probing looks at.
PROBE_BYTES = 512

_SURE = 100
_WEAK = 2
_RAW = 1

# (format, offset, signature): the format is certain when these bytes stand there.
_MAGICS: tuple[tuple[str, int, bytes], ...] = (
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("luks", 0, b"LUKS\xba\xbe\0\x01"),
)

_QCOW = b"QFI\xfb"
_PARALLELS = (b"WithoutFreeSpace", b"WithouFreSpacExt")
_CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
# Three texts in fields of 32, 16 and 16 bytes, then one of the versions.
_BOCHS = ((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"))
_BOCHS_VERSIONS = (0x10000, 0x20000)
_VMDK_VERSIONS = (b"version=1", b"version=2", b"version=3")


def probe(head: bytes | bytearray, filename: str) -> str:
    """Name of the format of an image that starts with `head` (up to 512 bytes, shorter if the image is)
    and is called `filename`. An empty image is raw."""
    if not head:
        return "raw"
    head = bytes(head[:PROBE_BYTES]).ljust(PROBE_BYTES, b"\0")
    best, winner = _RAW, "raw"
    for score, name in _scores(head, filename):
        if score > best:
            best, winner = score, name
    return winner


def _scores(head: bytes, filename: str) -> list[tuple[int, str]]:
    """(score, format) of all that recognise the image."""
    found = [(_SURE, name) for name, offset, magic in _MAGICS if head.startswith(magic, offset)]
    if head.startswith(_QCOW) and int.from_bytes(head[4:8], "big") >= 2:
        found.append((_SURE, "qcow2"))
    if head.startswith(_PARALLELS) and int.from_bytes(head[16:20], "little") == 2:
        found.append((_SURE, "parallels"))
    if _is_descriptor(head):
        found.append((_SURE, "vmdk"))
    if _is_bochs(head):
        found.append((_SURE, "bochs"))
    if head.startswith(_CLOOP):
        found.append((_WEAK, "cloop"))
    if filename.endswith(".dmg") and len(filename) > len(".dmg"):
        found.append((_WEAK, "dmg"))
    return found


def _is_bochs(head: bytes) -> bool:
    texts = all(head.startswith(text, offset) for offset, text in _BOCHS)
    return texts and int.from_bytes(head[64:68], "little") in _BOCHS_VERSIONS


def _is_descriptor(head: bytes) -> bool:
    """A VMDK descriptor: comments and lines of blanks, then a version line (vmdk sheet 2)."""
    *lines, _ = head.split(b"\n")
    for line in lines:
        if line.startswith(b"#"):
            continue
        if line.startswith(b" "):
            if line.removesuffix(b"\r").strip(b" "):
                return False
            continue
        return line.removesuffix(b"\r") in _VMDK_VERSIONS
    return False
