"""What the first 512 bytes of an image tell; every expectation was seen with the real program."""

from __future__ import annotations

from pathlib import Path

import pytest

from qimg.graph.probe import probe
from support.run import run_real


def _bochs(
    text: bytes = b"Bochs Virtual HD Image", kind: bytes = b"Growing", version: int = 0x20000
) -> bytes:
    fields = text.ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + kind.ljust(16, b"\0")
    return fields + version.to_bytes(4, "little")


_CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"

CONTENTS: list[tuple[bytes, str]] = [
    (b"", "raw"),
    (b"\0", "raw"),
    (b"QFI\xfb\0\0\0\0", "raw"),
    (b"QFI\xfb\0\0\0\1", "qcow"),
    (b"QFI\xfb\0\0\0\2", "qcow2"),
    (b"QFI\xfb\0\0\0\4", "qcow2"),
    (b"QFI\xfb\xff\0\0\2", "qcow2"),
    (b"QFI\xfb\0\0\0", "raw"),
    (b"QED\0", "qed"),
    (b"QED", "qed"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"conecti", "raw"),
    (b"LUKS\xba\xbe\0\1", "luks"),
    (b"LUKS\xba\xbe\0\2", "raw"),
    (b"WithoutFreeSpace\2\0\0\0", "parallels"),
    (b"WithouFreSpacExt\2\0\0\0", "parallels"),
    (b"WithoutFreeSpace\1\0\0\0", "raw"),
    (_bochs(), "bochs"),
    (_bochs(version=0x10000), "bochs"),
    (_bochs(version=0x30000), "raw"),
    (_bochs(kind=b"Undoable"), "raw"),
    (_bochs(b"Bochs Virtual HD ImageX"), "raw"),
    (_bochs(b"Bochs Virtual HD Image\0more"), "bochs"),
    (_CLOOP, "cloop"),
    (_CLOOP[:10], "raw"),
    (_CLOOP[:-1] + b" ", "raw"),
    (b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
    (b"# Disk DescriptorFile\n", "raw"),
    (b"version=1\n", "vmdk"),
    (b"version=3\r\n", "vmdk"),
    (b"version=4\n", "raw"),
    (b"version=1", "raw"),
    (b"version=1 \n", "raw"),
    (b" version=1\n", "raw"),
    (b"   \r\nversion=2\n", "vmdk"),
    (b"\nversion=1\n", "raw"),
    (b"\t\nversion=1\n", "raw"),
    (b"# a\n# b\n   \n# c\nversion=3\r\n", "vmdk"),
    (b"# a\nencoding=x\nversion=1\n", "raw"),
    (b"#" + b"x" * 501 + b"\nversion=1\n", "raw"),
    (b"#" + b"x" * 500 + b"\nversion=1\n", "vmdk"),
]


@pytest.mark.parametrize(("content", "format"), CONTENTS, ids=lambda value: repr(value)[:40])
def test_content_tells_the_format(content: bytes, format: str) -> None:
    assert probe(content[:512], "image") == format


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.dmg", b"x", "dmg"),
        ("a.dmg", b"", "raw"),
        ("a.dmg", b"QED\0", "qed"),
        ("a.DMG", b"x", "raw"),
        (".dmg", b"x", "raw"),
        ("a.dmg.raw", b"x", "raw"),
        ("a.qcow2", b"x", "raw"),
    ],
)
def test_of_all_names_only_dmg_tells_something(name: str, content: bytes, format: str) -> None:
    assert probe(content, name) == format


@pytest.mark.peer("qemu-img")
def test_the_real_program_takes_the_same_contents_for_raw(work: Path) -> None:
    for number, (content, format) in enumerate(CONTENTS):
        name = f"{number}"
        (work / name).write_bytes(content)
        found = run_real(["info", name], work)
        assert ("file format: raw" in found.out) == (format == "raw"), content
