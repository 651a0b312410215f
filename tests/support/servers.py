"""Real servers for images: nginx (http, https), vsftpd (ftp), pyftpdlib (ftps, passwords), OpenSSH's sshd.

Each is a context manager over a folder that it serves, on ports of 127.0.0.1 that are free.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from support import peers

#: Seconds until a server that does not answer counts as one that did not start.
START = 20.0
_FTP_SERVER = Path(__file__).parent / "ftp_server.py"


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int) -> bool:
    """Whether somebody takes connections at `port`."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def running(command: Sequence[str | Path], ready: Callable[[], bool], log: Path) -> Iterator[None]:
    """The process `command`, from `ready` on to the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + START
        while not ready():
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder with a short name that every user can enter."""
    path = Path(tempfile.mkdtemp(prefix="qimg"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_certificate(place: Path) -> None:
    """server-key.pem and server-cert.pem, signed by itself, for localhost and 127.0.0.1."""
    subprocess.run(
        (
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", place / "server-key.pem", "-out", place / "server-cert.pem"),
        ),
        check=True,
        capture_output=True,
    )


class Web(NamedTuple):
    """An nginx. Files of `root` are at /, with a password at /auth/ (user u, password p), without ranges at
    /norange/, behind a redirect at /redir/; what was asked for stands in `log`."""

    root: Path
    port: int
    tls_port: int
    log: Path
    certificate: Path

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        """Without a slash at the end."""
        return f"https://127.0.0.1:{self.tls_port}"

    def requests(self) -> list[str]:
        """What was asked for so far: method, path, range, status, Authorization, Cookie."""
        return self.log.read_text().splitlines()


_NGINX = """\
daemon off; master_process off; worker_processes 1; pid {top}/nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 256; }}
http {{ log_format asked '$request_method $uri $http_range $status $http_authorization $http_cookie';
 access_log {top}/access.log asked; default_type application/octet-stream; keepalive_requests 100000;
 client_body_temp_path {top}/t/b; proxy_temp_path {top}/t/p; fastcgi_temp_path {top}/t/f;
 uwsgi_temp_path {top}/t/u; scgi_temp_path {top}/t/s;
 server {{ listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl; root {top}/www;
  ssl_certificate {top}/server-cert.pem; ssl_certificate_key {top}/server-key.pem;
  location /norange/ {{ alias {top}/www/; max_ranges 0; }}
  location /auth/ {{ alias {top}/www/; auth_basic x; auth_basic_user_file {top}/htpasswd; }}
  location /busy/ {{ return 503; }}
  location /hangup/ {{ return 444; }}
  location /redir/ {{ rewrite ^/redir/(.*)$ /$1 redirect; }} }} }}
"""


@contextmanager
def nginx() -> Iterator[Web]:
    """A web server with an empty root."""
    program = peers.need("nginx")
    with folder() as top:
        web = Web(top / "www", free_port(), free_port(), top / "access.log", top / "server-cert.pem")
        web.root.mkdir()
        (top / "t").mkdir()
        make_certificate(top)
        hashed = subprocess.run(
            ("openssl", "passwd", "-apr1", "p"), capture_output=True, text=True, check=True
        )
        (top / "htpasswd").write_text(f"u:{hashed.stdout}")
        user = "user root;" if os.getuid() == 0 else ""
        (top / "nginx.conf").write_text(
            _NGINX.format(top=top, port=web.port, tls_port=web.tls_port, user=user)
        )
        command = (program, "-c", top / "nginx.conf", "-e", "stderr")
        with running(command, lambda: answers(web.port), top / "nginx.log"):
            yield web


@contextmanager
def vsftpd() -> Iterator[tuple[Path, str]]:
    """An FTP server for everybody: its folder and its URL without a slash at the end."""
    program = peers.need("vsftpd")
    with folder() as top:
        root = top / "ftp"
        for name in (root, top / "empty"):
            name.mkdir()
        port = free_port()
        (top / "vsftpd.conf").write_text(
            f"listen=YES\nlisten_address=127.0.0.1\nlisten_port={port}\nbackground=NO\nanonymous_enable=YES\n"
            f"anon_root={root}\nno_anon_password=YES\nsecure_chroot_dir={top}/empty\nseccomp_sandbox=NO\n"
        )
        with running((program, top / "vsftpd.conf"), lambda: answers(port), top / "vsftpd.log"):
            yield root, f"ftp://127.0.0.1:{port}"


@cache
def python_with_pyftpdlib() -> str:
    """An interpreter that has the FTP server. Skips the running test where none has, or fails it where peers
    are required."""
    for python in ("/usr/bin/python3", sys.executable):
        probe = (python, "-W", "ignore", "-c", "from pyftpdlib.handlers import TLS_FTPHandler")
        if peers.find(python) and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return python
    reason = peers.SKIP_PREFIX + "python3-pyftpdlib and python3-openssl"
    if peers.required():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@contextmanager
def ftp_with_passwords(*, tls: bool = False) -> Iterator[tuple[Path, str]]:
    """An FTP server (pyftpdlib) for user u with password p; with `tls` inside TLS from the first byte on."""
    with folder() as top:
        root, pem = top / "ftp", top / "server.pem"
        root.mkdir()
        if tls:
            make_certificate(top)
            pem.write_text("".join((top / f"server-{name}.pem").read_text() for name in ("key", "cert")))
        port = free_port()
        # Without the warnings: what it is made of is deprecated in Python 3.11.
        python = python_with_pyftpdlib()
        command = (python, "-W", "ignore", _FTP_SERVER, root, str(port), *((pem,) if tls else ()))
        with running(command, lambda: answers(port), top / "ftp.log"):
            yield root, f"{'ftps' if tls else 'ftp'}://127.0.0.1:{port}"


class Ssh(NamedTuple):
    """An sshd that lets the tests' user in by a key: in `home`/.ssh and with the agent of `environment`."""

    root: Path
    port: int
    home: Path
    environment: dict[str, str]
    host_key: Path

    def url(self, name: str, check: str | None = "no") -> str:
        """Of a file in `root`; `check`: the value of host_key_check, None: without."""
        query = "" if check is None else f"?host_key_check={check}"
        return f"ssh://127.0.0.1:{self.port}{self.root}/{name}{query}"


def digest(server: Ssh, kind: str) -> str:
    """The host key's fingerprint in hexadecimal, reckoned from its file."""
    blob = binascii.a2b_base64(server.host_key.read_text().split()[1])
    return hashlib.new(kind, blob).hexdigest()


@contextmanager
def sshd() -> Iterator[Ssh]:
    """An SSH server, a client's home and an agent."""
    program = peers.need("sshd")
    with folder() as top:
        home = top / "home"
        dot_ssh = home / ".ssh"
        dot_ssh.mkdir(parents=True, mode=0o700)
        (top / "files").mkdir()
        for key in (top / "hostkey", dot_ssh / "id_ed25519"):
            subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key), check=True)
        shutil.copy(dot_ssh / "id_ed25519.pub", top / "authorized_keys")
        port = free_port()
        (top / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {top}/hostkey\nStrictModes no\nUsePAM no\n"
            f"AuthorizedKeysFile {top}/authorized_keys\nPidFile {top}/sshd.pid\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\nMaxStartups 200\nUseDNS no\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        socket_file = top / "agent"
        environment = {"HOME": str(home), "SSH_AUTH_SOCK": str(socket_file)}
        daemon = (program, "-D", "-e", "-f", top / "sshd_config")
        agent = ("ssh-agent", "-D", "-a", socket_file)
        with running(agent, socket_file.exists, top / "agent.log"):
            key = dot_ssh / "id_ed25519"
            subprocess.run(("ssh-add", "-q", key), env={**os.environ, **environment}, check=True)
            with running(daemon, lambda: answers(port), top / "sshd.log"):
                yield Ssh(top / "files", port, home, environment, top / "hostkey.pub")
