"""Encrypted guest data in formats that place it cluster by cluster (qcow2 sheet 8, qcow sheet 2).

Tables say where a cluster lies; what lies there is not what the guest reads. A `Protection` turns the extents
that leave an image into ones in a storage that decrypts and encrypts, so that whoever moves bytes need not
know. Tables, and all else that is the format's own, go through the file itself.

With LUKS a sector is encrypted for its place in the file: one storage serves all. The old AES scheme does so
for its place on the guest's disk: a storage for each distance between the two, which is one for each run of
neighbouring clusters.
"""

from __future__ import annotations

from qimg.errors import OptionError
from qimg.extent import MAPPED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.crypto.ciphers import SectorCipher
    from qimg.extent import Extent
    from qimg.formats.encryption import Encrypted
    from qimg.options import Value
    from qimg.storage.base import Storage

SECTOR = 512
AES_KEY_BYTES = 16
KEY_OPTION = "encrypt.key-secret"
#: Storages of the old scheme that are kept; each is small, and made anew at no cost worth telling.
_KEPT = 4096

AES_WARNING = (
    "The AES encryption of qcow and qcow2 is obsolete and weak: the passphrase itself is the key, and a wrong"
    " one is not noticed. Use LUKS (encrypt.format=luks in qcow2) for anything that has to stay secret"
)


class Protection:
    """The cipher of an open image's data: LUKS."""

    def __init__(self, cipher: SectorCipher) -> None:
        self._cipher = cipher
        self._whole: Encrypted | None = None

    def storage(self, below: Storage, guest: int, host: int) -> Encrypted:
        """`below` with what lies at `host` as the guest reads it at `guest`."""
        if self._whole is None or self._whole.child is not below:
            from qimg.formats.encryption import Encrypted

            self._whole = Encrypted(below, self._cipher)
        return self._whole

    def uncover(self, extents: Iterable[Extent]) -> list[Extent]:
        """`extents` of an image with the data where the guest's bytes can be read and written."""
        return [self._uncovered(extent) for extent in extents]

    def _uncovered(self, extent: Extent) -> Extent:
        if not extent.flags & MAPPED:
            return extent
        assert extent.source is not None and extent.host is not None
        return extent._replace(source=self.storage(extent.source, extent.start, extent.host))


class ByGuest(Protection):
    """The old AES scheme."""

    def __init__(self, cipher: SectorCipher) -> None:
        super().__init__(cipher)
        self._moved: dict[int, Encrypted] = {}

    def storage(self, below: Storage, guest: int, host: int) -> Encrypted:
        whole = super().storage(below, guest, host)
        first_sector = (guest - host) // SECTOR
        found = self._moved.get(first_sector)
        if found is None or found.child is not below:
            if len(self._moved) >= _KEPT:
                self._moved.clear()
            found = self._moved[first_sector] = whole.numbered(first_sector)
        return found


def legacy_aes(passphrase: bytes) -> ByGuest:
    """Protection by AES-128 in CBC mode, keyed by the passphrase cut or filled up with zeros to 16 bytes."""
    from qimg.crypto.ciphers import sector_cipher

    key = passphrase[:AES_KEY_BYTES].ljust(AES_KEY_BYTES, b"\0")
    return ByGuest(sector_cipher("aes-128", "cbc", "plain64", None, key))


def check_open_options(options: dict[str, Value], found: str) -> None:
    """Raise OptionError for options of opening an image whose header says that it is encrypted in the way
    `found`."""
    said = options.get("encrypt.format", found)
    if said != found:
        raise OptionError(
            f"Header reported '{found}' encryption format but options specify '{said}'",
            option="encrypt.format",
        )
    for name in options:
        if name.startswith("encrypt.") and name not in ("encrypt.format", KEY_OPTION):
            raise _unexpected(name)


def _unexpected(option: str) -> OptionError:
    path, _, last = option.removeprefix("encrypt.").partition(".")
    if last:
        return OptionError(f"Parameters '{path}.*' are unexpected", option=option)
    return OptionError(f"Parameter '{path}' is unexpected", option=option)


def require_key(options: dict[str, Value]) -> str:
    """The id of the secret that the options name. Raises OptionError."""
    if KEY_OPTION not in options:
        raise OptionError(f"Parameter '{KEY_OPTION}' is required for cipher", option=KEY_OPTION)
    return str(options[KEY_OPTION])
