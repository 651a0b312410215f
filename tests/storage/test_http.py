"""http: what is asked for, what is believed, and what becomes of connections that break.

The servers of this module are scripted: each request gets the answer that the test says."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from threading import Barrier, Thread

import pytest

from qimg.errors import LocationError, OptionError, QimgError, StorageError
from qimg.storage import webfile
from qimg.storage.http import HttpFile
from support import scripted
from support.build import pattern
from support.scripted import ScriptedWeb, cut, garbage, headers, nothing, redirect, silence, status, trickle

SIZE = 3 << 20
CONTENT = pattern("H", 0, SIZE)
BLOCK = 256 << 10


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedWeb]:
    monkeypatch.setattr(webfile, "_PAUSES", (0.0, 0.01, 0.01, 0.01))
    with ScriptedWeb(CONTENT).running() as running:
        yield running


def opened(web: ScriptedWeb, path: str = "/disk.raw", **values) -> HttpFile:
    return HttpFile.from_options({"url": web.url + path, "timeout": 1, **values})


# -- asking


def test_opening_takes_one_request_which_brings_the_first_block(web: ScriptedWeb) -> None:
    with opened(web) as file:
        assert file.size == SIZE
        assert file.read(0, 4096) == CONTENT[:4096]
    assert web.ranges() == [f"bytes=0-{BLOCK - 1}"]


def test_a_large_read_is_one_request_and_small_ones_share_blocks(web: ScriptedWeb) -> None:
    with opened(web) as file:
        assert file.read(BLOCK, 1 << 20) == CONTENT[BLOCK : BLOCK + (1 << 20)]
        for offset in range(2 << 20, (2 << 20) + BLOCK, 65536):
            assert file.read(offset, 512) == CONTENT[offset : offset + 512]
    assert web.ranges()[1:] == [
        f"bytes={BLOCK}-{BLOCK + (1 << 20) - 1}",
        f"bytes={2 << 20}-{(2 << 20) + BLOCK - 1}",
    ]


def test_reading_on_and_on_fetches_more_and_more_at_once(web: ScriptedWeb) -> None:
    with opened(web) as file:
        for offset in range(0, SIZE, 65536):
            assert file.read(offset, 65536) == CONTENT[offset : offset + 65536]
    assert len(web.requests) == 4


def test_one_thread_needs_one_connection(web: ScriptedWeb) -> None:
    with opened(web, "/a") as file:
        web.script = [scripted.honest, scripted.short_range, redirect("/b")]
        for offset in range(1 << 20, 2 << 20, BLOCK):
            assert file.read(offset, BLOCK) == CONTENT[offset : offset + BLOCK]
    assert len(web.requests) == 7
    assert web.connections == 1


def test_any_reads_by_several_threads_give_the_files_bytes(web: ScriptedWeb) -> None:
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(12):
                offset = choose.randrange(SIZE + 1000)
                length = choose.choice((1, 512, 70000, BLOCK + 1))
                expected = CONTENT[offset : offset + length].ljust(length, b"\0")
                assert file.read(offset, length) == expected
        except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
            failures.append(error)

    with opened(web, readahead=4096) as file:
        threads = [Thread(target=read, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_login_and_cookie_go_with_every_request(web: ScriptedWeb) -> None:
    class Secrets:
        def secret(self, id: str) -> bytes:
            return {"s": b"p:\xc3\xa9", "c": b"a=b"}[id]

    values = {"username": "user", "password-secret": "s", "cookie-secret": "c", "context": Secrets()}
    context = values.pop("context")
    url = {"url": web.url + "/disk.raw"}
    with HttpFile.from_options({**url, **values}, context=context) as file:
        file.read(1 << 20, 1 << 20)
        assert not file.named
    # RFC 7617: base64 of user:p:é in UTF-8.
    assert [request[2:] for request in web.requests] == [("Basic dXNlcjpwOsOp", "a=b")] * 2


def test_login_may_stand_in_the_url(web: ScriptedWeb) -> None:
    url = web.url.replace("//", "//us%40er:p%3A@") + "/disk.raw?a=b#c"
    with HttpFile.from_options({"url": url}) as file:
        assert file.name == url
    # base64 of us@er:p:
    assert web.requests[0][0::2] == ("/disk.raw?a=b", "Basic dXNAZXI6cDo=")


# -- redirects


def test_redirects_are_followed_for_every_request(web: ScriptedWeb) -> None:
    web.script = [redirect("other.raw"), scripted.honest, redirect("/x/third.raw")]
    with opened(web, "/a/disk.raw") as file:
        assert file.read(1 << 20, 1 << 20) == CONTENT[1 << 20 : 2 << 20]
    assert [request[0] for request in web.requests] == [
        "/a/disk.raw",
        "/a/other.raw",
        "/a/disk.raw",
        "/x/third.raw",
    ]


def test_another_server_does_not_get_to_see_login_and_cookie(web: ScriptedWeb) -> None:
    with ScriptedWeb(CONTENT).running() as other:
        web.script = [redirect(other.url + "/disk.raw")]
        url = web.url.replace("//", "//user:word@") + "/disk.raw"
        HttpFile.from_options({"url": url, "cookie": "secret=1"}).close()
    assert web.requests[0][2:] == ("Basic dXNlcjp3b3Jk", "secret=1")
    assert other.requests[0][2:] == (None, None)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/disk.raw", "Maximum (20) redirects followed"),
        ("file:///etc/passwd", "Protocol 'file' not supported in a redirect"),
        ("ftp://127.0.0.1/x", "Protocol 'ftp' not supported in a redirect"),
        ("http://[::1/x", "URL using bad/illegal format or missing URL"),
        ("http://127.0.0.1:99999/", "URL using bad/illegal format or missing URL"),
    ],
)
def test_hostile_redirects_are_refused(web: ScriptedWeb, target: str, words: str) -> None:
    web.script = [redirect(target)] * 50
    with pytest.raises(StorageError) as caught:
        opened(web)
    assert str(caught.value) == f"CURL: Error opening file: {words}"
    assert len(web.requests) <= 21


# -- servers that break


@pytest.mark.parametrize(
    "fault",
    [
        status(503),
        status(429, Retry_After="0"),
        nothing,
        cut(0),
        cut(1000),
        cut(1000, hard=True),
        cut(200_000),
        silence(),
        silence(70_000),
        trickle,
        scripted.trickling_head,
        scripted.short_range,
        scripted.chunked,
    ],
    ids=lambda act: getattr(act, "__qualname__", "").split(".")[0],
)
def test_a_broken_transfer_goes_on_where_it_broke_off(web: ScriptedWeb, fault: scripted.Act) -> None:
    with opened(web) as file:
        file.access.timeout = 0.2
        web.script = [fault, fault]
        assert file.read(1 << 20, 1 << 20) == CONTENT[1 << 20 : 2 << 20]


def test_connections_that_the_server_gave_up_meanwhile_are_replaced() -> None:
    threads = 8
    together = Barrier(threads)

    def wait_for_all(request: scripted.Request) -> None:
        together.wait(10)
        scripted.honest(request)

    with ScriptedWeb(CONTENT, keep=0.1).running() as web, opened(web) as file:
        web.script = [wait_for_all] * threads
        readers = [Thread(target=file.read, args=(1 << 20, BLOCK)) for _ in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert web.connections == threads
        time.sleep(0.3)
        assert file.read(2 << 20, BLOCK) == CONTENT[2 << 20 : (2 << 20) + BLOCK]


def test_a_server_that_is_busy_for_a_moment_is_asked_again_when_opening(web: ScriptedWeb) -> None:
    web.script = [status(503), status(503)]
    with opened(web) as file:
        assert file.read(0, 100) == CONTENT[:100]
    assert len(web.requests) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(503), "The requested URL returned error: 503"),
        (nothing, "Empty reply from server"),
        (cut(0), "The server closed the connection"),
        (silence(), "Operation timed out"),
        (cut(10), "The server breaks every transfer off"),
    ],
    ids=["busy", "nothing", "cut", "silence", "crumbs"],
)
def test_a_server_that_stays_broken_is_given_up(web: ScriptedWeb, fault: scripted.Act, words: str) -> None:
    with opened(web) as file:
        file.access.timeout = 0.2
        web.script = [fault] * 50
        with pytest.raises(StorageError, match=words) as caught:
            file.read(1 << 20, 4096)
        assert caught.value.offset == 1 << 20
        assert len(web.requests) <= 6


# -- servers that are wrong


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(200, Content_Length=SIZE), "Server does not support 'range' (byte ranges)."),
        (status(404), "The requested URL returned error: 404"),
        (headers(Content_Range=None), "The server did not say which range it sent"),
        (headers(Content_Range="bytes 0-99/x"), "Server didn't report file size."),
        (headers(Content_Range="bytes 0-99/*"), "Server didn't report file size."),
        (headers(Content_Range=f"bytes 0-99/{'9' * 30}"), "Server didn't report file size."),
        (headers(Content_Range=f"bytes 1-{BLOCK}/{SIZE}"), "another range than the one asked for"),
        (headers(Content_Range=f"bytes 0-{BLOCK}/{SIZE}"), "another range than the one asked for"),
        (headers(Content_Range="bytes 0-99/50"), "another range than the one asked for"),
        (headers(Content_Range=f"bytes 9-0/{SIZE}"), "another range than the one asked for"),
        (headers(Content_Range=f"lines 0-99/{SIZE}"), "The server did not say which range it sent"),
        (headers(Content_Length=5), "The server's Content-Length contradicts its Content-Range"),
        (headers(Content_Encoding="gzip"), "The server sent an encoded range"),
        (garbage, "The server's answer makes no sense"),
        (status(206, X="y" * 70000), "The server's answer makes no sense"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(web: ScriptedWeb, fault: scripted.Act, words: str) -> None:
    web.script = [fault]
    with pytest.raises(StorageError) as caught:
        opened(web)
    assert str(caught.value).startswith("CURL: Error opening file: ")
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    "change",
    [headers(ETag='"2"'), headers(Content_Range=f"bytes {1 << 20}-{(2 << 20) - 1}/{SIZE + 1}"), status(416)],
    ids=["tag", "length", "shorter"],
)
def test_a_file_that_changes_while_it_is_read_is_an_error(web: ScriptedWeb, change: scripted.Act) -> None:
    with opened(web) as file:
        web.script = [change]
        with pytest.raises(StorageError, match="The file changed while it was read"):
            file.read(1 << 20, 1 << 20)


def test_a_file_that_changed_behind_a_break_is_an_error(web: ScriptedWeb) -> None:
    with opened(web) as file:
        web.script = [cut(100_000), headers(ETag='"2"')]
        with pytest.raises(StorageError, match="The file changed while it was read"):
            file.read(1 << 20, 1 << 20)


def test_an_empty_file_has_no_bytes(web: ScriptedWeb) -> None:
    web.script = [status(416, Content_Range="bytes */0")]
    with opened(web) as file:
        assert file.size == 0
        assert file.read(0, 10) == bytes(10)


# -- options


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "curl block driver requires an 'url' option"),
        (
            {"url": "https://h/x"},
            "http curl driver cannot handle the URL 'https://h/x' (does not start with 'http://')",
        ),
        ({"url": "http://h/x", "readahead": 100}, "HTTP_READAHEAD_SIZE 100 is not a multiple of 512"),
        ({"url": "http://h/x", "timeout": 10001}, "timeout parameter is too large or negative"),
        ({"url": "http://h/x", "timeout": -1}, "timeout parameter is too large or negative"),
        (
            {"url": "http://h/x", "cookie": "a", "cookie-secret": "b"},
            "curl driver cannot handle both cookie and cookie secret",
        ),
        ({"url": "http://h/x", "password-secret": "b"}, "No secret with id 'b'"),
    ],
)
def test_wrong_options_are_refused_without_a_connection(values: dict, words: str) -> None:
    with pytest.raises((LocationError, OptionError)) as caught:
        HttpFile.from_options(values)
    assert str(caught.value) == words


@pytest.mark.parametrize("path", ["/a b", "/a\tb", "/a\x7f"])
def test_urls_with_blanks_and_control_characters_are_refused(web: ScriptedWeb, path: str) -> None:
    with pytest.raises(QimgError, match="URL using bad/illegal format"):
        opened(web, path)
    assert not web.requests


def test_other_letters_are_quoted(web: ScriptedWeb) -> None:
    opened(web, "/ä%20b.raw").close()
    assert web.requests[0][0] == "/%C3%A4%20b.raw"


# -- proxies


def test_a_proxy_is_asked_for_the_whole_url_and_gets_its_own_login(
    web: ScriptedWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", web.url.replace("//", "//me:pw@"))
    monkeypatch.setenv("no_proxy", "other.invalid")
    with HttpFile.from_options({"url": "http://images.invalid:81/disk.raw", "cookie": "a"}) as file:
        assert file.read(0, 100) == CONTENT[:100]
    assert web.requests[0][0] == "http://images.invalid:81/disk.raw"
    with pytest.raises(StorageError, match=r"Could not resolve host: other\.invalid"):
        HttpFile.from_options({"url": "http://other.invalid/disk.raw"})


def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(QimgError, match="not as socks5://"):
        HttpFile.from_options({"url": "http://images.invalid/disk.raw"})
