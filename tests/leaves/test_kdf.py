"""Key derivation: published vectors of PBKDF2, and the properties of the anti-forensic split."""

from __future__ import annotations

import pytest

from qimg.crypto import kdf
from qimg.errors import LimitError, NotSupported


@pytest.mark.parametrize(
    ("hash", "iterations", "length", "wanted"),
    [
        # RFC 6070, and RFC 7914 section 11 for sha256.
        ("sha1", 4096, 20, "4b007901b765489abead49d926f721d065a429c1"),
        (
            "sha256",
            1,
            64,
            (
                "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
                "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
            ),
        ),
    ],
)
def test_pbkdf2_gives_published_vectors(hash: str, iterations: int, length: int, wanted: str) -> None:
    words = {"sha1": (b"password", b"salt"), "sha256": (b"passwd", b"salt")}[hash]
    assert kdf.pbkdf2(hash, *words, iterations, length).hex() == wanted


@pytest.mark.parametrize("hash", ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"])
@pytest.mark.parametrize("size", [16, 24, 64])
def test_all_of_the_material_gives_the_key_back_and_any_damage_another(hash: str, size: int) -> None:
    key = bytes(range(100, 100 + size))
    material = kdf.split(key, 50, hash)
    assert len(material) == 50 * size
    assert kdf.merge(material, 50, hash) == key
    for at in (0, 25 * size, len(material) - 1):
        damaged = bytearray(material)
        damaged[at] ^= 1
        assert kdf.merge(damaged, 50, hash) != key


def test_two_splits_of_one_key_have_nothing_in_common() -> None:
    first, second = (kdf.split(bytes(32), 4, "sha256") for _ in range(2))
    assert all(first[at : at + 32] != second[at : at + 32] for at in range(0, 128, 32))


def test_no_time_means_the_fewest_iterations() -> None:
    assert kdf.iterations_for("sha256", 32, 0) == 1000


def test_more_time_means_more_iterations_and_too_many_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdf, "_per_second", lambda *_: 2_000_000)
    assert kdf.iterations_for("sha256", 64, 2000) == 2_000_000
    assert kdf.iterations_for("sha256", 20, 2000, 8) == 500_000
    assert kdf.iterations_for("sha256", 32, 1) == 2000
    with pytest.raises(LimitError, match="larger than 4294967295"):
        kdf.iterations_for("sha256", 64, 1 << 30)
    for milliseconds in (1 << 60, -1):
        with pytest.raises(LimitError, match="PBKDF iterations 2000000 too large to scale"):
            kdf.iterations_for("sha256", 20, milliseconds)


@pytest.mark.parametrize("speed", [1e-4, 1e-5, 1e-6, 3e-8])
def test_the_benchmark_measures_a_tenth_of_a_second_at_least_and_not_much_more(
    monkeypatch: pytest.MonkeyPatch, speed: float
) -> None:
    """`speed`: the seconds that an iteration takes."""
    clock = [0.0]
    spent: list[float] = []

    def run(hash: str, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytearray:
        spent.append(iterations * speed)
        clock[0] += spent[-1]
        return bytearray(length)

    monkeypatch.setattr(kdf, "pbkdf2", run)
    monkeypatch.setattr("time.thread_time", lambda: clock[0])
    assert kdf.iterations_for("sha256", 32, 1000) == pytest.approx(1 / speed, rel=0.01)
    assert kdf.iterations_for("sha256", 64, 1000) == pytest.approx(1 / speed / 2, rel=0.01)
    assert spent[len(spent) // 2 - 1] >= 0.1
    assert sum(spent) < 1 or len(spent) == 2


def test_an_unknown_hash_is_named() -> None:
    with pytest.raises(NotSupported) as raised:
        kdf.pbkdf2("whirlpool", b"x", b"salt", 1, 32)
    assert str(raised.value) == "Hash algorithm 'whirlpool' not supported"


def test_wiped_buffers_hold_zeros() -> None:
    key, view = bytearray(b"secret"), memoryview(bytearray(b"other"))
    kdf.wipe(key, view)
    assert key == bytes(6)
    assert view == bytes(5)
