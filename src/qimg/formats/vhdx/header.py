"""The two headers, of which the one with the higher sequence number counts (vhdx sheet 1).

A change is written into the other one, so that there is a whole one at any moment; done twice, both tell the
same.
"""

from __future__ import annotations

from qimg.formats.vhdx.structs import (
    HEADER_AREA,
    HEADER_BYTES,
    HEADERS,
    MIB,
    NO_GUID,
    SIGNATURE,
    Header,
    fail,
    is_sealed,
    sealed,
)
from qimg.identity import guid_bytes, random_uuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Storage

_SEQUENCE_END = 1 << 64


class Headers:
    """The headers of one file; `current` is the one that counts."""

    def __init__(self, file: Storage, current: Header, slot: int, tail: bytes) -> None:
        """`slot`: which of the two it is. `tail`: the bytes that follow it, which stay."""
        self.file = file
        self.current = current
        self._slot = slot
        self._tail = tail

    @classmethod
    def read(cls, file: Storage) -> Headers:
        """Find the header that counts and validate it. Raises FormatError, StorageError."""
        found: list[tuple[Header, int, bytes]] = []
        for slot, offset in enumerate(HEADERS):
            raw = bytes(file.read(offset, HEADER_BYTES))
            header = Header.unpack(raw)
            if header.signature == b"head" and header.version == 1 and is_sealed(raw):
                found.append((header, slot, raw))
        same = len({header.sequence for header, _slot, _raw in found}) < len(found)
        if same and found[0][2] != found[1][2]:
            found = []  # nothing tells which of them is right
        if not found:
            fail(file, "No valid VHDX header found", "header", HEADERS[0])
        header, slot, raw = max(found, key=lambda one: one[0].sequence)
        _validate(file, header, HEADERS[slot])
        return cls(file, header, slot, raw[Header.SIZE :])

    @classmethod
    def new(cls, file: Storage, log_offset: int, log_length: int, *what: object) -> Headers:
        """Headers of a new image; `write_new` puts them into the file."""
        from qimg.identity import random_bytes

        header = Header(
            signature=b"head",
            sequence=int.from_bytes(random_bytes(4, "vhdx sequence", *what), "little"),
            file_guid=fresh_guid("vhdx file", *what),
            data_guid=fresh_guid("vhdx data", *what),
            version=1,
            log_length=log_length,
            log_offset=log_offset,
        )
        return cls(file, header, 1, bytes(HEADER_BYTES - Header.SIZE))

    def write_new(self) -> None:
        """Write both."""
        self.update()
        self.update()

    def update(self, *, log_guid: bytes | None = None, both: bool = False) -> None:
        """Write the current state, with another log GUID if one is given, as the next header, durably.

        `both`: twice, so that both headers say it. Raises StorageError."""
        if log_guid is not None:
            self.current.log_guid = log_guid
        for _ in range(2 if both else 1):
            header = self.current
            header.sequence = (header.sequence + 1) % _SEQUENCE_END
            slot = 1 - self._slot
            self.file.write(sealed(header.pack() + self._tail), HEADERS[slot])
            self.file.flush()
            self._slot = slot

    def renew(self) -> None:
        """Say that file and data change from now on: new GUIDs."""
        header = self.current
        header.file_guid = fresh_guid("vhdx file", header.sequence, header.file_guid)
        header.data_guid = fresh_guid("vhdx data", header.sequence, header.data_guid)
        self.update(both=True)

    @property
    def has_log(self) -> bool:
        """The log may hold changes that are not in their places yet."""
        return self.current.log_guid != NO_GUID and self.current.log_length > 0


def fresh_guid(*what: object) -> bytes:
    """A random GUID as it is stored (see `qimg.identity`)."""
    return guid_bytes(random_uuid(*what))


def check_signature(file: Storage) -> None:
    """Raise FormatError where the file does not start as a vhdx file."""
    found = bytes(file.read(0, len(SIGNATURE)))
    if found != SIGNATURE:
        fail(file, "not a VHDX file", "file type.signature", 0, expected=SIGNATURE, found=found)


def _validate(file: Storage, header: Header, at: int) -> None:
    """What section 8 says of the log's fields."""

    def wrong(message: str, field: str) -> None:
        fail(file, message, f"header.{field}", at + Header.offset_of(field), found=getattr(header, field))

    if header.log_version:
        wrong(f"Unsupported log version {header.log_version}", "log_version")
    if header.log_offset < HEADER_AREA or header.log_offset % MIB:
        wrong(f"Invalid log offset {header.log_offset:#x}", "log_offset")
    if header.log_length % MIB and header.log_guid != NO_GUID:
        wrong(f"Invalid log length {header.log_length:#x}", "log_length")
    if header.log_offset + header.log_length >= 1 << 63:
        wrong(f"Invalid log offset {header.log_offset:#x}", "log_offset")
