"""Creating a qcow2 image (sheet, section 12): options to header, the refusals, the empty image."""

from __future__ import annotations

from qimg.errors import LimitError, OptionError
from qimg.formats.base import Image
from qimg.formats.protection import KEY_OPTION, require_key
from qimg.formats.qcow2.create_options import CREATE_OPTIONS, ENCRYPTION_OPTIONS
from qimg.formats.qcow2.encryption import PREFIX, check_new_luks, new_protection
from qimg.formats.qcow2.header import ParsedHeader
from qimg.formats.qcow2.structs import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPAT_LAZY_REFCOUNTS,
    COMPRESSION_NAMES,
    COMPRESSION_ZLIB,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER,
    CryptoPointer,
    Header,
)
from qimg.units import INT64_MAX, SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from qimg.formats.base import CreateHelp
    from qimg.options import Value
    from qimg.storage.base import Storage

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_PREALLOCATION = ("off", "metadata", "falloc", "full")
_TOO_LARGE = "The image size is too large for file format 'qcow2' (try using a larger cluster size)"

#: Drivers that may be recorded as a backing file's format although qimg has no format of that name.
_OTHER_DRIVERS = """
    file host_device host_cdrom nbd http https ftp ftps ssh rbd iscsi nfs gluster nvme blkdebug blkverify
    blklogwrites blkreplay null-co null-aio quorum throttle compress copy-on-read copy-before-write
    preallocate replication snapshot-access vvfat
"""


class Settings:
    """Creation options, checked. `size` in guest bytes, a multiple of 512.

    Raises OptionError and LimitError with the real program's words and in its order.
    """

    def __init__(self, size: int, options: dict[str, Value]) -> None:
        values: dict[str, Value] = {
            option.name: option.default for option in CREATE_OPTIONS if option.default is not None
        }
        values.update(options)
        self._values = values
        self._check_encryption_twice()
        self.version = _VERSIONS[self._choice("compat", _VERSIONS, "version", "1.1")]
        self.backing_name = self._text("backing_file")
        self.backing_format = self._text("backing_fmt")
        self._check_backing_format()
        self.encryption = self._encryption()
        self.preallocation = self._choice("preallocation", _PREALLOCATION, "preallocation", "off")
        codes = {name: code for code, name in COMPRESSION_NAMES.items()}
        self.compression = codes[self._choice("compression_type", codes, "compression-type", "zlib")]
        self.extended = bool(values["extended_l2"])
        self.cluster_size = self._cluster_size()
        self.data_file = self._text("data_file")
        self._check_backing()
        self.lazy = bool(values["lazy_refcounts"])
        self._require_v3(
            self.lazy,
            "Lazy refcounts only supported with compatibility level 1.1 and above",
            "lazy_refcounts",
        )
        self.refcount_bits = self._refcount_bits()
        self.raw = bool(values.get("data_file_raw", False))
        self._check_data_file()
        self._require_v3(
            self.compression != COMPRESSION_ZLIB,
            "Non-zlib compression type is only supported with compatibility level 1.1 and above",
            "compression_type",
        )
        self.size = self._size(size)

    # -- one option at a time, in the real program's order

    def _text(self, name: str) -> str | None:
        value = self._values.get(name)
        return None if value is None else str(value)

    def _choice(self, name: str, known: Collection[str], shown: str, default: str) -> str:
        text = self._text(name)
        text = default if text is None else text
        if text not in known:
            raise OptionError(f"Parameter '{shown}' does not accept value '{text}'", option=name)
        return text

    def _require_v3(self, wanted: bool, message: str, option: str) -> None:
        if wanted and self.version < 3:
            raise OptionError(f"{message} (use version=v3 or greater)", option=option)

    def _check_encryption_twice(self) -> None:
        if "encryption" in self._values and "encrypt.format" in self._values:
            raise OptionError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
                option="encryption",
            )

    def _encryption(self) -> str | None:
        """The kind of encryption (aes, luks), None: none."""
        given = [option.name for option in ENCRYPTION_OPTIONS if option.name in self._values]
        kind = "aes" if self._values.get("encryption") else self._text("encrypt.format")
        if kind is None:
            if any(name != "encryption" for name in given):
                raise OptionError("Parameter 'encrypt.format' is missing", option="encrypt.format")
            return None
        if kind not in ("aes", "luks"):
            raise OptionError(f"Parameter 'format' does not accept value '{kind}'", option="encrypt.format")
        if kind == "luks":
            from qimg.formats.keyslots import scheme

            scheme(self._values, PREFIX)
        else:
            known = ("encryption", "encrypt.format", KEY_OPTION)
            for name in given:
                if name not in known:
                    raise OptionError(f"Parameter '{name}' is unexpected", option=name)
        return kind

    def _check_backing_format(self) -> None:
        name = self.backing_format
        if name is None or name in _OTHER_DRIVERS.split():
            return
        from qimg.formats.registry import FORMATS

        if name not in FORMATS:
            raise OptionError(f"Parameter 'backing-fmt' does not accept value '{name}'", option="backing_fmt")

    def _cluster_size(self) -> int:
        size = int(self._values["cluster_size"])
        self._require_v3(
            self.extended,
            "Extended L2 entries are only supported with compatibility level 1.1 and above",
            "extended_l2",
        )
        if size & (size - 1) or not 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS:
            raise OptionError(
                "Cluster size must be a power of two between 512 and 2048k", option="cluster_size"
            )
        if self.extended and size < MIN_EXTENDED_L2_CLUSTER:
            raise OptionError(
                "Extended L2 entries are only supported with cluster sizes of at least"
                f" {MIN_EXTENDED_L2_CLUSTER} bytes",
                option="extended_l2",
            )
        return size

    def _check_backing(self) -> None:
        if self.backing_name is not None:
            if self.preallocation != "off" and not self.extended:
                raise OptionError(
                    "Backing file and preallocation can only be used at the same time if extended_l2 is on",
                    option="preallocation",
                )
        elif self.backing_format is not None:
            raise OptionError("Backing format cannot be used without backing file", option="backing_fmt")

    def _refcount_bits(self) -> int:
        bits = int(self._values["refcount_bits"])
        if bits & (bits - 1) or not 1 <= bits <= 64:
            raise OptionError(
                "Refcount width must be a power of two and may not exceed 64 bits", option="refcount_bits"
            )
        if bits != 16 and self.version < 3:
            raise OptionError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above"
                " (use version=v3 or greater)",
                option="refcount_bits",
            )
        return bits

    def _check_data_file(self) -> None:
        if self.raw and self.data_file is None:
            raise OptionError("data-file-raw requires data-file", option="data_file_raw")
        if self.raw and self.backing_name is not None:
            raise OptionError(
                "Backing file and data-file-raw cannot be used at the same time", option="data_file_raw"
            )
        self._require_v3(
            self.data_file is not None,
            "External data files are only supported with compatibility level 1.1 and above",
            "data_file",
        )

    def _size(self, size: int) -> int:
        if size > INT64_MAX:
            raise LimitError("Could not resize image: Image size cannot be negative")
        size = round_up(size, SECTOR)
        if 8 * self.l1_entries(size) > MAX_L1_BYTES:
            raise LimitError(_TOO_LARGE)
        return size

    # -- the header they make

    def l1_entries(self, size: int) -> int:
        """Entries of the L1 table of a disk of `size` bytes."""
        per_table = self.cluster_size * (self.cluster_size // (16 if self.extended else 8))
        return -(-size // per_table)

    def header(self) -> ParsedHeader:
        """The header of the fresh image. Raises LimitError where it does not fit into a cluster."""
        zlib = self.compression == COMPRESSION_ZLIB
        l1_size = self.l1_entries(self.size)
        fixed = Header(
            magic=MAGIC,
            version=self.version,
            cluster_bits=self.cluster_size.bit_length() - 1,
            size=self.size,
            l1_size=l1_size,
            l1_table_offset=3 * self.cluster_size if l1_size else 0,
            crypt_method={None: CRYPT_NONE, "aes": CRYPT_AES, "luks": CRYPT_LUKS}[self.encryption],
            refcount_table_offset=self.cluster_size,
            refcount_table_clusters=1,
            refcount_order=self.refcount_bits.bit_length() - 1,
            compression_type=self.compression,
            incompatible_features=(0 if zlib else INCOMPAT_COMPRESSION)
            | (INCOMPAT_DATA_FILE if self.data_file is not None else 0)
            | (INCOMPAT_EXTENDED_L2 if self.extended else 0),
            compatible_features=COMPAT_LAZY_REFCOUNTS if self.lazy else 0,
            autoclear_features=AUTOCLEAR_DATA_FILE_RAW if self.raw else 0,
        )
        header = ParsedHeader(fixed, data_file_name=_encoded(self.data_file))
        if self.encryption == "luks":
            header.crypto = CryptoPointer()  # room for it has to be there
        self._fits(header, "Could not update qcow2 header")
        if self.backing_name is not None:
            header.backing_name = _encoded(self.backing_name)
            header.backing_format = _encoded(self.backing_format)
            what = f"Could not assign backing file '{self.backing_name}'"
            if self.backing_format is not None:
                what += f" with format '{self.backing_format}'"
            if len(header.backing_name or b"") > MAX_BACKING_NAME:
                raise LimitError(f"{what}: Invalid argument")
            self._fits(header, what)
        return header

    @staticmethod
    def _fits(header: ParsedHeader, what: str) -> None:
        try:
            header.pack()
        except LimitError as error:
            raise LimitError(f"{what}: {error}") from None


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def validate_create(size: int, options: dict[str, Value]) -> None:
    """Raise OptionError or LimitError for what `create` would refuse. `size` in bytes. No I/O."""
    settings = Settings(size, options)
    settings.header()
    if settings.encryption is not None:
        require_key(options)
    if settings.encryption == "luks":
        check_new_luks(options)


def create(file: Storage, size: int, options: dict[str, Value], help: CreateHelp) -> Image:
    """Start a fresh image of `size` guest bytes in `file`. It becomes a valid one by `Image.flush`; from the
    first change until then its header says that it is incomplete.

    Raises OptionError, LimitError, StorageError; `file` stays the caller's then.
    """
    from qimg.formats.qcow2.fresh import FreshImage

    settings = Settings(size, options)
    header = settings.header()
    data_file = None
    if settings.data_file is not None:
        mode = settings.preallocation if settings.preallocation in ("falloc", "full") else "off"
        data_file = help.open_data_file(settings.data_file, settings.size, mode)
    try:
        protection, luks = new_protection(settings.encryption, options, help.context)
        image = FreshImage(file, header, data_file, protection)
        if settings.preallocation != "off" or settings.raw:
            image.preallocate("metadata" if settings.preallocation == "off" else settings.preallocation)
        if luks is not None:
            image.place_luks_header(luks)
    except BaseException:
        if data_file is not None:
            data_file.close()
        raise
    return image
