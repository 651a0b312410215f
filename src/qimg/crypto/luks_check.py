"""What a LUKS1 header has to satisfy before anything in it is used (luks sheet 5)."""

from __future__ import annotations

from qimg.crypto import names
from qimg.crypto.luks import (
    ACTIVE,
    HEADER_SECTORS,
    INACTIVE,
    MAGIC,
    SLOTS,
    STRIPES,
    VERSION,
    Header,
    KeySlot,
    LuksHeader,
    Scheme,
    text_of,
)
from qimg.errors import FormatError, UnsupportedFeature
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from qimg.storage.base import Bytes

_WORDS = (
    ("cipher_name", "cipher name"),
    ("cipher_mode", "cipher mode"),
    ("hash_spec", "hash spec"),
)


class _Parser:
    """The bytes of a header on their way to a `LuksHeader`. `file`: where they come from, for messages."""

    def __init__(self, data: Bytes, file: str, *, detached: bool) -> None:
        self.header = Header.unpack(bytes(data))
        self.slots = [KeySlot.unpack(bytes(data), Header.SIZE + n * KeySlot.SIZE) for n in range(SLOTS)]
        self._file = file
        self._end = None if detached else self.header.payload_sector

    def parse(self) -> LuksHeader:
        self._check_fields()
        for number in range(SLOTS):
            self._check_slot(number)
        return LuksHeader(self.header, self.slots, self._scheme())

    def _fail(self, message: str, field: str, slot: int | None = None) -> NoReturn:
        where = Header.offset_of(field) if slot is None else Header.SIZE + slot * KeySlot.SIZE
        where += 0 if slot is None else KeySlot.offset_of(field)
        owner = self.header if slot is None else self.slots[slot]
        raise FormatError(
            message,
            file=self._file,
            field=f"header.{field}" if slot is None else f"keyslot[{slot}].{field}",
            offset=where,
            found=getattr(owner, field),
        )

    def _check_fields(self) -> None:
        header = self.header
        if header.magic != MAGIC:
            self._fail("Volume is not in LUKS format", "magic")
        if header.version != VERSION:
            self._fail(f"LUKS version {header.version} is not supported", "version")
        for field, what in _WORDS:
            if b"\0" not in getattr(header, field):
                self._fail(f"LUKS header {what} is not NUL terminated", field)
        if self._end is not None and self._end < HEADER_SECTORS:
            self._fail("LUKS payload is overlapping with the header", "payload_sector")
        if not header.digest_iterations:
            self._fail("LUKS key iteration count is zero", "digest_iterations")

    def _check_slot(self, number: int) -> None:
        slot = self.slots[number]
        if slot.stripes != STRIPES:
            text = f"Keyslot {number} is corrupted (stripes {slot.stripes} != {STRIPES})"
            self._fail(text, "stripes", number)
        if slot.state not in (ACTIVE, INACTIVE):
            self._fail(f"Keyslot {number} state (active/disable) is corrupted", "state", number)
        if slot.active and not slot.iterations:
            self._fail(f"Keyslot {number} iteration count is zero", "iterations", number)
        start, end = self._material(number)
        if start < HEADER_SECTORS:
            self._fail(f"Keyslot {number} is overlapping with the LUKS header", "material_sector", number)
        if self._end is not None and end > self._end:
            text = f"Keyslot {number} is overlapping with the encrypted payload"
            self._fail(text, "material_sector", number)
        for other in range(number + 1, SLOTS):
            low, high = self._material(other)
            if low < end and start < high:
                text = f"Keyslots {number} and {other} are overlapping in the header"
                self._fail(text, "material_sector", number)

    def _material(self, number: int) -> tuple[int, int]:
        """First sector of a slot's material, and the one behind it."""
        slot = self.slots[number]
        return slot.material_sector, slot.material_sector + -(-self.header.key_bytes * slot.stripes // SECTOR)

    def _scheme(self) -> Scheme:
        """The names in the header, which have to be ones that mean something."""
        header = self.header
        family, spec, hash = (text_of(getattr(header, field)) for field, _ in _WORDS)
        mode, dash, rest = spec.partition("-")
        if not dash:
            self._fail(f"Unexpected cipher mode string format '{spec}'", "cipher_mode")
        ivgen, colon, ivgen_hash = rest.partition(":")
        for message, field in self._unknown(family, mode, ivgen, ivgen_hash if colon else None, hash):
            raise UnsupportedFeature(
                message, file=self._file, field=f"header.{field}", offset=Header.offset_of(field)
            )
        cipher = names.algorithm(family, header.key_bytes // (2 if mode == "xts" else 1))
        return Scheme(cipher, mode, ivgen, ivgen_hash if colon else None, hash)

    def _unknown(
        self, family: str, mode: str, ivgen: str, ivgen_hash: str | None, hash: str
    ) -> Iterator[tuple[str, str]]:
        """(message, field) of names without a meaning, in the order in which they are looked at."""
        if hash not in names.HASHES:
            yield f"Hash algorithm '{hash}' not supported", "hash_spec"
        if ivgen_hash is not None and ivgen_hash not in names.HASHES:
            yield f"Hash algorithm '{ivgen_hash}' not supported", "cipher_mode"
        if mode not in names.MODES:
            yield f"Cipher mode '{mode}' not supported", "cipher_mode"
        size = self.header.key_bytes // (2 if mode == "xts" else 1)
        if not names.known(family, size) or self.header.key_bytes % 2:
            yield f"Algorithm '{family}' with key size {size} bytes not supported", "cipher_name"
        if ivgen not in names.IV_GENERATORS:
            yield f"IV generator '{ivgen}' not supported", "cipher_mode"
        if ivgen == "essiv" and ivgen_hash is None:
            yield "Missing IV generator hash specification", "cipher_mode"


def parse(data: Bytes, file: str, *, detached: bool = False) -> LuksHeader:
    """The header in `data`. Raises FormatError, UnsupportedFeature."""
    return _Parser(data, file, detached=detached).parse()
