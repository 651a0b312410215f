"""`snapshot` does what the real program does, in the same words (snapshot sheet; qcow2 sheet 7)."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qimg
from spec.differential import cases
from support import model, release7
from support.build import assert_real_check_clean, build, io, real_content
from support.qcow2 import Anatomy
from support.run import Result, run_both, run_peer, run_qimg, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

IMAGES = """
create -f raw a.raw 1M
create -f raw long.raw 4M
create -f qcow2 a.q 1M
create -f qcow2 one.q 1M
create -f qcow2 s.q 1M
create -f qcow2 sizes.q 1M
create -f qcow2 zero.q 0
create -f qcow2 numbers.q 1M
create -f qcow2 -o compat=0.10 v2.q 1M
create -f qcow2 -o cluster_size=512 small.q 300k
create -f qcow2 -o cluster_size=2M large.q 8M
create -f qcow2 -o refcount_bits=1 rb1.q 1M
create -f qcow2 -o refcount_bits=2 rb2.q 1M
create -f qcow2 -o refcount_bits=64 rb64.q 1M
create -f qcow2 -o extended_l2=on ext.q 1M
create -f qcow2 -o data_file=df.data df.q 1M
create -f qcow2 bits.q 1M
create -f qcow2 meta.q 1M -o preallocation=metadata
create -f qcow2 -b long.raw -F raw over.q 1M
create -f qcow2 -u -b nosuch.raw -F raw gone.q 1M
"""
DATA = ("write -P 1 0 64k", "write -P 2 192k 100k", "write -z 512k 64k")
#: Written before the snapshots are made, and afterwards.
FILLS = {
    **dict.fromkeys(("s.q", "v2.q", "rb2.q", "rb64.q", "bits.q", "ext.q", "rb1.q"), DATA),
    "small.q": ("write -P 1 0 70k", "write -P 2 150k 50k"),
    "large.q": ("write -P 1 0 1M", "write -P 2 4M 1M"),
    "over.q": ("write -P 5 64k 64k", "write -c -P 6 512k 64k"),
    "sizes.q": ("write -P 1 0 1M",),
    "meta.q": ("write -P 1 128k 64k",),
}
SNAPSHOTS = {
    "one.q": ["one"],
    "s.q": ["first", "second", "second"],
    "v2.q": ["first"],
    "numbers.q": ["2", "1", "", "two words"],
    "rb2.q": ["a", "b"],
    "rb64.q": ["a"],
    "small.q": ["a"],
    "large.q": ["a"],
    "ext.q": ["a"],
    "over.q": ["a"],
    "zero.q": ["a"],
    "meta.q": ["a"],
    "bits.q": ["a"],
}
AFTER = ("write -P 3 32k 64k", "write -c -P 4 768k 64k", "discard 192k 64k")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that the real programs made."""
    folder = tmp_path_factory.mktemp("stock")
    for line in cases(IMAGES):
        run_real(shlex.split(line.replace("create", "create -q", 1)), folder).ok()
    io(folder / "long.raw", ["write -q -P 7 0 4M"], format="raw")
    for name, commands in FILLS.items():
        io(folder / name, [command.replace("write", "write -q", 1) for command in commands])
    for name, names in SNAPSHOTS.items():
        for snapshot in names:
            run_real(["snapshot", "-c", snapshot, name], folder).ok()
    io(folder / "s.q", [command.replace("write", "write -q", 1) for command in AFTER])
    run_real(["resize", "-q", "sizes.q", "3M"], folder).ok()
    run_real(["snapshot", "-c", "middle", "sizes.q"], folder).ok()
    run_real(["resize", "-q", "--shrink", "sizes.q", "600k"], folder).ok()
    run_real(["snapshot", "-c", "less", "sizes.q"], folder).ok()
    run_real(["bitmap", "--add", "bits.q", "b0"], folder).ok()
    return folder


def entries(path: Path, *, dates: bool = False) -> list[dict[str, object]]:
    """The snapshots as the real ``info`` tells them, without dates unless asked for."""
    shown = json.loads(run_real(["info", "-U", "--output=json", path.name], path.parent).ok().out)
    rows: list[dict[str, object]] = shown.get("snapshots", [])
    for row in rows if not dates else ():
        del row["date-sec"], row["date-nsec"]
    return rows


def state(path: Path) -> tuple[list[dict[str, object]], dict[str, bytes]]:
    """What the real program finds in a sound image: snapshots, the disk's content and theirs."""
    assert_real_check_clean(path)
    rows = entries(path)
    contents = {"": real_content(path, format="qcow2")}
    for row in rows:
        name = f"snapshot.id={row['id']}"
        contents[name] = real_content(path, format="qcow2", snapshot=name)
    return rows, contents


def errors(text: str) -> str:
    """Our messages in 7.2's words: there `create` tells the number of the error too."""

    def numbered(match: re.Match[str]) -> str:
        number = next(number for number in range(1, 200) if os.strerror(number) == match[2])
        return f"{match[1]}: -{number} ({match[2]})"

    return re.sub(r"(?m)(Could not create snapshot '.*'): ([^:\n]+)$", numbered, text)


def assert_same(line: str, folder: Path) -> Result:
    """Both programs do `line` alike, each in its copy of `folder`; leaves both in ``real`` and ``ours``."""
    words = shlex.split(line)
    for place in ("real", "ours"):
        shutil.copytree(folder, folder.parent / place, symlinks=True)
    both = run_both(words, folder.parent / "real", folder.parent / "ours")
    assert (both.ours.code, release7.snapshot_table(both.ours.out), errors(both.ours.err)) == both.real
    return both.real


@pytest.fixture
def twin(stock: Path, tmp_path: Path) -> Path:
    """A copy of the stock."""
    return shutil.copytree(stock, tmp_path / "stock", symlinks=True)


CHANGES = cases("""
snapshot -c new a.q
snapshot -c '' a.q
snapshot -c 1 s.q
snapshot -c first s.q
snapshot -c new v2.q
snapshot -c new small.q
snapshot -c new large.q
snapshot -c new rb64.q
snapshot -c new ext.q
snapshot -c new zero.q
snapshot -c new numbers.q
snapshot -c new bits.q
snapshot -c new meta.q
snapshot -c new over.q
snapshot -c new sizes.q
snapshot -q -c new a.q
snapshot -c -x a.q
snapshot -c new --image-opts driver=qcow2,file.filename=a.q
snapshot --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.q -c new
snapshot -c 'ümlaut, and a name that is longer than sixteen bytes' a.q
snapshot -a 1 s.q
snapshot -a first s.q
snapshot -a second s.q
snapshot -a 3 s.q
snapshot -a first v2.q
snapshot -a 1 numbers.q
snapshot -a 2 numbers.q
snapshot -a '' numbers.q
snapshot -a 'two words' numbers.q
snapshot -a a small.q
snapshot -a a large.q
snapshot -a a rb64.q
snapshot -a a ext.q
snapshot -a a over.q
snapshot -a a zero.q
snapshot -a a meta.q
snapshot -a 1 sizes.q
snapshot -a middle sizes.q
snapshot -a less sizes.q
snapshot --image-opts driver=raw,file.driver=qcow2,file.file.filename=s.q -a first
snapshot -d first s.q
snapshot -d second s.q
snapshot -d 1 numbers.q
snapshot -d '' numbers.q
snapshot -d first v2.q
snapshot -d a small.q
snapshot -d a large.q
snapshot -d a rb2.q
snapshot -d a rb64.q
snapshot -d a ext.q
snapshot -d a over.q
snapshot -d a zero.q
snapshot -d a meta.q
snapshot -d a bits.q
snapshot -d one one.q
snapshot -d middle sizes.q
""")


@pytest.mark.parametrize("line", CHANGES)
def test_a_change_leaves_what_the_real_program_leaves(line: str, twin: Path) -> None:
    assert_same(line, twin).ok()
    name = re.findall(r"\w+\.q", line)[-1]
    real, ours = (state(twin.parent / place / name) for place in ("real", "ours"))
    assert ours == real
    before = entries(twin / name)
    assert real[0] != before or "-a" in line, "the line changes nothing"


REFUSALS = cases("""
snapshot -c new a.raw
snapshot -d new a.raw
snapshot -c new df.q
snapshot -a new df.q
snapshot -d new df.q
snapshot -c new rb1.q
snapshot -c new rb2.q
snapshot -c new nosuch.q
snapshot -c new gone.q
snapshot -a a gone.q
snapshot -a nosuch s.q
snapshot -U s.q
snapshot -a nosuch a.q
snapshot -a 4 s.q
snapshot -a a bits.q
snapshot -a nosuch bits.q
snapshot -d nosuch s.q
snapshot -d 1 s.q
snapshot -d a a.q
snapshot -d snapshot.name=first s.q
snapshot -U -c new a.q
snapshot -U -a first s.q
snapshot -U -d first s.q
snapshot -l -c new a.q
snapshot -c new -c new a.q
snapshot -l -l s.q
snapshot -a first -d first s.q
snapshot -c new
snapshot -c
snapshot -c new a.q s.q
snapshot
snapshot -l
snapshot -f qcow2 -l a.q
snapshot --output=json -l a.q
snapshot -x a.q
snapshot -l nosuch.q
snapshot -l gone.q
snapshot -l ''
snapshot --image-opts -l a.q
snapshot --image-opts -l driver=qcow2,file.filename=a.q,bogus=1
""")


@pytest.mark.parametrize("line", REFUSALS)
def test_a_refusal_has_the_words_of_the_real_program_and_changes_nothing(line: str, twin: Path) -> None:
    before = {path.name: path.read_bytes() for path in twin.iterdir()}
    assert assert_same(line, twin).code == 1
    assert {path.name: path.read_bytes() for path in (twin.parent / "ours").iterdir()} == before


def test_raw_has_nothing_to_go_back_to(stock: Path) -> None:
    """The real program warns of the guessed format twice here, for it opens the file again."""
    words = ["snapshot", "-a", "new", "a.raw"]
    real, ours = run_real(words, stock), run_qimg_inprocess(words, stock)
    assert ours.code == real.code == 1
    assert ours.err == "".join(dict.fromkeys(real.err.splitlines(keepends=True)))


def test_what_fits_in_the_end_is_applied_where_the_real_program_counts_too_high_between(twin: Path) -> None:
    """Two snapshots in counts of 2 bits: for a moment it has both the old and the new references."""
    before = real_content(twin / "rb2.q", snapshot="b")
    refused = run_real(["snapshot", "-a", "b", "rb2.q"], twin)
    assert "Failed to load snapshot: Invalid argument" in refused.err
    run_qimg_inprocess(["snapshot", "-a", "b", "rb2.q"], twin).ok()
    assert state(twin / "rb2.q")[1][""] == before


LISTS = cases("""
snapshot -l a.q
snapshot -l s.q
snapshot -l v2.q
snapshot -l numbers.q
snapshot -l zero.q
snapshot -l sizes.q
snapshot -l df.q
snapshot -l a.raw
snapshot -q -l s.q
snapshot -U -l s.q
snapshot s.q
snapshot a.raw
snapshot -q s.q
snapshot --image-opts -l driver=qcow2,file.filename=s.q
snapshot --image-opts -l driver=raw,file.driver=qcow2,file.file.filename=s.q
snapshot -l 'json:{"driver":"qcow2","file.filename":"s.q"}'
snapshot -l 'json:{"driver":"qcow2","backing":null,"file.filename":"gone.q"}'
""")


@pytest.mark.parametrize("line", LISTS)
def test_a_list_is_that_of_the_real_program(line: str, stock: Path) -> None:
    words = shlex.split(line)
    real, ours = run_real(words, stock), run_qimg_inprocess(words, stock)
    assert (ours.code, release7.snapshot_table(ours.out), ours.err) == real.ok()


def test_the_list_has_the_layout_of_release_10(stock: Path) -> None:
    lines = run_qimg_inprocess(["snapshot", "-l", "s.q"], stock).ok().lines
    assert lines[:2] == [
        "Snapshot list:",
        "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT",
    ]
    row = r"1       first                 0 B \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  0000:00:00\.000          0"
    assert re.fullmatch(row, lines[2])


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Chatham"])
def test_dates_are_in_local_time(zone: str, tmp_path: Path) -> None:
    """Every season, half hours, the epoch, and what only unsigned numbers hold."""
    path = snapshots_with(
        tmp_path,
        [struct.pack(">I", when) for when in (0, 1_700_000_000, 1_720_000_000, 0x8000_0000, 2**32 - 1)],
    )
    environment = {"TZ": zone}
    real = run_real(["snapshot", "-l", path.name], tmp_path, env=environment).ok()
    ours = run_qimg(["snapshot", "-l", path.name], tmp_path, env=environment).ok()
    assert release7.snapshot_table(ours.out) == real.out
    assert len(real.lines) == 7


def snapshots_with(folder: Path, dates: list[bytes]) -> Path:
    """An image with a snapshot of each of these dates, as they are stored."""
    path = folder / "dates.q"
    run_real(["create", "-q", "-f", "qcow2", path, "1M"], folder).ok()
    for number in range(len(dates)):
        run_real(["snapshot", "-c", f"s{number}", path], folder).ok()
    with path.open("r+b") as file:
        for at, date in zip(Anatomy(path).snapshots, dates, strict=True):
            file.seek(at + 16)
            file.write(date)
    return path


def test_a_new_snapshot_is_dated_now(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "A")
    before = time.time_ns()
    run_qimg_inprocess(["snapshot", "-c", "now", "a.q"], tmp_path).ok()
    (row,) = entries(path, dates=True)
    stored = int(str(row["date-sec"])) * 10**9 + int(str(row["date-nsec"]))
    assert before <= stored <= time.time_ns()


# -- tables that are not as the real program writes them


def patched(folder: Path, name: str, offset: int, data: bytes) -> None:
    """Overwrite a part of an image in all copies of the folder."""
    with (folder / name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def table_bytes(path: Path) -> list[bytes]:
    """The entries of the snapshot table without L1 offset and dates."""
    anatomy = Anatomy(path)
    found = []
    for at in anatomy.snapshots:
        size = 40 + anatomy.number(at + 36, 4) + anatomy.number(at + 12, 2) + anatomy.number(at + 14, 2)
        entry = anatomy.raw[at : at + size]
        found.append(entry[8:16] + entry[24:])
    return found


@pytest.mark.parametrize("extra", [0, 8, 15, 16, 23, 24, 30, 40, 1024])
def test_extra_data_is_made_whole_and_kept(extra: int, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    path = build(tmp_path / "stock" / "a.q", "A-B")
    run_real(["snapshot", "-c", "a name that is long enough", path], path.parent).ok()
    anatomy = Anatomy(path)
    (at,) = anatomy.snapshots
    known = struct.pack(">QQQ", 5 << 40, 1 << 20, 77) + bytes(range(250)) * 4
    head = anatomy.raw[at : at + 32] + struct.pack(">II", 1234, extra)
    strings = anatomy.raw[at + 64 : at + 64 + 27]
    patched(path.parent, "a.q", at, head + known[:extra] + strings)
    assert_same("snapshot -c new a.q", path.parent).ok()
    real, ours = (table_bytes(tmp_path / place / "a.q") for place in ("real", "ours"))
    assert ours == real
    assert_real_check_clean(tmp_path / "ours" / "a.q")


@pytest.mark.parametrize("id", ["9", "09", "x", "7x", " 8", "-", "0", "+5"])
def test_a_new_id_is_above_all_numbers(id: str, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    path = build(tmp_path / "stock" / "a.q", "A")
    for name in ("a", "b"):
        run_real(["snapshot", "-c", name, path], path.parent).ok()
    anatomy = Anatomy(path)
    at = anatomy.snapshots[1]
    head = anatomy.raw[at : at + 12] + struct.pack(">H", len(id)) + anatomy.raw[at + 14 : at + 64]
    patched(path.parent, "a.q", at, head + id.encode() + b"b")
    assert_same("snapshot -c new a.q", path.parent).ok()
    real, ours = (entries(tmp_path / place / "a.q") for place in ("real", "ours"))
    assert ours == real


@pytest.mark.parametrize("length", [255, 256, 300])
def test_a_long_name_is_cut_as_the_real_program_cuts_it(length: int, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    build(tmp_path / "stock" / "a.q", "A")
    assert_same(f"snapshot -c {'n' * length} a.q", tmp_path / "stock").ok()
    real, ours = (table_bytes(tmp_path / place / "a.q") for place in ("real", "ours"))
    assert ours == real


FIELDS = {
    "L1 offset not aligned": (0, struct.pack(">Q", 0x50001)),
    "L1 offset too large": (0, struct.pack(">Q", 1 << 63)),
    "L1 size": (8, struct.pack(">I", 1 << 30)),
    "disk size not in sectors": (48, struct.pack(">Q", (1 << 20) + 100)),
}


@pytest.mark.parametrize("action", ["-a", "-d"])
@pytest.mark.parametrize("field", FIELDS)
def test_damage_in_an_entry_is_refused_in_two_lines(field: str, action: str, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    path = build(tmp_path / "stock" / "a.q", "AB")
    run_real(["snapshot", "-c", "s", path], path.parent).ok()
    offset, data = FIELDS[field]
    patched(path.parent, "a.q", Anatomy(path).snapshots[0] + offset, data)
    if field == "disk size not in sectors" and action == "-d":
        assert_same("snapshot -d s a.q", path.parent).ok()  # deleting needs no size
        return
    before = path.read_bytes()
    assert assert_same(f"snapshot {action} s a.q", path.parent).code == 1
    assert (tmp_path / "ours" / "a.q").read_bytes() == before


@pytest.mark.parametrize("size", [512 << 10, 2 << 20])
def test_version_2_goes_back_to_no_other_size(size: int, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    path = build(tmp_path / "stock" / "a.q", "A" * 16, options="compat=0.10")
    run_real(["snapshot", "-c", "s", path], path.parent).ok()
    patched(path.parent, "a.q", Anatomy(path).snapshots[0] + 48, struct.pack(">Q", size))
    assert assert_same("snapshot -a s a.q", path.parent).code == 1


def test_there_can_be_65536_snapshots(tmp_path: Path) -> None:
    """With the words of the real program for one more."""
    (tmp_path / "stock").mkdir()
    path = tmp_path / "stock" / "a.q"
    run_real(["create", "-q", "-f", "qcow2", path, "0"], path.parent).ok()
    entry = struct.pack(">QIHHIIQII", 0, 0, 1, 1, 0, 0, 0, 0, 24) + bytes(24) + b"1a"
    image = bytearray(path.read_bytes().ljust(1 << 20, b"\0"))
    struct.pack_into(">IQ", image, 60, 65535, 1 << 20)
    table = (entry + bytes(-len(entry) % 8)) * 65535
    # Each cluster of the table counts once (16-bit counts, all in the first block).
    counts = Anatomy(path).blocks[0] + 2 * 16
    used = -(-len(table) // 65536)
    image[counts : counts + 2 * used] = b"\0\1" * used
    path.write_bytes(image + table)
    assert run_qimg_inprocess(["snapshot", "-c", "last", path.name], path.parent).ok()
    assert_real_check_clean(path)
    refused = assert_same("snapshot -c new a.q", path.parent)
    assert refused.err == "qemu-img: Could not create snapshot 'new': -27 (File too large)\n"


# -- what only images with machine state show


def test_machine_state_stays_with_its_snapshot_and_comes_back(tmp_path: Path) -> None:
    """It lies behind the disk's end in the snapshot's L1 table."""
    path = build(tmp_path / "a.q", "AB")
    io(path, ["write -q -b -P 9 0 200k"])
    run_qimg_inprocess(["snapshot", "-c", "state", path.name], tmp_path).ok()
    patched(tmp_path, "a.q", Anatomy(path).snapshots[0] + 40, struct.pack(">Q", 200 << 10))
    io(path, ["write -q -b -P 7 0 200k", "write -q -P 8 0 64k"])
    run_qimg_inprocess(["snapshot", "-c", "other", path.name], tmp_path).ok()
    assert_real_check_clean(path)
    run_qimg_inprocess(["snapshot", "-a", "state", path.name], tmp_path).ok()
    assert_real_check_clean(path)
    assert "Pattern verification failed" not in io(path, ["read -b -P 9 0 200k"])
    run_qimg_inprocess(["snapshot", "-d", "other", path.name], tmp_path).ok()
    assert_real_check_clean(path)
    assert "Pattern verification failed" not in io(path, ["read -b -P 9 0 200k"])
    assert entries(path)[0]["vm-state-size"] == 200 << 10


# -- sequences


#: Kinds of images whose counts soon are the largest; the real program leaks there.
NARROW = ("counts of 1 bit", "counts of 1 bit, compressed", "counts of 2 bits")


def steps(seed: int, count: int) -> Iterator[tuple[str, int]]:
    """Random actions: ``c``, or ``a`` and ``d`` with the place of a snapshot in the list, or ``w``."""
    chance = random.Random(seed)
    yield "c", 1000
    for _ in range(count - 1):
        yield chance.choice("cccwwwaad"), chance.randrange(1000)


def act(path: Path, action: str, number: int, program: str) -> bool:
    """One action by one of the programs; whether it could be done."""
    if action == "w":
        return False
    names = [str(row["name"]) for row in entries(path)]
    if action != "c" and not names:
        return False
    name = f"new {number}" if action == "c" else names[number % len(names)]
    run = run_real if program == "real" else run_qimg_inprocess
    run(["snapshot", f"-{action}", name, path.name], path.parent).ok()
    return True


@pytest.mark.parametrize(
    "name", [name for name in model.KINDS if "data file" not in name and name not in NARROW]
)
def test_any_sequence_leaves_what_the_real_program_leaves(name: str, tmp_path: Path) -> None:
    """Of creating, applying, deleting and writing, on twins; the writing is the real program's."""
    for place in ("real", "ours"):
        (tmp_path / place).mkdir()
    paths = [model.prepare(tmp_path / place, name) for place in ("real", "ours")]
    assert state(paths[0]) == state(paths[1])
    done = 0
    for number, (action, choice) in enumerate(steps(len(name), 12)):
        for path in paths:
            if action == "w":
                model.scribble(path, model.KINDS[name], random.Random(choice), 4)
            else:
                done += act(path, action, choice, path.parent.name)
        if number % 4 == 3:
            assert state(paths[1]) == state(paths[0])
    assert state(paths[1]) == state(paths[0])
    assert done >= 6


def test_deleting_gives_space_back(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "A" * 64)
    run_real(["snapshot", "-c", "s", path], tmp_path).ok()
    io(path, ["write -q -P 2 0 4M"])
    before = path.stat().st_blocks
    run_qimg_inprocess(["snapshot", "-d", "s", "a.q"], tmp_path).ok()
    assert before * 512 - path.stat().st_blocks * 512 > 4_000_000
    assert_real_check_clean(path)


# -- the library


def test_the_library_lists_creates_applies_and_deletes(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "AB")
    before = real_content(path)
    qimg.create_snapshot(path, "then", now_ns=1_700_000_000_000_000_007)
    (found,) = qimg.snapshots(path)
    assert (found.id, found.name, found.date_sec, found.date_nsec) == ("1", "then", 1_700_000_000, 7)
    assert entries(path, dates=True)[0]["date-sec"] == 1_700_000_000
    io(path, ["write -q -P 3 0 64k"])
    qimg.apply_snapshot(path, "then")
    assert real_content(path) == before
    qimg.delete_snapshot(path, "then")
    assert entries(path) == []
    with pytest.raises(qimg.QimgError, match=r"^Could not delete snapshot 'then': snapshot not found$"):
        qimg.delete_snapshot(path, "then")


def test_an_image_in_use_is_not_changed(tmp_path: Path) -> None:
    from support.holders import qemu_io_holding

    path = build(tmp_path / "a.q", "AB")
    with qemu_io_holding(path):
        both = run_both(["snapshot", "-c", "new", path], tmp_path, tmp_path)
    assert both.real.code == 1
    assert both.ours == both.real
    assert run_peer("qemu-img", ["snapshot", "-l", path]).ok().out == ""
