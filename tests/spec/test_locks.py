"""Images in use: qimg and the real programs refuse, and let in, each other as two real programs do.

Who holds an image, and with what, is the real program's doing (common sheet, section 11); each command line
is then run by the real qemu-img and by qimg. The other way round, qimg holds and the real programs come.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import qimg
from support import peers
from support.holders import qemu_io_holding, qemu_nbd_serving
from support.run import Result, run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")

MIB = 1 << 20

#: Command lines that meet the held image a.q; ov.q and top.q stand on it, b.q has nothing to do with it.
LINES = """
info a.q
info -U a.q
info --output=json a.q
info -f raw a.q
info ov.q
info --backing-chain ov.q
info --backing-chain -U ov.q
info --image-opts driver=qcow2,file.filename=a.q,file.locking=off
info --image-opts driver=qcow2,file.filename=a.q,force-share=on
map a.q
map -U a.q
map -f raw a.q
map --output=json ov.q
map -U top.q
check a.q
check -U a.q
check -q ov.q
check -U ov.q
compare a.q b.q
compare b.q a.q
compare -U a.q b.q
compare -s -U b.q a.q
compare -f raw a.q b.q
compare ov.q b.q
convert -O qcow2 a.q out
convert -U -O qcow2 a.q out
convert -f raw -O raw a.q out
convert -U -f raw -O raw a.q out
convert -O raw ov.q out
convert -U -O raw top.q out
convert -O qcow2 b.q a.q
convert -O raw b.q a.q
convert -U -O qcow2 b.q a.q
convert -n -O qcow2 b.q a.q
convert -n -O raw b.q a.q
convert -n --target-image-opts b.q driver=qcow2,file.filename=a.q
convert -O qcow2 -B a.q -F qcow2 b.q out
measure a.q
measure -U -O qcow2 a.q
measure -f raw a.q
measure ov.q
create -f qcow2 a.q 1M
create -f raw a.q 1M
create -q -f qcow2 -b a.q -F qcow2 out
create -q -f qcow2 -b ov.q -F qcow2 out
create -q -f qcow2 -o data_file=a.q out 1M
info --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.q
"""

#: The same for a held raw file, on which o.q stands, and for the data file of d.q.
RAW_LINES = """
info r.raw
info --backing-chain o.q
map r.raw
map -f raw r.raw
map o.q
map --image-opts driver=raw,file.driver=raw,file.file.filename=r.raw
check r.raw
check o.q
compare o.q b.q
compare r.raw b.q
convert o.q out
convert -U o.q out
convert r.raw out
convert -U -f raw r.raw out
convert --image-opts driver=raw,offset=512,file.filename=r.raw out
measure o.q
measure r.raw
convert r.raw r.raw
convert -n r.raw r.raw
convert b.q r.raw
convert -n b.q r.raw
convert -O qcow2 b.q r.raw
convert -O qcow2 -B r.raw -F raw b.q out
create -f raw r.raw 1M
create -f qcow2 r.raw 1M
create -q -f qcow2 -b r.raw -F raw out
create -q -f qcow2 -o data_file=r.raw out 1M
info d.q
map d.q
map -U d.q
check d.q
compare d.q b.q
convert d.q out
convert -U d.q out
measure d.q
"""

REFUSAL = "Failed to get "
NOT_YET = "Writing to existing qcow2 images is not supported yet"

Outcome = tuple[int, str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.q, two overlays of it, and b.q; also the working directory, so that names in messages are short."""
    monkeypatch.chdir(tmp_path)
    for words in (
        "a.q 1M",
        "b.q 1M",
        "-b a.q -F qcow2 ov.q",
        "-b ov.q -F qcow2 top.q",
    ):
        run_real(["create", "-q", "-f", "qcow2", *words.split()], tmp_path).ok()
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write -q -P 1 64k 128k", "a.q"], tmp_path).ok()
    return tmp_path


@contextmanager
def _nbd(path: Path, read_only: bool) -> Iterator[None]:
    with qemu_nbd_serving(path, read_only=read_only) as address, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(address)
        assert client.recv(8) == b"NBDMAGIC"
        yield


#: Somebody real who holds an image.
HOLDERS: dict[str, Callable[[Path], object]] = {
    "nobody": lambda path: ExitStack(),
    "qcow2 writer": qemu_io_holding,
    "qcow2 reader": lambda path: qemu_io_holding(path, read_only=True),
    "sharing qcow2 reader": lambda path: qemu_io_holding(path, read_only=True, share=True),
    "raw writer": lambda path: qemu_io_holding(path, format="raw"),
    "raw reader": lambda path: qemu_io_holding(path, format="raw", read_only=True),
    "server": lambda path: _nbd(path, read_only=False),
    "read-only server": lambda path: _nbd(path, read_only=True),
}


def lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


@pytest.mark.parametrize("holder", HOLDERS)
def test_qimg_is_refused_and_let_in_as_the_real_program_is(holder: str, folder: Path) -> None:
    expected = outcomes(run_real, holder, folder / "a.q", lines(LINES))
    found = outcomes(run_qimg_inprocess, holder, folder / "a.q", lines(LINES))
    for line, (_, err) in found.items():
        if NOT_YET in err and not expected[line][0]:
            found[line] = expected[line]
    assert found == expected
    refused = sum(REFUSAL in err for _, err in expected.values())
    assert bool(refused) == (holder not in ("nobody", "sharing qcow2 reader", "raw reader"))


@pytest.mark.parametrize("name", ["r.raw", "d.data"])
@pytest.mark.parametrize("holder", ["raw writer", "raw reader"])
def test_raw_files_are_shared_as_by_the_real_program(holder: str, name: str, folder: Path) -> None:
    for words in ("-f raw r.raw 1M", "-f qcow2 -b r.raw -F raw o.q", "-f qcow2 -o data_file=d.data d.q 1M"):
        run_real(["create", "-q", *words.split()], folder).ok()
    run_peer("qemu-io", ["-f", "raw", "-c", "write -q -P 1 64k 128k", "r.raw"], folder).ok()
    table = lines(RAW_LINES)
    expected = outcomes(run_real, holder, folder / name, table)
    found = outcomes(run_qimg_inprocess, holder, folder / name, table)
    assert found == expected


def outcomes(run: Callable[..., Result], holder: str, held: Path, table: list[str]) -> dict[str, Outcome]:
    """What becomes of every line. What a line does to the image is undone."""
    contents = {path: path.read_bytes() for path in held.parent.iterdir()}
    found: dict[str, Outcome] = {}
    with ExitStack() as stack:
        stack.enter_context(HOLDERS[holder](held))  # type: ignore[arg-type]
        for line in table:
            code, _, err = run(shlex.split(line), held.parent)
            found[line] = code, err
            held.with_name("out").unlink(missing_ok=True)
            if not held.exists():
                # A create of the real program that fails removes what was there.
                stack.close()
                held.write_bytes(contents[held])
                stack.enter_context(HOLDERS[holder](held))  # type: ignore[arg-type]
            for path, content in contents.items():
                if not path.exists() or path.read_bytes() != content:
                    path.write_bytes(content)
    return found


def test_what_is_refused_is_left_as_it_was(folder: Path) -> None:
    held = folder / "a.q"
    content = held.read_bytes()
    with qemu_io_holding(held, read_only=True):
        for line in ("create -q -f qcow2 a.q 5M", "create -q -f raw a.q 5M", "convert -O qcow2 b.q a.q"):
            assert run_qimg_inprocess(line.split(), folder).code == 1
            assert held.read_bytes() == content


def test_a_chain_is_locked_as_a_whole(folder: Path) -> None:
    """Whoever writes to a backing file keeps readers of its overlays out, at every level."""
    for name in ("ov.q", "top.q"):
        with qemu_io_holding(folder / "a.q"):
            found = run_qimg_inprocess(["map", name], folder)
            real = run_real(["map", name], folder)
        assert (found.code, found.err) == (real.code, real.err)
        assert found.code == 1


# -- qimg holds


def real_outcomes(name: str) -> dict[str, Outcome]:
    """What becomes of the real programs that want the image `name`, which somebody holds."""
    found: dict[str, Outcome] = {}
    place = Path(name)
    content = place.read_bytes()
    for line in (
        f"info {name}",
        f"info -U {name}",
        f"map {name}",
        f"map -U {name}",
        f"map -f raw {name}",
        f"check -q {name}",
        f"convert -O raw {name} out2",
        f"convert -U -O raw {name} out2",
        f"measure {name}",
        f"create -q -f qcow2 {name} 1M",
        f"create -q -f raw {name} 1M",
        f"resize -f qcow2 {name} 2M",
        f"snapshot -c s {name}",
        f"compare {name} b.q",
    ):
        code, _, err = run_real(line.split())
        if code != 0 and REFUSAL not in err:
            err = "not about locks"
        found[line] = code, err
        if place.read_bytes() != content:
            place.write_bytes(content)
    for more in ("", "-r", "-r -U", "-f raw", "-f raw -r"):
        words = [*more.split(), "-c", "quit", name]
        told = run_peer("qemu-io", words if "raw" in more else ["-f", "qcow2", *words])
        found[f"qemu-io {more}"] = told.code, told.out + told.err
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: qimg.open("a.q"), lambda path: qemu_io_holding(path, read_only=True)),
        (
            lambda: qimg.open("a.q", share=True),
            lambda path: qemu_io_holding(path, read_only=True, share=True),
        ),
        (lambda: qimg.open("ov.q"), lambda path: qemu_io_holding(path.with_name("ov.q"), read_only=True)),
        (lambda: qimg.open("top.q"), lambda path: qemu_io_holding(path.with_name("top.q"), read_only=True)),
        (
            lambda: qimg.open("top.q", share=True),
            lambda path: qemu_io_holding(path.with_name("top.q"), read_only=True, share=True),
        ),
    ],
    ids=["open", "open, shared", "overlay", "second overlay", "second overlay, shared"],
)
def test_what_qimg_opens_is_kept_as_a_real_reader_keeps_it(
    folder: Path, ours: Callable[[], qimg.Disk], theirs: Callable[[Path], object]
) -> None:
    with theirs(folder / "a.q"):  # type: ignore[attr-defined]
        expected = real_outcomes("a.q")
    with ours():
        found = real_outcomes("a.q")
    assert found == expected
    refused = {line: err for line, (_, err) in real_outcomes("a.q").items() if REFUSAL in err}
    assert not refused, "closing lets everybody in"


class Probed(Exception):
    """The conversion has run long enough."""


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("fresh", [True, False], ids=["new", "there already"])
def test_the_target_of_a_running_convert_is_kept_as_by_the_real_program(
    folder: Path, format: str, fresh: bool
) -> None:
    names = ("t.img", "src.raw")
    with (folder / "src.raw").open("wb") as file:
        file.write(b"x" * 4 * MIB)

    def prepare() -> None:
        if fresh:
            (folder / "t.img").unlink(missing_ok=True)
        else:
            run_real(["create", "-q", "-f", format, "t.img", "4M"]).ok()

    def questions() -> dict[str, Outcome]:
        """Only what changes nothing: the conversion has to go on."""
        found: dict[str, Outcome] = {}
        for name in names:
            for line in (
                f"info -f raw {name}",
                f"convert -f raw -O raw {name} out2",
                f"create -q -f raw {name} 0",
            ):
                if line.startswith("create") and (name, format) == ("t.img", "raw"):
                    continue  # let in, as the sheet says
                code, _, err = run_real(line.split())
                found[line] = code, err
            for more in ("-r", "-r -U", ""):
                told = run_peer("qemu-io", ["-f", "raw", *more.split(), "-c", "quit", name])
                found[f"qemu-io {more} {name}"] = told.code, told.out + told.err
        return found

    prepare()
    words = ["convert", "-r", "100k", "-f", "raw", "-O", format, "src.raw", "t.img"]
    if not fresh:
        words.insert(1, "-n")
    process = subprocess.Popen([peers.need("qemu-img"), *words], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        assert process.poll() is None
        expected = questions()
    finally:
        process.kill()
        process.wait()
    prepare()
    found: list[dict[str, Outcome]] = []

    def progress(done: int, total: int) -> None:
        if total and not found:
            found.append(questions())

    qimg.convert("src.raw", "t.img", source_format="raw", format=format, create=fresh, progress=progress)
    assert found == [expected]
    assert any(REFUSAL in err for _, err in expected.values())


def test_a_convert_that_ends_or_fails_lets_go_of_everything(folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise Probed

    qimg.convert("top.q", "t.q", format="qcow2")
    with pytest.raises(Probed):
        qimg.convert("top.q", "t2.q", format="qcow2", progress=stop)
    for name in ("a.q", "ov.q", "top.q", "t.q", "t2.q"):
        told = run_peer("qemu-io", ["-f", "raw", "-c", "quit", name])
        assert (told.code, told.out + told.err) == (0, ""), name
    run_real(["convert", "-O", "qcow2", "a.q", "t.q"]).ok()
    found = run_qimg_inprocess(["convert", "-O", "qcow2", "t.q", "t.q"])
    assert (found.code, REFUSAL in found.err) == (1, True)
    run_peer("qemu-io", ["-f", "qcow2", "-c", "quit", "t.q"]).ok()


def test_opening_twice_for_reading_is_no_conflict_within_a_process(folder: Path) -> None:
    with qimg.open("a.q") as one, qimg.open("a.q") as two, qimg.open("top.q") as three:
        assert one.read(64 << 10, 512) == two.read(64 << 10, 512) == three.read(64 << 10, 512) == b"\1" * 512


def test_a_lock_of_the_same_process_counts_as_well(folder: Path) -> None:
    with qimg.open("a.q"), pytest.raises(qimg.QimgError, match='Failed to get "write" lock'):
        qimg.convert("b.q", "a.q", format="qcow2")
    with qimg.open("a.q"), pytest.raises(qimg.QimgError, match="lock"):
        qimg.create("a.q", format="qcow2", size=MIB)
