"""parallels through every command, beside the real program (parallels sheet; the sheets of the commands)."""

from __future__ import annotations

import bz2
import os
import shutil
import struct
from pathlib import Path

import pytest

import qimg
from spec.differential import assert_same, cases
from support.build import content, io, real_content, write_raw
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
IN_USE = 0x746F6E59
LAYOUT = "AB-0C--A0-AAAA--BC-0"
SAMPLES = Path(__file__).parent.parent / "samples"


def patch(path: Path, *fields: tuple[str, int, int]) -> None:
    """Write (format, offset, value) into a file."""
    raw = bytearray(path.read_bytes())
    for code, offset, value in fields:
        struct.pack_into(code, raw, offset, value)
    path.write_bytes(raw)


def entry(number: int, value: int) -> tuple[str, int, int]:
    """The table's entry of a cluster."""
    return "<I", 64 + 4 * number, value


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the real program, whole and damaged. Nobody changes them."""
    folder = tmp_path_factory.mktemp("parallels")
    write_raw(folder / "a.raw", LAYOUT)
    run_real(["convert", "-O", "parallels", "-o", "cluster_size=64k", "a.raw", "a.hds"], folder).ok()
    run_real(["create", "-q", "-f", "parallels", "b.hds", "8M"], folder).ok()
    io(folder / "b.hds", ["write -P 1 0 1M", "write -P 2 5M 512", "write -P 3 2M 64k"], format="parallels")
    run_real(["create", "-q", "-f", "parallels", "empty.hds", "8M"], folder).ok()
    (folder / "v2.hds").write_bytes(bz2.decompress((SAMPLES / "parallels-v2.bz2").read_bytes()))
    damages = {
        "inuse": [("<I", 44, IN_USE)],
        "outside": [entry(1, 77)],
        "outside and in use": [("<I", 44, IN_USE), entry(1, 77), entry(6, 99)],
        "offset": [("<I", 48, 1)],
        "far offset": [("<I", 48, 2048 * 3)],
        "twice": [entry(1, 1), entry(6, 3)],
        "header": [("<I", 28, 1), entry(3, 0)],
        "fragmented": [entry(0, 3), entry(1, 2), entry(2, 1), entry(5, 0)],
        "short table": [("<I", 32, 3)],
    }
    for name, fields in damages.items():
        shutil.copy(folder / "b.hds", folder / f"{name}.hds")
        patch(folder / f"{name}.hds", *fields)
    for name in ("b", "inuse", "outside"):
        path = folder / f"leak {name}.hds"
        shutil.copy(folder / f"{name}.hds", path)
        os.truncate(path, path.stat().st_size + 3 * MIB - 1000)
    shutil.copy(folder / "b.hds", folder / "cut.hds")
    os.truncate(folder / "cut.hds", 3 * MIB + 5000)
    return folder


READING = """
info a.hds
info --output=json a.hds
info v2.hds
info --output=json b.hds
info --output=json inuse.hds
info --backing-chain b.hds
info -f parallels a.raw
map a.hds
map --output=json a.hds
map --output=json b.hds
map --output=json empty.hds
map --output=json v2.hds
map --output=json outside.hds
map --output=json cut.hds
map --output=json fragmented.hds
map --output=json "short table.hds"
check a.hds
check --output=json a.hds
check v2.hds
check empty.hds
check --output=json empty.hds
check inuse.hds
check --output=json inuse.hds
check "leak b.hds"
check --output=json "leak b.hds"
check fragmented.hds
check --output=json fragmented.hds
compare a.raw a.hds
compare a.hds b.hds
compare b.hds fragmented.hds
compare a.hds v2.hds
snapshot -l a.hds
amend -o size=1M a.hds
commit a.hds
rebase -u -F raw -b x a.hds
resize b.hds -- -1M
map --image-opts driver=parallels,file.filename=b.hds,prealloc-mode=truncate,prealloc-size=1M
map --image-opts driver=parallels,file.filename=b.hds,prealloc-mode=foo
map --image-opts driver=parallels,file.filename=b.hds,prealloc-size=foo
"""


@pytest.mark.parametrize("line", cases(READING))
def test_what_is_read_and_refused_is_the_real_programs(line: str, images: Path) -> None:
    assert_same(line, images)


CREATING = """
create -f parallels out 0
create -f parallels out 1
create -f parallels out 1000000
create -f parallels out 2T
create -f parallels -o cluster_size=0 out 1M
create -f parallels -o cluster_size=1 out 1M
create -f parallels -o cluster_size=1000 out 1M
create -f parallels -o cluster_size=3M out 1G
create -f parallels -o cluster_size=64k,size=7M out
create -f parallels -o cluster_size=2G out 1G
create -f parallels -o cluster_size=2147483647 out 1G
create -f parallels -o cluster_size=foo out 1G
create -f parallels -o cluster_size=512 out 1G
create -f parallels -o cluster_size=512 out 2T
create -f parallels -o foo=1 out 1G
create -f parallels -b a.hds -F parallels out
create -f parallels -o preallocation=full out 1M
create -f parallels out
create -f parallels out 4096T
create -f parallels out 8191P
convert -c -O parallels a.raw out
convert -B a.hds -O parallels a.raw out
convert -O parallels a.raw out
convert -O parallels -o cluster_size=64k a.raw out
convert -O parallels -S 0 a.raw out
"""


@pytest.mark.parametrize("line", cases(CREATING))
def test_images_are_created_as_by_the_real_program_to_the_byte(
    line: str, images: Path, tmp_path: Path
) -> None:
    found = []
    for run in (run_real, run_qimg_inprocess):
        folder = tmp_path / run.__name__
        folder.mkdir()
        for name in ("a.raw", "a.hds"):
            shutil.copy(images / name, folder)
        result = run(line.split(), folder)
        out = folder / "out"
        # What failed: the real program leaves an empty file.
        found.append((*result, out.read_bytes() if out.exists() and not result.code else None))
    assert found[0] == found[1]


def test_what_could_not_be_opened_again_is_not_created(tmp_path: Path) -> None:
    """The real program makes these, and refuses to open them (sheet, section 3)."""
    for line in ("create -f parallels -o cluster_size=2147483136 out 1G", "create -f parallels out 4095T"):
        found = run_qimg_inprocess(line.split(), tmp_path)
        assert found.code == 1
        assert "too large" in found.err
        assert not (tmp_path / "out").exists()


REPAIRS = [
    (name, how)
    for name in ("b", "inuse", "leak b", "leak inuse", "fragmented", "empty")
    for how in ("leaks", "all")
]


@pytest.mark.parametrize(("name", "how"), REPAIRS)
def test_repairs_are_the_real_programs_to_the_byte(name: str, how: str, images: Path, tmp_path: Path) -> None:
    found = []
    for number, run in enumerate((run_real, run_qimg_inprocess)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(images / f"{name}.hds", folder / "a.hds")
        result = run(["check", "-r", how, "a.hds"], folder)
        found.append((*result, (folder / "a.hds").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["outside", "leak outside", "outside and in use"])
def test_clusters_outside_the_file_are_found_and_dropped(name: str, images: Path, tmp_path: Path) -> None:
    """Release 7.2 gives the file the length that a wrong entry asks for; apart from that, and from the end
    that it takes this for, the two say the same."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copy(images / f"{name}.hds", theirs)
    shutil.copy(images / f"{name}.hds", ours)
    real, found = (
        run(["check", "-r", "all", path]) for run, path in ((run_real, theirs), (run_qimg_inprocess, ours))
    )
    assert (found.code, found.out, found.err) == (real.code, real.out, real.err)
    assert real_content(ours, format="parallels") == real_content(theirs, format="parallels")
    assert ours.stat().st_size == 4 * MIB
    assert run_real(["check", ours]).code == 0


@pytest.mark.parametrize("fix", ["none", "leaks"])
def test_clusters_outside_the_file_are_no_reason_to_lengthen_it(
    fix: str, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.hds"
    shutil.copy(images / "outside.hds", path)
    before = path.read_bytes()
    found = run_qimg_inprocess(["check", *(["-r", fix] if fix != "none" else []), path])
    assert found.code == 2
    assert found.err == "ERROR cluster 1 is outside image\n"
    assert path.read_bytes() == before


def test_clusters_used_twice_are_told_apart(images: Path, tmp_path: Path) -> None:
    """Newer releases than 7.2 find them (sheet, section 8): the later entry gets a copy."""
    path = tmp_path / "a.hds"
    shutil.copy(images / "twice.hds", path)
    content = real_content(path, format="parallels")
    found = run_qimg_inprocess(["check", path])
    assert (found.code, found.err) == (
        2,
        "ERROR duplicate offset in BAT entry 1\nERROR duplicate offset in BAT entry 6\n",
    )
    found = run_qimg_inprocess(["check", "-r", "all", path])
    assert found.code == 0
    assert found.err.count("Repairing duplicate") == 2
    assert run_real(["check", path]).ok().lines[-1] == f"Image end offset: {6 * MIB}"
    assert real_content(path, format="parallels") == content
    entries = struct.unpack("<8I", path.read_bytes()[64:96])
    assert entries == (1, 4, 3, 0, 0, 2, 5, 0)


@pytest.mark.parametrize("name", ["offset", "far offset"])
def test_a_wrong_beginning_of_the_data_is_corrected_and_costs_nothing(
    name: str, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.hds"
    shutil.copy(images / f"{name}.hds", path)
    assert run_qimg_inprocess(["check", path]).err == "ERROR data_off field has incorrect value\n"
    found = run_qimg_inprocess(["check", "-r", "all", path])
    assert (found.code, found.err) == (0, "Repairing data_off field has incorrect value\n")
    assert path.read_bytes() == (images / "b.hds").read_bytes()


def test_writing_to_a_damaged_image_repairs_it_before(images: Path, tmp_path: Path) -> None:
    """As newer releases than 7.2 do (sheet, section 5)."""
    path = tmp_path / "a.hds"
    shutil.copy(images / "twice.hds", path)
    patch(path, ("<I", 44, IN_USE))
    found = run_qimg_inprocess(["bench", "-w", "-c", "1", "-f", "parallels", path])
    assert found.code == 0
    assert found.err.splitlines() == [
        "Repairing image was not closed correctly",
        "Repairing duplicate offset in BAT entry 1",
        "Repairing duplicate offset in BAT entry 6",
    ]
    assert run_real(["check", path]).code == 0


# -- writing in place


def test_convert_into_an_existing_image_is_read_by_the_real_program(images: Path, tmp_path: Path) -> None:
    for cluster in ("1M", "64k", "1536"):
        path = tmp_path / f"{cluster}.hds"
        run_real(["create", "-q", "-f", "parallels", "-o", f"cluster_size={cluster}", path, "1310720"]).ok()
        io(path, ["write -P 7 0 1280k"], format="parallels")
        run_qimg_inprocess(["convert", "-n", "-O", "parallels", images / "a.raw", path]).ok()
        run_real(["check", path]).ok()
        assert real_content(path, format="parallels") == content(LAYOUT)


def test_clusters_that_become_zeros_give_their_room_back(tmp_path: Path) -> None:
    path, zeros = tmp_path / "a.hds", tmp_path / "zeros.raw"
    zeros.write_bytes(b"")
    os.truncate(zeros, 8 * MIB)
    run_real(["create", "-q", "-f", "parallels", path, "8M"]).ok()
    io(path, ["write -P 7 0 8M"], format="parallels")
    qimg.convert(zeros, path, format="parallels", source_format="raw", create=False)
    assert path.stat().st_size == MIB
    assert not any(real_content(path, format="parallels"))


def test_room_between_clusters_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    run_real(["create", "-q", "-f", "parallels", path, "8M"]).ok()
    io(path, ["write -P 7 0 4M"], format="parallels")
    patch(path, entry(1, 0), entry(2, 0))
    assert run_real(["check", path]).code == 0
    qimg.bench(path, format="parallels", write=True, count=3, size=MIB, step=MIB, offset=4 * MIB, pattern=9)
    entries = struct.unpack("<8I", path.read_bytes()[64:96])
    assert sorted(entry for entry in entries if entry) == [1, 2, 3, 4, 5]
    run_real(["check", path]).ok()
    assert real_content(path, format="parallels") == b"".join(
        bytes([value]) * MIB for value in (7, 0, 0, 7, 9, 9, 9, 0)
    )


def test_commit_and_rebase_through_overlays(images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "b.hds", tmp_path / "base.hds")
    run_real(["create", "-q", "-f", "qcow2", "-b", "base.hds", "-F", "parallels", "over.q"], tmp_path).ok()
    io(tmp_path / "over.q", ["write -P 5 512k 1M", "write -z 5M 1M", "write -P 6 7M 512"])
    expected = real_content(tmp_path / "over.q")
    assert run_qimg_inprocess(["convert", "-O", "raw", "over.q", "flat.raw"], tmp_path).code == 0
    assert (tmp_path / "flat.raw").read_bytes() == expected
    run_qimg_inprocess(["commit", "-q", "over.q"], tmp_path).ok()
    assert real_content(tmp_path / "base.hds", format="parallels") == expected
    run_real(["check", "base.hds"], tmp_path).ok()


# -- growing


@pytest.mark.parametrize(
    ("cluster", "size"),
    [("1M", "+3M"), ("1M", "600G"), ("512", "40M"), ("1536", "9000000"), ("64k", "8389120")],
)
def test_a_disk_that_has_grown_holds_what_it_held(cluster: str, size: str, tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    run_real(["create", "-q", "-f", "parallels", "-o", f"cluster_size={cluster}", path, "1000k"]).ok()
    io(path, ["write -P 7 0 100k", "write -P 8 900k 100k"], format="parallels")
    run_qimg_inprocess(["resize", "-f", "parallels", path, size]).ok()
    run_real(["check", "-f", "parallels", path]).ok()
    reads = ["read -P 7 0 100k", "read -P 0 100k 800k", "read -P 8 900k 100k", "read -P 0 1000k 3M"]
    shown = io(path, reads, format="parallels", options=["-r"])
    assert "verification failed" not in shown
    grown = qimg.info(path, format="parallels").virtual_size
    assert run_real(["info", "-f", "parallels", path]).ok().out.count(f"({grown} bytes)") == 1
    io(path, [f"write -P 9 {grown - 512} 512", "write -P 6 2M 64k"], format="parallels")
    run_real(["check", "-f", "parallels", path]).ok()
    assert "failed" not in io(path, [*reads[:3], f"read -P 9 {grown - 512} 512"], format="parallels")


def test_what_lies_behind_the_end_does_not_come_up_when_the_disk_grows(tmp_path: Path) -> None:
    """In the last cluster, and in entries of the table that the disk does not reach."""
    path = tmp_path / "a.hds"
    run_real(["create", "-q", "-f", "parallels", path, "4M"]).ok()
    io(path, ["write -P 7 0 4M"], format="parallels")
    patch(path, ("<Q", 36, 3072))
    run_qimg_inprocess(["resize", "-f", "parallels", path, "6M"]).ok()
    assert real_content(path, format="parallels") == b"\7" * (MIB + MIB // 2) + bytes(4 * MIB + MIB // 2)
    run_real(["check", path]).ok()


def test_a_version_1_image_is_read_written_and_grown(images: Path, tmp_path: Path) -> None:
    """The table counts sectors, and the size has 32 bits."""
    path = tmp_path / "v1.hds"
    raw = bytearray((images / "b.hds").read_bytes())
    raw[:16] = b"WithoutFreeSpace"
    for number in range(8):
        (word,) = struct.unpack_from("<I", raw, 64 + 4 * number)
        struct.pack_into("<I", raw, 64 + 4 * number, word * 2048)
    struct.pack_into("<I", raw, 40, 0xABCDEF)
    path.write_bytes(raw)
    assert_same("map --output=json v1.hds", tmp_path)
    assert_same("check v1.hds", tmp_path)
    expected = bytearray(real_content(images / "b.hds", format="parallels"))
    assert real_content(path, format="parallels") == expected
    qimg.bench(path, write=True, count=2, size=512, step=MIB, offset=3 * MIB, pattern=9)
    expected[3 * MIB : 3 * MIB + 512] = expected[4 * MIB : 4 * MIB + 512] = b"\x09" * 512
    assert real_content(path, format="parallels") == expected
    run_qimg_inprocess(["resize", path, "2000G"]).ok()
    run_real(["check", path]).ok()
    with qimg.open(path, format="parallels") as disk:
        assert disk.read(0, 8 * MIB) == expected
    found = run_qimg_inprocess(["resize", path, "3T"])
    assert (found.code, "too large" in found.err) == (1, True)


def test_shrinking_and_preallocation_are_refused(images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "b.hds", tmp_path / "a.hds")
    for line in ("resize --shrink a.hds 4M", "resize --preallocation=full a.hds 9M", "resize a.hds 4096T"):
        assert run_qimg_inprocess(line.split(), tmp_path).code == 1
        assert (tmp_path / "a.hds").read_bytes() == (images / "b.hds").read_bytes()


# -- measuring


@pytest.mark.parametrize("options", ["1M", "64k", "512"])
def test_measure_tells_what_convert_makes(options: str, images: Path, tmp_path: Path) -> None:
    found = qimg.measure(
        images / "a.raw", format="raw", output_format="parallels", options={"cluster_size": options}
    )
    run_real(
        ["convert", "-O", "parallels", "-o", f"cluster_size={options}", images / "a.raw", tmp_path / "out"]
    ).ok()
    assert found.required == (tmp_path / "out").stat().st_size
    run_real(
        [
            "convert",
            "-S",
            "0",
            "-O",
            "parallels",
            "-o",
            f"cluster_size={options}",
            images / "a.raw",
            tmp_path / "full",
        ]
    ).ok()
    assert found.fully_allocated == (tmp_path / "full").stat().st_size


# -- other writers


def test_an_image_of_parallels_itself_reads_as_the_real_program_reads_it(images: Path) -> None:
    with qimg.open(images / "v2.hds") as disk:
        assert disk.read(0, disk.size) == real_content(images / "v2.hds", format="parallels")


def test_a_grown_image_has_the_header_of_one_that_was_made_as_large(tmp_path: Path) -> None:
    for name, size in (("a.hds", "3M"), ("b.hds", "100M")):
        run_real(["create", "-q", "-f", "parallels", name, size], tmp_path).ok()
    run_qimg_inprocess(["resize", "a.hds", "100M"], tmp_path).ok()
    assert (tmp_path / "a.hds").read_bytes() == (tmp_path / "b.hds").read_bytes()
