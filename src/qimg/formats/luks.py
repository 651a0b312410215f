"""luks: a disk that is encrypted as a whole, behind a header with key slots (luks sheet).

The guest's sector n lies at the payload's sector n, encrypted. The header may be in a file of its own. The
header of a new image is written by the first `flush`: what was interrupted before is no image.
"""

from __future__ import annotations

import errno

from qimg.errors import LimitError, NotSupported, OptionError, StorageError
from qimg.extent import MAPPED, Extent
from qimg.formats import keyslots
from qimg.formats.base import Format, Image, Measure
from qimg.formats.encryption import Encrypted
from qimg.options import BOOL, SIZE, STR, Option
from qimg.units import INT64_MAX, SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.context import Context
    from qimg.crypto.luks import LuksHeader
    from qimg.formats.base import CreateHelp, MeasureSource
    from qimg.options import Value
    from qimg.storage.base import Storage

_HEADER = "header"
_DETACHED = "detached-header"


class LuksImage(Image):
    """One image. `file` holds the payload, and the header unless that was attached."""

    format_name = "luks"
    encrypted = True
    dirty = False
    can_write = True

    def __init__(self, file: Storage, options: dict[str, Value], context: Context, *, for_info: bool) -> None:
        """`options`: those of opening. `for_info`: no key is needed, and no data can be read."""
        self.file = file
        self._options = options
        self._context = context
        self._for_info = for_info
        self._attached: Storage | None = None
        self._plain: Encrypted | None = None
        self._pending: bytes | None = None  # the header of a new image

    @classmethod
    def open(cls, file: Storage, options: dict[str, Value], context: Context, *, for_info: bool) -> LuksImage:
        """The image in `file`; where the options name a header, that is attached afterwards."""
        image = cls(file, options, context, for_info=for_info)
        word = None if for_info else keyslots.passphrase(options, context)
        if _HEADER not in options:
            image._read(word)
        return image

    def attach_data_file(self, storage: Storage) -> None:
        """Give the image its detached header. It is closed with the image."""
        if _HEADER not in self._options:
            raise NotSupported("'header' can only be set for images with a detached header")
        self._attached = storage
        word = None if self._for_info else keyslots.passphrase(self._options, self._context)
        self._read(word)

    def attached(self) -> list[tuple[str, Storage]]:
        return [] if self._attached is None else [(_HEADER, self._attached)]

    def _read(self, word: bytes | None) -> None:
        """Read the header and, with the passphrase `word`, get ready to read data."""
        from qimg.crypto.kdf import wipe
        from qimg.crypto.luks import LuksHeader

        area = self._area
        header = LuksHeader.read(area, detached=self._attached is not None)
        self._set_header(header)
        if word is not None:
            key = header.unlock(area, word)
            try:
                self._set_key(key)
            finally:
                wipe(key)
        self._measure_payload()

    @property
    def _area(self) -> Storage:
        """What holds the header and the key material."""
        return self.file if self._attached is None else self._attached

    def _set_header(self, header: LuksHeader) -> None:
        self._header = header
        self._payload = 0 if self._attached is not None else header.payload_offset

    def _set_key(self, key: bytearray) -> None:
        cipher = self._header.scheme.sector_cipher(key)
        self._plain = Encrypted(self.file, cipher, first_sector=-(self._payload // SECTOR))

    def _measure_payload(self) -> None:
        """Set the size from the file's length. Raises StorageError."""
        whole = round_up(self.file.size, SECTOR)
        if self._payload > whole:
            raise StorageError("Could not refresh total sector count: Input/output error", errno=errno.EIO)
        self.size = whole - self._payload

    def format_specific(self) -> dict[str, object]:
        return self._header.format_specific(detached=self._attached is not None)

    # -- data

    def extents(self, start: int, length: int) -> list[Extent]:
        return self.allocate(start, length)

    def allocate(self, start: int, length: int) -> list[Extent]:
        return [Extent(start, length, MAPPED, 0, self._payload + start, self._plain)]

    in_place = allocate

    def flush(self) -> None:
        self.file.flush()
        if self._pending is not None:
            self.file.write(self._pending, 0)
            self.file.flush()
            self._pending = None

    # -- changes of the whole

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """What is new holds whatever the file's zeros decrypt to, as with the real program."""
        if size > INT64_MAX - self._payload:
            raise LimitError("The requested file size is too large")
        if preallocation == "metadata":
            raise NotSupported("Unsupported preallocation mode 'metadata'")
        self.file.resize(self._payload + size, preallocation)
        self.file.flush()
        self.size = round_up(size, SECTOR)

    def amend(
        self, options: dict[str, Value], *, force: bool = False, progress: Callable[[int, int], None]
    ) -> None:
        def unlock() -> bytearray:
            return self._header.unlock(self._area, keyslots.passphrase(self._options, self._context))

        keyslots.SlotChange(
            self._header, self._area, options, unlock=unlock, context=self._context, force=force
        ).run()
        progress(1, 1)

    @classmethod
    def create(cls, file: Storage, size: int, options: dict[str, Value], context: Context) -> LuksImage:
        """A new image in the empty `file`."""
        from qimg.crypto.kdf import wipe
        from qimg.crypto.luks import LuksHeader

        detached = bool(options.get(_DETACHED))
        header = LuksHeader.new(keyslots.scheme(options), detached=detached)
        image = cls(file, {}, context, for_info=False)
        image._set_header(header)
        image.size = size
        key, material = header.start(keyslots.passphrase(options, context), keyslots.iter_time(options))
        try:
            if not file.fixed_size:
                _set_length(file, header.area_bytes + (0 if detached else size), options)
            file.write(bytes(SECTOR), 0)  # no header yet
            file.write(material, header.slots[0].material_sector * SECTOR)
            image._pending = header.pack()
            image._set_key(key)
        finally:
            wipe(key)
        return image

    def close(self) -> None:
        if self._plain is not None:
            self._plain.forget()
        if self._attached is not None:
            self._attached.close()
        self.file.close()


def _set_length(file: Storage, length: int, options: dict[str, Value]) -> None:
    mode = str(options.get("preallocation", "off"))
    try:
        file.resize(length, "off" if mode == "metadata" else mode)
    except StorageError as error:
        if error.errno == errno.EFBIG:
            raise LimitError("The requested file size is too large") from error
        raise


class Luks(Format):
    """The driver. How space is allocated is an option of the storage, merged in by whoever creates."""

    name = "luks"
    create_options = (
        Option("size", SIZE, None, "Virtual disk size"),
        Option(keyslots.KEY_SECRET, STR, None, "ID of the secret that provides the keyslot passphrase"),
        *keyslots.creation_options(),
        Option(_DETACHED, BOOL, None, "Create a header without data, for data that is elsewhere"),
    )
    open_options = (
        Option(keyslots.KEY_SECRET, STR, None, "ID of the secret that provides the passphrase"),
        Option(_HEADER, STR, None, "The file with the header, where that is not in front of the data"),
    )
    amend_options = keyslots.slot_options()
    can_create = True
    can_amend = True
    can_measure = True

    def open(
        self,
        file: Storage,
        *,
        writable: bool = False,
        options: dict[str, Value] | None = None,
        context: Context,
        for_check: bool = False,
        for_info: bool = False,
    ) -> LuksImage:
        return LuksImage.open(file, options or {}, context, for_info=for_info)

    def check_secrets(self, options: dict[str, Value], context: Context) -> None:
        keyslots.passphrase(options, context)

    def validate_create(self, size: int, options: dict[str, Value]) -> None:
        keyslots.scheme(options)
        keyslots.require(options)
        mode = str(options.get("preallocation", "off"))
        if mode not in ("off", "metadata", "falloc", "full"):
            raise OptionError(f"invalid parameter value: {mode}", option="preallocation")
        if size > INT64_MAX - self._header(options).area_bytes:
            raise LimitError("The requested file size is too large")

    def _header(self, options: dict[str, Value]) -> LuksHeader:
        """A header as these options want it. Raises OptionError, NotSupported."""
        from qimg.crypto.luks import LuksHeader

        return LuksHeader.new(keyslots.scheme(options), detached=bool(options.get(_DETACHED)))

    def check_place(self, file: Storage, size: int, options: dict[str, Value]) -> None:
        if not file.fixed_size:
            return
        mode = str(options.get("preallocation", "off"))
        if mode != "off":
            raise NotSupported(f"Unsupported preallocation mode '{mode}'")
        if self._header(options).area_bytes + size > file.size:
            raise NotSupported(f"Cannot grow {file.plural or repr(file.name)}")

    def create(self, file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> LuksImage:
        self.validate_create(size, options)
        if help.filling and options.get(_DETACHED):
            raise OptionError("A detached header has no room for data", option=_DETACHED)
        return LuksImage.create(file, size, options, help.context)

    def measure(self, source: MeasureSource, options: dict[str, Value]) -> Measure:
        self.validate_create(source.size, options)
        header = self._header(options)
        whole = header.area_bytes + round_up(source.size, SECTOR)
        return Measure(whole, whole)
