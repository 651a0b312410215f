"""Where an image's descriptor text is, and how it is changed (vmdk sheet 3, 6)."""

from __future__ import annotations

from qimg.errors import FormatError, LimitError
from qimg.formats.vmdk import descriptor
from qimg.formats.vmdk.structs import DESCRIPTOR_SECTORS, SECTOR
from qimg.identity import random_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.vmdk.descriptor import Descriptor
    from qimg.formats.vmdk.structs import SparseHeader
    from qimg.storage.base import Storage

#: Not to be used as a CID: no parent, and its neighbours.
_RESERVED = (0, 0xFFFFFFFE, descriptor.NO_PARENT)
_ROOM = DESCRIPTOR_SECTORS * SECTOR
#: Where embedded text is (real programs look nowhere else).
_EMBEDDED = SECTOR


def new_cid(*what: object) -> int:
    """A random word that can be a CID; `what` tells it from others where nothing may be random."""
    number = 0
    while True:
        cid = int.from_bytes(random_bytes(4, "vmdk CID", number, *what), "little")
        if cid not in _RESERVED:
            return cid
        number += 1


class DescriptorPlace:
    """The text at byte `offset` of `file`: in `room` bytes inside of an extent, or (None) the whole file."""

    def __init__(self, file: Storage, offset: int, room: int | None) -> None:
        self.file = file
        self.offset = offset
        self.room = room

    @classmethod
    def embedded(cls, file: Storage, header: SparseHeader | None = None) -> DescriptorPlace:
        """Inside of an extent. Raises FormatError."""
        if header is None or not header.descriptor_offset:
            return cls(file, _EMBEDDED, _ROOM)
        room = min(header.descriptor_size * SECTOR or _ROOM, descriptor.MAX_TEXT + 1)
        if header.descriptor_offset * SECTOR >= file.size:
            raise FormatError(
                "invalid VMDK image descriptor (it lies behind the end of the file)",
                file=file.name,
                field="header.descriptor_offset",
                found=header.descriptor_offset,
            )
        return cls(file, header.descriptor_offset * SECTOR, room)

    def read(self) -> bytes:
        """The area, at most as much as is ever read of a descriptor."""
        size = min(self.file.size, descriptor.MAX_TEXT) if self.room is None else self.room
        return bytes(self.file.read(self.offset, size))

    def parse(self, *, extents: bool) -> Descriptor:
        """Raises FormatError, UnsupportedFeature, StorageError."""
        return descriptor.parse(self.read(), self.file.name, extents=extents)

    def renew_cid(self, old: int) -> int:
        """Give the image another CID, durably, by a write inside of a sector; returns it.

        Raises StorageError."""
        raw = self.read().partition(b"\0")[0]
        for line in raw.split(b"\n"):
            key, _, value = line.partition(b"=")
            if key.strip().lower() == b"cid":
                digits = len(value.strip())
                break
        else:
            digits = 8
        cid = old
        number = 0
        while cid == old:
            cid = new_cid(old, number) & ((1 << 4 * digits) - 1)
            number += 1
        self.update((("CID", f"{cid:0{digits}x}"),))
        return cid

    def update(self, values: Iterable[tuple[str, str]], *, sectors: int | None = None) -> None:
        """Change values, and `sectors` of the first extent line, durably.

        Raises LimitError where the text gets too long, StorageError."""
        area = self.read()
        old = area.partition(b"\0")[0]
        new = descriptor.replaced(area, values, sectors)
        if len(new) == len(old):
            at = [number for number in range(len(new)) if new[number] != old[number]]
            if at:
                self.file.write(new[at[0] : at[-1] + 1], self.offset + at[0])
        elif self.room is None:
            self.file.write(new, self.offset)
            if self.file.size > len(new) and not self.file.fixed_size:
                self.file.resize(len(new))
        else:
            if len(new) > self.room:
                raise LimitError("The descriptor has no room for longer values")
            self.file.write(new.ljust(self.room, b"\0"), self.offset)
        self.file.flush()
