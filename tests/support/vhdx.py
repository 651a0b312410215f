"""Vhdx images by hand, from the tables of the vhdx sheet, with every field open to be wrong.

``Vhdx(size=..., block=...)`` is a sound image; change attributes, or the bytes by `patch`, and `write` it.
Nothing of qimg is used, not even its checksum.
"""

from __future__ import annotations

import struct
import uuid
from functools import cache
from pathlib import Path
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
BAT, METADATA = "2DC27766-F623-4200-9D64-115E9BFD4A08", "8B7CA206-4790-4B9A-B8FE-575F050F886E"
PARAMETERS = "CAA16737-FA36-4D43-B3B6-33F0AA44E76B"
SIZE = "2FA54224-CD1B-4876-B211-5DBED83BF4B8"
PAGE_83 = "BECA12AB-B2E6-4523-93EF-C309E000C746"
LOGICAL = "8141BF1D-A96F-4709-BA47-F233A8FAAB5F"
PHYSICAL = "CDA348C7-445D-4471-9CC9-E9885251C556"
LOCATOR = "A8D35F2D-B30B-454D-ABF7-D3D84834AB0C"
LOCATOR_TYPE = "B04AEFB7-D19E-4A81-B789-25B8E9445913"
NO_GUID = "00000000-0000-0000-0000-000000000000"
LOG_GUID = "11111111-2222-3333-4444-555555555555"
DATA_GUID = "DA7ADA7A-0001-0002-0003-040506070809"


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


@cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 * (value & 1))
        table.append(value)
    return table


def crc32c(data: bytes) -> int:
    """CRC-32C by its definition, a byte at a time."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def sealed(raw: bytes) -> bytes:
    """`raw` with its checksum at byte 4."""
    blank = raw[:4] + bytes(4) + raw[8:]
    return blank[:4] + struct.pack("<I", crc32c(blank)) + blank[8:]


class Vhdx:
    """Log at 1 MiB, BAT at 2 MiB, metadata at 3 MiB, blocks from 4 MiB on. `bat`: words by index; `data`:
    (place, bytes); `log`: bytes at the start of the log; `items`: GUID -> (bytes, flags); `regions`: (GUID,
    offset, length, flags)."""

    def __init__(
        self, *, size: int = 16 * MIB, block: int = MIB, parent: dict[str, str] | None = None
    ) -> None:
        self.signature = b"vhdxfile"
        self.header: dict[str, object] = {
            "signature": b"head", "file": DATA_GUID, "data": DATA_GUID, "log": NO_GUID, "log_version": 0,
            "version": 1, "log_length": MIB, "log_offset": MIB,
        }  # fmt: skip
        self.sequences = [7, 8]
        self.region_signature = b"regi"
        self.region_count: int | None = None
        self.regions = [(BAT, 2 * MIB, MIB, 1), (METADATA, 3 * MIB, MIB, 1)]
        self.items: dict[str, tuple[bytes, int]] = {
            PARAMETERS: (struct.pack("<II", block, 2 if parent else 0), 4),
            SIZE: (struct.pack("<Q", size), 6),
            PAGE_83: (bytes(range(16)), 6),
            LOGICAL: (struct.pack("<I", 512), 6),
            PHYSICAL: (struct.pack("<I", 512), 6),
        }
        if parent is not None:
            self.items[LOCATOR] = (locator(parent), 4)
        self.item_count: int | None = None
        self.metadata_signature = b"metadata"
        self.bat: dict[int, int] = {}
        self.data: list[tuple[int, bytes]] = []
        self.log = b""
        self.length = 4 * MIB
        self.patches: list[tuple[int, bytes]] = []

    def block(self, index: int, place: int, data: bytes, *, length: int = MIB, state: int = 6) -> None:
        """BAT word `index` leads to `data` at `place`."""
        self.bat[index] = place | state
        self.data.append((place, data))
        self.length = max(self.length, place + length)

    def patch(self, offset: int, data: bytes) -> None:
        """Put bytes into the finished file, checksums or not."""
        self.patches.append((offset, data))

    def headers(self) -> list[bytes]:
        made = []
        for sequence in self.sequences:
            head = self.header
            raw = struct.pack(
                "<4sIQ16s16s16sHHIQ", head["signature"], 0, sequence, guid(str(head["file"])),
                guid(str(head["data"])), guid(str(head["log"])), head["log_version"], head["version"],
                head["log_length"], head["log_offset"],
            )  # fmt: skip
            made.append(sealed(raw.ljust(4096, b"\0")))
        return made

    def region_table(self) -> bytes:
        count = len(self.regions) if self.region_count is None else self.region_count
        raw = struct.pack("<4sIII", self.region_signature, 0, count, 0)
        for name, offset, length, flags in self.regions:
            raw += guid(name) + struct.pack("<QII", offset, length, flags)
        return sealed(raw.ljust(65536, b"\0"))

    def metadata(self) -> bytes:
        count = len(self.items) if self.item_count is None else self.item_count
        raw = struct.pack("<8sHH20x", self.metadata_signature, 0, count)
        values = b""
        for name, (value, flags) in self.items.items():
            raw += guid(name[:36]) + struct.pack("<IIII", 65536 + len(values), len(value), flags, 0)
            values += value
        return raw.ljust(65536, b"\0") + values

    def write(self, path: Path) -> Path:
        """The file."""
        where = {name: offset for name, offset, *_ in self.regions}
        first, second = self.headers()
        parts = [
            (0, self.signature), (64 * KIB, first), (128 * KIB, second), (192 * KIB, self.region_table()),
            (256 * KIB, self.region_table()), (MIB, self.log),
        ]  # fmt: skip
        if METADATA in where:
            parts.append((where[METADATA], self.metadata()))
        if BAT in where:
            parts += [(where[BAT] + 8 * index, struct.pack("<Q", word)) for index, word in self.bat.items()]
        with path.open("wb") as file:
            file.truncate(self.length)
            for offset, data in (*parts, *self.data, *self.patches):
                if offset < 1 << 50:
                    file.seek(offset)
                    file.write(data)
        return path


def locator(keys: dict[str, str], *, kind: str = LOCATOR_TYPE) -> bytes:
    """A parent locator."""
    head, texts = guid(kind) + struct.pack("<HH", 0, len(keys)), b""
    start = len(head) + 12 * len(keys)
    for key, value in keys.items():
        name, text = key.encode("utf-16-le"), value.encode("utf-16-le")
        head += struct.pack("<IIHH", start + len(texts), start + len(texts) + len(name), len(name), len(text))
        texts += name + text
    return head + texts


def data_descriptor(offset: int, data: bytes, sequence: int) -> tuple[bytes, bytes]:
    """A descriptor of 4 KiB `data`, and its data sector."""
    head = struct.pack("<4s4s8sQQ", b"desc", data[-4:], data[:8], offset, sequence)
    sector = struct.pack("<4sI4084sI", b"data", sequence >> 32, data[8:-4], sequence & 0xFFFFFFFF)
    return head, sector


def zero_descriptor(offset: int, length: int, sequence: int) -> tuple[bytes, bytes]:
    """A descriptor of zeros."""
    return struct.pack("<4sIQQQ", b"zero", 0, length, offset, sequence), b""


def log_entry(
    *parts: tuple[bytes, bytes],
    sequence: int,
    tail: int = 0,
    flushed: int,
    last: int,
    name: str = LOG_GUID,
    length: int | None = None,
    count: int | None = None,
) -> bytes:
    """An entry with these descriptors."""
    heads, sectors = b"".join(head for head, _ in parts), b"".join(data for _, data in parts)
    size = -(-(64 + len(heads)) // 4096) * 4096
    total = size + len(sectors)
    raw = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, total if length is None else length, tail, sequence,
        len(parts) if count is None else count, 0, guid(name), flushed, last,
    )  # fmt: skip
    return sealed((raw + heads).ljust(size, b"\0") + sectors)


#: Where the two regions are: rows of the region table.
BAT_AT, META_AT = (BAT, 2 * MIB, MIB, 1), (METADATA, 3 * MIB, MIB, 1)

# -- waiting logs


def logged(image: Vhdx, *entries: bytes, log: str = LOG_GUID) -> None:
    """Give an image a log of these entries that waits to be replayed."""
    image.header["log"] = log
    image.log = b"".join(entries)


def sector(*words: int) -> bytes:
    """A sector of the log (4096 bytes) that begins with these words of 8 bytes."""
    return struct.pack(f"<{len(words)}Q", *words).ljust(4096, b"\0")


def entry(sequence: int, *parts: tuple[bytes, bytes], **values: Any) -> bytes:
    """An entry that is written while the file has 4 MiB."""
    values.setdefault("flushed", 4 * MIB)
    values.setdefault("last", 4 * MIB)
    return log_entry(*parts, sequence=sequence, **values)


def bat_entry(sequence: int, *words: int, **values: Any) -> bytes:
    """An entry that writes the first sector of the BAT."""
    return entry(sequence, data_descriptor(2 * MIB, sector(*words), sequence), **values)
