"""Every command on NBD exports: the same words through both programs, and the same bytes behind them."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.errors import GateError
from qimg.graph.gate import CLOSED, Inside
from qimg.graph.open import ImageSpec, open_disk
from spec.differential import Difference, assert_same, cases
from support.nbdservers import Server, nbdkit, qemu_nbd
from support.run import run_peer, run_qimg_inprocess, run_real

MIB = 1 << 20
SIZE = 4 * MIB

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "nbdkit")

NAMES = """
info nbd:
info nbd:foo
info nbd:foo:
info nbd::1
info nbd:foo:1:x
info nbd://
info nbd:///
info nbd:///x
info nbd+unix:///
info nbd+unix:///x?foo=bar
info 'nbd+unix:///x?socket=a&socket=b'
info nbd+unix://host/x?socket=bar
info nbd://127.0.0.1:1/x?socket=bar
info nbd+tcp://127.0.0.1:1/x?a
info nbd+foo:///x?socket=ro
info nbd://127.0.0.1:1
info nbd://[::1]:1
info nbd:[::1]:1
info nbd:unix:nothere
info nbd+unix:///?socket=nothere
info -f nbd ro.raw
info -f file nbd+unix:///?socket=ro
info nbd+unix:///?socket=ro
info --output=json nbd+unix:///?socket=ro
info nbd:unix:ro
info nbd:unix:ro:exportname=
info -f nbd nbd:unix:ro
info -U nbd:unix:ro
info nbd+unix:///disk?socket=named
info nbd+unix:///other?socket=named
info nbd+unix:?socket=named
info nbd:unix:named
info nbd:unix:named:exportname=disk
info nbd+unix:///di%73k?socket=named
info nbd+unix:////disk?socket=named
info --image-opts driver=nbd
info --image-opts driver=nbd,path=ro
info --image-opts driver=nbd,path=ro,host=a
info --image-opts driver=nbd,port=1
info --image-opts driver=nbd,path=ro,bogus=1
info --image-opts driver=nbd,path=ro,reconnect-delay=1,open-timeout=1
info --image-opts driver=nbd,path=ro,reconnect-delay=x
info --image-opts driver=nbd,path=named,export=disk
info --image-opts driver=nbd,file=nbd:unix:ro
info --image-opts driver=nbd,server.type=unix,server.path=ro
info --image-opts driver=nbd,server.type=unix,server.path=ro,server.bogus=2
info --image-opts driver=nbd,server.type=unix,server.path=ro,host=2
info --image-opts driver=nbd,server.type=bogus
info --image-opts driver=nbd,server.path=ro
info --image-opts driver=nbd,server.type=inet,server.port=1
info --image-opts driver=nbd,server.type=unix
info --image-opts file.filename=nbd:unix:ro
info --image-opts file.driver=nbd,file.filename=nbd:unix:ro
info --image-opts driver=nbd,path=ro,tls-creds=t,tls-hostname=a
info 'json:{"driver":"nbd","filename":"nbd:unix:ro"}'
info 'json:{"driver":"raw","file":{"driver":"nbd","path":"ro"}}'
info 'json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"named"},"export":"disk"}}'
"""

READING = """
map nbd:unix:ro
map --output=json nbd:unix:ro
map --output=json nbd:unix:noextents
map --output=json nbd:unix:q
map -f raw --output=json nbd:unix:q
map --output=json nbd:unix:named:exportname=disk
map --output=json --image-opts driver=nbd,path=bitmap,x-dirty-bitmap=qemu:dirty-bitmap:b
map --output=json --image-opts driver=raw,file.driver=nbd,file.path=bitmap,file.x-dirty-bitmap=qemu:dirty-bitmap:b
map --output=json --image-opts driver=nbd,path=bitmap
map -s 1M -l 1M --output=json nbd:unix:ro
info nbd:unix:q
info -f raw nbd:unix:q
info nbd:unix:empty
map --output=json nbd:unix:empty
check nbd:unix:ro
check nbd:unix:q
snapshot -l nbd:unix:q
snapshot -l nbd:unix:ro
measure -O qcow2 nbd:unix:ro
measure -O raw nbd:unix:q
compare nbd:unix:ro ro.raw
compare -f raw -F raw nbd:unix:noextents ro.raw
compare nbd:unix:q q.qcow2
compare nbd:unix:q nbd:unix:ro
convert -O raw nbd:unix:failing out
convert -O raw nbd:unix:noblocks out
map nbd:unix:noblocks
map ov.qcow2
map --output=json ov.qcow2
info ov.qcow2
info --backing-chain ov.qcow2
check ov.qcow2
create -f qcow2 -b relative -F raw -u nbd:unix:w 1M
info --backing-chain -f qcow2 nbd:unix:w
dd if=nbd:unix:ro of=dd.out bs=64k count=3 skip=1
rebase -f qcow2 -b ro.raw -F raw ov.qcow2
rebase -f qcow2 -b nbd:unix:ro -F raw ov.qcow2
rebase -u -f qcow2 -b nbd:unix:ro -F raw ov.qcow2
"""

WRITING = """
create -f raw nbd:unix:w 4M
create -f raw nbd:unix:w 1M
create -f raw nbd:unix:w 5M
create -f raw -o help nbd:unix:w
create -f raw -o preallocation=full nbd:unix:w 4M
create -f raw -o preallocation=bogus nbd:unix:w 4M
create -f raw nbd:unix:nothere 4M
create -f qcow2 nbd:unix:nothere 4M
create -f raw nbd:bogus 4M
create -f qcow2 nbd:unix:w 4M
check nbd:unix:w
resize nbd:unix:w 8M
info nbd:unix:w
snapshot -c s nbd:unix:w
snapshot -d s nbd:unix:w
amend -o lazy_refcounts=on nbd:unix:w
check -r all nbd:unix:w
bench -w -c 2 -q -f qcow2 nbd:unix:nothere
convert -f raw -O qcow2 ro.raw nbd:unix:w
compare -f raw ro.raw nbd:unix:w
convert -n -f raw -O qcow2 ro.raw nbd:unix:w
compare -f raw ro.raw nbd:unix:w
rebase -f qcow2 -u -b ro.raw -F raw nbd:unix:w
resize -f raw nbd:unix:w 8M
resize -f raw --shrink nbd:unix:w 1M
resize -f raw nbd:unix:w 4M
convert -f raw -O vpc ro.raw nbd:unix:w
convert -n -O raw nbd:unix:ro nbd:unix:w
compare -f raw -F raw nbd:unix:ro nbd:unix:w
convert -O raw nbd:unix:ro nbd:unix:w
convert -O raw -f raw nbd:unix:ro nbd:unix:small
convert -n -O raw -f raw nbd:unix:ro nbd:unix:small
convert -O raw nbd:unix:ro nbd:unix:full
convert -n -O raw nbd:unix:ro nbd:unix:full
dd -f raw -O raw if=ro.raw of=nbd:unix:w
compare -f raw -F raw ro.raw nbd:unix:w
create -q -f qcow2 -F raw -b nbd:unix:w ovw.qcow2
commit ovw.qcow2
"""

DIFFERENT = {
    "info --backing-chain -f qcow2 nbd:unix:w": Difference(
        "the real program says the same in two ways",
        err="qemu-img: Could not open 'nbd:unix:w': Cannot generate a base directory for NBD nodes\n",
    ),
    "create -f raw nbd:bogus 4M": Difference(
        "names are looked at before anything is announced",
        out="",
        err="qemu-img: nbd:bogus: error parsing address 'bogus'\n",
    ),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, and sockets called as the tables call them."""
    folder = tmp_path_factory.mktemp("n")
    content = bytearray(SIZE)
    content[:MIB] = os.urandom(MIB)
    content[3 * MIB : 3 * MIB + 70000] = os.urandom(70000)
    (folder / "ro.raw").write_bytes(content)
    run_real(["convert", "-f", "raw", "-O", "qcow2", "ro.raw", "q.qcow2"], folder).ok()
    run_real(["create", "-q", "-f", "qcow2", "bitmap.qcow2", "1M"], folder).ok()
    run_real(["bitmap", "--add", "--enable", "-g", "64k", "bitmap.qcow2", "b"], folder).ok()
    for command in ("write -P 1 512k 64k", "write -z 0 64k", "write -P 1 64k 64k", "write -z 64k 64k"):
        run_peer("qemu-io", ["-c", command, "bitmap.qcow2"], folder).ok()
    file = ("file", folder / "ro.raw")
    failing = ("--filter=error", "pattern", SIZE)
    with ExitStack() as stack:

        def serve(name: str, server: Server) -> None:
            (folder / name).symlink_to(server.socket)

        def kit(name: str, *words: object) -> None:
            serve(name, stack.enter_context(nbdkit(folder, *words)))

        kit("ro", "-r", *file)
        kit("noextents", "-r", "--filter=noextents", *file)
        kit("q", "-r", "file", folder / "q.qcow2")
        kit("w", "memory", 4 * MIB)
        kit("small", "memory", MIB)
        kit("empty", "memory", 0)
        kit("failing", *failing, "error-pread=EIO", "error-pread-rate=100%")
        kit("noblocks", *failing, "error-extents=EIO", "error-extents-rate=100%")
        kit("full", "--filter=error", "memory", SIZE, "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
        serve(
            "named",
            stack.enter_context(qemu_nbd(folder, "-r", "-f", "qcow2", "-x", "disk", folder / "q.qcow2")),
        )
        serve(
            "bitmap",
            stack.enter_context(qemu_nbd(folder, "-r", "-f", "qcow2", "-B", "b", folder / "bitmap.qcow2")),
        )
        run_real(["create", "-q", "-f", "qcow2", "-b", "nbd:unix:ro", "-F", "raw", "ov.qcow2"], folder).ok()
        yield folder


@pytest.mark.parametrize("line", cases(NAMES, READING))
def test_what_is_said_of_an_export(work: Path, line: str) -> None:
    assert_same(line, work, DIFFERENT)


def test_what_is_done_to_an_export(work: Path) -> None:
    """One line after the other, for each finds what the one before has left."""
    wrong = []
    for line in cases(WRITING):
        try:
            assert_same(line, work, DIFFERENT)
        except AssertionError as error:
            wrong.append(f"{line}\n{error}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    "words", [[], ["-W"], ["-m", "1"], ["-S", "0"], ["-t", "none"], ["-t", "writethrough"]]
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_copy_to_an_export_that_holds_something_else_is_exact(
    work: Path, words: list[str], existing: bool
) -> None:
    with nbdkit(work, "--filter=cow", "pattern", 2 * SIZE) as server:
        more = ["-n"] if existing else []
        run_qimg_inprocess(
            ["convert", *more, *words, "-f", "raw", "-O", "raw", work / "ro.raw", server.url()]
        ).ok()
        window = f"driver=raw,size=4M,file.driver=nbd,file.path={server.socket}"
        run_real(["compare", "--image-opts", "driver=raw,file.filename=" + str(work / "ro.raw"), window]).ok()
        run_qimg_inprocess(
            ["convert", *words, "-f", "raw", "-O", "qcow2", work / "ro.raw", server.url()]
        ).ok()
        run_real(["compare", "-f", "raw", "-F", "qcow2", work / "ro.raw", server.url()]).ok()
        run_real(["check", server.url()]).ok()


def test_bitmaps_and_snapshots_of_an_image_on_an_export_are_there_for_the_real_program(work: Path) -> None:
    with nbdkit(work, "memory", SIZE) as server:
        for words in (["create", "-f", "qcow2"], ["bitmap", "--add"], ["snapshot", "-c", "s"]):
            last = {"create": ["2M"], "bitmap": ["b"]}.get(words[0], [])
            run_qimg_inprocess([*words, server.url(), *last]).ok()
        told = run_real(["info", server.url()]).ok().out
        assert "name: b" in told
        assert run_real(["snapshot", "-l", server.url()]).ok().lines[2].split()[1] == "s"
        run_real(["check", server.url()]).ok()


def test_a_qcow2_on_an_export_that_is_too_small_is_an_error_and_no_image(work: Path) -> None:
    with nbdkit(work, "memory", MIB) as server:
        ours = run_qimg_inprocess(["convert", "-f", "raw", "-O", "qcow2", work / "ro.raw", server.url()])
        assert ours.code == 1
        assert ours.err.endswith("No space left on device\n")
        assert run_real(["info", "-f", "qcow2", server.url()]).code == 1


def test_an_image_may_not_name_a_server_where_the_gate_is_closed(work: Path) -> None:
    for gate in (CLOSED, Inside(str(work))):
        with pytest.raises(GateError, match="names 'nbd:unix:ro'"):
            open_disk(ImageSpec(str(work / "ov.qcow2")), context=Context(), gate=gate)
