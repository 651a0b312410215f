"""Encryption of an image's data (sheet, section 8): opening, creating, what `info` tells."""

from __future__ import annotations

from qimg.errors import UnsupportedFeature
from qimg.formats.protection import check_open_options, legacy_aes, require_key
from qimg.formats.qcow2.structs import CRYPT_AES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.protection import Protection
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.options import Value
    from qimg.storage.base import Storage


def protect(
    file: Storage, header: ParsedHeader, options: dict[str, Value], context: Context, *, for_info: bool
) -> Protection | None:
    """The protection of an encrypted image that is opened with `options`. `for_info`: its key is not needed.

    Raises OptionError, FormatError, NotSupported, QimgError (wrong passphrase)."""
    old = header.header.crypt_method == CRYPT_AES
    check_open_options(options, "aes" if old else "luks")
    if old:
        return None if for_info else legacy_aes(context.secret(require_key(options)))
    if for_info:
        return None
    raise UnsupportedFeature("LUKS is not supported yet", file=file.name, field="header.crypt_method")


def describe(header: ParsedHeader) -> dict[str, object]:
    """The block ``encrypt`` of `info` (section 19)."""
    return {"format": "aes" if header.header.crypt_method == CRYPT_AES else "luks"}
