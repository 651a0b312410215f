"""NBD through TLS: whom we trust, whom we do not, and that what is said arrives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nbdservers import Server, nbdkit
from support.peers import need
from support.run import Result, run_qimg_inprocess, run_real

MIB = 1 << 20

pytestmark = pytest.mark.peer("nbdkit", "qemu-img", "openssl")


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run([need("openssl"), *words], cwd=folder, check=True, capture_output=True)


def _authority(folder: Path) -> None:
    folder.mkdir()
    words = (
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "9",
    )
    _openssl(folder, *words, "-subj", "/CN=test CA", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")


def _certificate(folder: Path, who: str, names: str) -> None:
    words = (
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        f"/CN={who}",
    )
    _openssl(folder, *words, "-keyout", f"{who}-key.pem", "-out", f"{who}.csr")
    usage = "serverAuth" if who == "server" else "clientAuth"
    (folder / f"{who}.ext").write_text(f"subjectAltName={names}\nextendedKeyUsage={usage}\n")
    sign = ("x509", "-req", "-days", "9", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
    _openssl(folder, *sign, "-in", f"{who}.csr", "-extfile", f"{who}.ext", "-out", f"{who}-cert.pem")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of certificates: good, other (another authority), bare (the authority only); psk: a key."""
    folder = tmp_path_factory.mktemp("keys")
    _authority(folder / "good")
    _certificate(folder / "good", "server", "DNS:localhost,IP:127.0.0.1")
    _certificate(folder / "good", "client", "DNS:client")
    _authority(folder / "other")
    (folder / "bare").mkdir()
    (folder / "bare" / "ca-cert.pem").write_bytes((folder / "good" / "ca-cert.pem").read_bytes())
    (folder / "psk").mkdir()
    (folder / "psk" / "keys.psk").write_text(f"qimg:{'5a' * 32}\n")
    return folder


@pytest.fixture(scope="module")
def servers(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """tls: wants TLS; strict: our certificate too; plain: has none."""
    folder = tmp_path_factory.mktemp("n")
    tls = ("--tls=require", f"--tls-certificates={keys / 'good'}")
    with (
        nbdkit(folder, *tls, "memory", MIB) as wants,
        nbdkit(folder, *tls, "--tls-verify-peer", "memory", MIB) as strict,
        nbdkit(folder, "memory", MIB) as plain,
    ):
        yield {"tls": wants, "strict": strict, "plain": plain}


def _words(server: Server, keys: str, *options: str, more: str = "") -> list[str]:
    """The words of an info that reach `server` with the certificates in `keys`."""
    made = f"tls-creds-x509,id=t,endpoint=client,dir={keys}{more}"
    return [
        *("info", "--object", made, "--image-opts"),
        ",".join((f"driver=nbd,path={server.socket}", "tls-creds=t", *options)),
    ]


def _head(result: Result) -> tuple[int, list[str], str]:
    return result.code, result.lines[:4], result.err


@pytest.mark.parametrize(
    ("server", "which", "options", "more"),
    [
        ("tls", "good", ["tls-hostname=localhost"], ""),
        ("tls", "good", ["tls-hostname=127.0.0.1"], ""),
        ("tls", "bare", ["tls-hostname=localhost"], ""),
        ("strict", "good", ["tls-hostname=localhost"], ""),
        ("tls", "other", ["tls-hostname=elsewhere"], ",verify-peer=no"),
        # refused
        ("tls", "good", ["tls-hostname=elsewhere"], ""),
        ("tls", "other", ["tls-hostname=localhost"], ""),
        ("tls", "good", [], ""),
        ("plain", "good", ["tls-hostname=localhost"], ""),
    ],
)
def test_a_server_is_trusted_or_refused_as_by_the_real_program(
    servers: dict[str, Server], keys: Path, server: str, which: str, options: list[str], more: str
) -> None:
    words = _words(servers[server], str(keys / which), *options, more=more)
    assert _head(run_qimg_inprocess(words)) == _head(run_real(words))


def test_a_server_that_wants_to_know_us_refuses_whom_it_does_not(
    servers: dict[str, Server], keys: Path
) -> None:
    words = _words(servers["strict"], str(keys / "bare"), "tls-hostname=localhost")
    ours = run_qimg_inprocess(words)
    assert ours.code == run_real(words).code == 1
    assert len(ours.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("made", "option"),
    [
        ("secret,id=t,data=x", "tls-creds=t"),
        ("tls-creds-x509,id=t,endpoint=server,dir={good}", "tls-creds=t"),
        ("tls-creds-x509,id=t,endpoint=client,dir={good}", "tls-creds=u"),
    ],
)
def test_what_are_no_credentials_is_refused_in_the_words_of_the_real_program(
    servers: dict[str, Server], keys: Path, made: str, option: str
) -> None:
    made = made.format(good=keys / "good")
    options = f"driver=nbd,path={servers['tls'].socket},tls-hostname=localhost,{option}"
    words = ["info", "--object", made, "--image-opts", options]
    assert run_qimg_inprocess(words) == run_real(words)


def test_without_credentials_the_user_is_told_what_is_missing(servers: dict[str, Server]) -> None:
    words = ["info", servers["tls"].url()]
    assert run_qimg_inprocess(words) == run_real(words)


def test_data_goes_both_ways_and_arrives(servers: dict[str, Server], keys: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * (MIB // 256))
    tls = f"tls-certificates={keys / 'good'}&tls-hostname=localhost"
    url = f"nbds+unix:///?socket={servers['strict'].socket}&{tls}"
    run_qimg_inprocess(["convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "a", url]).ok()
    run_qimg_inprocess(["convert", "-f", "raw", "-O", "raw", url, tmp_path / "b"]).ok()
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    name = run_qimg_inprocess(["info", "-f", "raw", url]).ok().lines[0]
    assert name.startswith('image: json:{"driver": "raw", "file": {"server.type": "unix"')


def test_a_name_with_tls_does_not_trust_who_is_signed_by_nobody_we_know(
    servers: dict[str, Server], tmp_path: Path
) -> None:
    url = f"nbds+unix:///?socket={servers['tls'].socket}&tls-hostname=localhost"
    ours = run_qimg_inprocess(["info", url])
    assert ours.err == f"qemu-img: Could not open '{url}': The certificate hasn't got a known issuer\n"


def test_a_key_that_both_know_needs_a_newer_python_or_works(keys: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--tls=require", f"--tls-psk={keys / 'psk' / 'keys.psk'}", "memory", MIB) as server:
        made = f"tls-creds-psk,id=t,endpoint=client,dir={keys / 'psk'},username=qimg"
        options = f"driver=nbd,path={server.socket},tls-creds=t"
        ours = run_qimg_inprocess(["info", "--object", made, "--image-opts", options])
        if sys.version_info >= (3, 13):
            assert ours.lines[2] == "virtual size: 1 MiB (1048576 bytes)"
        else:
            message = "TLS with pre-shared keys needs Python 3.13 or newer"
            assert ours.err == f"qemu-img: Could not open '{options}': {message}\n"
