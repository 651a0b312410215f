"""ssh: names, options, who is trusted, who may log in, and servers that break."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import asyncssh
import pytest

from qimg.context import Context, Notice
from qimg.errors import LocationError, NotSupported, OptionError, QimgError, StorageError
from qimg.storage.ssh import SshFile
from support.build import pattern
from support.servers import Ssh, digest, sshd

SIZE = 3 << 20
CONTENT = pattern("S", 0, SIZE)


@pytest.fixture(scope="module")
def server() -> Iterator[Ssh]:
    with sshd() as running:
        (running.root / "disk.raw").write_bytes(CONTENT)
        yield running


@pytest.fixture
def client(server: Ssh, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """The server, with the environment of a user who has its key in an agent."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    (server.home / ".ssh" / "known_hosts").unlink(missing_ok=True)
    return server


def opened(name: str, **how) -> SshFile:
    return SshFile.from_options(SshFile.parse(name), **how)


# -- names and options


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ssh://h/a", {"host": "h", "port": 22, "path": "/a"}),
        ("ssh://me@h:23/a%20b/c", {"host": "h", "port": 23, "path": "/a b/c", "user": "me"}),
        ("ssh://me:word@h/a", {"host": "h", "port": 22, "path": "/a", "user": "me"}),
        ("ssh://[::1]/a?foo=b", {"host": "::1", "port": 22, "path": "/a"}),
        ("ssh://h/a?host_key_check=no", {"host": "h", "port": 22, "path": "/a", "host_key_check": "no"}),
    ],
)
def test_a_name_says_host_port_user_path_and_check(name: str, values: dict) -> None:
    assert SshFile.parse(name) == values


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ssh:x", "missing hostname in URI"),
        ("ssh:///x", "missing hostname in URI"),
        ("ssh://h", "missing remote path in URI"),
        ("ssh://h?x", "missing remote path in URI"),
        ("ssh://h:99999999/x", "invalid host or port in URI"),
        ("ssh://[::1/x", "invalid host or port in URI"),
    ],
)
def test_wrong_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(LocationError) as caught:
        SshFile.parse(name)
    assert str(caught.value) == words


HERE = {"host": "127.0.0.1", "path": "/x"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": "/x"}, "Parameter 'server' is missing"),
        ({"host": "h"}, "Parameter 'path' is missing"),
        ({"path": "/x", "server.host": "h"}, "Parameter 'server.port' is missing"),
        ({"path": "/x", "server.port": "22"}, "Parameter 'server.host' is missing"),
        ({**HERE, "server.foo": "1"}, "Parameter 'server.foo' is unexpected"),
        ({**HERE, "port": 0}, "'0' is no port"),
        ({"path": "/x", "server.host": "h", "server.port": "ssh"}, "'ssh' is no port"),
        ({**HERE, "host_key_check": "foo"}, "unknown host_key_check setting (foo)"),
        ({**HERE, "host-key-check.mode": "bar"}, "Parameter 'mode' does not accept value 'bar'"),
        ({**HERE, "host-key-check.type": "md5"}, "Parameter 'host-key-check.mode' is missing"),
        ({**HERE, "host-key-check.mode": "hash"}, "Parameter 'host-key-check.type' is missing"),
        (
            {**HERE, "host-key-check.mode": "hash", "host-key-check.type": "md5"},
            "Parameter 'host-key-check.hash' is missing",
        ),
        (
            {**HERE, "host-key-check.mode": "hash", "host-key-check.type": "crc", "host-key-check.hash": "0"},
            "Parameter 'type' does not accept value 'crc'",
        ),
        (
            {**HERE, "host-key-check.mode": "none", "host-key-check.hash": "0"},
            "Parameter 'host-key-check.hash' is unexpected",
        ),
    ],
)
def test_wrong_options_are_refused_without_a_connection(values: dict, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        SshFile.from_options(values)
    assert str(caught.value) == words


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qimg.storage.sftp", "qimg.storage.sshlogin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("qimg.storage.sftp", raising=False)
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(NotSupported, match=r"pip install 'qimg\[ssh\]'"):
        SshFile.from_options(HERE)


# -- who is trusted


@pytest.mark.peer("sshd", "ssh-agent")
def test_an_unknown_host_is_not_trusted(client: Ssh) -> None:
    for check in (None, "yes"):
        with pytest.raises(StorageError) as caught:
            opened(client.url("disk.raw", check))
        assert str(caught.value) == "no host key was found in known_hosts"


@pytest.mark.peer("sshd", "ssh-agent")
def test_a_host_in_known_hosts_is_trusted_and_an_impostor_is_not(client: Ssh) -> None:
    known = client.home / ".ssh" / "known_hosts"
    kind, key, _ = client.host_key.read_text().split()
    known.write_text(f"[127.0.0.1]:{client.port} {kind} {key}\n")
    with opened(client.url("disk.raw", None)) as file:
        assert file.read(0, 100) == CONTENT[:100]
    other = (client.home / ".ssh" / "id_ed25519.pub").read_text().split()[1]
    known.write_text(f"[127.0.0.1]:{client.port} {kind} {other}\n")
    with pytest.raises(StorageError) as caught:
        opened(client.url("disk.raw", None))
    assert str(caught.value).startswith("host key does not match the one in known_hosts")


@pytest.mark.peer("sshd", "ssh-agent")
@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_host_with_the_right_fingerprint_is_trusted(client: Ssh, kind: str) -> None:
    right = digest(client, kind)
    with opened(client.url("disk.raw", f"{kind}:{right}")) as file:
        assert file.size == SIZE
    colons = ":".join(right[place : place + 2] for place in range(0, len(right), 2)).upper()
    values = {"host-key-check.mode": "hash", "host-key-check.type": kind, "host-key-check.hash": colons}
    SshFile.from_options({**SshFile.parse(client.url("disk.raw", None)), **values}).close()
    with pytest.raises(StorageError) as caught:
        opened(client.url("disk.raw", f"{kind}:00"))
    assert str(caught.value) == (
        f"remote host ssh-ed25519 key fingerprint '{kind}:{right}' does not match host_key_check '{kind}:00'"
    )


# -- who may log in


@pytest.mark.peer("sshd", "ssh-agent")
def test_keys_come_from_the_agent_or_from_the_home_folder(
    client: Ssh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    opened(client.url("disk.raw")).close()
    monkeypatch.delenv("SSH_AUTH_SOCK")
    with pytest.raises(StorageError, match="failed to authenticate using publickey authentication"):
        opened(client.url("disk.raw"))
    monkeypatch.setenv("HOME", str(client.home))
    opened(client.url("disk.raw")).close()


# -- files


@pytest.mark.peer("sshd", "ssh-agent")
def test_what_cannot_be_opened_is_an_error(client: Ssh) -> None:
    with pytest.raises(StorageError) as caught:
        opened(client.url("none"))
    assert str(caught.value).startswith(
        f"failed to open remote file '{client.root}/none': SFTP server: No such file"
    )
    with pytest.raises(StorageError, match=r"Failed to connect to '127\.0\.0\.1:1': Connection refused"):
        opened("ssh://127.0.0.1:1/x?host_key_check=no")
    with pytest.raises(StorageError, match=r"address resolution failed for nohost\.invalid:22: "):
        opened("ssh://nohost.invalid/x?host_key_check=no")


@pytest.mark.peer("sshd", "ssh-agent")
def test_a_new_file_is_told_from_an_old_one_and_can_be_removed(client: Ssh) -> None:
    place = client.root / "new.raw"
    with opened(client.url("new.raw"), writable=True, create=True) as file:
        assert file.created
        file.write(b"x" * 5000, 1000)
    assert place.read_bytes() == bytes(1000) + b"x" * 5000
    assert place.stat().st_mode & 0o777 == 0o644
    with opened(client.url("new.raw"), writable=True, create=True) as file:
        assert (file.created, file.size) == (False, 6000)
        file.start_new({}, Context())
    assert place.stat().st_size == 0
    SshFile.remove(SshFile.parse(client.url("new.raw")), context=Context())
    assert not place.exists()


@pytest.mark.peer("sshd", "ssh-agent")
def test_large_requests_are_cut_into_what_the_server_takes(client: Ssh) -> None:
    size = 7 << 20
    content = pattern("L", 0, size)
    with opened(client.url("large.raw"), writable=True, create=True) as file:
        file.write(content, 0)
        file.flush()
        assert (client.root / "large.raw").read_bytes() == content
        assert file.read(0, size) == content


@pytest.mark.peer("sshd", "ssh-agent")
def test_a_file_that_became_shorter_is_an_error(client: Ssh) -> None:
    (client.root / "shrinking.raw").write_bytes(CONTENT)
    with opened(client.url("shrinking.raw")) as file:
        (client.root / "shrinking.raw").write_bytes(CONTENT[:1000])
        with pytest.raises(StorageError, match="The remote file is shorter than it was"):
            file.read(0, 1 << 20)


# -- servers that break


@contextmanager
def in_a_loop(start: Callable[[], Coroutine[None, None, asyncio.Server]]) -> Iterator[int]:
    """The port of an asyncio server that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    server = loop.run_until_complete(start())
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def end() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def says(answer: bytes) -> Callable[[], Coroutine[None, None, asyncio.Server]]:
    """Something that says `answer` to everybody and hangs up."""

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    return lambda: asyncio.start_server(talk, "127.0.0.1", 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 400 \x1b[31mno\r\n\r\n",
        b"SSH-2.0-x\r\n\xff\xff\xff\xff" + bytes(64),
        b"SSH-1.5-old\r\n",
    ],
    ids=["nothing", "hello", "http", "nonsense", "version1"],
)
def test_something_that_is_no_ssh_server_is_an_error(answer: bytes) -> None:
    with in_a_loop(says(answer)) as port, pytest.raises(QimgError) as caught:
        opened(f"ssh://127.0.0.1:{port}/x?host_key_check=no")
    assert str(caught.value).startswith("failed to establish SSH session: ")
    assert str(caught.value).isprintable()


#: Files that are closed only at the end: a lost connection leaves them open.
OPENED: list = []
#: What clients have asked to be put on the disk.
SYNCED: list = []


class Files(asyncssh.SFTPServer):
    """A server's files, each with another fault; the paths are those of this machine."""

    def __init__(self, chan: asyncssh.SSHServerChannel) -> None:
        super().__init__(chan)
        self.fault = ""

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        self.fault = path.decode().rpartition(".")[2]
        file = super().open(path, pflags, attrs)
        OPENED.append(file)
        return file

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        if self.fault == "silent":
            await asyncio.sleep(0.6)
        if self.fault == "lost" and offset:
            self.connection.abort()
        if self.fault == "refused" and offset:
            raise asyncssh.SFTPPermissionDenied("\x1b[31mno")
        data = super().read(file_obj, offset, size)  # type: ignore[arg-type]
        assert isinstance(data, bytes)
        if self.fault == "generous":
            return data + b"more"
        return data[: size // 3 + 1] if self.fault == "sparing" else data

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        if self.fault == "full" and offset:
            raise asyncssh.SFTPFailure("No space left")
        if self.fault == "lost" and offset:
            self.connection.abort()
        written = super().write(file_obj, offset, data)  # type: ignore[arg-type]
        assert isinstance(written, int)
        return written

    def fsync(self, file_obj: object) -> None:
        SYNCED.append(file_obj)
        if self.fault == "nosync":
            raise asyncssh.SFTPOpUnsupported("no fsync")


class Everybody(asyncssh.SSHServer):
    """Lets everybody in."""

    def begin_auth(self, username: str) -> bool:
        return False


@pytest.fixture(scope="module")
def scripted() -> Iterator[int]:
    key = asyncssh.generate_private_key("ssh-ed25519")

    async def start() -> asyncio.Server:
        return await asyncssh.create_server(
            Everybody, "127.0.0.1", 0, server_host_keys=[key], sftp_factory=Files
        )

    with in_a_loop(start) as port:
        yield port
    for file in OPENED:
        file.close()


def faulty(port: int, folder: Path, fault: str, *, writable: bool = False) -> SshFile:
    path = folder / f"disk.{fault}"
    path.write_bytes(CONTENT)
    return opened(f"ssh://127.0.0.1:{port}{path}?host_key_check=no", writable=writable)


def test_short_answers_are_completed(scripted: int, tmp_path: Path) -> None:
    with faulty(scripted, tmp_path, "sparing") as file:
        assert file.read(12345, 1 << 20) == CONTENT[12345 : 12345 + (1 << 20)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("silent", "The connection to the SSH server broke: "),
        ("lost", "The connection to the SSH server broke: |Input/output error"),
        ("refused", "Permission denied"),
        ("generous", "The remote file is shorter than it was|Input/output error"),
    ],
)
def test_reading_from_a_server_that_breaks_is_an_error(
    scripted: int, tmp_path: Path, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qimg.storage.sftp._REQUEST_TIMEOUT", 0.3)
    with faulty(scripted, tmp_path, fault) as file, pytest.raises(StorageError, match=words):
        file.read(0, 2 << 20)


@pytest.mark.parametrize("fault", ["full", "lost"])
def test_writing_to_a_server_that_breaks_is_an_error(scripted: int, tmp_path: Path, fault: str) -> None:
    with faulty(scripted, tmp_path, fault, writable=True) as file, pytest.raises(StorageError):
        file.write(bytes(2 << 20), 0)


def test_after_the_connection_was_lost_everything_is_an_error(scripted: int, tmp_path: Path) -> None:
    with faulty(scripted, tmp_path, "lost", writable=True) as file:
        for _ in range(2):
            with pytest.raises(StorageError):
                file.read(0, 2 << 20)
        for request in (lambda: file.write(b"x", 0), file.flush, lambda: file.resize(5)):
            with pytest.raises(StorageError):
                request()


@pytest.mark.parametrize(
    ("cache", "syncs"),
    [
        ("writeback", [0, 1]),
        ("none", [0, 1]),
        ("writethrough", [1, 1]),
        ("directsync", [1, 1]),
        ("unsafe", [0, 0]),
    ],
)
def test_the_cache_mode_says_when_the_server_has_to_sync(
    scripted: int, tmp_path: Path, cache: str, syncs: list[int]
) -> None:
    path = tmp_path / "disk.well"
    path.write_bytes(CONTENT)
    before = len(SYNCED)
    with opened(f"ssh://127.0.0.1:{scripted}{path}?host_key_check=no", writable=True, cache=cache) as file:
        file.write(b"x", 0)
        written = len(SYNCED) - before
        file.flush()
        assert [written, len(SYNCED) - before] == syncs


def test_a_server_that_cannot_sync_is_told_of_once(scripted: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.nosync"
    path.write_bytes(CONTENT)
    notices: list[Notice] = []
    name = f"ssh://127.0.0.1:{scripted}{path}?host_key_check=no"
    with opened(name, writable=True, context=Context(notices.append)) as file:
        file.flush()
        assert not notices
        for _ in range(2):
            file.write(b"x", 0)
            file.flush()
    assert [notice.text for notice in notices] == [
        "The SSH server cannot say when data is on its disk (no fsync)"
    ]
