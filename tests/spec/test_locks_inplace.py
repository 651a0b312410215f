"""Commands that change an image: whoever uses the image keeps them out, and they keep out others.

The real program decides: it runs the same command lines against the same holders (common sheet, section 11).
What is refused has changed nothing. The other way round, real programs come while ours works.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from qimg.storage.base import Filter, Storage
from support import peers, release7
from support.faults import opened_through
from support.holders import qemu_io_holding, qemu_nbd_serving
from support.run import Result, command, run_peer, run_qimg, run_qimg_inprocess, run_real, start

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")

REFUSAL = "Failed to get "
WRITING = ("amend", "bench", "bitmap", "check", "commit", "convert", "dd", "rebase", "resize", "snapshot")

#: Command lines about a.q, which somebody holds; ov.q stands on it and top.q on that, b.q is another one.
LINES = """
amend -o lazy_refcounts=on a.q
amend -f qcow2 -o compat=0.10 a.q
amend -o refcount_bits=64 a.q
amend -o lazy_refcounts=on ov.q
amend --image-opts -o lazy_refcounts=on driver=qcow2,file.filename=a.q
bench -w -c 1 a.q
bench -w -c 1 -f qcow2 a.q
bench -w -c 1 -f raw a.q
bench -w -c 1 ov.q
bench -w -U -c 1 a.q
bench -c 1 -q ov.q
bitmap --add a.q new
bitmap --remove a.q one
bitmap --clear a.q one
bitmap --disable a.q one
bitmap --enable -f qcow2 a.q off
bitmap --merge off a.q one
bitmap --merge one -b a.q -F qcow2 b.q mine
bitmap --merge mine -b b.q a.q one
bitmap --add ov.q new
bitmap --add -g 32k --image-opts driver=qcow2,file.filename=a.q new
check -r leaks a.q
check -r all a.q
check -q -r all -f qcow2 a.q
check -r all ov.q
check -r all -U a.q
commit a.q
commit ov.q
commit -d ov.q
commit -q top.q
commit -b a.q top.q
commit -b ov.q top.q
commit -f qcow2 -t none ov.q
convert -n -O qcow2 b.q a.q
convert -n -O raw b.q a.q
convert -n -O qcow2 b.q ov.q
convert -n --target-image-opts b.q driver=qcow2,file.filename=a.q
dd if=b.q of=a.q
dd -O qcow2 if=b.q of=a.q
dd -O qcow2 if=b.q of=a.q count=0
dd -U -O qcow2 if=b.q of=a.q
rebase -b b.q -F qcow2 ov.q
rebase -b b.q -F qcow2 top.q
rebase -b a.q -F qcow2 top.q
rebase -b '' ov.q
rebase -u -b b.q -F qcow2 ov.q
rebase -u -b b.q -F qcow2 top.q
rebase -u -b '' a.q
rebase -b b.q -F qcow2 a.q
rebase -b a.q -F qcow2 b.q
rebase -U -b b.q -F qcow2 ov.q
rebase -p -t none -b b.q -F qcow2 top.q
resize a.q 2M
resize a.q +1M
resize -f qcow2 --shrink a.q 512k
resize -f raw a.q 2M
resize --preallocation=metadata a.q 2M
resize ov.q 2M
resize --image-opts driver=qcow2,file.filename=a.q 2M
snapshot -c new a.q
snapshot -a snap a.q
snapshot -d snap a.q
snapshot -l a.q
snapshot -q -c new ov.q
snapshot -U -c new a.q
snapshot -U -l a.q
snapshot -c new --image-opts driver=qcow2,file.filename=a.q
"""

#: The same for r.raw, on which o.q stands, and for the data file of d.q.
RAW_LINES = """
amend -o lazy_refcounts=on o.q
amend -o lazy_refcounts=on d.q
bench -w -c 1 -f raw {held}
bench -w -c 1 o.q
bench -w -c 1 d.q
bitmap --add o.q new
bitmap --add d.q new
check -r all o.q
check -r all d.q
commit o.q
commit -d o.q
convert -n -f qcow2 b.q {held}
convert -n -O qcow2 b.q d.q
convert -n -O qcow2 b.q o.q
dd if=b.q of={held}
dd -O qcow2 if=b.q of={held}
rebase -b b.q -F qcow2 o.q
rebase -b {held} -F raw o.q
rebase -u -b b.q -F qcow2 o.q
resize -f raw {held} 2M
resize -f raw --shrink {held} 512k
resize o.q 2M
resize d.q 2M
snapshot -c new o.q
snapshot -c new d.q
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images, in the working directory, so that names in messages are short."""
    monkeypatch.chdir(tmp_path)
    for words in (
        "create -q -f qcow2 a.q 1M",
        "create -q -f qcow2 b.q 1M",
        "create -q -f qcow2 -b a.q -F qcow2 ov.q",
        "create -q -f qcow2 -b ov.q -F qcow2 top.q",
        "create -q -f raw r.raw 1M",
        "create -q -f qcow2 -b r.raw -F raw o.q",
        "create -q -f qcow2 -o data_file=d.data d.q 1M",
        "bitmap --add a.q one",
        "bitmap --add --disable a.q off",
        "bitmap --add b.q mine",
    ):
        run_real(words.split(), tmp_path).ok()
    for number, name in enumerate(("a.q", "b.q", "ov.q", "top.q", "o.q", "d.q"), 1):
        _io("qcow2", name, f"write -q -P {number} {number * 64}k 128k")
    _io("raw", "r.raw", "write -q -P 9 128k 64k")
    run_real(["snapshot", "-c", "snap", "a.q"], tmp_path).ok()
    return tmp_path


def _io(format: str, name: str, command: str) -> None:
    run_peer("qemu-io", ["-f", format, "-c", command, name]).ok()


# -- somebody else holds


@contextmanager
def _serving(path: Path, format: str, read_only: bool) -> Iterator[None]:
    with (
        qemu_nbd_serving(path, read_only=read_only, format=format) as address,
        socket.socket(socket.AF_UNIX) as client,
    ):
        # Its socket is there before it has opened the image; it talks only afterwards.
        client.settimeout(20)
        client.connect(address)
        assert client.recv(8) == b"NBDMAGIC"
        yield


def _nobody(_path: Path, _format: str) -> ExitStack:
    return ExitStack()


#: Somebody real who holds an image.
HOLDERS: dict[str, Callable[[Path, str], object]] = {
    "nobody": _nobody,
    "a writer": lambda path, kind: qemu_io_holding(path, format=kind),
    "a reader": lambda path, kind: qemu_io_holding(path, format=kind, read_only=True),
    "a sharing reader": lambda path, kind: qemu_io_holding(path, format=kind, read_only=True, share=True),
    "a server": lambda path, kind: _serving(path, kind, read_only=False),
    "a read-only server": lambda path, kind: _serving(path, kind, read_only=True),
    "a reader of its bytes": lambda path, _: qemu_io_holding(path, format="raw", read_only=True),
    "a writer of its bytes": lambda path, _: qemu_io_holding(path, format="raw"),
}


class Shown(NamedTuple):
    """What became of a command line, and the names of the files that it changed."""

    code: int
    err: str
    changed: list[str]


def outcomes(
    run: Callable[..., Result], holder: str, held: Path, format: str, table: list[str]
) -> dict[str, Shown]:
    """What becomes of every line while somebody holds `held`. What a line does is undone."""
    before = {path: path.read_bytes() for path in held.parent.iterdir()}
    found: dict[str, Shown] = {}
    with ExitStack() as stack:
        stack.enter_context(HOLDERS[holder](held, format))  # type: ignore[arg-type]
        # Whoever opens an image with bitmaps for writing notes in it that these are in use.
        contents = {path: path.read_bytes() for path in before}
        for line in table:
            code, _, err = run(shlex.split(line), held.parent)
            if not held.exists():
                # A creation of the real program that fails removes what was there.
                stack.close()
                held.write_bytes(before[held])
                stack.enter_context(HOLDERS[holder](held, format))  # type: ignore[arg-type]
                found[line] = Shown(code, release7.errors(err), [held.name])
                continue
            changed = [path.name for path, was in contents.items() if path.read_bytes() != was]
            found[line] = Shown(code, release7.errors(err), sorted(changed))
            for path, was in contents.items():
                if path.name in changed:
                    path.write_bytes(was)
    for path, was in before.items():
        path.write_bytes(was)
    return found


def assert_the_same(found: dict[str, Shown], expected: dict[str, Shown], *, held: bool) -> None:
    """Both refuse the same lines with the same words, ours without having changed anything."""
    wrong = {}
    refusals = set()
    for line, real in expected.items():
        ours = found[line]
        if REFUSAL in real.err or REFUSAL in ours.err:
            if (ours.code, ours.err) != (real.code, real.err) or ours.changed:
                wrong[line] = (ours, real)
            refusals.add(line.split()[0])
        elif bool(ours.code) != bool(real.code):
            wrong[line] = (ours, real)
    assert not wrong
    assert bool(refusals) == held


@pytest.mark.parametrize("holder", HOLDERS)
def test_commands_that_write_are_refused_as_those_of_the_real_program(holder: str, folder: Path) -> None:
    table = lines(LINES)
    expected = outcomes(run_real, holder, folder / "a.q", "qcow2", table)
    found = outcomes(run_qimg_inprocess, holder, folder / "a.q", "qcow2", table)
    shares = ("nobody", "a sharing reader", "a reader of its bytes")
    assert_the_same(found, expected, held=holder not in shares)
    if holder in ("a writer", "a reader", "a server"):
        assert {line.split()[0] for line in table if REFUSAL in expected[line].err} == set(WRITING)


@pytest.mark.parametrize(("name", "format"), [("r.raw", "raw"), ("d.data", "raw")])
@pytest.mark.parametrize("holder", ["a writer", "a reader", "a server"])
def test_what_stands_on_a_raw_file_in_use_is_let_in_as_by_the_real_program(
    holder: str, name: str, format: str, folder: Path
) -> None:
    table = [line.format(held=name) for line in lines(RAW_LINES)]
    expected = outcomes(run_real, holder, folder / name, format, table)
    found = outcomes(run_qimg_inprocess, holder, folder / name, format, table)
    if holder == "a server":
        # It relies on the length of the file. Row 107: ours always claims the right to make a base longer.
        for line in ("commit o.q", "commit -d o.q"):
            assert not expected[line].code
            if name == "r.raw":
                words = 'Failed to get "resize" lock\nIs another process using the image [r.raw]?\n'
                assert found[line] == Shown(1, f"qemu-img: {words}", [])
                del expected[line]
    wrong = {
        line: (found[line], real)
        for line, real in expected.items()
        if (found[line].code, found[line].err) != (real.code, real.err)
        or (REFUSAL in real.err and found[line].changed)
    }
    assert not wrong


def lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


# -- ours holds

#: What real programs try meanwhile with an image NAME. None changes anything even where it is let in.
QUESTIONS = """
qemu-img info NAME
qemu-img info -U NAME
qemu-img map NAME
qemu-img map -f raw NAME
qemu-img check -q NAME
qemu-img convert -f raw -O raw NAME out
qemu-img convert -O raw NAME out
qemu-img measure NAME
qemu-img snapshot -l NAME
qemu-io -f qcow2 -c quit NAME
qemu-io -f qcow2 -r -c quit NAME
qemu-io -f raw -c quit NAME
qemu-io -f raw -r -c quit NAME
qemu-io -f raw -r -U -c quit NAME
"""
#: These want to write, and must be kept out.
CHANGES = """
qemu-img resize -f qcow2 NAME 3M
qemu-img snapshot -c intruder NAME
qemu-img bitmap --add NAME intruder
qemu-img amend -o lazy_refcounts=on NAME
qemu-img rebase -u -b '' NAME
qemu-img commit NAME
qemu-img check -r all NAME
qemu-img bench -w -c 1 -f qcow2 NAME
qemu-img create -q -f qcow2 NAME 1M
"""


def answers(name: str, *, changes: bool) -> dict[str, str]:
    """What the real programs say who want the image `name`: the words of a refusal, or that it was none."""
    found = {}
    for line in lines(QUESTIONS + (CHANGES if changes else "")):
        program, *words = shlex.split(line.replace("NAME", name))
        told = run_peer(program, words)
        said = told.out + told.err if program == "qemu-io" else told.err
        found[line] = said if REFUSAL in said else "let in"
    return found


class _Asking(Filter):
    """Asks before writes from offset `behind` on."""

    def __init__(self, child: Storage, ask: Callable[[], None], behind: int) -> None:
        super().__init__(child)
        self._ask = ask
        self._behind = behind

    def write(self, buf: bytes | bytearray | memoryview, offset: int) -> None:
        if offset >= self._behind:
            self._ask()
        super().write(buf, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        if offset >= self._behind:
            self._ask()
        super().zero(offset, length, unmap)


def while_it_writes(line: str, written: str, asked: str, *, changes: bool, behind: int = 0) -> dict[str, str]:
    """What real programs are told of the image `asked` while our command makes its first change of `written`
    (at offset `behind` or later)."""
    found: list[dict[str, str]] = []
    guard = threading.Lock()

    def ask() -> None:
        with guard:
            if not found:
                found.append(answers(asked, changes=changes))

    with opened_through(lambda file: _Asking(file, ask, behind) if file.writable else file, written):
        run_qimg_inprocess(shlex.split(line)).ok()
    assert found, "it has changed nothing"
    return found[0]


#: A command, the file whose first change is the moment, an image, and what real holder it is like.
MOMENTS = [
    ("amend -o lazy_refcounts=on a.q", "a.q", "a.q", "a writer"),
    ("amend -o refcount_bits=64 a.q", "a.q", "a.q", "a writer"),
    ("amend -o lazy_refcounts=on ov.q", "ov.q", "ov.q", "a writer"),
    ("amend -o lazy_refcounts=on ov.q", "ov.q", "a.q", "a reader"),
    ("bench -w -c 100 a.q", "a.q", "a.q", "a writer"),
    ("bench -w -c 100 ov.q", "ov.q", "ov.q", "a writer"),
    ("bench -w -c 100 ov.q", "ov.q", "a.q", "a reader"),
    ("bench -w -c 100 -f raw r.raw", "r.raw", "r.raw", "a raw writer"),
    ("bitmap --add a.q new", "a.q", "a.q", "a writer"),
    ("bitmap --remove a.q one", "a.q", "a.q", "a writer"),
    ("bitmap --merge mine -b b.q -F qcow2 a.q one", "a.q", "a.q", "a writer"),
    ("bitmap --merge mine -b b.q -F qcow2 a.q one", "a.q", "b.q", "a reader"),
    ("check -q -r all leaky.q", "leaky.q", "leaky.q", "a writer"),
    ("commit ov.q", "a.q", "a.q", "a writer"),
    ("commit ov.q", "a.q", "ov.q", "a writer"),
    ("commit ov.q", "ov.q", "ov.q", "a writer"),
    ("commit -b a.q top.q", "a.q", "a.q", "a writer"),
    ("commit -b a.q top.q", "a.q", "top.q", "a writer"),
    ("convert -n -O qcow2 b.q a.q", "a.q", "a.q", "a writer"),
    ("convert -n -O qcow2 b.q a.q", "a.q", "b.q", "a reader"),
    ("dd -O qcow2 if=b.q of=a.q", "a.q", "b.q", "a reader"),
    ("rebase -b b.q -F qcow2 ov.q", "ov.q", "ov.q", "a writer"),
    ("rebase -b b.q -F qcow2 ov.q", "ov.q", "a.q", "a reader"),
    ("rebase -b b.q -F qcow2 ov.q", "ov.q", "b.q", "a reader"),
    ("rebase -u -b b.q -F qcow2 ov.q", "ov.q", "ov.q", "a writer"),
    ("resize a.q 2M", "a.q", "a.q", "a writer"),
    ("resize --shrink ov.q 512k", "ov.q", "ov.q", "a writer"),
    ("snapshot -c new a.q", "a.q", "a.q", "a writer"),
    ("snapshot -a snap a2.q", "a2.q", "a2.q", "a writer"),
    ("snapshot -d snap a.q", "a.q", "a.q", "a writer"),
]

AS: dict[str, Callable[[Path], object]] = {
    "a writer": qemu_io_holding,
    "a reader": lambda path: qemu_io_holding(path, read_only=True),
    "a raw writer": lambda path: qemu_io_holding(path, format="raw"),
}


@pytest.mark.parametrize(("line", "written", "asked", "like"), MOMENTS)
def test_while_it_writes_the_real_programs_are_kept_out_as_by_one_of_them(
    line: str, written: str, asked: str, like: str, folder: Path
) -> None:
    (folder / "a2.q").write_bytes((folder / "b.q").read_bytes())
    run_real(["bitmap", "--remove", "a2.q", "mine"]).ok()
    run_real(["snapshot", "-c", "snap", "a2.q"]).ok()
    _leak(folder / "leaky.q")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    raw = like == "a raw writer"
    with AS[like](folder / asked):  # type: ignore[attr-defined]
        expected = answers(asked, changes=not raw)
    for path, was in before.items():
        path.write_bytes(was)
    assert while_it_writes(line, written, asked, changes=not raw) == expected
    assert any(REFUSAL in said for said in expected.values())
    left = answers(asked, changes=False)
    assert not [line for line, said in left.items() if REFUSAL in said], "it has let go of everything"


def _leak(path: Path) -> None:
    """An image with a leaked cluster: one that an overwritten header field has forgotten."""
    run_real(["create", "-q", "-f", "qcow2", path.name, "1M"]).ok()
    _io("qcow2", path.name, "write -q -P 7 0 64k")
    data = bytearray(path.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 : l1 + 8] = bytes(8)
    path.write_bytes(data)
    assert run_real(["check", "-q", path.name]).code == 3


def test_every_command_that_writes_is_in_the_tables() -> None:
    assert {line.split()[0] for line in lines(LINES)} == set(WRITING)
    assert {moment[0].split()[0] for moment in MOMENTS} == set(WRITING)


@pytest.mark.parametrize(
    ("line", "written", "names"),
    [
        ("commit -r 100k ov.q", "a.q", ("a.q", "ov.q")),
        ("commit -r 100k o.q", "r.raw", ("r.raw", "o.q")),
        ("commit -r 100k -b a.q top.q", "a.q", ("a.q", "ov.q", "top.q")),
        ("convert -n -r 100k -O qcow2 b.q a.q", "a.q", ("a.q", "b.q")),
        ("convert -n -r 100k -O raw b.q r.raw", "r.raw", ("r.raw", "b.q")),
        ("dd bs=1 if=b.q of=new.raw", "new.raw", ("new.raw", "b.q")),
        ("dd bs=1 -O qcow2 if=b.q of=new.q", "new.q", ("new.q", "b.q")),
        ("dd bs=1 -f raw if=r.raw of=new.raw", "new.raw", ("new.raw", "r.raw")),
        ("bench -w -d 1 -c 2000000000 -S 512 -s 512 ov.q", "ov.q", ("ov.q", "a.q")),
        ("bench -w -d 1 -c 2000000000 -S 512 -s 512 -f raw r.raw", "r.raw", ("r.raw",)),
    ],
)
def test_while_it_works_it_holds_what_the_same_command_of_the_real_program_holds(
    line: str, written: str, names: tuple[str, ...], folder: Path
) -> None:
    """The real one is slow, or slowed down; real programs come while it runs, and while ours does."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    process = start(
        [peers.need("qemu-img"), *line.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(0.4)
        assert process.poll() is None
        process.send_signal(19)  # SIGSTOP: as long as it takes
        expected = {name: answers(name, changes=False) for name in names}
    finally:
        process.kill()
        process.wait()
    for path, was in before.items():
        path.write_bytes(was)
    for name in ("new.raw", "new.q"):
        (folder / name).unlink(missing_ok=True)
    ours = line.replace("-r 100k ", "").replace("2000000000", "200")
    for name in names:
        for path, was in before.items():
            path.write_bytes(was)
        behind = 5 << 16 if written == "new.q" else 0  # data, not what creates the image
        found = while_it_writes(ours, written, name, changes=False, behind=behind)
        assert found == expected[name], name


def test_two_of_ours_keep_each_other_out(folder: Path) -> None:
    """Also as two processes."""
    endless = ["bench", "-w", "-c", "2000000000", "a.q"]
    process = start([*command(), *endless], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith(b"Sending")
        for line in (
            "snapshot -c new a.q",
            "resize a.q 2M",
            "bench -w -c 1 a.q",
            "map a.q",
            "dd if=b.q of=a.q",
        ):
            shown = run_qimg(line.split())
            assert shown.code == 1
            assert REFUSAL in shown.err
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    run_qimg(["map", "a.q"]).ok()
