"""A real NFS server: nfs-ganesha with rpcbind, in a network namespace of its own (which takes root), for the
clients find it through port 111 only."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support import peers

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_SET_FLAGS, _UP_AND_RUNNING = 0x8914, 0x41  # SIOCSIFFLAGS
_CONFIGURATION = """
NFS_CORE_PARAM {{ Protocols = 3; NFS_Port = 22049; MNT_Port = 22050; Enable_NLM = false;
 Enable_RQUOTA = false; Enable_UDP = false; mount_path_pseudo = true; }}
EXPORT {{ Export_Id = 1; Path = {folder}/export; Pseudo = /vol; Access_Type = RW; Squash = No_Root_Squash;
 SecType = sys; Protocols = 3; Transports = TCP; PrivilegedPort = false; FSAL {{ Name = VFS; }} }}
EXPORT {{ Export_Id = 2; Path = {folder}/export2; Pseudo = /ro; Access_Type = RO; Squash = No_Root_Squash;
 SecType = sys; Protocols = 3; Transports = TCP; PrivilegedPort = false; FSAL {{ Name = VFS; }} }}
"""
_libc = ctypes.CDLL(None, use_errno=True)


class NfsServer:
    """A running server; `files` is the folder that it exports as ``/vol``, `fixed` as ``/ro``, read-only."""

    def __init__(self, folder: Path, namespace: int, process: subprocess.Popen[bytes]) -> None:
        self.files = folder / "export"
        self.fixed = folder / "export2"
        self.namespace = namespace
        self.process = process

    @contextmanager
    def reached(self) -> Iterator[None]:
        """This thread, and processes and threads that it starts, are in the server's network meanwhile."""
        with open("/proc/thread-self/ns/net") as here:
            assert _libc.setns(self.namespace, _NEW_NETWORK) == 0
            try:
                yield
            finally:
                assert _libc.setns(here.fileno(), _NEW_NETWORK) == 0


def _new_network() -> int:
    """A descriptor of a new network namespace with a loopback; this thread stays where it is."""
    with open("/proc/thread-self/ns/net") as here:
        if _libc.unshare(_NEW_NETWORK) != 0:
            pytest.skip("needs root for a network namespace")
        try:
            with socket.socket() as any_socket:
                fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP_AND_RUNNING))
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        finally:
            _libc.setns(here.fileno(), _NEW_NETWORK)


def _answers(*words: str) -> bool:
    done = subprocess.run([peers.need("rpcinfo"), *words], capture_output=True, check=False, timeout=20)
    return done.returncode == 0


def _start(stack: ExitStack, ready: tuple[str, ...], log: Path, *words: object) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=output)
    stack.callback(process.wait)
    stack.callback(process.kill)
    end = time.monotonic() + 20
    while not _answers(*ready):
        assert time.monotonic() < end and process.poll() is None, log.read_text()
        time.sleep(0.02)
    return process


@contextmanager
def nfs_server() -> Iterator[NfsServer]:
    """A server with two empty exports. Use it inside ``server.reached()``."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="/tmp/q"))
        stack.callback(shutil.rmtree, folder)
        for name in ("export", "export2"):
            (folder / name).mkdir()
        Path("/var/lib/nfs/ganesha").mkdir(parents=True, exist_ok=True)
        (folder / "conf").write_text(_CONFIGURATION.format(folder=folder))
        namespace = _new_network()
        stack.callback(os.close, namespace)
        server = NfsServer(folder, namespace, None)  # type: ignore[arg-type]
        with server.reached():
            # It keeps a lock and a socket in /run, where only one could be.
            alone = f"mount -t tmpfs none /run && exec {peers.need('rpcbind')} -f -w"
            words = ["unshare", "-m", "sh", "-c", alone]
            binder = _start(stack, ("-p", "127.0.0.1"), folder / "log1", *words)
            words = ["nsenter", "-m", "-t", str(binder.pid), peers.need("ganesha.nfsd"), "-F"]
            words += ["-f", str(folder / "conf"), "-L", str(folder / "log"), "-p", str(folder / "pid")]
            server.process = _start(stack, ("-t", "127.0.0.1", "mountd", "3"), folder / "log2", *words)
        yield server
