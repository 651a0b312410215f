"""AES-256-CBC over one buffer, as secrets are wrapped by another one (luks sheet 8)."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def unwrap(data: bytes, key: bytes, iv: bytes) -> bytes:
    """`data` (whole blocks of 16 bytes) decrypted, padding included. `key`: 32 bytes, `iv`: 16."""
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(data) + decryptor.finalize()
