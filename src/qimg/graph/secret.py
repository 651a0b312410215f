"""Secrets (luks sheet 8): their bytes, from a description, a file or the kernel's keyring.

A secret may be wrapped by another one, named by ``keyid``: AES-256-CBC with the other's 32 bytes as the key.
Nothing here puts a secret's bytes into a message.
"""

from __future__ import annotations

import os

from qimg.errors import NotSupported, OptionError, QimgError, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_SECRET = 1 << 20
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_KEY_BYTES, _BLOCK = 32, 16

#: Number of the system call keyctl, by machine, and of its operation "read".
_KEYCTL = {
    "x86_64": 250,
    "aarch64": 219,
    "riscv64": 219,
    "loongarch64": 219,
    "ppc64le": 271,
    "ppc64": 271,
    "s390x": 280,
    "i686": 288,
    "armv7l": 311,
}
_READ = 11


def secret_bytes(kind: str, properties: dict[str, object], other: Callable[[str], bytes]) -> bytes:
    """The bytes of a new secret of type `kind`; `other` gives those of the secret with an id. `data` is taken
    out of `properties`: there is one copy less to show by mistake.

    Raises OptionError, StorageError, NotSupported in the words of the real program."""
    if kind == "secret_keyring":
        content = _read_keyring(int(str(properties["serial"])))
    else:
        content = _given(properties.pop("data", None), properties.get("file"))
    plain = properties.get("format") != "base64"
    if "keyid" not in properties:
        return content if plain else decode_base64(content)
    return _unwrap(content, other(str(properties["keyid"])), properties.get("iv"), plain=plain)


def _given(data: object, file: object) -> bytes:
    """What is written in the description or in a file, byte for byte."""
    if data is not None and file is not None:
        raise OptionError("'file' and 'data' are mutually exclusive")
    if file is not None:
        return _read_file(str(file))
    if data is None:
        raise OptionError("Either 'file' or 'data' must be provided")
    return str(data).encode("utf-8", "surrogateescape")


def _read_file(name: str) -> bytes:
    doing = f"Failed to open file \u201c{name}\u201d"
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        doing = f"Error reading file \u201c{name}\u201d"
        with open(descriptor, "rb") as file:
            content = file.read(_MAX_SECRET + 1)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or 22
        raise StorageError(f"Unable to read {name}: {doing}: {os.strerror(number)}", errno=number) from error
    if len(content) > _MAX_SECRET:
        raise QimgError(f"Unable to read {name}: a secret has at most {_MAX_SECRET} bytes")
    return content


def _read_keyring(serial: int) -> bytes:
    """The payload of the key with this number in the kernel's keyring."""
    if serial == 0:
        raise OptionError("'serial' should not be equal to 0", option="serial")
    import ctypes

    machine = os.uname().machine
    if os.uname().sysname != "Linux" or machine not in _KEYCTL:
        raise NotSupported(f"Secrets in the kernel's keyring are not supported on {machine}")
    call = ctypes.CDLL(None, use_errno=True).syscall
    buffer = ctypes.create_string_buffer(_MAX_SECRET)
    size = call(_KEYCTL[machine], _READ, serial, buffer, ctypes.c_size_t(_MAX_SECRET))
    if size < 0:
        number = ctypes.get_errno()
        raise StorageError(
            f"Unable to read serial key {serial & 0xFFFFFFFF:08x}: {os.strerror(number)}", errno=number
        )
    if size > _MAX_SECRET:
        raise QimgError(f"Unable to read serial key {serial:08x}: a secret has at most {_MAX_SECRET} bytes")
    content = buffer.raw[:size]
    ctypes.memset(buffer, 0, size)
    return content


def _unwrap(content: bytes, key: bytes, iv: object, *, plain: bool) -> bytes:
    """`content` decrypted; `plain`: it is not in base64."""
    if len(key) != _KEY_BYTES:
        raise OptionError(f"Key should be {_KEY_BYTES} bytes in length", option="keyid")
    if iv is None:
        raise OptionError("IV is required to decrypt secret", option="iv")
    start = decode_base64(str(iv).encode("utf-8", "surrogateescape"))
    if len(start) != _BLOCK:
        raise OptionError(f"IV should be {_BLOCK} bytes in length not {len(start)}", option="iv")
    if not plain:
        content = decode_base64(content)
    if len(content) % _BLOCK:
        raise OptionError(f"Length {len(content)} must be a multiple of block size {_BLOCK}")
    if not content:
        return content
    from qimg.crypto.wrap import unwrap

    opened = unwrap(content, key, start)
    padding = opened[-1]
    if padding > _BLOCK:
        raise OptionError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return opened[: len(opened) - padding]


def decode_base64(content: bytes) -> bytes:
    """Base64 as the real program reads it: line ends are ignored, so are letters that do not make up a whole
    group of four, and ``=`` takes a byte off its own group wherever that stands. Raises OptionError."""
    import binascii

    letters = content.translate(None, b"\r\n")
    if letters.strip(_BASE64):
        raise OptionError("Base64 data contains invalid characters")
    letters = letters[: len(letters) // 4 * 4]
    decoded = binascii.a2b_base64(letters.replace(b"=", b"A"))
    if b"=" not in letters:
        return decoded
    # Of a group's letters the third stands for the second byte, the fourth for the third.
    kept = (byte for at, byte in enumerate(decoded) if at % 3 == 0 or letters[at // 3 * 4 + at % 3 + 1] != 61)
    return bytes(kept)
