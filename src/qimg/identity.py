"""Times and identifiers that new images carry. With SOURCE_DATE_EPOCH in the environment they depend on the
image only, so that the same input gives the same file."""

from __future__ import annotations

import os


def _epoch() -> int | None:
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if text.isascii() and text.isdigit() else None


def now() -> int:
    """Seconds since 1970, or what SOURCE_DATE_EPOCH says."""
    epoch = _epoch()
    if epoch is not None:
        return epoch
    import time

    return int(time.time())


def random_bytes(length: int, *what: object) -> bytes:
    """`length` (32 at most) random bytes; with SOURCE_DATE_EPOCH a digest of it and of `what`."""
    epoch = _epoch()
    if epoch is None:
        return os.urandom(length)
    from hashlib import sha256

    return sha256(repr((epoch, *what)).encode()).digest()[:length]


def random_uuid(*what: object) -> bytes:
    """A version 4 UUID, 16 bytes in the order in which they are printed (RFC 9562)."""
    raw = bytearray(random_bytes(16, *what))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


def guid_bytes(uuid: bytes) -> bytes:
    """The same UUID with its first three fields little-endian, as Microsoft's GUIDs are stored."""
    return uuid[3::-1] + uuid[5:3:-1] + uuid[7:5:-1] + uuid[8:]
