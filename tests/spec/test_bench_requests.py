"""bench, seen from below: how many requests are in flight, when flushes come, what a failure leaves."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.storage.base import Storage
from qimg.storage.fault import CHANGE, FLUSH, READ, WRITE, FaultStorage, Rule
from support import crash
from support.build import build, io, real_content, write_raw
from support.faults import opened_through
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_raw(tmp_path / "a.raw", "ABCDEFGH" * 2)
    build(tmp_path / "a.q", "A-b-0#" * 3)
    return tmp_path


class Watching(FaultStorage):
    """Remembers what kinds of changes came, in their order."""

    def __init__(self, child: Storage, rules: list[Rule]) -> None:
        super().__init__(child, rules)
        self.seen: list[str] = []

    def write(self, buf: bytes | bytearray | memoryview, offset: int) -> None:
        super().write(buf, offset)
        self.seen.append("w")

    def flush(self) -> None:
        super().flush()
        self.seen.append("F")


def changes(words: str, name: str = "a.raw", rules: list[Rule] | None = None) -> tuple[Result, str]:
    """What our bench shows, and the writes and flushes that the file got."""
    made: list[Watching] = []

    def wrap(file: Storage) -> Storage:
        made.append(Watching(file, rules or []))
        return made[-1]

    with opened_through(wrap, name):
        shown = run_qimg_inprocess(["bench", "-w", *words.split(), name])
    return shown, "".join(made[0].seen)


#: What the real program's calls are (pwrite64 and fdatasync, as strace shows them).
FLUSHES = {
    "-d 1 -c 10 --flush-interval=2": "wwFwwFwwFwwFwwF",
    "-d 1 -c 10 --flush-interval=3": "wFwwwFwwwFwwwF",
    "-d 1 -c 10 --flush-interval=10": "wwwwwwwwwwF",
    "-d 1 -c 10 --flush-interval=11": "wwwwwwwwwwF",
    "-d 1 -c 5 --flush-interval=1": "wFwFwFwFwF",
    "-d 1 -c 10 --flush-interval=4 --no-drain": "wwFwwwwFwwwwF",
    "-d 1 -c 10": "wwwwwwwwwwF",
    "-d 1 -c 0 --flush-interval=1": "",
    "-d 1 -c 0": "",
    "-d 4 -c 20 --flush-interval=4": "wwwwFwwwwFwwwwFwwwwFwwwwF",
}


@pytest.mark.parametrize("words", FLUSHES)
def test_flushes_come_where_the_real_program_has_them(words: str, folder: Path) -> None:
    shown, seen = changes(f"-f raw {words}")
    shown.ok()
    assert seen == FLUSHES[words]


def test_a_flush_that_drains_comes_after_the_requests_before_it(folder: Path) -> None:
    for _ in range(5):
        shown, seen = changes("-f raw -d 8 -c 40 --flush-interval=8 -s 512")
        shown.ok()
        assert seen == ("w" * 8 + "F") * 5


def test_a_flush_that_does_not_drain_comes_as_often(folder: Path) -> None:
    shown, seen = changes("-f raw -d 8 -c 40 --flush-interval=8 -s 512 --no-drain")
    shown.ok()
    assert (seen.count("w"), seen.count("F"), seen[-1]) == (40, 5, "F")


def test_as_many_requests_are_in_flight_as_the_depth_says(folder: Path) -> None:
    """Each request waits until all others of its group have begun: fewer in flight would never end."""
    for depth in (1, 2, 7, 64):
        with opened_through(_AllTogether.of(depth), "a.raw"):
            words = ["bench", "-f", "raw", "-s", "777", "-d", str(depth), "-c", str(depth * 3), "a.raw"]
            run_qimg_inprocess(words).ok()


class _AllTogether(FaultStorage):
    """No request of 777 bytes ends before `parties` of them have begun."""

    parties: threading.Barrier

    @classmethod
    def of(cls, parties: int) -> Callable[[Storage], Storage]:
        def wrap(file: Storage) -> Storage:
            made = cls(file, [])
            made.parties = threading.Barrier(parties, timeout=20)
            return made

        return wrap

    def read_into(self, buf: bytearray | memoryview, offset: int) -> None:
        super().read_into(buf, offset)
        if len(buf) == 777:
            self.parties.wait()


@pytest.mark.parametrize("depth", [1, 64])
def test_a_request_that_fails_ends_the_run(depth: int, folder: Path) -> None:
    made: list[FaultStorage] = []

    def wrap(file: Storage) -> Storage:
        made.append(FaultStorage(file, [Rule(READ, 20, errno.EIO)]))
        return made[-1]

    with opened_through(wrap, "a.raw"):
        shown = run_qimg_inprocess(["bench", "-f", "raw", "-d", str(depth), "-c", "1000000", "a.raw"])
    assert (shown.code, shown.err) == (1, "qemu-img: Failed request: Input/output error\n")
    assert shown.out.startswith("Sending 1000000 read requests")
    assert "completed" not in shown.out
    assert made[0].counts[READ] < 20 + 2 * depth


@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("kind", [CHANGE, WRITE, FLUSH])
def test_an_image_whose_file_fails_while_it_is_written_to_stays_sound(
    depth: int, kind: str, folder: Path
) -> None:
    """At whatever request: one line, exit code 1, and no more than leaks in the image."""
    original = Path("a.q").read_bytes()
    content = real_content(Path("a.q"), format="qcow2")
    messages = set()
    for nth in range(1, 200):
        Path("a.q").write_bytes(original)
        words = f"-d {depth} -c 40 -s 5000 -S 33333 --pattern=200 --flush-interval=16"
        shown, _ = changes(words, "a.q", [Rule(kind, nth, errno.ENOSPC)])
        checked = run_real(["check", "-q", "a.q"])
        assert checked.code in (0, 3), checked
        now = real_content(Path("a.q"), format="qcow2")
        assert len(now) == len(content)
        for at in range(0, len(now), 4096):
            old, new = content[at : at + 4096], now[at : at + 4096]
            assert old == new or all(b in (a, 200) for a, b in zip(old, new, strict=True)), "bytes of nobody"
        if shown.code == 0:
            break
        messages.add(shown.err)
    assert shown.code == 0
    expected = {
        "qemu-img: Failed request: No space left on device\n",
        "qemu-img: Failed flush request: No space left on device\n",
    }
    assert messages <= expected
    assert messages


def test_a_guessed_raw_image_keeps_its_guard(folder: Path) -> None:
    """No write may make a header of the first sector; a pattern cannot, and so is let through."""
    shown = run_qimg_inprocess(["bench", "-w", "-c", "1", "--pattern=81", "a.raw"])
    assert shown.code == 0
    assert shown.err.startswith(
        "WARNING: Image format was not specified for 'a.raw' and probing guessed raw.\n"
    )


def test_bitmaps_know_what_a_write_test_wrote(folder: Path) -> None:
    for program, name in ((run_real, "real.q"), (run_qimg_inprocess, "ours.q")):
        build(folder / name, "AB-c----" * 4)
        run_real(["bitmap", "--add", "-g", "64k", name, "b"]).ok()
        program(["bench", "-w", "-c", "6", "-s", "3000", "-S", "150000", name]).ok()  # type: ignore[operator]
    assert _dirty("ours.q") == _dirty("real.q") != []


def _dirty(name: str) -> list[object]:
    """The set bits of bitmap b, as a server shows them."""
    import json

    from support.holders import qemu_nbd_serving

    with qemu_nbd_serving(Path(name).resolve(), read_only=True, options=("-B", "b")) as socket:
        description = "driver=nbd,x-dirty-bitmap=qemu:dirty-bitmap:b,server.type=unix,server.path=" + socket
        rows = json.loads(run_real(["map", "--output=json", "--image-opts", description]).ok().out)
    return [(row["start"], row["length"]) for row in rows if not row["data"]]


# -- the library


def test_the_library_measures_as_the_command_does(folder: Path) -> None:
    io(folder / "a.q", ["write -q -P 5 0 64k"])
    seconds = qimg.bench("a.q", count=50, depth=4)
    assert 0 < seconds < 60
    run_real(["bench", "-w", "-c", "40", "-s", "3000", "--pattern=9", "a.q"]).ok()
    expected = real_content(Path("a.q"), format="qcow2")
    build(folder / "a.q", "A-b-0#" * 3)
    io(folder / "a.q", ["write -q -P 5 0 64k"])
    qimg.bench("a.q", count=40, size=3000, write=True, pattern=9, flush_interval=64)
    assert real_content(Path("a.q"), format="qcow2") == expected
    with pytest.raises(qimg.StorageError, match="Failed request: Input/output error"):
        qimg.bench("a.raw", format="raw", offset=10 * MIB)
    with pytest.raises(qimg.OptionError):
        qimg.bench("a.raw", depth=0)
    with pytest.raises(qimg.OptionError, match="smaller than depth"):
        qimg.bench("a.raw", write=True, flush_interval=3)
    with pytest.raises(qimg.OptionError, match="write tests"):
        qimg.bench("a.raw", flush_interval=100)
    with pytest.raises(qimg.OpenError):
        qimg.bench("missing")


@pytest.mark.parametrize("more", [{"depth": 1}, {"depth": 8, "flush_interval": 16}])
@pytest.mark.parametrize("options", ["", "extended_l2=on", "compat=0.10"])
def test_a_crash_of_a_write_test_leaves_leaks_at_most(
    options: str, more: dict[str, int], folder: Path
) -> None:
    build(folder / "c.q", "A-b-CC--d---", options=options, backing="a.raw", backing_format="raw")

    def write() -> None:
        qimg.bench("c.q", count=60, size=3000, step=11000, write=True, pattern=7, **more)  # type: ignore[arg-type]

    crash.assert_survives(folder, ["c.q"], write)
