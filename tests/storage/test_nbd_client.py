"""What the NBD client asks of servers, and what it does when they go away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from qimg.errors import QimgError, StorageError
from qimg.extent import ABSENT, MAPPED, ZERO
from qimg.storage.nbd import client
from qimg.storage.nbd.storage import NbdStorage
from support.build import pattern
from support.nbdscript import DISCONNECT, FLUSH, READ, TRIM, WRITE, ZEROES, Asked, Talk, scripted
from support.nbdservers import Server, nbdkit, qemu_nbd
from support.run import run_peer

KIB = 1024
MIB = 1 << 20
SIZE = MIB
LOST = r"NBD server closed the connection|Connection to NBD server lost"
FUA, NO_HOLE = 1, 2
# Transmission flags.
HAS_FLAGS, READ_ONLY, CAN_FLUSH, CAN_FUA, CAN_TRIM, CAN_ZERO, MULTI = 1, 2, 4, 8, 32, 64, 256


def opened(url: str, *, cache: str = "writeback", discard: bool = True, **options: str | int) -> NbdStorage:
    values = {**NbdStorage.parse(url), **{name.replace("_", "-"): value for name, value in options.items()}}
    return NbdStorage.from_options(values, writable=True, cache=cache, discard=discard)


# -- what is asked


def asked_of(tmp_path: Path, flags: int, work, **options: object) -> list[tuple[int, int, int, int]]:
    """(command, flags, offset, length) of the requests that `work` on an export with `flags` makes."""
    log: list[Asked] = []

    def script(talk: Talk) -> None:
        talk.agree(SIZE, flags, (512, 4096, 64 * KIB))
        talk.serve(bytearray(SIZE), log)

    with scripted(tmp_path, script) as url, opened(url, **options) as place:  # type: ignore[arg-type]
        work(place)
    return [(asked.command, asked.flags, asked.offset, asked.length) for asked in log]


ALL = HAS_FLAGS | CAN_FLUSH | CAN_FUA | CAN_TRIM | CAN_ZERO


def test_requests_are_no_longer_than_the_server_wants(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, ALL, lambda place: place.read(512, 150 * KIB))
    assert asked == [(READ, 0, 512, 65536), (READ, 0, 66048, 65536), (READ, 0, 131584, 22528)]


def test_zeros_are_asked_for_without_data_and_in_one_go(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, ALL, lambda place: place.zero(0, SIZE))
    assert asked == [(ZEROES, 0, 0, SIZE)]


def test_space_that_is_to_stay_is_not_made_a_hole(tmp_path: Path) -> None:
    assert asked_of(tmp_path, ALL, lambda place: place.zero(0, 512, unmap=False)) == [
        (ZEROES, NO_HOLE, 0, 512)
    ]
    kept = asked_of(tmp_path, ALL, lambda place: place.zero(0, 512), discard=False)
    assert kept == [(ZEROES, NO_HOLE, 0, 512)]


def test_a_server_that_cannot_zero_gets_zeros(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, ALL & ~CAN_ZERO, lambda place: place.zero(0, 1024))
    assert asked == [(WRITE, 0, 0, 1024)]


def test_whole_blocks_are_given_back_where_the_server_can(tmp_path: Path) -> None:
    assert asked_of(tmp_path, ALL, lambda place: place.discard(100, 2000)) == [(TRIM, 0, 512, 1536)]
    assert not asked_of(tmp_path, ALL & ~CAN_TRIM, lambda place: place.discard(0, 4096))
    assert not asked_of(tmp_path, ALL, lambda place: place.discard(0, 4096), discard=False)


def test_a_flush_is_one_where_the_server_can_and_the_cache_mode_wants(tmp_path: Path) -> None:
    assert asked_of(tmp_path, ALL, lambda place: place.flush()) == [(FLUSH, 0, 0, 0)]
    assert not asked_of(tmp_path, ALL & ~CAN_FLUSH, lambda place: place.flush())
    assert not asked_of(tmp_path, ALL, lambda place: place.flush(), cache="unsafe")


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_durable_writes_are_asked_for_or_flushed(tmp_path: Path, cache: str) -> None:
    def work(place: NbdStorage) -> None:
        place.write(b"x" * 512, 0)
        place.zero(512, 512)

    asked = asked_of(tmp_path, ALL, work, cache=cache)
    assert asked == [(WRITE, FUA, 0, 512), (ZEROES, FUA, 512, 512)]
    asked = asked_of(tmp_path, ALL & ~CAN_FUA, work, cache=cache)
    assert asked == [(WRITE, 0, 0, 512), (FLUSH, 0, 0, 0), (ZEROES, 0, 512, 512), (FLUSH, 0, 0, 0)]


def test_part_of_a_block_is_written_with_what_is_beside_it(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, ALL, lambda place: place.write(b"x" * 10, 1000))
    assert asked == [(READ, 0, 512, 512), (WRITE, 0, 512, 512)]


def test_an_export_that_is_read_only_is_not_opened_for_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^NBD export is read-only$"):
        asked_of(tmp_path, ALL | READ_ONLY, lambda place: None)


def test_the_server_is_told_that_we_go(tmp_path: Path) -> None:
    last: list[int] = []

    def script(talk: Talk) -> None:
        talk.agree(SIZE)
        last.append(talk.request().command)

    with scripted(tmp_path, script) as url:
        opened(url).close()
    assert last == [DISCONNECT]


# -- several at once


def _read_in_threads(place: NbdStorage, count: int) -> list[bytes]:
    found: list[bytes] = [b""] * count

    def work(number: int) -> None:
        found[number] = bytes(place.read(number * 512, 512))

    threads = [Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_requests_are_in_flight_together_on_one_connection(tmp_path: Path) -> None:
    """The server waits for all of them before it answers any, the last one first."""
    count = 6

    def script(talk: Talk) -> None:
        talk.agree(SIZE)
        for asked in reversed([talk.request() for _ in range(count)]):
            talk.data(asked, asked.offset, pattern("A", asked.offset, 512))
        talk.read(1)

    with scripted(tmp_path, script) as url, opened(url) as place:
        assert _read_in_threads(place, count) == [pattern("A", number * 512, 512) for number in range(count)]


def test_more_connections_are_opened_where_the_server_allows_and_they_are_needed(tmp_path: Path) -> None:
    talks: list[Talk] = []

    def script(talk: Talk) -> None:
        talks.append(talk)
        talk.agree(SIZE, ALL | MULTI)
        while (asked := talk.request()).command != DISCONNECT:
            time.sleep(0.002)
            talk.data(asked, asked.offset, pattern("A", asked.offset, 512))

    with scripted(tmp_path, script) as url, opened(url) as place:
        end = time.monotonic() + 10
        while len(talks) < client.MAX_CONNECTIONS and time.monotonic() < end:
            found = _read_in_threads(place, 12)
            assert found == [pattern("A", number * 512, 512) for number in range(12)]
    assert len(talks) == client.MAX_CONNECTIONS


def test_one_connection_serves_where_a_further_one_is_refused(tmp_path: Path) -> None:
    talks: list[Talk] = []

    def script(talk: Talk) -> None:
        talks.append(talk)
        if len(talks) > 1:
            return
        talk.agree(SIZE, ALL | MULTI)
        talk.serve(bytearray(pattern("A", 0, SIZE)))

    with scripted(tmp_path, script) as url, opened(url) as place:
        for _ in range(4):
            assert _read_in_threads(place, 8) == [pattern("A", number * 512, 512) for number in range(8)]
    assert len(talks) <= 2


# -- servers that go away


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(pattern("A", 0, SIZE))
    return path


@pytest.mark.peer("nbdkit")
def test_a_lost_server_is_an_error_at_once(tmp_path: Path, content: Path) -> None:
    with nbdkit(tmp_path, "file", content) as server, opened(server.url()) as place:
        place.read(0, 512)
        server.kill()
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(QimgError, match=LOST):
                place.read(0, 512)
        assert time.monotonic() - started < 5
        server.start()


@pytest.mark.peer("nbdkit")
def test_a_server_that_comes_back_is_gone_on_with(tmp_path: Path, content: Path) -> None:
    with nbdkit(tmp_path, "file", content) as server, opened(server.url(), reconnect_delay=20) as place:
        place.write(b"before" * 100, 0)
        server.kill()
        writer = Thread(target=lambda: place.write(b"after!" * 100, 600))
        writer.start()
        time.sleep(0.2)
        server.start()
        writer.join(30)
        assert place.read(0, 1200) == b"before" * 100 + b"after!" * 100
        place.flush()


@pytest.mark.peer("nbdkit")
def test_requests_that_were_in_flight_are_sent_again(tmp_path: Path, content: Path) -> None:
    slow = ("-t", 8, "--filter=delay", "file", content, "rdelay=300ms")
    with nbdkit(tmp_path, *slow) as server, opened(server.url(), reconnect_delay=20) as place:
        found: list[list[bytes]] = []
        reader = Thread(target=lambda: found.append(_read_in_threads(place, 6)))
        reader.start()
        time.sleep(0.1)
        server.kill()
        server.start()
        reader.join(30)
    assert found == [[pattern("A", number * 512, 512) for number in range(6)]]


@pytest.mark.peer("nbdkit")
def test_a_server_that_stays_away_for_too_long_is_an_error(tmp_path: Path, content: Path) -> None:
    with nbdkit(tmp_path, "file", content) as server, opened(server.url(), reconnect_delay=1) as place:
        server.kill()
        started = time.monotonic()
        with pytest.raises(QimgError, match=LOST):
            place.read(0, 512)
        assert 0.5 < time.monotonic() - started < 10
        server.start()


@pytest.mark.peer("nbdkit")
def test_a_server_that_comes_back_with_another_disk_is_an_error(tmp_path: Path, content: Path) -> None:
    with nbdkit(tmp_path, "file", content) as server, opened(server.url(), reconnect_delay=20) as place:
        server.kill()
        content.write_bytes(bytes(SIZE // 2))
        server.start()
        with pytest.raises(QimgError) as caught:
            place.read(0, 512)
        assert "has changed" in str(caught.value.__cause__ or caught.value)


@pytest.mark.peer("nbdkit")
def test_opening_waits_for_a_server_as_long_as_it_is_told(tmp_path: Path, content: Path) -> None:
    with nbdkit(tmp_path, "file", content) as server:
        server.kill()
        server.socket.unlink()
        with pytest.raises(StorageError, match=r"^Failed to connect to '.*': No such file or directory$"):
            opened(server.url())
        found: list[bytes] = []

        def read() -> None:
            with opened(server.url(), open_timeout=20) as place:
                found.append(bytes(place.read(0, 512)))

        reader = Thread(target=read)
        reader.start()
        time.sleep(0.2)
        server.start()
        reader.join(30)
    assert found == [pattern("A", 0, 512)]


# -- bitmaps and block states


@pytest.fixture(scope="module")
def bitmaps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An export with a bitmap that has recorded the write of 64 KiB at 512 KiB."""
    folder = tmp_path_factory.mktemp("bitmaps")
    image = folder / "a.qcow2"
    run_peer("qemu-img", ["create", "-q", "-f", "qcow2", image, "1M"]).ok()
    run_peer("qemu-img", ["bitmap", "--add", "--enable", "-g", "64k", image, "b"]).ok()
    run_peer("qemu-io", ["-c", "write -P 1 512k 64k", image]).ok()
    with qemu_nbd(folder, "-r", "-f", "qcow2", "-B", "b", image) as server:
        yield server


@pytest.mark.peer("qemu-nbd", "qemu-io", "qemu-img")
def test_a_dirty_bitmap_is_read_instead_of_the_allocation(bitmaps: Server) -> None:
    values = NbdStorage.parse(bitmaps.url())
    with NbdStorage.from_options({**values, "x-dirty-bitmap": "qemu:dirty-bitmap:b"}) as place:
        found = [tuple(extent[:3]) for extent in place.extents(0, SIZE)]
    dirty = (512 * KIB, 64 * KIB, MAPPED | ABSENT)
    assert found == [(0, 512 * KIB, MAPPED), dirty, (576 * KIB, 448 * KIB, MAPPED)]
    with NbdStorage.from_options(values) as place:
        found = [tuple(extent[:3]) for extent in place.extents(0, SIZE)]
    assert found == [(0, 512 * KIB, ZERO), (512 * KIB, 64 * KIB, MAPPED), (576 * KIB, 448 * KIB, ZERO)]


@pytest.mark.peer("qemu-nbd", "qemu-io", "qemu-img")
def test_a_bitmap_that_the_server_does_not_have_is_an_error(bitmaps: Server) -> None:
    values = {**NbdStorage.parse(bitmaps.url()), "x-dirty-bitmap": "qemu:dirty-bitmap:other"}
    with pytest.raises(QimgError, match=r"^requested x-dirty-bitmap qemu:dirty-bitmap:other not found$"):
        NbdStorage.from_options(values)
