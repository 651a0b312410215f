"""What ciphers, modes, hashes and generators are called, and which of them this installation has.

Nothing heavy is imported: names are checked without loading a cipher. Names are those of creation options
(``aes-256``, ``xts``, ``plain64``, ``sha256``); LUKS headers write the family (``aes``) and the key length.
"""

from __future__ import annotations

from qimg.errors import NotSupported

#: Family -> bytes of a block, and bytes of the keys that it takes.
FAMILIES: dict[str, tuple[int, tuple[int, ...]]] = {
    "aes": (16, (16, 24, 32)),
    "camellia": (16, (16, 24, 32)),
    "cast5": (8, (16,)),
    "sm4": (16, (16,)),
}
#: Known to the format, but in no well-kept library with a permissive licence.
_MISSING: dict[str, tuple[int, ...]] = {"serpent": (16, 24, 32), "twofish": (16, 24, 32)}
MODES = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS = ("plain", "plain64", "essiv")
#: Hash -> bytes of its digest.
HASHES = {
    "md5": 16,
    "sha1": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "ripemd160": 20,
    "sm3": 32,
}
#: Families with one key length that carry no length in their name.
_BARE = ("sm4",)


def algorithm(family: str, key_size: int) -> str:
    """The name of `family` with keys of `key_size` bytes: ``aes-256``."""
    return family if family in _BARE else f"{family}-{key_size * 8}"


def split(name: str) -> tuple[str, int]:
    """``aes-256`` -> family and key size in bytes. Raises NotSupported for what is not there."""
    family = name.partition("-")[0]
    for size in FAMILIES.get(family, (0, ()))[1]:
        if algorithm(family, size) == name:
            return family, size
    raise NotSupported(f"Algorithm '{name}' not supported")


def known(family: str, size: int) -> bool:
    """Whether `family` with keys of `size` bytes means something, if only a cipher that is missing here."""
    return size in FAMILIES.get(family, (0, ()))[1] or size in _MISSING.get(family, ())


def creatable() -> list[str]:
    """The algorithms that creation options accept, also those that are then refused as missing."""
    every = {**{family: FAMILIES[family][1] for family in ("aes", "cast5", "sm4")}, **_MISSING}
    return ["des", "3des", *(algorithm(family, size) for family, sizes in every.items() for size in sizes)]
