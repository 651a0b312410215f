"""Apple Data Compression (ADC), decoding only (dmg sheet, section 5).

A string of runs, told apart by the two highest bits of their first byte::

    1nnnnnnn                     n + 1 literal bytes follow
    01nnnnnn dddddddd dddddddd   copy n + 4 bytes from d + 1 bytes back
    00nnnndd dddddddd            copy n + 3 bytes from d + 1 bytes back

A copy may reach into what it writes itself, which repeats.
"""

from __future__ import annotations


def decode(data: bytes, size: int) -> bytes:
    """`size` bytes of `data`; what follows them is ignored. Raises ValueError, IndexError for bad data."""
    out = bytearray()
    at = 0
    while len(out) < size:
        first = data[at]
        if first & 0x80:
            count = first - 0x7F
            literals = data[at + 1 : at + 1 + count]
            if len(literals) < count:
                raise ValueError("it ends inside a run")
            out += literals
            at += 1 + count
            continue
        if first & 0x40:
            count = (first & 0x3F) + 4
            distance = (data[at + 1] << 8 | data[at + 2]) + 1
            at += 3
        else:
            count = (first >> 2) + 3
            distance = ((first & 3) << 8 | data[at + 1]) + 1
            at += 2
        start = len(out) - distance
        if start < 0:
            raise ValueError("a copy from before the beginning")
        part = out[start : start + count]
        if len(part) < count:
            part = (part * (count // distance + 1))[:count]
        out += part
    if len(out) > size:
        raise ValueError(f"it gives more than {size} bytes")
    return bytes(out)
