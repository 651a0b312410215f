"""luks images: every cipher both ways, creation, headers in files of their own, cryptsetup (luks sheet)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qimg.crypto import kdf
from qimg.crypto.ciphers import sector_cipher
from qimg.crypto.luks import LuksHeader, Scheme
from spec.differential import as_release_7
from support.luks import PAYLOAD, SECRETS, content, io, make, opts, our_content, real, slots
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

M = 1 << 20


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that the real program made."""
    path = tmp_path_factory.mktemp("stock") / "a.luks"
    real(["create", "-q", "-f", "luks", *SECRETS, "-o", "key-secret=s,iter-time=10", path, "1M"]).ok()
    io(path, ["write -q -P 7 0 1M"])
    return path


# -- every cipher

CIPHERS = [
    {"cipher-alg": cipher, "cipher-mode": mode}
    for cipher in ("aes-128", "aes-192", "aes-256", "cast5-128")
    for mode in ("ecb", "cbc", "ctr", "xts")
    if (cipher, mode) != ("cast5-128", "xts") and (cipher != "aes-192" or mode == "xts")
]
GENERATORS = [
    {"cipher-alg": "aes-128", "cipher-mode": mode, "ivgen-alg": generator, **more}
    for mode in ("cbc", "xts")
    for generator, more in (
        ("plain", {}),
        ("essiv", {}),
        ("essiv", {"ivgen-hash-alg": "md5"}),
        ("plain64", {"ivgen-hash-alg": "sha1"}),
    )
]
HASHES = [
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "hash-alg": hash}
    for hash in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
]


@pytest.mark.parametrize(
    "scheme", CIPHERS + GENERATORS + HASHES, ids=lambda scheme: ",".join(scheme.values())
)
def test_the_real_program_reads_what_we_encrypt_and_we_what_it_encrypts(
    scheme: dict[str, str], tmp_path: Path
) -> None:
    """The content is more than one piece of our cipher."""
    size = 600 * 512
    (tmp_path / "a.raw").write_bytes(os.urandom(size))
    plain = (tmp_path / "a.raw").read_bytes()
    said = ",".join(f"{name}={value}" for name, value in {"iter-time": "0", **scheme}.items())
    path = tmp_path / "a.luks"
    words = ["convert", "-f", "raw", "-O", "luks", *SECRETS, "-o", f"key-secret=s,{said}"]
    run_qimg_inprocess([*words, tmp_path / "a.raw", path]).ok()
    assert content(path) == plain
    io(path, ["write -q -P 3 1k 200k"])
    assert our_content(path) == plain[:1024] + b"\3" * (200 << 10) + plain[1024 + (200 << 10) :]
    shown = run_qimg_inprocess(["info", path])
    assert as_release_7("info", shown).out == run_real(["info", path]).out


def test_a_key_that_the_real_program_cannot_handle_is_refused(tmp_path: Path) -> None:
    """It stops with a failed assertion instead: the material of such keys is not made of whole sectors."""
    words = [
        "create",
        "-f",
        "luks",
        *SECRETS,
        "-o",
        "key-secret=s,cipher-alg=aes-192,cipher-mode=cbc",
        "a",
        "1M",
    ]
    ours = run_qimg_inprocess(words, tmp_path)
    assert (ours.code, ours.err) == (
        1,
        "qemu-img: a: Cipher mode 'cbc' not supported with keys of 24 bytes\n",
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cipher", ["serpent-256", "twofish-128", "serpent-192"])
def test_a_missing_cipher_is_named_and_nothing_is_made(cipher: str, tmp_path: Path) -> None:
    words = ["create", "-f", "luks", *SECRETS, "-o", f"key-secret=s,cipher-alg={cipher}", "a", "1M"]
    ours = run_qimg_inprocess(words, tmp_path)
    assert (ours.code, ours.err) == (1, f"qemu-img: a: Algorithm '{cipher}' not supported\n")
    assert os.listdir(tmp_path) == []


# -- creating


@pytest.mark.parametrize("size", [0, 512, 1000, 70001])
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_a_new_image_is_as_long_as_header_and_disk(size: int, mode: str, tmp_path: Path) -> None:
    path = make(tmp_path / "a.luks", size, preallocation=mode)
    whole = -(-size // 512) * 512
    status = path.stat()
    assert status.st_size == PAYLOAD + whole
    if mode in ("falloc", "full"):
        assert status.st_blocks * 512 >= PAYLOAD + whole
    else:
        assert status.st_blocks * 512 < PAYLOAD / 4
    assert len(content(path)) == whole


def test_a_disk_that_fits_no_file_is_refused(tmp_path: Path) -> None:
    words = ["create", "-f", "luks", *SECRETS, "-o", "key-secret=s", "a", "9223372036854774784"]
    ours = run_qimg_inprocess(words, tmp_path)
    assert (ours.code, ours.err) == (1, "qemu-img: a: The requested file size is too large\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("time", "said"),
    [
        ("-1", "too large to scale"),
        ("10000000000000000", "too large to scale"),
        ("100000000", "larger than 4294967295"),
    ],
)
def test_more_iterations_than_a_header_can_hold_are_refused(time: str, said: str, tmp_path: Path) -> None:
    """The number in the message is a measurement; the real program's words otherwise."""
    words = ["create", "-f", "luks", *SECRETS, "-o", f"key-secret=s,iter-time={time}", "a", "1M"]
    ours = run_qimg_inprocess(words, tmp_path)
    assert ours.code == 1
    assert ours.err.startswith("qemu-img: a: PBKDF iterations ")
    assert ours.err.endswith(f" {said}: Numerical result out of range\n")
    assert os.listdir(tmp_path) == []


def test_no_image_is_made_that_would_take_minutes_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours would refuse to open it, see tests/hostile/test_luks.py."""
    monkeypatch.setattr(kdf, "_per_second", lambda _: 10_000_000)
    words = ["create", "-f", "luks", *SECRETS, "-o", "key-secret=s,iter-time=60000", "a", "1M"]
    ours = run_qimg_inprocess(words, tmp_path)
    said = "Keyslot 0 iteration count 300000000 is larger than 268435456"
    assert (ours.code, ours.err) == (1, f"qemu-img: a: {said}\n")
    assert os.listdir(tmp_path) == []


def test_measure_tells_the_length_of_the_image(tmp_path: Path) -> None:
    words = ["measure", "-O", "luks", *SECRETS, "-o", "key-secret=s"]
    whole = PAYLOAD + M
    expected = f"required size: {whole}\nfully allocated size: {whole}\n"
    assert run_qimg_inprocess([*words, "--size", "1M"]).ok().out == expected
    (tmp_path / "a.raw").write_bytes(bytes(M))
    assert run_qimg_inprocess([*words, "-f", "raw", tmp_path / "a.raw"]).ok().out == expected


def test_zeros_are_encrypted_too(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\1" * 4096 + bytes(M))
    path = tmp_path / "a.luks"
    words = ["convert", "-f", "raw", "-O", "luks", *SECRETS, "-o", "key-secret=s,iter-time=0"]
    run_qimg_inprocess([*words, tmp_path / "a.raw", path]).ok()
    assert content(path) == (tmp_path / "a.raw").read_bytes()
    assert bytes(512) not in [path.read_bytes()[at : at + 512] for at in range(PAYLOAD, PAYLOAD + M, 512)]


# -- detached headers (no 7.2 has them; its own images, taken apart, are the judge)


@pytest.fixture
def apart(stock: Path, tmp_path: Path) -> str:
    """The real program's image as two files; how ours is told of them."""
    whole = stock.read_bytes()
    (tmp_path / "header").write_bytes(whole[:104] + bytes(4) + whole[108:PAYLOAD])
    (tmp_path / "data").write_bytes(whole[PAYLOAD:])
    return f"driver=luks,file.filename={tmp_path}/data,header.filename={tmp_path}/header"


def test_a_detached_header_is_read_and_shown(apart: str, tmp_path: Path) -> None:
    shown = json.loads(run_qimg_inprocess(["info", "--output=json", "--image-opts", apart]).ok().out)
    assert shown["virtual-size"] == M
    assert shown["format-specific"]["data"]["detached-header"] is True
    assert shown["format-specific"]["data"]["payload-offset"] == 0
    assert {child["name"] for child in shown["children"]} == {"file", "header"}
    used = sum((tmp_path / name).stat().st_blocks * 512 for name in ("header", "data"))
    assert shown["actual-size"] == used
    words = ["convert", *SECRETS, "--image-opts", apart + ",key-secret=s", "-O", "raw", tmp_path / "out"]
    run_qimg_inprocess(words).ok()
    assert (tmp_path / "out").read_bytes() == b"\7" * M


def test_slots_change_in_the_header_and_the_length_in_the_data(apart: str, tmp_path: Path) -> None:
    data, header = tmp_path / "data", tmp_path / "header"
    before = data.read_bytes()
    length = header.stat().st_size
    said = [*SECRETS, "--image-opts", apart + ",key-secret=s"]
    run_qimg_inprocess(["amend", *said, "-o", "state=active,new-secret=n,iter-time=0"]).ok()
    assert data.read_bytes() == before
    run_qimg_inprocess(["resize", *said, "2M"]).ok()
    assert (data.stat().st_size, header.stat().st_size) == (2 * M, length)
    # Put together again, it is an image of the real program's kind.
    whole = header.read_bytes()
    joined = tmp_path / "joined"
    joined.write_bytes(whole[:104] + (PAYLOAD // 512).to_bytes(4, "big") + whole[108:] + data.read_bytes())
    assert slots(joined)[:3] == [True, True, False]
    assert content(joined, "n")[: 1 << 16] == b"\7" * (1 << 16)


def test_a_detached_header_alone_is_no_image(apart: str, tmp_path: Path) -> None:
    shown = run_qimg_inprocess(["info", "-f", "luks", "header"], tmp_path)
    assert shown.err == "qemu-img: Could not open 'header': LUKS payload is overlapping with the header\n"


def test_a_detached_header_can_be_made_for_data_elsewhere(tmp_path: Path) -> None:
    words = ["create", "-q", "-f", "luks", *SECRETS, "-o", "key-secret=s,iter-time=0,detached-header=on"]
    run_qimg_inprocess([*words, "header", "1M"], tmp_path).ok()
    assert (tmp_path / "header").stat().st_size == PAYLOAD
    (tmp_path / "data").write_bytes(bytes(M))
    (tmp_path / "a.raw").write_bytes(b"\5" * M)
    target = "driver=luks,file.filename=data,header.filename=header,key-secret=s"
    words = ["convert", "-n", *SECRETS, "--image-opts", "driver=raw,file.filename=a.raw"]
    run_qimg_inprocess([*words, "--target-image-opts", target], tmp_path).ok()
    header = (tmp_path / "header").read_bytes()
    joined = header[:104] + (PAYLOAD // 512).to_bytes(4, "big") + header[108:]
    (tmp_path / "joined").write_bytes(joined + (tmp_path / "data").read_bytes())
    assert content(tmp_path / "joined") == b"\5" * M


def test_a_detached_header_is_no_target_of_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    options = "key-secret=s,detached-header=on"
    words = ["convert", "-O", "luks", *SECRETS, "-o", options, "a.raw", "h"]
    ours = run_qimg_inprocess(words, tmp_path)
    assert ours.code == 1
    assert ours.err.endswith("A detached header has no room for data\n")
    assert os.listdir(tmp_path) == ["a.raw"]


# -- interop with cryptsetup


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize(
    ("cipher", "bits", "hash"),
    [
        ("aes-xts-plain64", 512, "sha256"),
        ("aes-xts-plain64", 256, "sha1"),
        ("aes-cbc-essiv:sha256", 256, "sha512"),
        ("aes-cbc-plain", 192, "ripemd160"),
        ("aes-ctr-plain64", 128, "sha224"),
    ],
)
def test_what_cryptsetup_makes_is_opened(cipher: str, bits: int, hash: str, tmp_path: Path) -> None:
    """The key is checked against a digest, so an image that opens was decrypted right."""
    path = tmp_path / "a.luks"
    path.write_bytes(b"")
    os.truncate(path, 3 * M)
    words = ["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    words += ["--cipher", cipher, "--key-size", str(bits), "--hash", hash, path]
    assert run_peer("cryptsetup", words, input="sesame").code == 0
    plain = our_content(path)
    if bits != 192:  # the real program stops with a failed assertion
        assert plain == content(path)
    said = [*SECRETS, "--image-opts", opts(path), "-o", "state=active,new-secret=n,iter-time=0"]
    run_qimg_inprocess(["amend", *said]).ok()
    assert opens(path, "new") and opens(path, "sesame") and not opens(path, "wrong")


def opens(path: Path, passphrase: str) -> bool:
    """Whether cryptsetup does."""
    words = ["open", "--test-passphrase", "--key-file", "-", path]
    return run_peer("cryptsetup", words, input=passphrase).code == 0


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
        {"cipher-mode": "ctr", "hash-alg": "sha512"},
    ],
)
def test_cryptsetup_opens_what_we_make(scheme: dict[str, str], tmp_path: Path) -> None:
    path = make(tmp_path / "a.luks", 4096, **scheme)
    dump = run_peer("cryptsetup", ["luksDump", path]).ok().out
    assert "Key Slot 0: ENABLED" in dump and "Key Slot 1: DISABLED" in dump
    assert f"Hash spec:     \t{scheme.get('hash-alg', 'sha256')}" in dump
    assert opens(path, "sesame") and not opens(path, "wrong")


# -- ciphers that 7.2 lacks


@pytest.mark.parametrize(
    ("cipher", "mode"), [("camellia-256", "xts"), ("camellia-128", "cbc"), ("sm4", "xts"), ("sm4", "cbc")]
)
def test_headers_with_ciphers_of_other_programs_are_understood(
    cipher: str, mode: str, tmp_path: Path
) -> None:
    """What they compute is held in tests/leaves/test_ciphers.py; here, that names lead to them."""
    header = LuksHeader.new(Scheme(cipher, mode))
    key, material = header.start(b"sesame", 0)
    secret = sector_cipher(cipher, mode, "plain64", None, key).encrypt(b"\5" * 4096, 0)
    whole = header.pack().ljust(header.slots[0].material_sector * 512, b"\0") + material
    path = tmp_path / "a.luks"
    path.write_bytes(whole.ljust(header.payload_offset, b"\0") + secret)
    family = cipher.partition("-")[0].encode()
    assert path.read_bytes()[8:40] == family.ljust(32, b"\0")
    assert f"cipher alg: {cipher}\n" in run_qimg_inprocess(["info", path]).ok().out
    assert our_content(path) == b"\5" * 4096
