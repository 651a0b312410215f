"""`resize` does what the real program does, in the same words (resize sheet; qcow2 sheet 16)."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.loop_devices import loop_device
from spec.differential import as_release_7, cases
from support import crash
from support.build import assert_real_check_clean, io, real_content
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

IMAGES = """
create -f raw a.raw 1M
create -f raw full.raw 1M
create -f raw back.raw 4M
create -f qcow2 a.q 1M
create -f qcow2 none.q 0
create -f qcow2 odd.q 100k
create -f qcow2 -o compat=0.10 v2.q 1M
create -f qcow2 -o compat=0.10 v2snap.q 1M
create -f qcow2 snap.q 1M
create -f qcow2 -o cluster_size=512 small.q 200k
create -f qcow2 -o cluster_size=2M large.q 5M
create -f qcow2 -o refcount_bits=1 rb1.q 1M
create -f qcow2 -o refcount_bits=64 rb64.q 1M
create -f qcow2 -o extended_l2=on ext.q 1000k
create -f qcow2 -o data_file=df.raw df.q 1M
create -f qcow2 -o data_file=dfr.raw,data_file_raw=on dfr.q 1M
create -f qcow2 zip.q 1M
create -f qcow2 bits.q 1M
create -f qcow2 -b back.raw -F raw over.q 1M
create -f qcow2 -b back.raw -F raw ragged.q 60k
create -f qcow2 -b back.raw -F raw raggedfull.q 60k
create -f qcow2 -o compat=0.10 -b back.raw -F raw v2over.q 1M
create -f qcow2 -o compat=0.10 -b back.raw -F raw v2ragged.q 60k
create -f qcow2 -o extended_l2=on -b back.raw -F raw extover.q 61k
create -f qcow2 -b a.raw -F raw same.q 1M
create -f qcow2 -u -b nosuch.raw -F raw gone.q 1M
"""
_DATA = ("write -P 1 0 64k", "write -P 2 192k 100k", "write -P 3 900k 100k", "write -z 512k 64k")
_FILLS = {
    **dict.fromkeys(
        ("a.q", "v2.q", "v2snap.q", "snap.q", "rb1.q", "rb64.q", "df.q", "dfr.q", "bits.q"), _DATA
    ),
    "small.q": ("write -P 1 0 70k", "write -P 2 150k 50k"),
    "odd.q": ("write -P 1 60k 40k",),
    "large.q": ("write -P 1 0 1M", "write -P 2 4M 1M"),
    "ext.q": ("write -P 1 0 3k", "write -P 2 190k 20k", "write -P 3 990k 10k"),
    "zip.q": (
        "write -c -P 1 0 64k",
        "write -c -P 2 64k 64k",
        "write -P 3 512k 100k",
        "write -c -P 9 960k 64k",
    ),
    "over.q": ("write -P 5 64k 64k",),
    "raggedfull.q": ("write -P 5 0 60k",),
    "v2over.q": ("write -P 5 64k 64k",),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that the real programs made."""
    folder = tmp_path_factory.mktemp("stock")
    for line in cases(IMAGES):
        run_real(shlex.split(line.replace("create", "create -q", 1)), folder).ok()
    (folder / "odd.raw").write_bytes(b"xyz")
    (folder / "empty.raw").write_bytes(b"")
    io(folder / "full.raw", ["write -q -P 1 0 1M"], format="raw")
    io(folder / "back.raw", ["write -q -P 7 0 4M"], format="raw")
    run_real(["bitmap", "--add", "bits.q", "b0"], folder).ok()
    for name, commands in _FILLS.items():
        io(folder / name, [command.replace("write", "write -q", 1) for command in commands])
    run_real(["snapshot", "-c", "s", "snap.q"], folder).ok()
    run_real(["snapshot", "-c", "s", "v2snap.q"], folder).ok()
    return folder


@pytest.fixture
def sides(stock: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two copies of the stock: the real program's folder and ours."""
    for side in ("real", "ours"):
        shutil.copytree(stock, tmp_path / side)
    yield tmp_path / "real", tmp_path / "ours"
    shutil.rmtree(tmp_path / "ours")


WORDS = """
resize
resize X
resize --help
resize a.q
resize a.q -f qcow2
resize a.q 5M --shrink
resize a.q b.q 5M
resize 5M 6M 7M
resize -h 5M --help x
resize a.q --shrink
resize --preallocation
resize --preallocation 5M
resize --preallocation a.q 5M
resize --preallocation=foo a.raw 5M
resize --preallocation= a.raw 5M
resize --preallocation=foo a.raw zz
resize --preallocation=Full a.raw zz
resize --object 5M
resize --object secret,id=s,data=x -f raw a.raw 2M
resize --object secret,data=x a.raw 2M
resize -z a.q 5M
resize -p a.q 5M
resize -U a.q 5M
resize -t none a.q 5M
resize -f raw a.raw +
resize -f raw a.raw -
resize -f raw a.raw +-1
resize -f raw a.raw ++1
resize -f raw a.raw -+1
resize -f raw a.raw --1
resize -f raw a.raw 1.5
resize -f raw a.raw 1.5k
resize -f raw a.raw ''
resize -f raw a.raw 1e3
resize -f raw a.raw 16E
resize -f raw a.raw 18446744073709551615
resize -f raw a.raw 18446744073709551616
resize -f raw nosuch zz
resize -f raw nosuch 0
resize -f raw nosuch 1M
resize nosuch 1M
resize -f nosuch a.q 5M
resize gone.q 2M
resize -f raw a.raw -- 0
resize -f raw a.raw 0
resize -f raw a.raw -1M
resize -f raw a.raw -2M
resize -f raw a.raw +9E
resize -f raw a.raw +8E
resize -f raw a.raw 8E
resize -f raw a.raw 7E
resize -f raw empty.raw +0
resize -f raw empty.raw 1
resize none.q +0
resize none.q 1M
resize -f raw a.raw 500k
resize -q -f raw a.raw 500k
resize a.raw 500k
resize a.q 500k
resize a.q 500
resize --shrink a.q 500
resize a.q +1
resize a.q 1000001
resize -f raw --preallocation=full a.raw 500k
resize -f raw --preallocation=full a.raw 1M
resize -f raw --preallocation=metadata a.raw 1M
resize -f raw --preallocation=metadata a.raw 2M
resize -f raw --preallocation=metadata --shrink a.raw 1k
resize a.q 4E
resize a.q 3P
resize a.q 2251799813685760
resize small.q 128G
resize small.q 137438953984
resize v2snap.q 2M
resize v2snap.q +0
resize v2snap.q 1000
resize v2snap.q +1
resize --shrink v2snap.q 512k
resize v2over.q 2M
resize v2ragged.q 128k
resize --image-opts -f raw driver=qcow2,file.filename=a.q 8M
resize --image-opts driver=qcow2,file.filename=a.q,read-only=on 8M
resize --image-opts driver=raw,file.filename=a.raw,size=512 8M
resize --image-opts driver=raw,file.filename=a.raw,size=512 +0
resize --image-opts driver=qcow2,file.filename=a.q,bogus=1 8M
resize --image-opts a.q 8M
"""

CHANGES = """
resize a.raw 2M
resize a.raw +1
resize a.raw --shrink 100
resize --shrink a.raw 100
resize --shrink -q -f raw full.raw 100001
resize --shrink -f raw full.raw -1k
resize -f raw full.raw +1
resize -f raw full.raw +0
resize -f raw odd.raw +0
resize -f raw odd.raw +1
resize -f raw odd.raw 10000001
resize -f raw odd.raw 2
resize --shrink -f raw odd.raw 2
resize -f raw empty.raw 4096
resize -f raw --preallocation=falloc a.raw 2M
resize -f raw --preallocation=full a.raw 2M
resize -f raw --preallocation=full full.raw +1000
resize -f raw --preallocation=off --shrink full.raw 1000
resize --preallocation full -f raw full.raw 1500k
resize --pre=falloc -f raw full.raw 1500k
resize -f file a.raw 2M
resize --image-opts driver=file,filename=a.raw 3M
resize --image-opts driver=raw,file.filename=full.raw,offset=65536 2M
resize --image-opts --shrink driver=raw,file.filename=full.raw,offset=65536 1
resize --image-opts file.filename=a.q 3M
resize 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.q"}}' 3M
resize -f raw -- a.raw 2M
resize a.raw -f raw -- 2M
resize -fraw -q a.raw 2M
resize a.q 2M
resize a.q +0
resize a.q 10G
resize a.q 1T
resize a.q +512
resize --shrink a.q 512k
resize --shrink a.q 64k
resize --shrink a.q 512
resize --shrink a.q -1000k
resize -q --shrink a.q -100k
resize -q a.q 1M
resize --preallocation=metadata a.q 3M
resize --preallocation=falloc a.q 3M
resize --preallocation=full a.q 3M
resize --preallocation=full a.q 1100k
resize none.q 10M
resize odd.q 110k
resize odd.q 1G
resize --shrink odd.q 30k
resize v2.q 5M
resize --shrink v2.q 100k
resize --preallocation=metadata v2.q 5M
resize snap.q 2M
resize --shrink snap.q 300k
resize --shrink snap.q 950k
resize --preallocation=full snap.q 1500k
resize small.q 100M
resize --shrink small.q 1k
resize --shrink small.q 61k
resize --preallocation=metadata small.q 1M
resize --preallocation=full small.q 1M
resize large.q 100M
resize --shrink large.q 3M
resize --preallocation=falloc large.q 9M
resize rb1.q 10G
resize --shrink rb1.q 256k
resize --preallocation=metadata rb1.q 5M
resize rb64.q 10G
resize --shrink rb64.q 256k
resize --preallocation=full rb64.q 5M
resize ext.q 5M
resize --shrink ext.q 205k
resize --shrink ext.q 200k
resize --shrink ext.q 1k
resize --preallocation=metadata ext.q 3M
resize --preallocation=full ext.q 3M
resize df.q 3M
resize --shrink df.q 300k
resize --preallocation=metadata df.q 3M
resize --preallocation=falloc df.q 3M
resize --preallocation=full df.q 3M
resize dfr.q 3M
resize --shrink dfr.q 300k
resize --preallocation=full dfr.q 3M
resize zip.q 3M
resize --shrink zip.q 600k
resize --shrink zip.q 64k
resize bits.q 10M
resize --shrink bits.q 200k
resize over.q 2M
resize over.q 4M
resize over.q 10M
resize --shrink over.q 100k
resize --preallocation=metadata over.q 2M
resize --preallocation=falloc over.q 8M
resize --preallocation=full over.q 2M
resize same.q 10M
resize --shrink same.q 10k
resize ragged.q 64k
resize ragged.q 62k
resize ragged.q 6M
resize --shrink ragged.q 1k
resize --preallocation=full ragged.q 256k
resize raggedfull.q 3M
resize v2ragged.q 64k
resize v2ragged.q 62k
resize --shrink v2over.q 100k
resize extover.q 62k
resize extover.q 64k
resize extover.q 3M
resize --preallocation=metadata extover.q 3M
resize --preallocation=full extover.q 3M
"""


def both(line: str, sides: tuple[Path, Path]) -> tuple[Result, Result]:
    """The answers of the real program and of ours, each in its folder."""
    words = shlex.split(line)
    real = run_real(words, sides[0])
    return real, as_release_7(line, run_qimg_inprocess(words, sides[1]))


@pytest.mark.parametrize("line", cases(WORDS))
def test_what_is_refused_is_refused_in_the_same_words_and_changes_nothing(
    line: str, sides: tuple[Path, Path], stock: Path
) -> None:
    real, ours = both(line, sides)
    if "-h 5M" in line:
        assert (ours.code, ours.err) == (real.code, real.err)
        assert "Command syntax:" in ours.out
        return
    assert ours == real
    if ours.code:
        for path in stock.iterdir():
            assert (sides[1] / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("line", cases(CHANGES))
def test_the_disk_becomes_as_large_and_reads_the_same(
    line: str, sides: tuple[Path, Path], stock: Path
) -> None:
    real, ours = both(line, sides)
    assert ours == real
    for path in stock.iterdir():
        mine, theirs = sides[1] / path.name, sides[0] / path.name
        if path.suffix == ".raw" and path.name != "dfr.raw":
            assert mine.stat().st_size == theirs.stat().st_size, path.name
            assert mine.read_bytes() == theirs.read_bytes()
        elif path.suffix == ".q" and theirs.read_bytes() != path.read_bytes():
            assert_same_image(theirs, mine)


def assert_same_image(theirs: Path, mine: Path) -> None:
    """The real program says the same of both, and finds neither leaks nor damage in ours."""
    assert_real_check_clean(mine)
    assert info(mine) == info(theirs)
    same = run_real(["compare", "-f", "qcow2", "-F", "qcow2", theirs, mine], mine.parent)
    assert same.code == 0, same.out + same.err
    for row in info(mine).get("snapshots", []):
        assert real_content(mine, snapshot=row["id"]) == real_content(theirs, snapshot=row["id"])


def info(path: Path) -> dict[str, object]:
    """What the real ``info`` says, without what depends on the layout of the file."""
    shown = json.loads(run_real(["info", "--output=json", path.name], path.parent).ok().out)
    shown.pop("actual-size")
    return shown


def test_space_is_reserved_as_much_as_the_real_program_reserves(sides: tuple[Path, Path]) -> None:
    for mode in ("metadata", "falloc", "full"):
        line = f"resize -q --preallocation={mode} a.q +8M"
        real, ours = both(line, sides)
        assert ours == real == Result(0, "", "")
        theirs, mine = ((side / "a.q").stat() for side in sides)
        assert abs(mine.st_blocks - theirs.st_blocks) * 512 <= 256 << 10
        assert abs(mine.st_size - theirs.st_size) <= 256 << 10
    for mode in ("falloc", "full"):
        both(f"resize -f raw --preallocation={mode} a.raw +8M", sides)
        assert (sides[1] / "a.raw").stat().st_blocks == (sides[0] / "a.raw").stat().st_blocks


def test_a_smaller_disk_gives_its_space_back(tmp_path: Path) -> None:
    run_real(
        ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "a.q", "8M"], tmp_path
    )
    io(tmp_path / "a.q", ["write -q -P 5 0 8M"])
    shutil.copy(tmp_path / "a.q", tmp_path / "b.q")
    run_qimg_inprocess(["resize", "--shrink", "a.q", "64k"], tmp_path).ok()
    run_real(["resize", "--shrink", "b.q", "64k"], tmp_path).ok()
    assert_real_check_clean(tmp_path / "a.q")
    mine, theirs = (tmp_path / "a.q").stat(), (tmp_path / "b.q").stat()
    assert mine.st_size <= theirs.st_size
    assert mine.st_blocks <= theirs.st_blocks + 8


def test_what_was_cut_off_does_not_come_back(tmp_path: Path) -> None:
    """The real program leaves the end of the last cluster as it was (docs/differences.md)."""
    for options, commands in {
        "compat=1.1": ("write -q -P 5 0 1M",),
        "compat=0.10": ("write -q -P 5 0 1M",),
        "extended_l2=on": ("write -q -P 5 0 1M",),
        "compression_type=zlib": tuple(f"write -q -c -P 5 {at}k 64k" for at in range(0, 1024, 64)),
        "data_file=d.raw": ("write -q -P 5 0 1M",),
    }.items():
        path = tmp_path / "a.q"
        run_real(["create", "-q", "-f", "qcow2", "-o", options, "a.q", "1M"], tmp_path).ok()
        io(path, commands)
        run_qimg_inprocess(["resize", "--shrink", "a.q", "100k"], tmp_path).ok()
        run_real(["resize", "a.q", "1M"], tmp_path).ok()
        assert_real_check_clean(path)
        assert real_content(path) == b"\5" * 102400 + bytes((1 << 20) - 102400), options


def test_what_the_real_program_cut_off_does_not_come_back_either(tmp_path: Path) -> None:
    for options in ("compat=1.1", "extended_l2=on", "compat=0.10"):
        path = tmp_path / "a.q"
        run_real(["create", "-q", "-f", "qcow2", "-o", options, "a.q", "1M"], tmp_path).ok()
        io(path, ["write -q -P 5 0 1M"])
        run_real(["resize", "--shrink", "a.q", "100k"], tmp_path).ok()
        run_qimg_inprocess(["resize", "a.q", "1M"], tmp_path).ok()
        assert_real_check_clean(path)
        assert real_content(path) == b"\5" * 102400 + bytes((1 << 20) - 102400), options


def test_a_snapshot_keeps_the_bytes_that_were_cut_off(tmp_path: Path) -> None:
    for options in ("compat=1.1", "extended_l2=on"):
        path = tmp_path / "a.q"
        run_real(["create", "-q", "-f", "qcow2", "-o", options, "a.q", "1M"], tmp_path).ok()
        io(path, ["write -q -P 5 0 1M"])
        run_real(["snapshot", "-c", "s", "a.q"], tmp_path).ok()
        run_qimg_inprocess(["resize", "--shrink", "a.q", "100k"], tmp_path).ok()
        assert_real_check_clean(path)
        run_qimg_inprocess(["resize", "a.q", "2M"], tmp_path).ok()
        assert_real_check_clean(path)
        assert real_content(path) == b"\5" * 102400 + bytes((2 << 20) - 102400)
        run_real(["snapshot", "-a", "s", "a.q"], tmp_path).ok()
        assert_real_check_clean(path)
        assert real_content(path) == b"\5" * (1 << 20)


@pytest.mark.parametrize("shared", [False, True])
def test_a_cluster_that_begins_with_a_hole_of_the_file_is_no_cluster_of_zeros(
    shared: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.q"
    run_real(["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "a.q", "8M"], tmp_path).ok()
    io(path, [f"write -q -P 5 {at}k 500k" for at in (1500, 3500, 5500, 7500)])
    if shared:
        run_real(["snapshot", "-c", "s", "a.q"], tmp_path).ok()
    run_qimg_inprocess(["resize", "--shrink", "a.q", "5M"], tmp_path).ok()
    before = real_content(path)
    run_real(["resize", "a.q", "8M"], tmp_path).ok()
    assert_real_check_clean(path)
    assert real_content(path) == before.ljust(8 << 20, b"\0")


def test_a_data_file_that_was_longer_does_not_show_in_a_larger_disk(tmp_path: Path) -> None:
    run_real(["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "a.q", "1M"], tmp_path).ok()
    with (tmp_path / "d.raw").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"\7" * (1 << 20))
    run_qimg_inprocess(["resize", "--preallocation=metadata", "a.q", "3M"], tmp_path).ok()
    assert (tmp_path / "d.raw").stat().st_size == 3 << 20
    assert real_content(tmp_path / "a.q") == bytes(3 << 20)


def test_a_raw_data_file_stays_the_raw_image_of_the_disk(tmp_path: Path) -> None:
    run_real(["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "a.q", "1M"], tmp_path)
    io(tmp_path / "a.q", ["write -q -P 3 0 1M"])
    run_qimg_inprocess(["resize", "a.q", "3M"], tmp_path).ok()
    io(tmp_path / "a.q", ["write -q -P 4 2M 100k"])
    assert (tmp_path / "d.raw").read_bytes() == real_content(tmp_path / "a.q")
    shown = json.loads(run_real(["map", "--output=json", "a.q"], tmp_path).ok().out)
    assert [(row["start"], row["offset"], row["length"]) for row in shown] == [(0, 0, 3 << 20)]


def test_an_inconsistent_bitmap_keeps_the_image_from_being_resized(stock: Path, tmp_path: Path) -> None:
    path = tmp_path / "bits.q"
    content = bytearray((stock / "bits.q").read_bytes())
    directory = struct.unpack(">Q", content[_extension(content, 0x23852875) + 16 :][:8])[0]
    content[directory + 15] |= 1  # in use
    path.write_bytes(content)
    for words in (
        ["resize", "bits.q", "2M"],
        ["resize", "bits.q", "+0"],
        ["amend", "-o", "size=2M", "bits.q"],
    ):
        real = run_real(words, tmp_path)
        assert run_qimg_inprocess(words, tmp_path) == real
        assert real.code == 1
        assert path.read_bytes() == content


def _extension(header: bytes, kind: int) -> int:
    """Where the data of a header extension starts."""
    at = struct.unpack(">I", header[100:104])[0]
    while True:
        found, length = struct.unpack(">II", header[at : at + 8])
        if found == kind:
            return at + 8
        at += 8 + (length + 7) // 8 * 8


def test_a_device_keeps_its_size(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(8 << 20))
    with loop_device(tmp_path / "disk") as device:
        for words in (
            "8M",
            "+0",
            "9M",
            "--shrink 4M",
            "--preallocation=full 9M",
            "--preallocation=metadata 9M",
        ):
            *options, size = words.split()
            line = ["resize", "-f", "raw", *options, device, size]
            assert run_qimg_inprocess(line) == run_real(line), words


def test_an_image_on_a_device_grows_within_it(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"\5" * (8 << 20))
    with loop_device(tmp_path / "disk") as device:
        run_real(["create", "-q", "-f", "qcow2", device, "2M"]).ok()
        for words in ("3M", "--preallocation=metadata 4M", "--preallocation=full 5M", "--shrink 1M", "100G"):
            *options, size = words.split()
            line = ["resize", *options, device, size]
            ours = run_qimg_inprocess(line)
            if "full" in words:
                assert ours == run_real(line)
                assert ours.code == 1
            else:
                assert ours == Result(0, "Image resized.\n", "")
            assert run_real(["check", device]).code == 0
            io(Path(device), ["read -q -P 0 0 1M"])
        shown = json.loads(run_real(["info", "--output=json", device]).ok().out)
        assert shown["virtual-size"] == 100 << 30


def test_a_grown_disk_reads_as_zeros_where_a_damaged_table_said_otherwise(tmp_path: Path) -> None:
    """Entries behind the end (machine state of a snapshot, say) are no content of the disk."""
    path = tmp_path / "a.q"
    run_real(["create", "-q", "-f", "qcow2", "a.q", "1M"], tmp_path).ok()
    io(path, ["write -q -P 5 0 1M"])
    with path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", 128 << 10))  # the header's size alone
    run_qimg_inprocess(["resize", "a.q", "1M"], tmp_path).ok()
    assert_real_check_clean(path)
    assert real_content(path) == b"\5" * (128 << 10) + bytes((1 << 20) - (128 << 10))


def test_the_library_resizes(tmp_path: Path) -> None:
    import qimg

    run_real(["create", "-q", "-f", "qcow2", "a.q", "1M"], tmp_path).ok()
    path = tmp_path / "a.q"
    qimg.resize(path, 3 << 20)
    qimg.resize(path, 1 << 20, relative=True)
    with pytest.raises(qimg.QimgError, match="--shrink"):
        qimg.resize(path, -(1 << 20), relative=True)
    qimg.resize(path, -(1 << 20), relative=True, shrink=True)
    with qimg.open(path) as disk:
        assert disk.size == 3 << 20
    assert crash.guest_content(path) == bytes(3 << 20)
