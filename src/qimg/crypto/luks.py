"""LUKS1: the header of an encrypted volume, and its key slots (luks sheet 1 to 5).

A `LuksHeader` works on an area, any storage that holds the header at offset 0 and the key material behind it:
a whole file, or clusters inside a qcow2. Nothing here knows where the guest's data is.

Slots change so that after a crash each passphrase works that did before and is to work afterwards: material
first, then the header that names it; when a slot is given up, the header first.
"""

from __future__ import annotations

import os

from qimg.crypto import kdf, names
from qimg.crypto.ciphers import SectorCipher, essiv_cipher, sector_cipher
from qimg.errors import FormatError, NotSupported, UnsupportedFeature
from qimg.identity import random_uuid
from qimg.ondisk import U16, U32, Struct
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Annotated

    from qimg.storage.base import Bytes, Storage

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SLOTS = 8
STRIPES = 4000
ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD
#: Sectors before the first key material, and what the material of a slot is rounded up to.
HEADER_SECTORS = 8
#: Times that given up key material is overwritten.
_WIPES = 40
#: The digest of the master key takes this part of the time that a slot takes.
_DIGEST_PART = 8
_DIGEST_BYTES = 20
_SALT_BYTES = 32
#: More iterations would take minutes for each slot: no tool asks for them, only an image that means harm.
MAX_ITERATIONS = 1 << 28


class Header(Struct, order=">"):
    """The first 208 bytes; eight key slots follow."""

    magic: Annotated[bytes, 6]
    version: U16
    cipher_name: Annotated[bytes, 32]
    cipher_mode: Annotated[bytes, 32]
    hash_spec: Annotated[bytes, 32]
    payload_sector: U32
    key_bytes: U32
    digest: Annotated[bytes, 20]
    digest_salt: Annotated[bytes, 32]
    digest_iterations: U32
    uuid: Annotated[bytes, 40]


class KeySlot(Struct, order=">"):
    """One place for a passphrase."""

    state: U32
    iterations: U32
    salt: Annotated[bytes, 32]
    material_sector: U32
    stripes: U32

    @property
    def active(self) -> bool:
        """It holds the master key under some passphrase."""
        return self.state == ACTIVE


SIZE = Header.SIZE + SLOTS * KeySlot.SIZE


class Scheme:
    """How a volume is encrypted, in the words of creation options: ``aes-256``, ``xts``, ``plain64``, None,
    ``sha256``."""

    __slots__ = ("cipher", "hash", "ivgen", "ivgen_hash", "mode")

    def __init__(
        self,
        cipher: str = "aes-256",
        mode: str = "xts",
        ivgen: str = "plain64",
        ivgen_hash: str | None = None,
        hash: str = "sha256",
    ) -> None:
        self.cipher = cipher
        self.mode = mode
        self.ivgen = ivgen
        self.ivgen_hash = "sha256" if ivgen == "essiv" and ivgen_hash is None else ivgen_hash
        self.hash = hash

    @property
    def key_bytes(self) -> int:
        """Length of the key. Raises NotSupported for a cipher that is not there."""
        return names.split(self.cipher)[1] * (2 if self.mode == "xts" else 1)

    def check(self) -> None:
        """Whether volumes of this kind can be made. Raises QimgError."""
        family, size = names.split(self.cipher)
        if self.mode == "xts" and names.FAMILIES[family][0] != 16:
            raise NotSupported(f"Unsupported cipher mode {self.mode}")
        if self.key_bytes * STRIPES % SECTOR:
            # The real program, handed such a volume, stops with a failed assertion.
            raise NotSupported(f"Cipher mode '{self.mode}' not supported with keys of {size} bytes")
        if self.ivgen == "essiv":
            essiv_cipher(family, self.ivgen_hash)
        kdf.hasher(self.hash)

    def sector_cipher(self, key: bytearray) -> SectorCipher:
        """The cipher keyed by `key`. Raises NotSupported."""
        return sector_cipher(self.cipher, self.mode, self.ivgen, self.ivgen_hash, key)

    @property
    def mode_spec(self) -> str:
        """The mode as the header writes it: ``cbc-essiv:sha256``."""
        return f"{self.mode}-{self.ivgen}" + ("" if self.ivgen_hash is None else f":{self.ivgen_hash}")


class LuksHeader:
    """A header and its eight slots. `scheme` says what they mean."""

    def __init__(self, header: Header, slots: list[KeySlot], scheme: Scheme) -> None:
        self.header = header
        self.slots = slots
        self.scheme = scheme

    # -- reading

    @classmethod
    def read(cls, area: Storage, *, detached: bool = False) -> LuksHeader:
        """Read and validate the header in the order of section 5. `detached`: the data is elsewhere.

        Raises FormatError, UnsupportedFeature, StorageError."""
        from qimg.crypto.luks_check import parse

        return parse(area.read(0, SIZE), area.name, detached=detached)

    @property
    def payload_offset(self) -> int:
        """Where in the area the data begins, 0 for a detached header; in bytes."""
        return self.header.payload_sector * SECTOR

    def format_specific(self, *, format: str | None = None, detached: bool = False) -> dict[str, object]:
        """What ``info`` shows (section 9). `format`: the name that a qcow2 adds."""
        scheme = self.scheme
        shown: dict[str, object] = {"ivgen-alg": scheme.ivgen, "detached-header": detached}
        shown |= {"hash-alg": scheme.hash, "cipher-alg": scheme.cipher, "uuid": text_of(self.header.uuid)}
        if scheme.ivgen == "essiv":
            shown["ivgen-hash-alg"] = scheme.ivgen_hash
        if format is not None:
            shown["format"] = format
        shown["cipher-mode"] = scheme.mode
        shown["slots"] = [_shown(slot) for slot in self.slots]
        shown["payload-offset"] = self.payload_offset
        shown["master-key-iters"] = self.header.digest_iterations
        return shown

    # -- opening

    def unlock(self, area: Storage, passphrase: Bytes) -> bytearray:
        """The master key; wipe it after use. Raises FormatError where no slot opens, NotSupported,
        StorageError."""
        names.split(self.scheme.cipher)  # what is missing is said before any work
        for number in range(SLOTS):
            key = self.open_slot(area, number, passphrase)
            if key is not None:
                return key
        raise FormatError("Invalid password, cannot unlock any keyslot", file=area.name)

    def open_slot(self, area: Storage, number: int, passphrase: Bytes) -> bytearray | None:
        """The master key if slot `number` is active and opens with `passphrase`, else None."""
        slot = self.slots[number]
        if not slot.active:
            return None
        header = self.header
        self._bound(slot.iterations, f"Keyslot {number}")
        self._bound(header.digest_iterations, "Master key")
        size = header.key_bytes
        slot_key = kdf.pbkdf2(self.scheme.hash, passphrase, slot.salt, slot.iterations, size)
        material = area.read(slot.material_sector * SECTOR, round_up(size * STRIPES, SECTOR))
        cipher = self.scheme.sector_cipher(slot_key)
        cipher.decrypt(material, 0)
        cipher.forget()
        key = kdf.merge(memoryview(material)[: size * STRIPES], STRIPES, self.scheme.hash)
        kdf.wipe(slot_key, material)
        if self._digest(key) == header.digest:
            return key
        kdf.wipe(key)
        return None

    def _digest(self, key: Bytes) -> bytes:
        header = self.header
        made = kdf.pbkdf2(self.scheme.hash, key, header.digest_salt, header.digest_iterations, _DIGEST_BYTES)
        return bytes(made)

    def _bound(self, iterations: int, what: str) -> None:
        if iterations > MAX_ITERATIONS:
            raise UnsupportedFeature(f"{what} iteration count {iterations} is larger than {MAX_ITERATIONS}")

    # -- making

    @classmethod
    def new(cls, scheme: Scheme, *, detached: bool = False) -> LuksHeader:
        """A header without keys, all slots inactive, for a volume that is encrypted by `scheme`.

        Raises QimgError for what cannot be made."""
        scheme.check()
        material = material_sectors(scheme.key_bytes)
        salt = os.urandom(_SALT_BYTES)
        header = Header(
            magic=MAGIC,
            version=VERSION,
            cipher_name=names.split(scheme.cipher)[0].encode(),
            cipher_mode=scheme.mode_spec.encode(),
            hash_spec=scheme.hash.encode(),
            payload_sector=0 if detached else HEADER_SECTORS + SLOTS * material,
            key_bytes=scheme.key_bytes,
            digest=b"",
            digest_salt=salt,
            digest_iterations=kdf.MIN_ITERATIONS,
            uuid=_uuid_text(random_uuid("luks", salt)),
        )
        slots = [
            KeySlot(state=INACTIVE, material_sector=HEADER_SECTORS + number * material, stripes=STRIPES)
            for number in range(SLOTS)
        ]
        return cls(header, slots, scheme)

    @property
    def area_bytes(self) -> int:
        """Bytes from the header to the end of the last slot's material; in new volumes data begins there."""
        last = max(slot.material_sector for slot in self.slots)
        return (last + material_sectors(self.header.key_bytes)) * SECTOR

    def start(self, passphrase: Bytes, milliseconds: int) -> tuple[bytearray, bytearray]:
        """Give a new header its master key, which slot 0 keeps under `passphrase`; unlocking it is to take
        `milliseconds`. Returns the key and the material of slot 0, to be written before the header.

        Raises LimitError, UnsupportedFeature."""
        key = bytearray(os.urandom(self.header.key_bytes))
        self.slots[0], material = self._fill(0, key, passphrase, milliseconds)
        self.header.digest_iterations = kdf.iterations_for(
            self.scheme.hash, _DIGEST_BYTES, milliseconds, _DIGEST_PART
        )
        self.header.digest = self._digest(key)
        return key, material

    def _fill(
        self, number: int, key: Bytes, passphrase: Bytes, milliseconds: int
    ) -> tuple[KeySlot, bytearray]:
        """Slot `number` as it will be, and its encrypted material. Changes nothing."""
        hash, size = self.scheme.hash, self.header.key_bytes
        salt = os.urandom(_SALT_BYTES)
        iterations = kdf.iterations_for(hash, size, milliseconds)
        self._bound(iterations, f"Keyslot {number}")  # before it costs the minutes
        slot_key = kdf.pbkdf2(hash, passphrase, salt, iterations, size)
        plain = kdf.split(key, STRIPES, hash)
        plain += bytes(-len(plain) % SECTOR)
        cipher = self.scheme.sector_cipher(slot_key)
        material = cipher.encrypt(plain, 0)
        cipher.forget()
        kdf.wipe(slot_key, plain)
        old = self.slots[number]
        return (
            KeySlot(
                state=ACTIVE,
                iterations=iterations,
                salt=salt,
                material_sector=old.material_sector,
                stripes=STRIPES,
            ),
            material,
        )

    def pack(self) -> bytes:
        """Header and slots as they are stored."""
        return self.header.pack() + b"".join(slot.pack() for slot in self.slots)

    # -- changing slots

    def add_slot(self, area: Storage, number: int, key: Bytes, passphrase: Bytes, milliseconds: int) -> None:
        """Let `passphrase` open slot `number` as well. Where that is the only active one, another keeps the
        new passphrase meanwhile, so that there is no moment at which none works. Durable when it returns.

        Raises LimitError, UnsupportedFeature, StorageError."""
        slot, material = self._fill(number, key, passphrase, milliseconds)
        if self.active_slots() != [number]:
            self._put(area, number, slot, material)
            return
        spare = (number + 1) % SLOTS
        self._put(area, spare, *self._fill(spare, key, passphrase, milliseconds))
        self._put(area, number, slot, material)
        self.erase_slot(area, spare)

    def _put(self, area: Storage, number: int, slot: KeySlot, material: Bytes) -> None:
        area.write(material, slot.material_sector * SECTOR)
        area.flush()
        self.slots[number] = slot
        self._store(area)

    def erase_slot(self, area: Storage, number: int) -> None:
        """Make slot `number` inactive and its material unreadable. Durable when it returns.

        Raises StorageError."""
        old = self.slots[number]
        self.slots[number] = KeySlot(state=INACTIVE, material_sector=old.material_sector, stripes=old.stripes)
        self._store(area)
        length = self.header.key_bytes * STRIPES
        for _ in range(_WIPES):
            area.write(os.urandom(length), old.material_sector * SECTOR)
            area.flush()

    def _store(self, area: Storage) -> None:
        area.write(self.pack(), 0)
        area.flush()

    def active_slots(self) -> list[int]:
        """Numbers of the slots that hold the key."""
        return [number for number, slot in enumerate(self.slots) if slot.active]


def material_sectors(key_bytes: int) -> int:
    """Sectors that a slot's material takes in new volumes (section 2)."""
    return round_up(-(-key_bytes * STRIPES // SECTOR), HEADER_SECTORS)


def text_of(field: bytes) -> str:
    """A name in a field that is filled up with NULs."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _uuid_text(uuid: bytes) -> bytes:
    text = uuid.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])).encode()


def _shown(slot: KeySlot) -> dict[str, object]:
    offset = slot.material_sector * SECTOR
    if not slot.active:
        return {"active": False, "key-offset": offset}
    return {"active": True, "iters": slot.iterations, "key-offset": offset, "stripes": slot.stripes}
