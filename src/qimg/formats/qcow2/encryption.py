"""Encryption of an image's data (sheet, section 8): opening, creating, changing keys, what `info` tells.

A LUKS header has clusters of its own; in them it is what it is in front of a luks volume.
"""

from __future__ import annotations

from qimg.context import Notice
from qimg.errors import FormatError
from qimg.formats import keyslots
from qimg.formats.protection import AES_WARNING, Protection, check_open_options, legacy_aes
from qimg.formats.qcow2.structs import CRYPT_AES
from qimg.storage.base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.crypto.luks import LuksHeader
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.formats.qcow2.image import Qcow2Image
    from qimg.formats.qcow2.structs import CryptoPointer
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage

PREFIX = "encrypt."


class HeaderArea(Filter):
    """The part of an image file that belongs to the LUKS header, addressed from 0 on."""

    def __init__(self, file: Storage, pointer: CryptoPointer) -> None:
        super().__init__(file)
        self._start = pointer.offset
        self._length = pointer.length

    @property
    def size(self) -> int:
        return self._length

    def _inside(self, offset: int, length: int) -> int:
        """`offset` in the file. Raises FormatError for what reaches beyond the area."""
        if offset + length > self._length:
            raise FormatError(
                "Request for data outside of extension header",
                file=self.name,
                field="crypto.length",
                expected=f">= {offset + length}",
                found=self._length,
            )
        return self._start + offset

    def read_into(self, buf: Buffer, offset: int) -> None:
        self.child.read_into(buf, self._inside(offset, len(buf)))

    def write(self, buf: Bytes, offset: int) -> None:
        self.child.write(buf, self._inside(offset, len(buf)))


def _luks(file: Storage, header: ParsedHeader) -> tuple[LuksHeader, HeaderArea]:
    """The LUKS header of an image, and where it is. Raises FormatError, UnsupportedFeature, StorageError."""
    from qimg.crypto.luks import LuksHeader

    assert header.crypto is not None
    area = HeaderArea(file, header.crypto)
    return LuksHeader.read(area), area


def protect(
    file: Storage, header: ParsedHeader, options: dict[str, Value], context: Context, *, for_info: bool
) -> Protection | None:
    """The protection of an encrypted image that is opened with `options`. `for_info`: its key is not needed.

    Raises OptionError, FormatError (damage, wrong passphrase), NotSupported, StorageError."""
    old = header.header.crypt_method == CRYPT_AES
    check_open_options(options, "aes" if old else "luks")
    word = b"" if for_info else keyslots.passphrase(options, context, PREFIX)
    if old:
        return None if for_info else legacy_aes(word)
    luks, area = _luks(file, header)
    return None if for_info else _unlocked(luks, luks.unlock(area, word))


def _unlocked(luks: LuksHeader, key: bytearray) -> Protection:
    """Protection by the master key, which is wiped."""
    from qimg.crypto.kdf import wipe

    try:
        return Protection(luks.scheme.sector_cipher(key))
    finally:
        wipe(key)


def describe(file: Storage, header: ParsedHeader) -> dict[str, object]:
    """The block ``encrypt`` of `info` (section 19)."""
    if header.header.crypt_method == CRYPT_AES:
        return {"format": "aes"}
    return _luks(file, header)[0].format_specific(format="luks")


def check_new_luks(options: dict[str, Value]) -> int:
    """Bytes of the LUKS header of an image that is made with `options`. Raises OptionError, NotSupported."""
    from qimg.crypto.luks import LuksHeader

    return LuksHeader.new(keyslots.scheme(options, PREFIX)).area_bytes


def new_protection(
    kind: str | None, options: dict[str, Value], context: Context
) -> tuple[Protection | None, bytes | None]:
    """The protection of a new image that is to be encrypted in the way `kind` (aes, luks, None), and its LUKS
    header with the key material of slot 0, which takes as long to make as to unlock.

    Raises OptionError, NotSupported, LimitError."""
    if kind is None:
        return None, None
    word = keyslots.passphrase(options, context, PREFIX)
    if kind == "aes":
        context.warn(Notice(AES_WARNING))
        return legacy_aes(word), None
    from qimg.crypto.luks import LuksHeader

    luks = LuksHeader.new(keyslots.scheme(options, PREFIX))
    key, material = luks.start(word, keyslots.iter_time(options, PREFIX))
    content = bytearray(luks.area_bytes)
    start = luks.slots[0].material_sector * 512
    content[start : start + len(material)] = material
    packed = luks.pack()
    content[: len(packed)] = packed
    return _unlocked(luks, key), bytes(content)


def change_keys(image: Qcow2Image, options: dict[str, Value], *, force: bool) -> None:
    """Change key slots as the options of `amend` say. Durable when it returns.

    Raises OptionError and QimgError before any change, StorageError."""
    luks, area = _luks(image.file, image.header)

    def unlock() -> bytearray:
        return luks.unlock(area, keyslots.passphrase(image.options, image.context, PREFIX))

    values = {name: value for name, value in options.items() if name.startswith(PREFIX)}
    keyslots.SlotChange(
        luks, area, values, unlock=unlock, context=image.context, force=force, prefix=PREFIX
    ).run()
