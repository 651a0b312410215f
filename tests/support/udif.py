"""Apple disk images put together by hand, from chunks (dmg sheet). Compressed bytes come from the caller."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ZERO, RAW, IGNORE = 0, 1, 2
ADC, ZLIB, BZIP2, LZFSE, XZ = 0x80000004, 0x80000005, 0x80000006, 0x80000007, 0x80000008
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF


class Chunk(NamedTuple):
    """`sectors` sectors from `sector` on, of the kind `kind`; `data` as stored. `at`, `length`: what the
    table says instead of where the data is."""

    kind: int
    sector: int
    sectors: int
    data: bytes = b""
    at: int | None = None
    length: int | None = None


def block_list(chunks: Sequence[Chunk], places: Sequence[int], *, first: int = 0, base: int = 0) -> bytes:
    """A ``mish`` structure; `places` are the offsets of the chunks' data in the data fork."""
    rows = [
        struct.pack(
            ">IIQQQQ",
            chunk.kind,
            0,
            chunk.sector - first & (1 << 64) - 1,
            chunk.sectors,
            (place if chunk.at is None else chunk.at) - base,
            len(chunk.data) if chunk.length is None else chunk.length,
        )
        for chunk, place in zip(chunks, places, strict=True)
    ]
    total = sum(chunk.sectors for chunk in chunks) & (1 << 64) - 1
    rows.append(struct.pack(">IIQQQQ", END, 0, total, 0, places[-1] - base if places else 0, 0))
    head = struct.pack(">4sIQQQII24x136xI", b"mish", 1, first, total, base, 0, 0, len(rows))
    return head + b"".join(rows)


def property_list(lists: Sequence[bytes]) -> bytes:
    """The XML that holds these block lists."""
    entries = "".join(
        "<dict><key>Attributes</key><string>0x0050</string><key>CFName</key><string>p</string>"
        f"<key>Data</key>\n<data>\n{base64.encodebytes(data).decode()}</data>\n<key>ID</key><string>{number}"
        "</string><key>Name</key><string>p</string></dict>"
        for number, data in enumerate(lists)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN"'
        ' "http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n<plist version="1.0"><dict><key>resource-fork'
        f"</key><dict><key>blkx</key><array>{entries}</array></dict></dict></plist>\n"
    ).encode()


def resource_fork(lists: Sequence[bytes]) -> bytes:
    """The resource fork that holds these block lists."""
    data = b"".join(struct.pack(">I", len(part)) + part for part in lists)
    return struct.pack(">IIII", 256, 256 + len(data), len(data), 0) + bytes(240) + data


def trailer(**fields: int) -> bytes:
    """The last 512 bytes."""
    values = {
        "data_offset": 0, "data_length": 0, "fork_offset": 0, "fork_length": 0,
        "xml_offset": 0, "xml_length": 0, "sectors": 0,
    }  # fmt: skip
    values.update(fields)
    mask = (1 << 64) - 1
    words = {name: value & mask for name, value in values.items()}
    return struct.pack(
        ">4sIIIQQQQQII16s136sQQ120s136sIQ12s",
        b"koly", 4, 512, 1, 0, words["data_offset"], words["data_length"], words["fork_offset"],
        words["fork_length"], 1, 1, b"", b"", words["xml_offset"], words["xml_length"], b"", b"", 1,
        words["sectors"], b"",
    )  # fmt: skip


def udif(
    chunks: Sequence[Chunk],
    *,
    sectors: int | None = None,
    fork: bool = False,
    split: int = 0,
    lead: bytes = b"",
    tail: bytes = b"",
    **fields: int,
) -> bytes:
    """An image of these chunks. `sectors`: its size, if not where they end. `fork`: tables in a resource
    fork. `split`: so many chunks in a block list, else all in one. `lead` stands before the data fork, `tail`
    after the trailer; `fields` replace those of the trailer."""
    places, data = [], b""
    for chunk in chunks:
        places.append(len(data))
        data += chunk.data
    step = split or len(chunks) or 1
    lists = [
        block_list(
            chunks[low : low + step],
            places[low : low + step],
            first=chunks[low].sector,
            base=places[low] if chunks[low].at is None else 0,
        )
        for low in range(0, len(chunks), step)
    ] or [block_list([], [])]
    tables = resource_fork(lists) if fork else property_list(lists)
    place = len(lead) + len(data)
    size = max((chunk.sector + chunk.sectors for chunk in chunks), default=0) if sectors is None else sectors
    kind = "fork" if fork else "xml"
    values = {"data_offset": len(lead), "data_length": len(data), "sectors": size}
    values |= {f"{kind}_offset": place, f"{kind}_length": len(tables)}
    return lead + data + tables + trailer(**(values | fields)) + tail


def write(path: Path, *args: object, **options: object) -> Path:
    """`udif` as a file."""
    path.write_bytes(udif(*args, **options))  # type: ignore[arg-type]
    return path
