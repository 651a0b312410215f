"""Jobs that read and write images on servers: on this machine, and five milliseconds away."""

from __future__ import annotations

import atexit
import getpass
import os
import queue
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from bench import MIB, Job, Workshop

#: Seconds to a server that is far away, and back.
FAR = 0.005
#: Seconds until a server that does not answer counts as one that did not start.
START = 10.0


def jobs(shop: Workshop) -> list[Job]:
    """Those whose servers are installed."""
    return [
        *_nbd(shop, "", 0.0, "1.0"),
        # The real program needs four minutes for 1 GiB from there.
        *(_nbd(shop, ", 5 ms away", FAR, "3") if shop.content <= 128 * MIB else []),
        *_http(shop, "", 0.0, "1.5"),
        *_http(shop, ", 5 ms away", FAR, "5"),
        # Five milliseconds away the real program needs ten minutes for 1 GiB from ssh.
        *_ssh(shop, "1.0"),
    ]


def _nbd(shop: Workshop, note: str, delay: float, wanted: str) -> list[Job]:
    if _program("nbdkit") is None:
        return []
    target = "target.raw"
    ways = []
    for way, name in (("from", shop.raw), ("to", target)):
        port = _free_port()
        url = f"nbd://127.0.0.1:{port}/"
        names = (url, target) if way == "from" else ("-n", shop.raw, url)
        ways.append(
            Job(
                f"convert {way} nbd{note}",
                ("convert", "-f", "raw", "-O", "raw", *names),
                wanted,
                target,
                before=partial(_start, shop, partial(_nbdkit, name), port, delay),
                fresh=partial(_lengthen, shop, target) if way == "to" else None,
                check=partial(shop.same, target, shop.raw, "raw", "raw"),
            )
        )
    return ways


def _lengthen(shop: Workshop, target: str) -> None:
    """Make the empty file that an export is."""
    with (shop.folder / target).open("wb") as file:
        file.truncate((shop.folder / shop.raw).stat().st_size)


def _nbdkit(name: str, _scratch: Path, folder: Path, port: int) -> list[str]:
    (folder / name).touch()  # it starts for what is there
    words = (_program("nbdkit"), "-f", "-i", "127.0.0.1", "-p", port, "file", folder / name)
    return [str(word) for word in words]


def _http(shop: Workshop, note: str, delay: float, wanted: str) -> list[Job]:
    if _program("nginx") is None:
        return []
    port, target = _free_port(), "target.raw"
    words = ("convert", "-f", "raw", "-O", "raw", f"http://127.0.0.1:{port}/{shop.raw}", target)
    return [
        Job(
            f"convert from http{note}",
            words,
            wanted,
            target,
            before=partial(_start, shop, _nginx, port, delay),
            check=partial(shop.same, target, shop.raw, "raw", "raw"),
            # With several requests in flight the real program hangs.
            other=(shop.real, words[0], "-m", "1", *words[1:]),
        )
    ]


def _ssh(shop: Workshop, wanted: str) -> list[Job]:
    if _program("sshd") is None:
        return []
    port, target = _free_port(), "target.raw"
    url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{shop.folder}/{{}}?host_key_check=no"
    both = (("from", url.format(shop.raw), target), ("to", shop.raw, url.format(target)))
    return [
        Job(
            f"convert {way} ssh",
            ("convert", "-f", "raw", "-O", "raw", *names),
            wanted,
            target,
            before=partial(_start, shop, _sshd, port, 0.0),
            check=partial(shop.same, target, shop.raw, "raw", "raw"),
        )
        for way, *names in both
    ]


@cache
def _start(shop: Workshop, server: Callable[[Path, Path, int], list[str]], port: int, delay: float) -> None:
    """Make the input, and have a server at `port`, `delay` seconds away and back. Once is enough."""
    shop.real_files()
    scratch = Path(tempfile.mkdtemp(prefix="qimg-bench"))
    scratch.chmod(0o755)
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    own = _free_port() if delay else port
    log = (scratch / "log").open("wb")
    process = subprocess.Popen(server(scratch, shop.folder, own), stdout=log, stderr=log)
    atexit.register(process.terminate)
    end = time.monotonic() + START
    while not _answers(own):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"bench: {process.args!r} does not start")
        time.sleep(0.02)
    if delay:
        threading.Thread(target=_relay, args=(port, own, delay), daemon=True).start()


def _nginx(scratch: Path, folder: Path, port: int) -> list[str]:
    user = "user root;" if os.getuid() == 0 else ""
    places = " ".join(
        f"{name}_temp_path {scratch};" for name in ("proxy", "fastcgi", "uwsgi", "scgi", "client_body")
    )
    (scratch / "conf").write_text(
        f"daemon off; master_process off; pid {scratch}/pid; error_log stderr; {user} events {{ }}"
        f" http {{ access_log off; sendfile on; keepalive_requests 100000; {places}"
        f" server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
    )
    return [str(_program("nginx")), "-c", f"{scratch}/conf", "-e", "stderr"]


def _sshd(scratch: Path, _folder: Path, port: int) -> list[str]:
    for name in ("host", "user"):
        subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", scratch / name), check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    agent = subprocess.Popen(("ssh-agent", "-D", "-a", scratch / "agent"), stdout=subprocess.DEVNULL)
    atexit.register(agent.terminate)
    while not (scratch / "agent").exists():
        time.sleep(0.02)
    os.environ["SSH_AUTH_SOCK"] = f"{scratch}/agent"
    subprocess.run(("ssh-add", "-q", scratch / "user"), check=True)
    (scratch / "conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {scratch}/host\nPidFile {scratch}/pid\n"
        f"AuthorizedKeysFile {scratch}/user.pub\nStrictModes no\nUsePAM no\nUseDNS no\n"
        "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
    )
    return [str(_program("sshd")), "-D", "-e", "-f", f"{scratch}/conf"]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


# -- distance


def _relay(port: int, to: int, delay: float) -> None:
    """Pass everything on between `port` and the port `to`, each way half of `delay` seconds later; what is on
    the way takes no place from what follows."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            near = listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", to))
            for both in ((near, far), (far, near)):
                both[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_one_way, args=(*both, delay / 2), daemon=True).start()


def _one_way(source: socket.socket, target: socket.socket, delay: float) -> None:
    under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(1024)
    threading.Thread(target=_arrive, args=(under_way, target), daemon=True).start()
    data = b"-"
    while data:
        try:
            data = source.recv(1 << 18)
        except OSError:
            data = b""
        under_way.put((time.monotonic() + delay, data))


def _arrive(under_way: queue.Queue[tuple[float, bytes]], target: socket.socket) -> None:
    while True:
        when, data = under_way.get()
        time.sleep(max(0.0, when - time.monotonic()))
        try:
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)
        except OSError:
            target.close()
            return
