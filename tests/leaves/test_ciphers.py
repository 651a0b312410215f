"""Sector ciphers against the vectors of IEEE 1619 and against OpenSSL's own chaining, sector by sector."""

from __future__ import annotations

import hashlib
import random
import threading

import pytest
from cryptography.hazmat.decrepit.ciphers import algorithms as old
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qimg.crypto.ciphers import sector_cipher
from qimg.errors import NotSupported, QimgError

SECTOR = 512
#: More than one piece, and a last one that is short.
SECTORS = 600

# IEEE 1619-2007, annex B: vectors 4 (AES-128) and 10 (AES-256), data unit of 512 bytes 00 01 .. ff 00 .. ff.
XTS_VECTORS = [
    (
        "aes-128",
        0,
        "2718281828459045235360287471352631415926535897932384626433832795",
        "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89cc78cf7f5e543445f8333d8fa7f560000",
        "a418f20a282df920147beabe421ee5319d0568",
    ),
    (
        "aes-256",
        0xFF,
        (
            "2718281828459045235360287471352662497757247093699959574966967627"
            "3141592653589793238462643383279502884197169399375105820974944592"
        ),
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44",
        "a755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
    ),
]


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize(("cipher", "sector", "key", "begin", "end"), XTS_VECTORS)
def test_xts_gives_the_vectors_of_the_standard(
    cipher: str, sector: int, key: str, begin: str, end: str
) -> None:
    made = sector_cipher(cipher, "xts", "plain64", None, bytes.fromhex(key))
    plain = bytes(range(256)) * 2
    secret = made.encrypt(plain, sector)
    assert secret.hex().startswith(begin)
    assert secret.hex().endswith(end)
    made.decrypt(secret, sector)
    assert secret == plain


FAMILIES = {
    "aes-128": (algorithms.AES, 16, 16),
    "aes-192": (algorithms.AES, 24, 16),
    "aes-256": (algorithms.AES, 32, 16),
    "camellia-256": (old.Camellia, 32, 16),
    "cast5-128": (old.CAST5, 16, 8),
    "sm4": (algorithms.SM4, 16, 16),
}


def expected(cipher: str, mode: str, iv: bytes, key: bytes, sector: bytes) -> bytes:
    kind, _, block = FAMILIES[cipher]
    if mode == "ctr":  # by its definition, for the ciphers that OpenSSL does not offer it for
        first = int.from_bytes(iv, "big")
        numbers = [(first + at) % (1 << 8 * block) for at in range(SECTOR // block)]
        counters = b"".join(number.to_bytes(block, "big") for number in numbers)
        stream = int.from_bytes(Cipher(kind(key), modes.ECB()).encryptor().update(counters), "big")
        return (stream ^ int.from_bytes(sector, "big")).to_bytes(SECTOR, "big")
    chaining = modes.CBC(iv) if mode == "cbc" else modes.ECB()
    return Cipher(kind(key), chaining).encryptor().update(sector)


@pytest.mark.parametrize("cipher", FAMILIES)
@pytest.mark.parametrize("mode", ["ecb", "cbc", "ctr"])
@pytest.mark.parametrize("ivgen", ["plain", "plain64", "essiv"])
def test_a_buffer_is_encrypted_as_openssl_encrypts_its_sectors_one_by_one(
    cipher: str, mode: str, ivgen: str
) -> None:
    kind, size, block = FAMILIES[cipher]
    key = noise(size)
    hash = {"aes": "sha256", "camellia": "sha256"}.get(cipher.partition("-")[0], "md5")
    essiv = Cipher(kind(hashlib.new(hash, key).digest()), modes.ECB()).encryptor()
    first = (1 << 32) - 100  # `plain` wraps inside the buffer
    plain = noise(SECTORS * SECTOR)
    wanted = b""
    for number in range(first, first + SECTORS):
        iv = (number % (1 << 32) if ivgen == "plain" else number).to_bytes(block, "little")
        iv = essiv.update(iv) if ivgen == "essiv" else iv
        at = (number - first) * SECTOR
        wanted += expected(cipher, mode, iv, key, plain[at : at + SECTOR])
    made = sector_cipher(cipher, mode, ivgen, hash if ivgen == "essiv" else None, key)
    secret = made.encrypt(plain, first)
    assert secret == wanted
    made.decrypt(secret, first)
    assert secret == plain


def test_a_counter_carries_into_its_upper_half() -> None:
    """Counters that begin next to 2^64 or 2^128: one vector in 2^59 does so, so it is handed in."""
    from qimg.vec.sectors import Ctr

    key = noise(16)
    ecb = Cipher(algorithms.AES(key), modes.ECB())
    mode = Ctr(16, ecb.encryptor().update_into, ecb.decryptor().update_into)
    plain = noise(2 * SECTOR)
    ivs = bytes(7) + b"\x05" + b"\xff" * 7 + b"\xf0" + b"\xff" * 15 + b"\xfe"
    made = bytearray(2 * SECTOR)
    mode.encrypt(plain, made, ivs)
    for at in (0, 1):
        part = plain[at * SECTOR : (at + 1) * SECTOR]
        openssl = Cipher(algorithms.AES(key), modes.CTR(ivs[at * 16 : at * 16 + 16]))
        wanted = openssl.encryptor().update(part)
        assert made[at * SECTOR : (at + 1) * SECTOR] == wanted


@pytest.mark.parametrize("cipher", ["aes-128", "aes-192", "aes-256", "camellia-256", "sm4"])
def test_xts_masks_each_block_with_a_power_of_x(cipher: str) -> None:
    """The standard's own description, block by block, with OpenSSL for single blocks."""
    kind, size, _ = FAMILIES[cipher]
    key = noise(2 * size)
    data, tweak = (Cipher(kind(half), modes.ECB()).encryptor() for half in (key[:size], key[size:]))
    plain = noise(3 * SECTOR)
    wanted = b""
    for number in range(3):
        mask = int.from_bytes(tweak.update((7 + number).to_bytes(16, "little")), "little")
        for at in range(number * SECTOR, (number + 1) * SECTOR, 16):
            masked = int.from_bytes(plain[at : at + 16], "little") ^ mask
            secret = int.from_bytes(data.update(masked.to_bytes(16, "little")), "little") ^ mask
            wanted += secret.to_bytes(16, "little")
            mask = (mask << 1) ^ (0x87 | 1 << 128 if mask >> 127 else 0)
    assert sector_cipher(cipher, "xts", "plain64", None, key).encrypt(plain, 7) == wanted


def test_views_that_begin_at_odd_addresses_are_decrypted_where_they_are() -> None:
    made = sector_cipher("aes-256", "xts", "plain64", None, noise(64))
    plain = noise(3 * SECTOR)
    room = bytearray(3 * SECTOR + 8)
    room[3 : 3 + 3 * SECTOR] = made.encrypt(plain, 5)
    made.decrypt(memoryview(room)[3 : 3 + 3 * SECTOR], 5)
    assert room == bytes(3) + plain + bytes(5)


def test_nothing_is_encrypted_to_nothing() -> None:
    made = sector_cipher("aes-256", "cbc", "plain64", None, noise(32))
    assert made.encrypt(b"", 0) == b""


def test_a_cipher_that_forgot_its_key_holds_zeros_and_works_no_more() -> None:
    made = sector_cipher("aes-256", "xts", "plain64", None, noise(64))
    keys = made._keys
    assert b"".join(keys) == noise(64)
    made.forget()
    assert b"".join(keys) == bytes(64)
    with pytest.raises(AttributeError):
        made.encrypt(bytes(SECTOR), 0)


def test_threads_share_a_cipher() -> None:
    made = sector_cipher("aes-256", "xts", "plain64", None, noise(64))
    plain = noise(SECTORS * SECTOR)
    wanted = bytes(made.encrypt(plain, 3))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            secret = made.encrypt(plain, 3)
            if secret != wanted:
                wrong.append(number)
            made.decrypt(secret, 3)
            if secret != plain:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("words", "key", "message"),
    [
        (("serpent-256", "xts", "plain64", None), 64, "Algorithm 'serpent-256' not supported"),
        (("aes-512", "xts", "plain64", None), 64, "Algorithm 'aes-512' not supported"),
        (("aes-256", "pcbc", "plain64", None), 32, "Cipher mode 'pcbc' not supported"),
        (("aes-256", "cbc", "benbi", None), 32, "IV generator 'benbi' not supported"),
        (("aes-256", "cbc", "essiv", None), 32, "Missing IV generator hash specification"),
        (("aes-256", "cbc", "essiv", "foo"), 32, "Hash algorithm 'foo' not supported"),
        (("aes-256", "cbc", "essiv", "sha1"), 32, "No AES cipher with key size 20 available"),
        (("cast5-128", "xts", "plain64", None), 32, "Unsupported cipher mode xts"),
        (("aes-256", "xts", "plain64", None), 32, "Cipher key length 32 should be 64"),
    ],
)
def test_what_is_missing_or_makes_no_sense_is_named(
    words: tuple[str, str, str, str | None], key: int, message: str
) -> None:
    with pytest.raises(QimgError) as raised:
        sector_cipher(*words, bytes(key))
    assert str(raised.value) == message


def test_parts_of_sectors_are_refused() -> None:
    with pytest.raises(ValueError):
        sector_cipher("aes-256", "ecb", None, None, bytes(32)).encrypt(bytes(100), 0)


def test_a_missing_cipher_is_a_feature_that_is_not_supported() -> None:
    with pytest.raises(NotSupported):
        sector_cipher("twofish-256", "cbc", "plain64", None, bytes(32))
