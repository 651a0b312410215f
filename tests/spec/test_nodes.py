"""Nodes that stand on other nodes (throttle, quorum, blkdebug ...), by qimg and by the real qemu-img.

A line is one invocation, in shell syntax, in a folder with the files that `inputs` makes. Lines that are to
differ stand in `DIFFERENT`, with the number of their row in docs/differences.md.
"""

from __future__ import annotations

import json
import shlex
import struct
import time
from pathlib import Path

import pytest

from qimg.context import Context
from qimg.errors import StorageError
from qimg.graph.open import ImageSpec, open_disk
from qimg.storage.fault import FaultStorage, Rule
from qimg.storage.filters.blklogwrites import BlkLogWrites
from qimg.storage.filters.preallocate import Preallocate
from qimg.storage.filters.quorum import Quorum
from qimg.storage.filters.throttle import ThrottleGroup
from qimg.storage.memory import MemoryStorage
from qimg.storage.posix import PosixFile
from support import release7
from support.build import real_content
from support.run import run_both, run_peer, run_qimg_inprocess, run_real
from support.twins import Different, Inputs, compare_line, lines

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
GROUP = "--object throttle-group,id=g"
#: Rules for blkdebug, by the name of their file.
CONFIGS = {
    "read.conf": '[inject-error]\nevent = "none"\niotype = "read"\nonce = "on"\n',
    "write.conf": '# a remark\n\n[inject-error]\nevent = "none"\niotype = "write"\nerrno = "28"\n',
    "group.conf": '[foo]\na = "b"\n',
    "event.conf": '[inject-error]\nevent = "bogus"\n',
    "blank.conf": '[inject-error]\nonce="on"\n',
    "option.conf": '[inject-error]\nevent = "none"\nnope = "1"\n',
    "noevent.conf": '[inject-error]\nerrno = "5"\n',
    "kind.conf": '[inject-error "x"]\nevent = "none"\niotype = "wat"\n',
    "nogroup.conf": 'event = "none"\n',
}
Q3 = ",".join(
    f"children.{number}.driver=raw,children.{number}.file.filename={name}"
    for number, name in enumerate(("base.raw", "same.raw", "other.raw"))
)
TWO = "children.0.driver=file,children.0.filename=base.raw,children.1.driver=file,children.1.filename="
SLOW = "driver=throttle,throttle-group=g"
SLOW_FILE = "file.driver=throttle,file.throttle-group=g"
ONE = "driver=quorum,vote-threshold=1,children.0.driver=raw,children.0.file.filename="
QCOW2 = "children.0.driver=qcow2,children.0.file.filename="
IN_QUORUM = (
    "driver=qcow2,file.driver=quorum,file.vote-threshold=1,file.children.0.driver=file,"
    "file.children.0.filename=a.q"
)
UNNAMED = "children.0.driver=file,children.0.filename=base.raw"
NAMED = f"{UNNAMED},children.0.node-name=n"
DEBUG = "driver=blkdebug,image.filename=base.raw"
WRITES_FAIL, READS_FAIL = (
    f"file.driver=blkdebug,file.image.filename={name},file.inject-error.0.event=none,"
    f"file.inject-error.0.iotype={kind}"
    for name, kind in (("t-out.raw", "write"), ("a.q", "read"))
)
TABLE = lines(
    rf"""
## throttle
info {GROUP} --image-opts {SLOW},file.driver=qcow2,file.file.filename=a.q
info --output=json {GROUP} --image-opts {SLOW},file.driver=qcow2,file.file.filename=a.q
map --output=json {GROUP} --image-opts {SLOW},file.driver=qcow2,file.file.filename=a.q
map {GROUP} --image-opts {SLOW},file.driver=qcow2,file.file.filename=a.q
info {GROUP} --image-opts driver=qcow2,{SLOW_FILE},file.file.filename=sub/a.q
info {GROUP} --image-opts file.driver=throttle,file.throttle-group=g,file.file.filename=a.q
map --output=json {GROUP} --image-opts driver=qcow2,{SLOW_FILE},file.file.filename=a.q
check {GROUP} --image-opts {SLOW},file.driver=qcow2,file.file.filename=a.q
convert {GROUP} --image-opts {SLOW},file.driver=qcow2,file.file.filename=a.q out
compare {GROUP} --image-opts {SLOW},file.filename=base.raw driver=raw,file.filename=same.raw
measure -O qcow2 {GROUP} --image-opts {SLOW},file.filename=base.raw
info --image-opts {SLOW},file.filename=base.raw
info --image-opts driver=throttle,file.filename=base.raw
info --object secret,id=g,data=x --image-opts {SLOW},file.filename=base.raw
info {GROUP} --image-opts {SLOW}
info {GROUP} --image-opts {SLOW},file=base.raw
## quorum
info --image-opts driver=quorum,vote-threshold=2,{Q3}
info --output=json --image-opts driver=quorum,vote-threshold=2,{Q3}
map --output=json --image-opts driver=quorum,vote-threshold=2,{Q3}
map --image-opts driver=quorum,vote-threshold=2,{Q3}
check --image-opts driver=quorum,vote-threshold=2,{Q3}
measure -O qcow2 --image-opts driver=quorum,vote-threshold=2,{Q3}
convert --image-opts driver=quorum,vote-threshold=2,{Q3} out
convert --image-opts driver=quorum,vote-threshold=3,{Q3} out
convert --image-opts driver=quorum,vote-threshold=3,read-pattern=fifo,{Q3} out
convert --image-opts driver=quorum,vote-threshold=1,{QCOW2}sub/a.q out
convert --image-opts driver=quorum,vote-threshold=2,blkverify=on,{TWO}same.raw out
info --image-opts driver=quorum,vote-threshold=1
info --image-opts driver=quorum,{TWO}same.raw
info --image-opts driver=quorum,vote-threshold=3,{TWO}same.raw
info --image-opts driver=quorum,vote-threshold=1,read-pattern=foo,{TWO}same.raw
info --image-opts driver=quorum,vote-threshold=2,blkverify=on,{Q3}
info --image-opts driver=quorum,vote-threshold=2,rewrite-corrupted=on,blkverify=on,{TWO}same.raw
info --image-opts driver=quorum,vote-threshold=1,{TWO}a.q
info --image-opts driver=quorum,vote-threshold=1,{TWO}nosuch
info --image-opts driver=quorum,vote-threshold=1,children.1.driver=file,children.1.filename=base.raw
info --image-opts driver=quorum,vote-threshold=1,children.0.filename=base.raw
info --image-opts driver=quorum,vote-threshold=1,children.0.file.filename=base.raw
info --image-opts driver=quorum,vote-threshold=1,children.0=x
info --image-opts {IN_QUORUM}
convert --image-opts {IN_QUORUM} out
resize --image-opts {ONE}t-out.raw 3M
convert -n --target-image-opts base.raw {ONE}t-out.raw
## blkdebug
info blkdebug::base.raw
info --output=json blkdebug::base.raw
info blkdebug::a.q
info blkdebug::sub/a.q
info --backing-chain blkdebug::sub/a.q
map blkdebug::sub/a.q
map --output=json blkdebug::base.raw
check blkdebug::a.q
convert blkdebug::sub/a.q out
compare -f raw -F raw blkdebug::base.raw same.raw
resize -f raw blkdebug::t-out.raw 2M
create -f qcow2 blkdebug::new.q 1M
convert blkdebug:read.conf:base.raw out
convert -f raw blkdebug:read.conf:base.raw out
convert blkdebug:group.conf:base.raw out
convert blkdebug:event.conf:base.raw out
convert blkdebug:blank.conf:base.raw out
convert blkdebug:option.conf:base.raw out
convert blkdebug:noevent.conf:base.raw out
convert blkdebug:kind.conf:base.raw out
convert blkdebug:nogroup.conf:base.raw out
convert blkdebug:nosuch.conf:base.raw out
convert blkdebug:write.conf:base.raw out
convert -n -f raw -O raw base.raw blkdebug:write.conf:t-out.raw
info blkdebug:nofile
info blkdebug:
info blkdebug::nosuch
info --image-opts driver=blkdebug
info --image-opts driver=blkdebug,image=base.raw
info --image-opts {DEBUG}
info --image-opts {DEBUG},align=4096
info --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=a.q
info --image-opts driver=blkdebug,config=write.conf,image.filename=base.raw,inject-error.0.event=none
info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=sub/a.q,file.align=4096
convert --image-opts {DEBUG},align=3 out
convert --image-opts {DEBUG},foo=1 out
convert --image-opts {DEBUG},inject-error.0.event=bogus out
convert --image-opts {DEBUG},inject-error.0.event=read_aio,inject-error.0.foo=1 out
convert --image-opts {DEBUG},inject-error.0.event=none,inject-error.0.errno=28,inject-error.0.sector=200 out
convert --image-opts {DEBUG},inject-error.0.event=none,inject-error.0.sector=3000 out
convert --image-opts {DEBUG},inject-error.0.event=none,inject-error.0.iotype=write out
convert --image-opts {DEBUG},set-state.0.event=read_aio,set-state.0.new_state=2 out
convert --image-opts driver=qcow2,{READS_FAIL} out
convert -n --target-image-opts base.raw driver=raw,{WRITES_FAIL},file.inject-error.0.errno=28
## blkverify
info blkverify:full.raw:a.q
info blkverify:base.raw:same.raw
map --output=json blkverify:base.raw:same.raw
convert blkverify:base.raw:same.raw out
convert blkverify:full.raw:a.q out
info blkverify:base.raw
info blkverify:base.raw:nosuch
info blkverify:nosuch:a.q
info --image-opts driver=blkverify,test.filename=base.raw
info --image-opts driver=blkverify,test.filename=base.raw,raw.filename=same.raw
info --image-opts driver=blkverify,test.driver=qcow2,test.file.filename=a.q,raw.filename=full.raw
create -f qcow2 blkverify:base.raw:new.q 1M
## blklogwrites
info --image-opts driver=blklogwrites,file.filename=base.raw,log.filename=t-log
map --output=json --image-opts driver=blklogwrites,file.filename=base.raw,log.filename=t-log
info --image-opts driver=blklogwrites,file.filename=base.raw,log.filename=nosuch
info --image-opts driver=blklogwrites,file.filename=base.raw
## preallocate, compress, copy-on-read
info --image-opts driver=preallocate,file.filename=base.raw
info --image-opts driver=raw,file.driver=preallocate,file.file.filename=base.raw
info --image-opts driver=preallocate,file.filename=base.raw,prealloc-size=1M
info --image-opts driver=preallocate,file.filename=base.raw,prealloc-align=100
convert -n --target-image-opts base.raw driver=raw,file.driver=preallocate,file.file.filename=t-out.raw
info --image-opts driver=compress,file.driver=qcow2,file.file.filename=a.q
map --output=json --image-opts driver=compress,file.driver=qcow2,file.file.filename=a.q
info --image-opts driver=compress,file.filename=base.raw
info --image-opts driver=compress,file.driver=raw,file.file.filename=base.raw
info --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=a.q
map --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=a.q
## nodes that others refer to
info --image-opts driver=quorum,vote-threshold=1,{NAMED},children.1=n
convert --image-opts driver=quorum,vote-threshold=2,{QCOW2}sub/a.q,children.0.node-name=n,children.1=n out
map --output=json --image-opts driver=quorum,vote-threshold=1,{NAMED},children.1=n
info --image-opts driver=blkverify,raw.driver=file,raw.filename=base.raw,raw.node-name=n,test=n
map --image-opts driver=qcow2,file.driver=file,file.filename=a.q,file.node-name=n,backing=n
convert --image-opts driver=qcow2,file.driver=file,file.filename=a.q,file.node-name=n,backing=n out
info --image-opts driver=quorum,vote-threshold=1,{UNNAMED},children.1=n
info --image-opts driver=raw,file=n,file.filename=base.raw
## what no image tool has a use for stays refused
info --image-opts driver=bogus,file.filename=base.raw
"""
)
DIFFERENT: dict[str, Different] = {}

#: What makes our output that of release 7.2: as text, as JSON.
SHOWING = {
    "info": (release7.info_human, release7.info_json),
    "map": (str, release7.map_json),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "sub").mkdir()
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    base = bytearray(MIB)
    base[: 128 << 10] = b"\1" * (128 << 10)
    other = bytearray(base)
    other[100] = 7
    for name, content in (("base", base), ("same", base), ("sub/base", base), ("other", other)):
        write_sparse(folder / f"{name}.raw", content)
    for name in ("a.q", "sub/a.q"):
        place = folder / name
        run_real(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", place, "1M"]).ok()
        run_peer("qemu-io", ["-f", "qcow2", "-c", "write -P 2 256k 64k", place]).ok()
    run_real(["convert", "-O", "raw", folder / "a.q", folder / "full.raw"]).ok()
    run_real(["create", "-q", "-f", "qcow2", folder / "t-c.q", "1M"]).ok()
    write_sparse(folder / "t-out.raw", bytearray(MIB))
    write_sparse(folder / "t-log", bytearray(MIB))
    return Inputs(folder, tmp_path_factory.mktemp("runs"))


def write_sparse(path: Path, content: bytearray) -> None:
    with path.open("wb") as file:
        file.write(content.rstrip(b"\0"))
        file.truncate(len(content))


@pytest.mark.parametrize("line", TABLE)
def test_a_node_behaves_as_the_real_programs(line: str, inputs: Inputs) -> None:
    if line.split()[0] in SHOWING:
        compare_shown(line, inputs)
    else:
        compare_line(line, inputs, DIFFERENT, format="raw")


def compare_shown(line: str, inputs: Inputs) -> None:
    """For commands whose output depends on the release."""
    words = shlex.split(line)
    both = run_both(words, *inputs.pair(words))
    shown = SHOWING[words[0]]["--output=json" in words](both.ours.out)
    assert (both.ours.code, shown, release7.errors(both.ours.err)) == both.real[:3]


# -- what the lines cannot show


def test_what_is_written_through_compress_is_stored_compressed(tmp_path: Path) -> None:
    """The real program fails at the second write into one cluster."""
    content = b"\1" * 200_000 + bytes(100_000) + b"\2" * 100_000
    (tmp_path / "a.raw").write_bytes(content.ljust(MIB, b"\0"))
    target = tmp_path / "c.q"
    run_real(["create", "-q", "-f", "qcow2", target, "1M"]).ok()
    words = ["convert", "-n", "-f", "raw", "--target-image-opts", tmp_path / "a.raw"]
    run_qimg_inprocess(
        [*words, f"driver=compress,file.driver=qcow2,file.file.filename={target}"], tmp_path
    ).ok()
    assert real_content(target) == content.ljust(MIB, b"\0")
    check = run_real(["check", target]).ok().out
    assert "100.00% compressed clusters" in check


def test_what_is_read_through_copy_on_read_moves_to_the_top(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\1" * MIB)
    top = tmp_path / "top.q"
    run_real(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", top, "1M"], tmp_path).ok()
    spec = ImageSpec(f"driver=copy-on-read,file.driver=qcow2,file.file.filename={top}", image_opts=True)
    with open_disk(spec, context=Context(), writable=True) as disk:
        part = bytearray(4096)
        disk.read_into(part, 64 << 10)
        assert part == b"\1" * 4096
        disk.top.flush()
    rows = run_real(["map", "--output=json", top], tmp_path).ok().out
    present = [(row["start"], row["length"]) for row in json.loads(rows) if row["depth"] == 0]
    assert present == [(64 << 10, 64 << 10)]
    assert real_content(top) == b"\1" * MIB


def test_a_group_lets_a_burst_pass_and_then_its_rate() -> None:
    group = ThrottleGroup({"bps-total": 10_000_000, "bps-total-max": 20_000_000})
    begin = time.monotonic()
    group.wait("read", 20_000_000)
    assert time.monotonic() - begin < 0.1
    group.wait("write", 3_000_000)
    group.wait("read", 1)
    assert 0.25 < time.monotonic() - begin < 2


def test_operations_of_a_group_are_counted_by_their_size() -> None:
    group = ThrottleGroup({"iops-write": 100, "iops-size": 4096})
    group.wait("read", 1 << 30)
    begin = time.monotonic()
    group.wait("write", 4096 * 40)
    group.wait("write", 4096)
    assert 0.25 < time.monotonic() - begin < 2


def test_a_quorum_mends_the_child_that_disagrees() -> None:
    children = [MemoryStorage(b"good" * 128, writable=True) for _ in range(3)]
    children[1].write(b"bad!", 100)
    node = Quorum(children, 2, rewrite=True)
    assert node.read(0, 512) == b"good" * 128
    assert children[1].read(0, 512) == b"good" * 128


def test_a_quorum_reads_and_writes_while_enough_children_do() -> None:
    plain = [MemoryStorage(bytes(512), writable=True) for _ in range(2)]
    node = Quorum([FaultStorage(plain[0], [Rule("read", 1), Rule("write", 1)]), plain[1]], 1)
    assert node.read(0, 4) == bytes(4)
    node.write(b"1234", 0)
    assert plain[1].read(0, 4) == b"1234"
    strict = Quorum([FaultStorage(plain[0], [Rule("write", 1)]), plain[1]], 2)
    with pytest.raises(StorageError):
        strict.write(b"1234", 0)


def test_a_log_of_writes_is_the_one_that_the_real_program_makes(tmp_path: Path) -> None:
    for name in ("real", "ours"):
        write_sparse(tmp_path / f"{name}.raw", bytearray(MIB))
        write_sparse(tmp_path / f"{name}.log", bytearray(MIB))
    opened = f"driver=blklogwrites,file.filename={tmp_path}/real.raw,log.filename={tmp_path}/real.log"
    script = [
        f"open -o {opened}",
        "write -P 3 4096 1024",
        "write -z 8192 4096",
        "discard 16384 4096",
        "flush",
    ]
    run_peer("qemu-io", [word for command in script for word in ("-c", command)]).ok()
    file, log = (PosixFile.open(str(tmp_path / f"ours.{end}"), writable=True) for end in ("raw", "log"))
    with BlkLogWrites(file, log, sector=512, interval=4096, append=False) as node:
        node.write(b"\3" * 1024, 4096)
        node.zero(8192, 4096)
        node.flush()
        node.discard(16384, 4096)
    real, ours = ((tmp_path / f"{name}.log").read_bytes() for name in ("real", "ours"))
    flushed = 512 * (1 + 1 + 2 + 1 + 8 + 1)
    # The numbers of entries differ: the real program flushes once more.
    assert ours[:16] + ours[24:flushed] == real[:16] + real[24:flushed]
    assert ours[flushed : flushed + 32] == struct.pack("<QQQQ", 32, 8, 4, 0)


def test_a_log_is_gone_on_with_where_it_ended(tmp_path: Path) -> None:
    log = MemoryStorage(size=MIB, writable=True)
    with BlkLogWrites(MemoryStorage(size=MIB), log, sector=4096, interval=1, append=False) as node:
        node.write(bytes(8192), 4096)
    again = BlkLogWrites(MemoryStorage(size=MIB), log, sector=512, interval=1, append=True)
    assert again.limits.request_alignment == 4096
    again.write(b"\5" * 4096, 0)
    assert log.read(4096 * 4, 32) == struct.pack("<QQQQ", 0, 1, 0, 0)
    assert log.read(4096 * 5, 4096) == b"\5" * 4096


def test_what_was_prepared_and_not_used_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    with Preallocate(PosixFile.open(str(path), writable=True), 4096, 10 * MIB) as node:
        node.write(b"1" * 4096, 4096)
        assert path.stat().st_size == 8192 + 10 * MIB
        assert node.size == 8192
    assert path.stat().st_size == 8192
