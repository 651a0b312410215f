"""From passphrases to keys: hashes, PBKDF2, and the anti-forensic split of LUKS (luks sheet 3)."""

from __future__ import annotations

import os
from errno import ERANGE

from qimg.crypto import names
from qimg.errors import LimitError, NotSupported
from qimg.units import UINT64_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from qimg.storage.base import Buffer, Bytes

#: Fewest iterations, and the most that a field holds.
MIN_ITERATIONS = 1000
_MAX_ITERATIONS = (1 << 32) - 1
#: The benchmark: where it starts, and the processor time (seconds) that makes it exact to a percent.
_FIRST_ROUND = 32768
_ENOUGH = 0.1


def hasher(name: str) -> Callable[[Bytes], Any]:
    """The constructor of the hash called `name`. Raises NotSupported where OpenSSL lacks it."""
    import hashlib

    if name in names.HASHES:
        try:
            hashlib.new(name)
        except ValueError:  # a system that forbids it
            pass
        else:
            return lambda data: hashlib.new(name, data)
    raise NotSupported(f"Hash algorithm '{name}' not supported")


def digest(name: str, data: Bytes) -> bytes:
    """The hash called `name` of `data`."""
    made: bytes = hasher(name)(data).digest()
    return made


def pbkdf2(hash: str, passphrase: Bytes, salt: bytes, iterations: int, length: int) -> bytearray:
    """`length` bytes of PBKDF2-HMAC (RFC 8018) with `hash`."""
    import hashlib

    hasher(hash)
    return bytearray(hashlib.pbkdf2_hmac(hash, passphrase, salt, iterations, length))


def iterations_for(hash: str, length: int, milliseconds: int, divisor: int = 1) -> int:
    """How many iterations of PBKDF2 with `length` bytes of output take `milliseconds`, divided by `divisor`.

    Raises LimitError where more are asked for than a header can hold."""
    if not milliseconds:
        return MIN_ITERATIONS
    speed = _per_second(hash) // -(-length // names.HASHES[hash])  # each digest of output is as much work
    if not 0 < speed * milliseconds <= UINT64_MAX:
        raise LimitError(f"PBKDF iterations {speed} too large to scale: {os.strerror(ERANGE)}")
    count = speed * milliseconds // 1000 // divisor
    if count > _MAX_ITERATIONS:
        raise LimitError(f"PBKDF iterations {count} larger than {_MAX_ITERATIONS}: {os.strerror(ERANGE)}")
    return max(count, MIN_ITERATIONS)


def _per_second(hash: str) -> int:
    """Iterations per second of this thread's processor time, measured over at least `_ENOUGH`."""
    from time import thread_time

    count = _FIRST_ROUND
    while True:
        begin = thread_time()
        pbkdf2(hash, b"password", bytes(32), count, names.HASHES[hash])
        spent = thread_time() - begin
        if spent >= _ENOUGH:
            return int(count / spent)
        count *= min(100, max(2, int(2 * _ENOUGH / max(spent, 1e-6))))


# -- the anti-forensic split


def split(key: Bytes, stripes: int, hash: str) -> bytearray:
    """`key` blown up to `stripes` times its length: only all of it together gives the key back."""
    size = len(key)
    made = bytearray(os.urandom(size * (stripes - 1)))
    made += _mixed(made, size, stripes, hash, key)
    return made


def merge(material: Bytes, stripes: int, hash: str) -> bytearray:
    """The key that `split` made `material` from."""
    size = len(material) // stripes
    view = memoryview(material)
    return _mixed(view, size, stripes, hash, view[size * (stripes - 1) :])


def _mixed(material: Bytes, size: int, stripes: int, hash: str, last: Bytes) -> bytearray:
    """All stripes but the last diffused into one another, and `last` upon it."""
    make = hasher(hash)
    width = names.HASHES[hash]
    view = memoryview(material)
    state = 0
    for at in range(0, size * (stripes - 1), size):
        mixed = (state ^ int.from_bytes(view[at : at + size], "big")).to_bytes(size, "big")
        pieces = [
            make(number.to_bytes(4, "big") + mixed[number * width : (number + 1) * width]).digest()
            for number in range(-(-size // width))
        ]
        short = size % width
        if short:
            pieces[-1] = pieces[-1][:short]
        state = int.from_bytes(b"".join(pieces), "big")
    return bytearray((state ^ int.from_bytes(last, "big")).to_bytes(size, "big"))


def wipe(*buffers: Buffer) -> None:
    """Overwrite secrets that are no longer needed. Copies that a library made stay (docs/encryption.md)."""
    for buf in buffers:
        buf[:] = bytes(len(buf))
