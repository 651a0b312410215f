"""Sector ciphers: what encrypts the data of a disk, done on whole buffers (luks sheet 3).

A sector of 512 bytes is encrypted for itself, with an initialization vector made from its number. The cipher
runs over a piece of many sectors by one call to OpenSSL; chaining and tweaks are arrays (`qimg.vec.sectors`).
"""

from __future__ import annotations

from qimg.crypto import names
from qimg.errors import NotSupported, QimgError
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from qimg.storage.base import Buffer, Bytes
    from qimg.vec.sectors import Ecb, Mode

#: Sector numbers wrap here.
_PLAIN = {"plain": (1 << 32) - 1, "plain64": (1 << 64) - 1}


class _Keyed:
    """A block cipher with its key."""

    def __init__(self, family: str, key: bytearray) -> None:
        """`key` stays in use and is the caller's to wipe."""
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        self.block = names.FAMILIES[family][0]
        self._cipher = Cipher(_algorithm(family)(key), modes.ECB())

    def encrypt(self) -> Ecb:
        """A function for one thread that encrypts whole buffers."""
        return self._cipher.encryptor().update_into

    def decrypt(self) -> Ecb:
        """A function for one thread that decrypts whole buffers."""
        return self._cipher.decryptor().update_into


def _algorithm(family: str) -> Any:
    """The library's class of a cipher."""
    from cryptography.hazmat.decrepit.ciphers import algorithms as old
    from cryptography.hazmat.primitives.ciphers import algorithms

    name = {"aes": "AES", "camellia": "Camellia", "cast5": "CAST5", "sm4": "SM4"}[family]
    return getattr(old, name, None) or getattr(algorithms, name)


class SectorCipher:
    """One key in one mode. May be used by many threads at once: each has its own scratch memory."""

    def __init__(
        self,
        make_mode: Callable[[], Mode],
        vectors: Callable[[int, int], Bytes],
        keys: tuple[bytearray, ...] = (),
    ) -> None:
        """`make_mode` gives a thread its mode; `vectors(sector, count)` the vectors of `count` sectors;
        `keys` are what `forget` wipes."""
        from _thread import _local

        self._local: Any = _local()
        self._make_mode = make_mode
        self._vectors = vectors
        self._keys = keys

    def decrypt(self, buf: Buffer, sector: int) -> None:
        """Decrypt `buf`, whole sectors the first of which has the number `sector`, where it is."""
        self._run(self._mode().decrypt, buf, buf, sector)

    def encrypt(self, data: Bytes, sector: int) -> bytearray:
        """`data`, whole sectors the first of which has the number `sector`, encrypted."""
        made = bytearray(len(data))
        self.encrypt_into(data, made, sector)
        return made

    def encrypt_into(self, data: Bytes, target: Buffer, sector: int) -> None:
        """The same into `target`, as long as `data`; it may be `data` itself."""
        self._run(self._mode().encrypt, data, target, sector)

    def forget(self) -> None:
        """Wipe the keys, as the last call. OpenSSL wipes its own copies when it is done with them."""
        self._local = None
        for key in self._keys:
            key[:] = bytes(len(key))

    def _mode(self) -> Mode:
        mode: Mode | None = getattr(self._local, "mode", None)
        if mode is None:
            mode = self._local.mode = self._make_mode()
        return mode

    def _run(
        self, work: Callable[[Bytes, Buffer, Bytes], None], source: Bytes, target: Buffer, sector: int
    ) -> None:
        from qimg.vec.sectors import PIECE

        if len(source) % SECTOR:
            raise ValueError("not whole sectors")
        source, target = memoryview(source).cast("B"), memoryview(target).cast("B")
        for at in range(0, len(source), PIECE * SECTOR):
            part = source[at : at + PIECE * SECTOR]
            vectors = self._vectors(sector + at // SECTOR, len(part) // SECTOR)
            work(part, target[at : at + len(part)], vectors)


def sector_cipher(
    cipher: str, mode: str, ivgen: str | None, ivgen_hash: str | None, key: bytes | bytearray
) -> SectorCipher:
    """The cipher called `cipher` (``aes-256``) in `mode`, with vectors by `ivgen`; None: no vectors, `ecb`
    only. `key` is twice as long with `xts`; it is copied.

    Raises NotSupported for what the installation lacks, QimgError for a combination that makes no sense."""
    family, size = names.split(cipher)
    if mode not in names.MODES:
        raise NotSupported(f"Cipher mode '{mode}' not supported")
    if len(key) != size * (2 if mode == "xts" else 1):
        raise QimgError(f"Cipher key length {len(key)} should be {size * (2 if mode == 'xts' else 1)}")
    halves = bytearray(key[:size]), bytearray(key[size:])
    keyed = _Keyed(family, halves[0])
    if mode == "xts" and keyed.block != 16:
        raise NotSupported("Unsupported cipher mode xts")
    tweak = _Keyed(family, halves[1]) if mode == "xts" else None
    vectors = _vectors(family, mode, ivgen, ivgen_hash, key)
    return SectorCipher(lambda: _make_mode(mode, keyed, tweak), vectors, halves)


def _make_mode(name: str, keyed: _Keyed, tweak: _Keyed | None) -> Mode:
    from qimg.vec import sectors

    if tweak is not None:
        return sectors.Xts(keyed.encrypt(), keyed.decrypt(), tweak.encrypt())
    kind = {"ecb": sectors.Mode, "cbc": sectors.Cbc, "ctr": sectors.Ctr}[name]
    return kind(keyed.block, keyed.encrypt(), keyed.decrypt())


def _vectors(
    family: str, mode: str, ivgen: str | None, ivgen_hash: str | None, key: bytes | bytearray
) -> Callable[[int, int], Bytes]:
    """What makes initialization vectors: ``(first sector, count)`` -> `count` blocks."""
    if mode == "ecb" or ivgen is None:
        return lambda sector, count: b""
    block = names.FAMILIES[family][0]
    if ivgen in _PLAIN:
        mask = _PLAIN[ivgen]

        def plain(sector: int, count: int) -> Bytes:
            from qimg.vec.sectors import numbers

            return numbers(sector, count, block, mask)

        return plain
    if ivgen != "essiv":
        raise NotSupported(f"IV generator '{ivgen}' not supported")
    return _essiv(family, ivgen_hash, key)


def essiv_cipher(family: str, ivgen_hash: str | None) -> str:
    """The cipher that encrypts sector numbers for ``essiv``: as long a key as the hash has a digest.

    Raises QimgError where there is none."""
    if ivgen_hash is None:
        raise QimgError("Missing IV generator hash specification")
    size = names.HASHES.get(ivgen_hash)
    if size is None:
        raise NotSupported(f"Hash algorithm '{ivgen_hash}' not supported")
    if size not in names.FAMILIES[family][1]:
        raise NotSupported(f"No {family.upper()} cipher with key size {size} available")
    return names.algorithm(family, size)


def _essiv(family: str, ivgen_hash: str | None, key: bytes | bytearray) -> Callable[[int, int], Bytes]:
    from qimg.crypto.kdf import digest

    essiv_cipher(family, ivgen_hash)
    keyed = _Keyed(family, bytearray(digest(str(ivgen_hash), key)))

    def essiv(sector: int, count: int) -> Bytes:
        from qimg.vec.sectors import SLACK, numbers

        plain = numbers(sector, count, keyed.block, _PLAIN["plain64"])
        made = bytearray(len(plain) + SLACK)
        keyed.encrypt()(plain, made)
        return memoryview(made)[: len(plain)]

    return essiv
