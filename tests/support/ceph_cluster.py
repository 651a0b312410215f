"""A real Ceph cluster of one monitor and one object store in memory, with the pool ``rbd``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support import peers
from support.servers import free_port

_CONFIGURATION = """\
[global]
fsid = {id}
mon host = {monitor}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
crash dir = {folder}
public addr = 127.0.0.1
ms bind port min = {port}
ms bind port max = {last_port}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
osd objectstore = memstore
memstore device bytes = 1073741824
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
"""
_CAPABILITIES = {
    "mon.": ["--cap", "mon", "allow *"],
    "client.admin": ["--cap", "mon", "allow *", "--cap", "osd", "allow *"],
    "osd.0": ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"],
}


class Cluster:
    """A running cluster; `configuration` is the file that clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "ceph.conf"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def run(self, program: str, *words: object, check: bool = True) -> str:
        """A command of Ceph; its standard output."""
        done = subprocess.run(
            [peers.need(program), *map(str, words)],
            env={**os.environ, "CEPH_CONF": str(self.configuration)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def _daemon(self, program: str, *words: str) -> None:
        with (self.folder / f"{program}.out").open("wb") as output:
            command = [peers.need(program), *words, "-f", "-c", str(self.configuration)]
            self.daemons.append(subprocess.Popen(command, stdout=output, stderr=output))

    def start(self) -> None:
        """Make and start it; takes 5 to 10 seconds."""
        folder, monitor_port = self.folder, free_port()
        first = free_port()
        monitor = f"[v2:127.0.0.1:{monitor_port},v1:127.0.0.1:{first}]"
        cluster_id, store_id = uuid.uuid4(), uuid.uuid4()
        (folder / "mon").mkdir()
        (folder / "osd").mkdir()
        text = _CONFIGURATION.format(
            id=cluster_id, monitor=monitor, folder=folder, port=first + 1, last_port=first + 60
        )
        self.configuration.write_text(text)
        for number, (name, rights) in enumerate(_CAPABILITIES.items()):
            new = [] if number else ["-C"]
            self.run("ceph-authtool", *new, "-n", name, "--gen-key", *rights, folder / "keyring")
        words = ["--create", "--fsid", cluster_id, "--addv", "a", monitor, folder / "monmap"]
        self.run("monmaptool", *words)
        self.run(
            "ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "monmap", "--keyring", folder / "keyring"
        )
        self._daemon("ceph-mon", "-i", "a")
        self.run("ceph", "osd", "new", store_id, "0")
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store_id)
        self._daemon("ceph-osd", "-i", "0")
        end = time.monotonic() + 60
        while "1 up" not in self.run("ceph", "osd", "stat", check=False):
            assert time.monotonic() < end, "the cluster does not start"
            time.sleep(0.1)
        self.run("ceph", "osd", "pool", "create", "rbd", "8", "8")
        self.run("ceph", "osd", "pool", "application", "enable", "rbd", "rbd")

    def kill(self) -> None:
        """End it at once."""
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


@contextmanager
def ceph_cluster() -> Iterator[Cluster]:
    """A running cluster with an empty pool ``rbd``."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="/tmp/q"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder)
        stack.callback(cluster.kill)
        cluster.start()
        yield cluster
