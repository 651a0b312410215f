"""vvfat: a folder shown as a disk (protocols sheet, ``fat:``).

The real program makes the same disks; it leaves what it read before behind the end of a file, in the file's
last cluster, so where all bytes are compared the files here fill their clusters. mtools and fsck.fat read
what it cannot make.
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import stat
from pathlib import Path

import pytest

from qimg.errors import LimitError, LocationError, NotSupported, OptionError, QimgError, StorageError
from qimg.storage import fatnames, registry
from qimg.storage.vvfat import VvFat, parse_name
from support import release7
from support.run import run_peer, run_qimg_inprocess, run_real

KINDS = ["", "12:", "16:", "floppy:", "floppy:12:", "floppy:16:"]
LETTERS = "abcXYZ019 .+,;=[]~_-é日😀$%'@`!(){}^#&x\t\"*:<>?\\|\x7f"
CLUSTER = 8192
TRACK = 63 * 512

pytestmark = pytest.mark.filterwarnings("error")


def opened(name: str, **options: object) -> VvFat:
    """``fat:...`` by name, with the notices it gives passed over."""
    place = VvFat.from_options({**parse_name(name), **options})  # type: ignore[dict-item]
    assert isinstance(place, VvFat)
    return place


def same(name: str, tmp_path: Path) -> bool:
    """Whether the disk called `name` is the same as the real program makes it, and as we do."""
    run_real(["convert", "-O", "raw", name, tmp_path / "real"], tmp_path).ok()
    run_qimg_inprocess(["convert", "-O", "raw", name, tmp_path / "ours"], tmp_path).ok()
    return filecmp.cmp(tmp_path / "real", tmp_path / "ours", shallow=False)


def settle(folder: Path, rng: random.Random) -> None:
    """Times that reading does not change: last read in the future."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(
            path, (rng.randrange(1900000000, 4000000000), rng.randrange(1700000000)), follow_symlinks=False
        )


def grow(folder: Path, rng: random.Random, count: int) -> None:
    """Files and folders with names of all kinds; files fill their clusters."""
    folders = [folder]
    folder.mkdir()
    for _ in range(count):
        name = "".join(
            rng.choice(LETTERS) for _ in range(rng.choice((1, 2, 3, 5, 8, 9, 12, 13, 14, 26, 27, 40)))
        )
        if rng.random() < 0.3:
            name = name[:8] + "." + name[:3]
        path = rng.choice(folders) / name
        if name in (".", "..") or path.exists():
            continue
        if rng.random() < 0.25:
            path.mkdir()
            folders.append(path)
        else:
            path.write_bytes(rng.randbytes(CLUSTER * rng.choice((0, 1, 1, 2, 4))))
    settle(folder, rng)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_tree_is_the_real_programs_disk_to_the_byte(kind: str, seed: int, tmp_path: Path) -> None:
    grow(tmp_path / "d", random.Random(seed), 30)
    assert same(f"fat:{kind}d", tmp_path)


@pytest.mark.peer("qemu-img")
def test_folders_of_several_clusters_and_files_without_number(tmp_path: Path) -> None:
    rng = random.Random(9)
    (tmp_path / "d" / "sub" / "deep").mkdir(parents=True)
    for number in range(300):
        (tmp_path / "d" / "sub" / f"a long name, number {number}.text").touch()
        (tmp_path / "d" / "sub" / "deep" / f"{number}").write_bytes(bytes([number % 256]) * CLUSTER)
    settle(tmp_path / "d", rng)
    assert same("fat:d", tmp_path)


@pytest.mark.peer("qemu-img")
def test_links_and_what_is_no_file(tmp_path: Path) -> None:
    """A link is what it leads to, if it leads anywhere; what is no file is empty; a loop ends."""
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_bytes(b"f" * CLUSTER)
    (folder / "to file").symlink_to("file")
    (folder / "to nothing").symlink_to("nothing")
    (folder / "sub" / "up").symlink_to("..")
    os.mkfifo(folder / "fifo")
    settle(folder, random.Random(1))
    assert same("fat:d", tmp_path)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_times_are_local(zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    import time

    time.tzset()
    grow(tmp_path / "d", random.Random(5), 5)
    try:
        assert same("fat:floppy:d", tmp_path)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.peer("mcopy", "fsck.fat")
@pytest.mark.parametrize(
    ("kind", "bits"), [("", 16), ("12:", 12), ("32:", 32), ("floppy:", 12), ("floppy:12:", 12)]
)
def test_mtools_finds_every_file_with_its_content(kind: str, bits: int, tmp_path: Path) -> None:
    rng = random.Random(7)
    folder = tmp_path / "d"
    (folder / "Some folder" / "deeper").mkdir(parents=True)
    contents: dict[str, bytes] = {}
    for number, size in enumerate((0, 1, 511, 513, 4095, 4097, 8191, 8193, 100000)):
        name = ("", "Some folder/", "Some folder/deeper/")[number % 3] + f"File number {number}.data"
        contents[name] = rng.randbytes(size)
        (folder / name).write_bytes(contents[name])
    run_qimg_inprocess(["convert", "-O", "raw", f"fat:{kind}d", tmp_path / "x"], tmp_path).ok()
    start = 0 if "floppy" in kind else TRACK
    (tmp_path / "out").mkdir()
    run_peer("mcopy", ["-s", "-i", f"{tmp_path}/x@@{start}", "::", tmp_path / "out"], tmp_path).ok()
    found = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == contents
    part = f"driver=raw,offset={start},file.filename=x"
    run_qimg_inprocess(["convert", "--image-opts", part, "-O", "raw", tmp_path / "part"], tmp_path).ok()
    report = run_peer("fsck.fat", ["-n", "-v", tmp_path / "part"]).ok()
    assert (
        f"{kind[-3:-1] if kind[-3:-1] in ('12', '32') else '12' if kind else '16'} bit entries" in report.out
    )


def test_what_lies_behind_the_end_of_a_file_is_zeros(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3 * CLUSTER)
    (tmp_path / "b").write_bytes(b"b" * 100)
    place = opened(f"fat:floppy:{tmp_path}")
    whole = bytes(place.read(0, place.size))
    start = whole.index(b"b" * 100)
    assert whole[start + 100 : start + CLUSTER] == bytes(CLUSTER - 100)
    assert whole.count(b"a" * 3 * CLUSTER) == 1


def test_the_same_tree_gives_the_same_disk_with_a_source_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    names = [f"name {number}" for number in range(40)]
    disks = []
    for folder, order in (("one", names), ("two", names[::-1])):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(name)
        place = opened(f"fat:floppy:{tmp_path / folder}")
        disks.append(bytes(place.read(0, place.size)))
    assert disks[0] == disks[1]


# -- names


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("README.TXT", "README  TXT"),
        ("lower.Up", "LOWER   UP "),
        ("a long name.text", "ALONGN~1TEX"),
        (".hidden", "HIDDEN~1   "),
        (".hid.den", "HID~1   DEN"),
        ("a.tar.gz", "A~1     GZ "),
        ("a.", "A          "),
        ("a..", "A~1        "),
        ("12345678.abc", "12345678ABC"),
        ("123456789", "123456~1   "),
        ("foo~bar", "FOO~BAR    "),
        ("日本語.txt", "TXT~1      "),
        ("àb.ÀÉ", "B~1        "),
        ("+.+", "~1         "),
    ],
)
def test_short_names_as_the_real_program_made_them(name: str, short: str) -> None:
    assert fatnames.short_name(name.encode(), ()) == short.encode()


def test_short_names_that_are_taken_get_numbers() -> None:
    taken: list[bytes] = []
    for number in range(110):
        taken.append(fatnames.short_name(b"xxxxxxxxxxxx%03d" % number, taken))
    assert taken[:2] == [b"XXXXXX~1   ", b"XXXXXX~2   "]
    assert taken[8:10] == [b"XXXXXX~9   ", b"XXXXX~10   "]
    assert taken[98:100] == [b"XXXXX~99   ", b"XXXX~100   "]


def test_a_name_that_is_no_utf_8_has_its_short_name_only(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/bad\xff.x", os.O_CREAT | os.O_WRONLY))
    shown = run_qimg_inprocess(["info", f"fat:{tmp_path}"]).ok()
    assert shown.err.startswith("vvfat: invalid UTF-8 name: bad")
    assert b"BAD~1   X  " in bytes(opened(f"fat:floppy:{tmp_path}").read(0, 65536))


# -- the command line

NAMES = """
info fat:d/f
info fat:
info fat:rw:d
info fat:rw:floppy:d
create -f raw fat:d 1M
convert -O raw a.raw fat:d
info fat:99:d
info fat:16:floppy:d
info fat:12:16:d
info fat:floppyx:d
info fat:a:b:d
info fat:d:x
info fat:x/12:/d
info -f vvfat d
info --image-opts driver=vvfat,dir=d
info --image-opts driver=raw,file.driver=vvfat,file.dir=d,file.label=X
info json:{"driver":"vvfat","dir":"d"}
info json:{"driver":"vvfat","dir":"d","fat-type":13}
info json:{"driver":"vvfat","dir":"d","label":"123456789012"}
info json:{"driver":"vvfat","dir":"d","label":"hi","floppy":true,"rw":false,"fat-type":12}
info json:{"driver":"vvfat"}
info json:{"driver":"vvfat","dir":"d","rw":true}
info json:{"driver":"vvfat","filename":"fat:d"}
info json:{"driver":"vvfat","filename":"fat:d","dir":"d"}
info json:{"driver":"raw","file":"fat:d"}
map --output=json json:{"driver":"vvfat","dir":"d"}
map --output=json fat:d
map fat:d
measure -O raw fat:d
measure -O qcow2 fat:floppy:d
check fat:d
check -r all fat:d
info --output=json json:{"driver":"vvfat","dir":"d"}
bench -w -c 1 fat:d
resize fat:d 1M
compare fat:d fat:12:d
snapshot -l fat:d
rebase -b x fat:d
"""


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("line", [line for line in NAMES.splitlines() if line])
def test_commands_answer_as_the_real_program_does(line: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x" * CLUSTER)
    (tmp_path / "a.raw").write_bytes(bytes(512))
    settle(tmp_path / "d", random.Random(2))
    words = line.split(" ")
    real, ours = run_real(words, tmp_path), run_qimg_inprocess(words, tmp_path)
    out = ours.out
    if words[0] == "info":
        out = release7.info_human(out)
        if "--output=json" in words:
            known = json.loads(ours.out)
            assert known.pop("children") == []
            assert known == json.loads(real.out)
            return
    elif words[0] == "map":
        out = release7.map_json(out)
    assert (ours.code, out, ours.err) == tuple(real)


@pytest.mark.peer("qemu-img")
def test_a_folder_as_a_backing_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x" * CLUSTER)
    settle(tmp_path / "d", random.Random(3))
    run_qimg_inprocess(["create", "-f", "qcow2", "-b", "fat:floppy:d", "-F", "raw", "ov"], tmp_path).ok()
    run_real(["compare", "ov", "fat:floppy:d"], tmp_path).ok()
    run_qimg_inprocess(["compare", "ov", "fat:floppy:d"], tmp_path).ok()


def test_the_parts_of_a_name() -> None:
    assert parse_name("fat:floppy:12:some/dir") == {
        "fat-type": 12, "dir": "some/dir", "floppy": True, "rw": False,
    }  # fmt: skip
    assert parse_name("fat:c:/dir")["dir"] == "c:/dir"
    with pytest.raises(LocationError, match="must start with 'fat:'"):
        parse_name("dir")


def test_what_is_refused_for_now_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match=r"^Writing to a folder \(fat:rw:\) is not supported yet$"):
        registry.get("vvfat").from_options({"dir": str(tmp_path), "rw": True}, writable=True)
    with pytest.raises(NotSupported, match=r"^Image is read-only$"):
        registry.get("vvfat").from_options({"dir": str(tmp_path)}, writable=True)
    with pytest.raises(OptionError, match="more clusters than a floppy has"):
        opened(f"fat:floppy:32:{tmp_path}")


# -- limits


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("kind", "clusters"),
    [("", 64470), ("12:", 4020), ("floppy:", 357), ("floppy:12:", 177), ("floppy:16:", 357)],
)
def test_as_much_fits_as_with_the_real_program(kind: str, clusters: int, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for size in (clusters * CLUSTER, clusters * CLUSTER + 1):
        with open(tmp_path / "d" / "f", "wb") as file:
            file.truncate(size)
        real = run_real(["info", f"fat:{kind}d"], tmp_path)
        ours = run_qimg_inprocess(["info", f"fat:{kind}d"], tmp_path)
        assert (ours.code, ours.err) == (real.code, real.err)
        assert ours.code == (size > clusters * CLUSTER)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "names", [["f"] * 255, ["f"] * 254 + ["a name of 2 parts"], ["f"] * 255 + [""], ["f"] * 256]
)
def test_as_many_names_fit_in_the_root_as_with_the_real_program(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for number, name in enumerate(names):
        if name:
            (tmp_path / "d" / (name if " " in name else f"{name}{number}")).touch()
    real = run_real(["info", "fat:d"], tmp_path)
    ours = run_qimg_inprocess(["info", "fat:d"], tmp_path)
    assert (ours.code, ours.err) == (real.code, real.err)


@pytest.mark.peer("qemu-img")
def test_a_file_larger_than_fat_can_say(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with open(tmp_path / "d" / "f", "wb") as file:
        file.truncate(1 << 31)
    real, ours = (run(["info", "fat:d"], tmp_path) for run in (run_real, run_qimg_inprocess))
    assert (ours.code, ours.err) == (real.code, real.err)


def test_a_tree_too_large_is_refused_before_all_of_it_is_read(tmp_path: Path) -> None:
    for number in range(400):
        (tmp_path / "d" / f"{number % 20}" / f"{number}").mkdir(parents=True)
    with pytest.raises(LimitError, match=r"^Directory does not fit in FAT12 \(capacity 1.44 MB\)$"):
        opened(f"fat:floppy:12:{tmp_path / 'd'}")


def test_a_file_that_has_gone_or_shrunk_fails_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 100)
    place = opened(f"fat:floppy:{tmp_path}")
    start = bytes(place.read(0, place.size)).index(b"a" * 100)
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError, match="has become shorter"):
        place.read(start, 512)
    (tmp_path / "a").unlink()
    with pytest.raises(StorageError, match="No such file"):
        place.read(start, 512)
    os.mkfifo(tmp_path / "a")  # does not wait for somebody to write
    with pytest.raises(QimgError):
        place.read(start, 512)
    assert stat.S_ISFIFO((tmp_path / "a").stat().st_mode)
    assert place.read(0, 512)[510:] == b"\x55\xaa"
