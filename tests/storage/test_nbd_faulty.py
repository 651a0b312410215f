"""NBD servers that lie, stop or are slow: each of them ends in one clear error, or in the right bytes."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qimg.errors import QimgError
from qimg.extent import MAPPED, ZERO
from qimg.storage.nbd import client, connection
from qimg.storage.nbd.storage import NbdStorage
from support import nbdscript
from support.build import pattern
from support.nbdscript import ACK, CONTEXT, GO, INFO, META, SET_META, STRUCTURED, UNSUPPORTED, Talk, scripted

KIB = 1024
SIZE = 256 * KIB
#: Seconds that are long for a server that answers at once, and short for a test.
SOON = 0.3


def opened(url: str, **options: str | int | bool) -> NbdStorage:
    return NbdStorage.from_options({**NbdStorage.parse(url), **options}, writable=True)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT", SOON)
    monkeypatch.setattr(client, "REPLY_TIMEOUT", SOON)


# -- the handshake


def _greeting(data: bytes) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        talk.send(data)
        talk.read(1 << 20)

    return script


def _answers(*answers: tuple[int, int, bytes]) -> Callable[[Talk], None]:
    """Answers to options, whatever they are: (option, kind, data)."""

    def script(talk: Talk) -> None:
        talk.greet()
        for option, kind, data in answers:
            talk.option()
            talk.answer(option, kind, data)
        talk.read(1 << 20)

    return script


def _going(*infos: bytes, last: int = ACK) -> Callable[[Talk], None]:
    """Nothing but GO is known."""

    def script(talk: Talk) -> None:
        talk.greet()
        while True:
            option, _ = talk.option()
            if option != GO:
                talk.answer(option, UNSUPPORTED)
                continue
            for info in infos:
                talk.answer(GO, INFO, info)
            talk.answer(GO, last)

    return script


def _export(size: int, flags: int = nbdscript.FLAGS) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


def _blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", 3, minimum, preferred, maximum)


def _context(*replies: bytes, kind: int = META) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        talk.greet()
        while True:
            option, _ = talk.option()
            if option == STRUCTURED:
                talk.answer(option, ACK)
            elif option == SET_META:
                for reply in replies:
                    talk.answer(option, kind, reply)
                talk.answer(option, ACK)
            else:
                talk.answer(option, UNSUPPORTED)

    return script


HANDSHAKES = {
    "says nothing": (_greeting(b""), "does not answer"),
    "stops in its greeting": (_greeting(b"NBDMAGIC"), "does not answer"),
    "hangs up": (lambda talk: None, "closed the connection"),
    "is a web server": (_greeting(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "Not an NBD server"),
    "is of the old style": (
        _greeting(b"NBDMAGIC" + bytes.fromhex("00420281861253").rjust(8, b"\0") + bytes(136)),
        "old style",
    ),
    "has another style": (_greeting(b"NBDMAGIC" + b"x" * 10), "unknown style"),
    "is newstyle but not fixed": (
        _greeting(nbdscript.GREETING + b"\0\0"),
        "does not offer the fixed newstyle",
    ),
    "answers another option": (_answers((99, ACK, b"")), "a reply to option 99"),
    "acknowledges with data": (_answers((11, ACK, b"x")), "an acknowledgement with data"),
    "answers without end": (_answers((11, 1 << 20, b"x" * 100)), "a reply of type"),
    "has a very long answer": (
        lambda talk: (
            talk.greet(),
            talk.option(),
            talk.send(struct.pack(">QIII", nbdscript.REPLY, 11, 1, 1 << 31)),
        ),
        "an option's reply of 2147483648 bytes",
    ),
    "has another magic": (
        lambda talk: (talk.greet(), talk.option(), talk.send(bytes(20)), talk.read(1)),
        "magic 0x0",
    ),
    "tells no size": (_going(), "no size of the export"),
    "tells a short size": (_going(bytes(6)), "information of 6 bytes"),
    "tells an empty information": (_going(b""), "a reply of type 3"),
    "informs without end": (_going(*[_export(SIZE)] * 100), "more than 64 replies"),
    "has a huge export": (_going(_export(1 << 63)), "an export of 9223372036854775808 bytes"),
    "has blocks of no power of two": (
        _going(_export(SIZE), _blocks(768, 4096, 1 << 20)),
        "minimum block size of 768",
    ),
    "has huge blocks": (
        _going(_export(1 << 20), _blocks(1 << 17, 1 << 17, 1 << 20)),
        "minimum block size of 131072",
    ),
    "has blocks of no bytes": (_going(_export(SIZE), _blocks(0, 0, 0)), "contradict each other"),
    "has a maximum below the minimum": (
        _going(_export(SIZE), _blocks(4096, 4096, 512)),
        "contradict each other",
    ),
    "has a part of a block": (
        _going(_export(5000), _blocks(4096, 4096, 8192)),
        "an export of 5000 bytes in blocks",
    ),
    "refuses the export": (_going(last=0x80000006), "Requested export not available"),
    "wants TLS": (_going(last=0x80000005), "TLS negotiation required before option 7"),
    "denies it": (_going(last=0x80000002), "Denied by server for option 7"),
    "is going down": (_going(last=0x80000007), "Server shutting down"),
    "has an unknown error": (_going(last=0x80000063), "refuses option 7 .go. with error 99"),
    "chooses another context": (
        _context(b"\0\0\0\1other:thing"),
        "a metadata context that was not asked for",
    ),
    "chooses a context twice": (
        _context(*[b"\0\0\0\1base:allocation"] * 2),
        "a metadata context that was not asked for",
    ),
    "chooses a context without a number": (_context(b"\1"), "choice of a metadata context"),
}


@pytest.mark.parametrize("name", HANDSHAKES)
def test_a_server_that_breaks_the_handshake_is_refused(tmp_path: Path, name: str) -> None:
    script, message = HANDSHAKES[name]
    started = time.monotonic()
    with scripted(tmp_path, script) as url, pytest.raises(QimgError, match=message):
        opened(url)
    assert time.monotonic() - started < 20


def test_a_text_of_the_server_is_shown_without_what_would_move_the_cursor(tmp_path: Path) -> None:
    text = b"no\x1b[2Jsuch\nthing\xff"
    script = _answers((11, UNSUPPORTED, b""), (8, UNSUPPORTED, b""), (7, 0x80000006, text))
    with scripted(tmp_path, script) as url, pytest.raises(QimgError) as caught:
        opened(url)
    assert caught.value.hint == "server reported: no?[2Jsuch?thing\ufffd"


# -- requests


def _serving(answer: Callable[[Talk, nbdscript.Asked], None], *, size: int = SIZE) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        talk.agree(size)
        while (asked := talk.request()).command != nbdscript.DISCONNECT:
            answer(talk, asked)

    return script


def _bytes(count: int) -> bytes:
    return pattern("Z", 0, count)


READS: dict[str, tuple[Callable[[Talk, nbdscript.Asked], None], str]] = {
    "hangs up": (lambda talk, asked: talk.sock.close(), "closed the connection|lost"),
    "says nothing": (lambda talk, asked: None, "does not answer"),
    "stops in a header": (lambda talk, asked: talk.send(b"\x66\x8e\x33\xef\0\1"), "does not answer"),
    "stops in the data": (
        lambda talk, asked: talk.send(
            struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, asked.cookie, 4104, 0), b"x" * 100
        ),
        "does not answer",
    ),
    "has another magic": (lambda talk, asked: talk.send(b"\0" * 16), "magic 0x0 of a reply"),
    "answers with extended headers": (
        lambda talk, asked: talk.send(struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, asked.cookie, 0, 0)),
        "magic 0x6e8a278c of a reply",
    ),
    "answers what nobody asked": (
        lambda talk, asked: talk.chunk(asked._replace(cookie=asked.cookie + 77), 0),
        "a reply to a request that was not sent",
    ),
    "answers without chunks": (
        lambda talk, asked: talk.simple(asked, _bytes(4096)),
        "a simple reply to a read",
    ),
    "begins in chunks and ends without": (
        lambda talk, asked: (talk.data(asked, 0, _bytes(512), 0), talk.simple(asked, error=5)),
        "a simple reply after a chunk",
    ),
    "has data before the range": (
        lambda talk, asked: talk.data(asked, SIZE - 1, b"x"),
        "which nobody asked for",
    ),
    "has data across the end": (
        lambda talk, asked: talk.data(asked, 1, _bytes(4096)),
        "which nobody asked for",
    ),
    "has data at a huge offset": (
        lambda talk, asked: talk.data(asked, (1 << 64) - 1, b"x"),
        "which nobody asked for",
    ),
    "has far too much data": (
        lambda talk, asked: talk.send(struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, asked.cookie, 0xFFFFFFFF, 0)),
        "which nobody asked for",
    ),
    "has a hole past the end": (lambda talk, asked: talk.hole(asked, 0, 1 << 31), "which nobody asked for"),
    "has an empty hole": (lambda talk, asked: talk.hole(asked, 0, 0), "which nobody asked for"),
    "has a hole of the wrong length": (
        lambda talk, asked: talk.chunk(asked, 2, bytes(13)),
        "a chunk of type 2",
    ),
    "has a chunk with no data": (lambda talk, asked: talk.chunk(asked, 1, bytes(8)), "a chunk of type 1"),
    "has an unknown chunk": (lambda talk, asked: talk.chunk(asked, 77, b"x"), "a chunk of type 77"),
    "has data in a chunk of nothing": (lambda talk, asked: talk.chunk(asked, 0, b"x"), "a chunk of type 0"),
    "sends half of it": (lambda talk, asked: talk.data(asked, 0, _bytes(2048)), "incomplete"),
    "sends nothing": (lambda talk, asked: talk.chunk(asked, 0), "incomplete"),
    "sends it twice": (
        lambda talk, asked: (talk.data(asked, 0, _bytes(4096), 0), talk.data(asked, 0, _bytes(4096))),
        "comes twice|incomplete",
    ),
    "sends one half twice": (
        lambda talk, asked: (talk.data(asked, 0, _bytes(2048), 0), talk.data(asked, 0, _bytes(2048))),
        "comes twice",
    ),
    "has states for a read": (lambda talk, asked: talk.states(asked, (4096, 0)), "block states of"),
    "has an error without a number": (
        lambda talk, asked: talk.chunk(asked, 0x8001, struct.pack(">IH", 0, 0)),
        "an error without a number",
    ),
    "has a short error": (lambda talk, asked: talk.chunk(asked, 0x8001, b"\0\0\0\5"), "an error of 4 bytes"),
    "has an error with a text beyond it": (
        lambda talk, asked: talk.chunk(asked, 0x8001, struct.pack(">IH", 5, 99)),
        "beyond its chunk",
    ),
    "has a very long error": (
        lambda talk, asked: talk.send(struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, asked.cookie, 1 << 30)),
        "an error of 1073741824 bytes",
    ),
    "has an error": (
        lambda talk, asked: talk.chunk(asked, 0x8001, struct.pack(">IH", 5, 2) + b"no"),
        "^Input/output error$",
    ),
    "has an error at an offset": (
        lambda talk, asked: (
            talk.data(asked, 0, _bytes(512), 0),
            talk.chunk(asked, 0x8002, struct.pack(">IHQ", 28, 0, 512)),
        ),
        "^No space left on device$",
    ),
    "has an error of no known kind": (
        lambda talk, asked: talk.chunk(asked, 0x8077, struct.pack(">IH", 1, 0)),
        "^Operation not permitted$",
    ),
    "has an error with an unknown number": (
        lambda talk, asked: talk.simple(asked, error=77777),
        "^Invalid argument$",
    ),
}


@pytest.mark.parametrize("name", READS)
def test_a_wrong_reply_to_a_read_is_one_clear_error(tmp_path: Path, name: str) -> None:
    answer, message = READS[name]
    with (
        scripted(tmp_path, _serving(answer)) as url,
        opened(url) as place,
        pytest.raises(QimgError, match=message),
    ):
        place.read(0, 4096)


def test_chunks_without_end_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_MAX_CHUNKS", 5)

    def answer(talk: Talk, asked: nbdscript.Asked) -> None:
        error = struct.pack(">IHHQIIH", 0x668E33EF, 0, 0x8001, asked.cookie, 6, 5, 0)
        while True:
            talk.send(error)

    with (
        scripted(tmp_path, _serving(answer)) as url,
        opened(url) as place,
        pytest.raises(QimgError, match="more than 5 chunks"),
    ):
        place.read(0, 4096)


def _state(*states: tuple[int, int], context: int = CONTEXT) -> Callable[[Talk, nbdscript.Asked], None]:
    data = struct.pack(">I", context) + b"".join(struct.pack(">II", *state) for state in states)
    return lambda talk, asked: talk.chunk(asked, 5, data)


STATES: dict[str, tuple[Callable[[Talk, nbdscript.Asked], None], str]] = {
    "none": (_state(), "block states of 4 bytes"),
    "no chunk at all": (lambda talk, asked: talk.simple(asked), "a block status without states"),
    "another context": (_state((4096, 0), context=9), "a context that was not chosen"),
    "an empty one": (_state((0, 0)), "an empty block state"),
    "one behind the range": (_state((SIZE, 0), (512, 0)), "one beyond the range"),
    "part of one": (lambda talk, asked: talk.chunk(asked, 5, bytes(10)), "block states of 10 bytes"),
    "wide ones": (lambda talk, asked: talk.chunk(asked, 6, bytes(24)), "block states of 24 bytes"),
    "twice": (
        lambda talk, asked: (
            talk.chunk(asked, 5, struct.pack(">III", CONTEXT, 512, 0), 0),
            talk.chunk(asked, 5, struct.pack(">III", CONTEXT, 512, 0)),
        ),
        "block states of 12 bytes",
    ),
    "data": (lambda talk, asked: talk.data(asked, 0, b"x"), "which nobody asked for"),
}


@pytest.mark.parametrize("name", STATES)
def test_wrong_block_states_are_one_clear_error(tmp_path: Path, name: str) -> None:
    answer, message = STATES[name]
    with (
        scripted(tmp_path, _serving(answer)) as url,
        opened(url) as place,
        pytest.raises(QimgError, match=message),
    ):
        list(place.extents(0, SIZE))


def test_after_a_wrong_reply_nothing_is_asked_any_more(tmp_path: Path) -> None:
    asked_for = []

    def answer(talk: Talk, asked: nbdscript.Asked) -> None:
        asked_for.append(asked)
        talk.send(bytes(16))

    with scripted(tmp_path, _serving(answer)) as url, opened(url) as place:
        for _ in range(3):
            with pytest.raises(QimgError, match="magic 0x0 of a reply"):
                place.read(0, 512)
    assert len(asked_for) == 1


def test_more_of_the_last_state_than_was_asked_for_is_cut_off(tmp_path: Path) -> None:
    answer = _state((4096, 3), (1 << 31, 0))
    with scripted(tmp_path, _serving(answer)) as url, opened(url) as place:
        found = [tuple(extent[:3]) for extent in place.extents(0, 8192)]
    assert found == [(0, 4096, ZERO), (4096, 4096, MAPPED)]


# -- what is unusual and right


def test_a_server_that_knows_only_the_oldest_option_is_served(tmp_path: Path) -> None:
    def script(talk: Talk) -> None:
        talk.greet()
        talk.structured = False
        while True:
            option, _ = talk.option()
            if option == 1:
                talk.send(struct.pack(">QH", SIZE, nbdscript.FLAGS))
                talk.serve(bytearray(_bytes(SIZE)))
                return
            talk.answer(option, UNSUPPORTED)

    with scripted(tmp_path, script) as url, opened(url) as place:
        assert place.read(512, 1024) == pattern("Z", 512, 1024)


def test_extended_headers_are_used_where_they_are_offered(tmp_path: Path) -> None:
    size = 1 << 40
    asked_for: list[nbdscript.Asked] = []

    def script(talk: Talk) -> None:
        talk.agree(size)
        while (asked := talk.request()).command != nbdscript.DISCONNECT:
            asked_for.append(asked)
            if asked.command == nbdscript.STATUS:
                talk.states(asked, (1 << 36, 3), (asked.length - (1 << 36), 0))
            elif asked.command == nbdscript.READ:
                talk.data(asked, asked.offset, b"\xaa" * 512, 0)
                talk.hole(asked, asked.offset + 512, asked.length - 512)
            else:
                talk.chunk(asked, 0)

    with scripted(tmp_path, script, extended=True) as url, opened(url) as place:
        assert place.read(1 << 39, 1024) == b"\xaa" * 512 + bytes(512)
        place.write(b"x" * 512, 1024)
        place.flush()
        found = [tuple(extent[:3]) for extent in place.extents(0, 1 << 37)]
    assert found == [(0, 1 << 36, ZERO), (1 << 36, 1 << 36, MAPPED)]
    by_command = {asked.command: asked for asked in asked_for}
    assert by_command[nbdscript.WRITE].data == b"x" * 512
    assert by_command[nbdscript.WRITE].flags & 1 << 5


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_chunks_in_any_order_and_number_give_the_right_bytes(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(pattern("A", 0, SIZE))
    cuts = sorted(data.draw(st.sets(st.integers(1, SIZE - 1), max_size=12)))
    pieces = list(zip([0, *cuts], [*cuts, SIZE], strict=True))
    holes = data.draw(st.sets(st.sampled_from(pieces), max_size=len(pieces)))
    for start, end in holes:
        content[start:end] = bytes(end - start)
    order = data.draw(st.permutations(pieces))

    def answer(talk: Talk, asked: nbdscript.Asked) -> None:
        for start, end in order:
            if (start, end) in holes:
                talk.hole(asked, start, end - start, 0)
            else:
                talk.data(asked, start, bytes(content[start:end]), 0)
        talk.chunk(asked, 0)

    with scripted(tmp_path, _serving(answer)) as url, opened(url) as place:
        assert place.read(0, SIZE) == content
