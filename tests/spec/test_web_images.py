"""Every command on images behind http, https, ftp and ssh, beside the real program (protocols sheet 2)."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import ClassVar

import pytest

from support import release7, scripted
from support.build import pattern
from support.run import Result, run_qimg_inprocess, run_real
from support.scripted import ScriptedWeb
from support.servers import Ssh, Web, digest, nginx, sshd, vsftpd

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20


def make_images(root: Path) -> None:
    """disk.raw, disk.qcow2, other.raw, and overlay.qcow2 on base.raw in the folder `hd`."""
    (root / "hd").mkdir()
    (root / "other.raw").write_bytes(bytes(MIB) + pattern("O", 0, 3 * MIB))
    (root / "disk.raw").write_bytes(pattern("W", 0, 3 * MIB) + bytes(MIB))
    (root / "hd" / "base.raw").write_bytes(pattern("B", 0, 2 * MIB))
    run_real(("convert", "-O", "qcow2", "disk.raw", "disk.qcow2"), root).ok()
    overlay = ("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "overlay.qcow2")
    run_real(overlay, root / "hd").ok()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with nginx() as running:
        make_images(running.root)
        yield running


@pytest.fixture(scope="module")
def ftp() -> Iterator[str]:
    with vsftpd() as (root, url):
        make_images(root)
        yield url


@pytest.fixture(scope="module")
def ssh() -> Iterator[Ssh]:
    with sshd() as running:
        make_images(running.root)
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses before further tries."""
    monkeypatch.setattr("qimg.storage.webfile._PAUSES", (0.0, 0.01))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def as_7(result: Result) -> Result:
    """Ours as 7.2 prints it, and neither's measurements."""
    out = release7.map_json(release7.info_json(release7.info_human(result.out)))
    return Result(result.code, out, _errors(result))


def _errors(result: Result) -> str:
    # The real program drops criticals of a library of its own, and tells where the error was met.
    lines = [line for line in result.err.splitlines(keepends=True) if "GLib: " not in line]
    text = re.sub(r" after \d+ ms", "", "".join(lines))
    return release7.errors(text.replace("libssh error code: 1, ", ""))


def same(words: list[str], **how: dict[str, str]) -> Result:
    """Run both programs and compare all that they show; ours, unchanged."""
    real = run_real(words, **how)  # type: ignore[arg-type]
    ours = run_qimg_inprocess(words, **how)  # type: ignore[arg-type]
    assert as_7(ours) == Result(real.code, real.out, _errors(real))
    return ours


# -- http


LOOKING = [
    "info U/disk.raw",
    "info U/disk.qcow2",
    "info --output=json U/disk.qcow2",
    "info --backing-chain U/hd/overlay.qcow2",
    "map U/hd/overlay.qcow2",
    "map --output=json U/disk.raw",
    "map --output=json U/disk.qcow2",
    "check U/disk.qcow2",
    "compare U/disk.raw U/disk.qcow2",
    "compare U/disk.raw U/hd/base.raw",
    "measure -O qcow2 U/disk.raw",
    "snapshot -l U/disk.qcow2",
]
REFUSED = [
    "info U/none",
    "create -f raw U/new.raw 1M",
    "create -f qcow2 U/new.qcow2 1M",
    "create -f raw -o help U/new.raw",
    "convert -O raw U/disk.raw U/new.raw",
    "convert -n -O raw U/disk.raw U/disk.raw",
    "resize -f raw U/disk.raw +1M",
    "commit U/hd/overlay.qcow2",
    "rebase -u -b x U/hd/overlay.qcow2",
    "amend -o compat=0.10 U/disk.qcow2",
    "snapshot -c x U/disk.qcow2",
    "check -r all U/disk.qcow2",
]
ONLY_HTTP = [
    "info U/redir/disk.raw",
    "info U/norange/disk.raw",
    "info U/hangup/disk.raw",
    "info U/busy/disk.raw",
    "info U/auth/disk.raw",
    "info U/disk.raw?a=b#c",
    "info http://127.0.0.1:1/x",
    "info http://nohost.invalid/x",
    "info http:127.0.0.1",
    "info HTTP://127.0.0.1/x",
    "info --image-opts driver=http,url=U/disk.raw",
    "info --image-opts driver=qcow2,file.driver=http",
    "info --image-opts driver=qcow2,file.driver=http,file.url=https://h/x",
    "info --image-opts driver=qcow2,file.driver=http,file.url=U/disk.qcow2,file.filename=U/disk.qcow2",
    *(
        f"info --image-opts driver=qcow2,file.driver=http,file.url=U/disk.qcow2,file.{option}"
        for option in (
            *("readahead=64k", "readahead=0", "readahead=8G", "readahead=100", "timeout=7", "timeout=0"),
            *(
                "timeout=10001",
                "timeout=-1",
                "sslverify=on",
                "bogus=1",
                "password-secret=no",
                "cookie-secret=no",
            ),
        )
    ),
    *(
        f"info --object secret,id=s,data=x --image-opts driver=raw,file.driver=http,{options}"
        for options in (
            "file.url=U/auth/disk.raw,file.username=u,file.password-secret=s",
            "file.url=U/disk.raw,file.cookie=a,file.cookie-secret=s",
        )
    ),
]


@pytest.mark.peer("nginx", "openssl")
@pytest.mark.parametrize("line", [*LOOKING, *REFUSED, *ONLY_HTTP])
def test_http_is_read_and_refused_like_the_real_program_does(web: Web, work: Path, line: str) -> None:
    same([word.replace("U/", web.url + "/") for word in line.split()])


@pytest.mark.peer("nginx", "openssl")
@pytest.mark.parametrize(
    "options",
    [
        "url=U/disk.raw,sslverify=off",
        "url=U/disk.raw,cookie=a=b",
        "url=U/disk.raw,cookie-secret=s",
        "url=U/disk.raw,proxy-username=u,proxy-password-secret=s",
        "url=U/auth/disk.raw,username=u,password-secret=s",
    ],
)
def test_options_that_matter_stand_in_the_displayed_name(web: Web, options: str) -> None:
    nodes = ",".join("file." + option for option in options.replace("U/", web.url + "/").split(","))
    words = ["info", "--object", "secret,id=s,data=p", "--image-opts", f"driver=raw,file.driver=http,{nodes}"]
    asked = []
    shown = []
    for run in (run_real, run_qimg_inprocess):
        before = len(web.requests())
        name, *rest = release7.info_human(run(words).ok().out).splitlines()
        shown.append((json.loads(name.removeprefix("image: json:")), rest))
        asked.append({line.split(" ", 4)[4] for line in web.requests()[before:]})
    assert shown[0] == shown[1]
    assert asked[0] == asked[1]


@pytest.mark.peer("nginx", "openssl")
def test_https_checks_the_certificate_unless_told_otherwise(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"driver=raw,file.driver=https,file.url={web.tls_url}/disk.raw"
    lines = same(["info", "--image-opts", options + ",file.sslverify=off"]).lines
    assert "virtual size: 4 MiB (4194304 bytes)" in lines
    for run in (run_real, run_qimg_inprocess):
        refused = run(["info", "--image-opts", options])
        assert refused.code == 1
        assert "CURL: Error opening file: " in refused.err
        assert "certificate" in refused.err
    trusting = run_qimg_inprocess(
        ["info", "--image-opts", options], env={"SSL_CERT_FILE": str(web.certificate)}
    )
    assert trusting.code == 0


class Tunnel(StreamRequestHandler):
    """A proxy that only knows CONNECT; notes what it is asked."""

    def handle(self) -> None:
        lines = iter(lambda: self.rfile.readline().decode().strip(), "")
        asked, *rest = lines
        login = [line for line in rest if line.startswith("Proxy-Authorization: ")]
        self.server.asked.append((*asked.split()[:2], *login))  # type: ignore[attr-defined]
        host, _, port = asked.split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            self.wfile.write(b"HTTP/1.1 200 ok\r\n\r\n")
            back = Thread(target=self.copy, args=(far.recv, self.connection.sendall), daemon=True)
            back.start()
            self.copy(self.connection.recv, far.sendall)
            far.shutdown(socket.SHUT_RDWR)
            back.join()

    @staticmethod
    def copy(receive: Callable[[int], bytes], send: Callable[[bytes], None]) -> None:
        try:
            while data := receive(1 << 16):
                send(data)
        except OSError:
            pass


@pytest.mark.peer("nginx", "openssl")
def test_https_goes_through_a_proxy_like_with_the_real_program(web: Web) -> None:
    class Server(ThreadingTCPServer):
        daemon_threads = True
        asked: ClassVar[list] = []

    options = f"driver=raw,file.driver=https,file.url={web.tls_url}/disk.raw,file.sslverify=off"
    login = ",file.proxy-username=me,file.proxy-password-secret=s"
    with Server(("127.0.0.1", 0), Tunnel) as proxy:
        Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        environment = {"https_proxy": f"http://127.0.0.1:{proxy.server_address[1]}"}
        for more in ("", login):
            words = ["info", "--object", "secret,id=s,data=pw", "--image-opts", options + more]
            asked = []
            for run in (run_real, run_qimg_inprocess):
                Server.asked.clear()
                assert "virtual size: 4 MiB (4194304 bytes)" in run(words, env=environment).ok().lines
                asked.append(set(Server.asked))
            assert asked[0] == asked[1]
        proxy.shutdown()


@pytest.mark.peer("nginx", "openssl")
@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2", "hd/overlay.qcow2"])
def test_converting_from_the_web_copies_the_bytes(web: Web, work: Path, name: str) -> None:
    run_qimg_inprocess(["convert", "-O", "raw", f"{web.url}/{name}", "copy.raw"]).ok()
    run_real(["convert", "-O", "raw", str(web.root / name), "right.raw"]).ok()
    assert Path("copy.raw").read_bytes() == Path("right.raw").read_bytes()


@pytest.mark.peer("nginx", "openssl")
def test_a_backing_file_may_be_on_the_web(web: Web, work: Path) -> None:
    backing = f"{web.url}/disk.qcow2"
    same(["create", "-f", "qcow2", "-b", backing, "-F", "qcow2", "top.qcow2"])
    same(["info", "--backing-chain", "top.qcow2"])
    same(["map", "--output=json", "top.qcow2"])
    same(["compare", "top.qcow2", str(web.root / "disk.raw")])


@pytest.mark.peer("nginx", "openssl")
@pytest.mark.parametrize(
    "line", ["info U/disk.raw", "info U/none", "info --output=json U/disk.raw", "map U/disk.raw"]
)
def test_passwords_in_urls_are_used_and_never_shown(web: Web, line: str) -> None:
    url = web.url.replace("//", "//u:p@") + "/auth/"
    words = line.replace("U/", url).split()
    real, ours = run_real(words), run_qimg_inprocess(words)
    assert "//u:p@" in real.out + real.err
    assert as_7(ours) == Result(
        real.code, *(text.replace("u:p@", "u:***@") for text in (real.out, _errors(real)))
    )


@pytest.mark.peer("nginx", "openssl")
def test_passwords_of_backing_files_are_used_and_never_shown(web: Web, work: Path) -> None:
    url = web.url.replace("//", "//u:p@") + "/auth/hd/overlay.qcow2"
    words = ["create", "-f", "qcow2", "-b", url, "-F", "qcow2", "top.qcow2"]
    commands = (["info", "--backing-chain"], ["info", "--backing-chain", "--output=json"], ["map"])
    shown = [run_qimg_inprocess(words).ok().out]
    shown += [run_qimg_inprocess([*command, "top.qcow2"]).ok().out for command in commands]
    assert all("u:***@" in text and "u:p@" not in text for text in shown)
    assert b"//u:p@" in Path("top.qcow2").read_bytes()
    run_real(["compare", "top.qcow2", str(web.root / "hd" / "base.raw")]).ok()


# -- ftp


@pytest.mark.peer("vsftpd")
@pytest.mark.parametrize(
    "line",
    [
        *LOOKING,
        *(line for line in REFUSED if "none" in line or "raw" in line),
        "info ftp:x",
        "info ftp://127.0.0.1:1/x",
        "info --image-opts driver=raw,file.driver=ftp,file.url=U/disk.raw,file.readahead=64k,file.timeout=3",
    ],
)
def test_ftp_is_read_and_refused_like_the_real_program_does(ftp: str, work: Path, line: str) -> None:
    same([word.replace("U/", ftp + "/") for word in line.split()])


@pytest.mark.peer("vsftpd")
def test_converting_by_ftp_copies_the_bytes(ftp: str, work: Path) -> None:
    run_qimg_inprocess(["convert", "-O", "raw", f"{ftp}/disk.qcow2", "copy.raw"]).ok()
    assert Path("copy.raw").read_bytes() == pattern("W", 0, 3 * MIB) + bytes(MIB)


# -- ssh

SSH = [
    "info U/disk.raw?C",
    "info --output=json U/disk.qcow2?C",
    "info U/disk.raw?C&foo=bar",
    "info U/none?C",
    "info U/?C",
    "map --output=json U/disk.raw?C",
    "compare U/disk.raw?C U/disk.qcow2?C",
    "measure -O qcow2 U/disk.raw?C",
    "check U/disk.qcow2?C",
    "create -f raw U/new.raw?C 3M",
    "create -f raw U/new.raw?C 2M",
    "create -f raw -o help U/new.raw?C",
    "create -f raw -o preallocation=full U/new.raw?C 3M",
    "create -f raw U/nodir/new.raw?C 3M",
    "create -f qcow2 U/new.qcow2?C 3M",
    "resize -f raw U/new.raw?C 5M",
    "resize -f raw --preallocation=full U/new.raw?C 9M",
    "resize U/new.qcow2?C 9M",
    "resize --shrink U/new.qcow2?C 1M",
    "snapshot -c s U/new.qcow2?C",
    "convert -O qcow2 U/disk.raw?C U/other.qcow2?C",
    "convert -O raw U/disk.qcow2?C U/nodir/x?C",
    "convert -n -O raw U/disk.raw?C U/hd/base.raw?C",
    "info U/disk.raw?host_key_check=foo",
    "info U/disk.raw?host_key_check=md5:00",
    "info U/disk.raw?host_key_check=sha256:H",
    "info ssh://127.0.0.1:1/x?C",
    "info ssh://nohost.invalid/x?C",
    "info ssh:///x",
    "info ssh://h",
    "info ssh:x",
    *(
        f"info --image-opts driver=raw,file.driver=ssh,{options}"
        for options in (
            "file.host=127.0.0.1,file.port=P,file.path=R/disk.raw,file.host_key_check=no",
            "file.server.host=127.0.0.1,file.server.port=P,file.path=R/disk.raw,file.host-key-check.mode=none",
            "file.server.host=127.0.0.1,file.path=/x",
            "file.host=127.0.0.1",
            "file.path=/x",
            "file.host=127.0.0.1,file.port=foo,file.path=/x",
            "file.host=127.0.0.1,file.path=/x,file.host-key-check.mode=bar",
            "file.host=127.0.0.1,file.path=/x,file.host-key-check.mode=hash",
            "file.filename=ssh://h/x",
        )
    ),
]


def ssh_words(server: Ssh, line: str) -> list[str]:
    """The words of a line with the server's address, folder and fingerprint in it."""
    line = line.replace("?C", "?host_key_check=no").replace("sha256:H", "sha256:" + digest(server, "sha256"))
    url = f"ssh://127.0.0.1:{server.port}{server.root}/"
    line = line.replace("U/", url).replace("=R/", f"={server.root}/").replace("port=P", f"port={server.port}")
    return line.split()


@pytest.mark.peer("sshd", "ssh-agent")
@pytest.mark.parametrize("line", SSH)
def test_ssh_is_used_like_the_real_program_does(ssh: Ssh, work: Path, line: str) -> None:
    words = ssh_words(ssh, line)
    if not line.startswith(("resize", "snapshot")):
        same(words, env=ssh.environment)
        return
    # Each program has to find the place as it was.
    name = "new.raw" if "new.raw" in line else "new.qcow2"
    results = []
    for run in (run_real, run_qimg_inprocess):
        run_real(["create", "-q", "-f", name.partition(".")[2], str(ssh.root / name), "3M"]).ok()
        result = run(words, env=ssh.environment)
        results.append(
            (result, run_real(["info", str(ssh.root / name)]).lines[2], (ssh.root / name).stat().st_size)
        )
    (real, *left), (ours, *ours_left) = results
    assert as_7(ours) == Result(real.code, real.out, _errors(real))
    assert left[:1] == ours_left[:1]
    if name == "new.raw":
        assert left == ours_left


@pytest.mark.peer("sshd", "ssh-agent")
@pytest.mark.parametrize("how", ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "raw -W -m 4", "qcow2 -c"])
def test_converting_to_ssh_makes_what_the_real_program_reads(ssh: Ssh, work: Path, how: str) -> None:
    format, *switches = how.split()
    target = f"made.{format}"
    for source in ("disk.raw", "other.raw"):
        onto = ["-n"] if source == "other.raw" else []
        words = ["convert", *onto, *switches, "-O", format, str(ssh.root / source), ssh.url(target)]
        run_qimg_inprocess(words, env=ssh.environment).ok()
        compare = ["compare", "-f", "raw", "-F", format, str(ssh.root / source), str(ssh.root / target)]
        run_real(compare).ok()


@pytest.mark.peer("sshd", "ssh-agent")
def test_a_failed_create_leaves_nothing_on_the_server(ssh: Ssh, work: Path) -> None:
    words = [
        "convert",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=5",
        str(ssh.root / "disk.raw"),
        ssh.url("failed.qcow2"),
    ]
    assert run_qimg_inprocess(words, env=ssh.environment).code == 1
    assert not (ssh.root / "failed.qcow2").exists()


@pytest.mark.peer("sshd", "ssh-agent")
def test_a_raw_image_on_the_server_shrinks_which_the_real_program_refuses(ssh: Ssh, work: Path) -> None:
    (ssh.root / "long.raw").write_bytes(pattern("L", 0, 2 * MIB))
    words = ["resize", "-f", "raw", "--shrink", ssh.url("long.raw"), "1M"]
    assert "ssh driver does not support shrinking files" in run_real(words, env=ssh.environment).err
    run_qimg_inprocess(words, env=ssh.environment).ok()
    assert (ssh.root / "long.raw").read_bytes() == pattern("L", 0, MIB)


# -- faults, as a user sees them


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (scripted.headers(ETag='"2"'), "The file changed while it was read"),
        (scripted.status(404), "The requested URL returned error: 404"),
        (scripted.nothing, "Empty reply from server"),
        (scripted.cut(7), "The server breaks every transfer off"),
    ],
    ids=["changed", "gone", "nothing", "crumbs"],
)
def test_a_convert_from_a_broken_server_says_where_and_why_and_leaves_no_whole_image(
    work: Path, fault: scripted.Act, words: str
) -> None:
    def act(request: scripted.Request) -> None:
        (fault if request.last >= 3 * MIB else scripted.honest)(request)

    with ScriptedWeb(pattern("W", 0, 4 * MIB)).running() as web:
        web.script = [act] * 100
        failed = run_qimg_inprocess(["convert", "-O", "raw", web.url + "/disk.raw", "copy.raw"])
    assert failed.code == 1
    first, second = failed.err.splitlines()
    assert re.fullmatch(r"qemu-img: error while reading at byte \d+: Input/output error", first)
    assert second == words
    assert not Path("copy.raw").exists() or Path("copy.raw").stat().st_size < 4 * MIB
