"""ftp and ftps: folders, logins, TLS, streams that go on and transfers that break."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest

from qimg.errors import StorageError
from qimg.storage import webfile
from qimg.storage.ftp import FtpFile, FtpsFile
from support.build import pattern
from support.servers import ftp_with_passwords, vsftpd

SIZE = 3 << 20
CONTENT = pattern("F", 0, SIZE)


class Secrets:
    def secret(self, id: str) -> bytes:
        return id.encode()


@pytest.fixture(scope="module")
def anonymous() -> Iterator[str]:
    """The URL of a vsftpd with disk.raw, and the same in the folder `a folder`."""
    with vsftpd() as (root, url):
        (root / "a folder").mkdir()
        for path in (root / "disk.raw", root / "a folder" / "disk.raw"):
            path.write_bytes(CONTENT)
        (root / "empty.raw").touch()
        yield url


@pytest.fixture(scope="module")
def private() -> Iterator[tuple[Path, str]]:
    """Folder and URL of a server that wants a login."""
    with ftp_with_passwords() as (root, url):
        yield root, url


@pytest.fixture(scope="module")
def encrypted() -> Iterator[tuple[Path, str]]:
    """Folder and URL of a server that speaks TLS from the first byte."""
    with ftp_with_passwords(tls=True) as (root, url):
        (root / "disk.raw").write_bytes(CONTENT)
        yield root, url


@pytest.mark.peer("vsftpd")
@pytest.mark.parametrize("path", ["/disk.raw", "/a%20folder/disk.raw", "/%2F/disk.raw"])
def test_files_are_read_where_the_url_leads(anonymous: str, path: str) -> None:
    with FtpFile.from_options({"url": anonymous + path}) as file:
        assert file.size == SIZE
        choose = random.Random(1)
        for _ in range(20):
            offset = choose.randrange(SIZE)
            length = choose.choice((1, 4096, 300_000))
            assert file.read(offset, length) == CONTENT[offset : offset + length].ljust(length, b"\0")


@pytest.mark.peer("vsftpd")
def test_threads_share_one_stream_through_the_file(anonymous: str) -> None:
    with FtpFile.from_options({"url": anonymous + "/disk.raw", "readahead": 512}) as file:
        found = bytearray(SIZE)
        failures: list[BaseException] = []

        def read(number: int) -> None:
            try:
                for offset in range(number << 18, SIZE, 3 << 18):
                    file.read_into(memoryview(found)[offset : offset + (1 << 18)], offset)
            except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
                failures.append(error)

        threads = [Thread(target=read, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert found == CONTENT


@pytest.mark.peer("vsftpd")
def test_an_empty_file_and_a_missing_one(anonymous: str) -> None:
    with FtpFile.from_options({"url": anonymous + "/empty.raw"}) as file:
        assert (file.size, file.read(0, 3)) == (0, bytes(3))
    for path in ("/none", "/none/disk.raw", "/a%20folder"):
        with pytest.raises(StorageError, match="CURL: Error opening file: The file does not exist"):
            FtpFile.from_options({"url": anonymous + path})
    for path in ("/a%0D%0ADELE%20disk.raw", "/"):
        with pytest.raises(StorageError, match="CURL: Error opening file: "):
            FtpFile.from_options({"url": anonymous + path})


def test_a_login_comes_from_options_or_from_the_url(private: tuple[Path, str]) -> None:
    root, url = private
    (root / "disk.raw").write_bytes(CONTENT[:5000])
    values = {"url": url + "/disk.raw", "username": "u", "password-secret": "p"}
    for given in (values, {"url": url.replace("//", "//u:%70@") + "/disk.raw"}):
        with FtpFile.from_options(given, context=Secrets()) as file:  # type: ignore[arg-type]
            assert file.read(0, 5000) == CONTENT[:5000]
    with pytest.raises(StorageError) as caught:
        FtpFile.from_options({"url": url.replace("//", "//u:wrong@") + "/disk.raw"})
    assert str(caught.value) == "CURL: Error opening file: Access denied: 530"


def test_a_file_that_changes_while_it_is_read_is_an_error(private: tuple[Path, str]) -> None:
    root, url = private
    path = root / "changing.raw"
    path.write_bytes(CONTENT)
    with FtpFile.from_options({"url": url.replace("//", "//u:p@") + "/changing.raw"}) as file:
        path.write_bytes(CONTENT[:-1])
        with pytest.raises(StorageError, match="The file changed while it was read"):
            file.read(2 << 20, 1 << 19)
    path.write_bytes(CONTENT)
    with FtpFile.from_options({"url": url.replace("//", "//u:p@") + "/changing.raw"}) as file:
        os.utime(path, (0, 0))
        with pytest.raises(StorageError, match="The file changed while it was read"):
            file.read(2 << 20, 1 << 19)


@pytest.mark.peer("openssl")
def test_ftps_encrypts_all_and_checks_the_certificate(encrypted: tuple[Path, str]) -> None:
    _, url = encrypted
    url = url.replace("//", "//u:p@") + "/disk.raw"
    with FtpsFile.from_options({"url": url, "sslverify": False}) as file:
        assert file.read(0, 1 << 20) == CONTENT[: 1 << 20]
        assert file.read(2 << 20, 1 << 20) == CONTENT[2 << 20 :]
    with pytest.raises(StorageError, match="SSL certificate problem: self-signed certificate"):
        FtpsFile.from_options({"url": url})


# -- servers that break and lie


Script = dict[str, str | bytes | None]


class Session(StreamRequestHandler):
    """One control connection. Answers commands as its script says - a text; bytes on the data connection;
    None: it hangs up - and otherwise like a server that has `CONTENT`."""

    def handle(self) -> None:
        scripts: list[Script] = self.server.scripts  # type: ignore[attr-defined]
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        self.say(str(script.get("hello", "220 hello")))
        with socket.create_server(("127.0.0.1", 0)) as data:
            port = data.getsockname()[1]
            honest: Script = {
                "PASV": f"227 ok (127,0,0,1,{port >> 8},{port & 255})",
                "SIZE": f"213 {SIZE}",
                "MDTM": "213 20260101000000",
                "REST": "350 ok",
                "USER": "230 ok",
                "RETR": CONTENT,
            }
            start = 0
            for line in self.rfile:
                word, _, argument = line.decode().strip().partition(" ")
                start = int(argument) if word == "REST" else start
                answer = {**honest, **script}.get(word, "200 ok")
                if answer is None:
                    return
                if isinstance(answer, str):
                    self.say(answer)
                else:
                    self.transfer(data, answer[start:])
                    start = 0

    def say(self, text: str) -> None:
        """Letters after "slowly" come one by one."""
        text, slowly, letters = text.partition("slowly")
        self.wfile.write((text + slowly).encode())
        for letter in letters:
            time.sleep(0.05)
            self.wfile.write(letter.encode())
        self.wfile.write(b"\r\n")

    def transfer(self, data: socket.socket, content: bytes) -> None:
        self.say("150 here it comes")
        with data.accept()[0] as stream:
            try:
                stream.sendall(content)
            except OSError:
                pass
        self.say("226 done")

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            pass


@contextmanager
def scripted(*scripts: Script) -> Iterator[str]:
    """The URL of a server whose sessions go by `scripts`; the last one is for all further sessions."""

    class Server(ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that go away are what it is for."""

    with Server(("127.0.0.1", 0), Session) as server:
        server.scripts = list(scripts)  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"ftp://127.0.0.1:{server.server_address[1]}/disk.raw"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webfile, "_PAUSES", (0.0, 0.01, 0.01, 0.01))


@pytest.mark.parametrize(
    "fault",
    [
        {"hello": "421 busy"},
        {"USER": None},
        {"PASV": None},
        {"RETR": "425 no"},
        {"RETR": None},
        {"RETR": b""},
        {"RETR": CONTENT[: (1 << 20) + 100_000]},
    ],
    ids=lambda fault: "-".join(f"{name}" for name in fault),
)
def test_a_broken_transfer_goes_on_where_it_broke_off(fault: Script) -> None:
    with scripted({"RETR": CONTENT[: 1 << 20]}, fault, {}) as url, FtpFile.from_options({"url": url}) as file:
        assert file.read(0, 2 << 20) == CONTENT[: 2 << 20]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"hello": "421 busy"}, "The server answered 421"),
        ({"hello": "what"}, "The server's answer makes no sense"),
        ({"hello": "220-more\r\n" * 10000}, "The server's answer makes no sense"),
        ({"USER": None}, "The server answered nothing"),
        ({"USER": "530 no"}, "Access denied: 530"),
        ({"SIZE": "213 many"}, "URL using bad"),
        ({"SIZE": "213 -5"}, "Server didn't report file size."),
        ({"SIZE": "502 what?"}, "The server refused with 502"),
        ({"RETR": b""}, "The server closed the connection"),
        ({"PASV": "227 ok (1,2,3)"}, "The server's answer makes no sense"),
    ],
)
def test_a_server_that_stays_wrong_is_given_up(fault: Script, words: str) -> None:
    with scripted(fault) as url, pytest.raises(StorageError) as caught:
        FtpFile.from_options({"url": url, "timeout": 2})
    assert str(caught.value).startswith(f"CURL: Error opening file: {words}")


def test_an_answer_that_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        scripted({}, {"hello": "220 slowly" + "!" * 1000}) as url,
        FtpFile.from_options({"url": url}) as file,
    ):
        file.access.timeout = 0.2
        file.close()
        with pytest.raises(StorageError, match="Operation timed out"):
            file.read(0, 1 << 20)
