"""`check -r` says what the real program says, and leaves an image of which the real program thinks the same
(check sheet). What is repaired, and how, is in tests/formats/qcow2/test_repair_images.py."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import qimg
from qimg.errors import NotSupported, QimgError
from spec.differential import cases
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

DAMAGED = """
leak double lost low copied uncopied misaligned dataodd l2far l2odd reserved l1reserved refblock beyond
truncated zcopied zlow zbeyond garbage zgarbage snaplow snapbad extbad v2zero df rb1 rb64 dirty
"""

SOUND = """
check -r leaks a.q
check -r all a.q
check -r all --output=json a.q
check -r all empty.q
check -r all zero.q
check -r leaks --output=json odd.q
check -r all v2.q
check -r all snap.q
check -r all snapv2.q
check -r all ext.q
check -r all df.q
check -r all bitmaps.q
check -r all lazy.q
check -r all dirty.q
check -r leaks dirty.q
check -r all p-corrupt.q
check -r leaks --output=json p-corrupt.q
check -r all p-autoclear.q
check -r all p-compatible.q
check -r all cs512.q
check -r all cs2M.q
check -r all ov.q
check -q -r all a.q
check -T none -r all a.q
check --repair=all -f qcow2 a.q
check --repair leaks --format=qcow2 a.q
check -r all --image-opts driver=qcow2,file.filename=c-leak.q
check --output=json -r all --image-opts driver=qcow2,file.filename=c-low.q
check -r all 'json:{"driver":"qcow2","file.filename":"c-leak.q"}'
check -q -r all c-leak.q
check -q -r leaks c-low.q
check -q --output=json -r all c-lost.q
"""

REFUSED = """
check -r leaks -U a.q
check -r all -U full.raw
check -r all full.raw
check -r leaks -f raw full.raw
check -q -r all full.raw
check -r all --output=json full.raw
check -r all -f raw a.q
check -r all nosuch
check -r all gone.q
check -r all -f qcow2 full.raw
check -r all p-incompatible.q
check -r all --image-opts driver=qcow2,read-only=on,file.filename=a.q
check -r all --image-opts driver=qcow2,file.filename=a.q,force-share=on
check -r foo a.q
check -r ALL a.q
check -r '' a.q
check -r
check -r all
"""

#: The real program says this where it finds nothing to free, and goes on.
NOISE = re.compile(r"qcow2_free_clusters failed: .*\n")

CASES = cases(SOUND, REFUSED) + [
    f"check -r {fix} {more}c-{name}.q"
    for name in DAMAGED.split()
    for fix, more in (("leaks", ""), ("all", ""), ("all", "--output=json "))
    if not (name == "refblock" and fix == "all")
]


def copy_named(line: str, images: Path, folder: Path) -> None:
    """Copies of the files that `line` names, and of those that they name."""
    folder.mkdir()
    for name in {*re.findall(r"[\w.-]+\.(?:q|raw)", line), "back.raw", "base.raw", "full.raw"}:
        if (images / name).exists():
            subprocess.run(["cp", "--sparse=always", images / name, folder / name], check=True)
    for path in images.iterdir():
        if path.suffix in (".df", ".bin", ".raw") and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    (folder / "dir").mkdir()


def after(line: str, folder: Path) -> list[Result]:
    """What the real check says of the images that `line` names."""
    names = [name for name in re.findall(r"[\w.-]+\.q", line) if (folder / name).exists()]
    return [run_real(["check", "-f", "qcow2", name], folder) for name in names]


@pytest.mark.parametrize("line", CASES)
def test_check_r_says_what_the_real_program_says(line: str, images: Path, tmp_path: Path) -> None:
    words = shlex.split(line)
    copy_named(line, images, tmp_path / "real")
    copy_named(line, images, tmp_path / "ours")
    real, ours = run_real(words, tmp_path / "real"), run_qimg_inprocess(words, tmp_path / "ours")
    assert ours == real
    if "bitmap" not in line:  # the real program moves bitmaps whenever it has an image open
        assert after(line, tmp_path / "ours") == after(line, tmp_path / "real")


def test_a_refcount_block_that_is_not_aligned_is_repaired(images: Path, tmp_path: Path) -> None:
    """The real program fails; so it does with `leaks`, and there we do too."""
    copy_named("c-refblock.q", images, tmp_path / "real")
    copy_named("c-refblock.q", images, tmp_path / "ours")
    words = ["check", "-r", "all", "c-refblock.q"]
    assert run_real(words, tmp_path / "real").code == 1
    assert run_qimg_inprocess(words, tmp_path / "ours").code == 0
    assert run_real(["check", "c-refblock.q"], tmp_path / "ours").code == 0
    same = run_real(["compare", images / "c-refblock.q", "c-refblock.q"], tmp_path / "ours")
    assert same.code == 0


def test_every_exit_code_is_among_the_cases(images: Path, tmp_path: Path) -> None:
    """0 repaired, 1 failed, 2 corruptions left, 3 leaks left, 63 no repair for the format."""
    copy_named("c-leak.q c-lost.q c-misaligned.q full.raw", images, tmp_path / "w")
    codes = [
        run_qimg_inprocess(["check", "-r", fix, name], tmp_path / "w").code
        for fix, name in (
            ("leaks", "c-leak.q"),
            ("leaks", "c-lost.q"),
            ("all", "c-misaligned.q"),
            ("all", "full.raw"),
        )
    ]
    assert codes == [0, 1, 2, 63]


def test_a_second_repair_finds_nothing(images: Path, tmp_path: Path) -> None:
    copy_named("c-low.q c-lost.q c-leak.q", images, tmp_path / "w")
    for name in ("c-low.q", "c-lost.q", "c-leak.q"):
        assert run_qimg_inprocess(["check", "-r", "all", name], tmp_path / "w").code == 0
        again = run_qimg_inprocess(["check", "-r", "all", name], tmp_path / "w")
        assert again.out.startswith("No errors were found on the image.\n")
        assert again.err == ""


def test_several_files_are_repaired_one_by_one(images: Path, tmp_path: Path) -> None:
    copy_named("a.q c-leak.q c-low.q full.raw", images, tmp_path / "w")
    words = ["check", "-r", "all", "--output=json", "a.q", "c-leak.q", "full.raw", "c-low.q"]
    found = run_qimg_inprocess(words, tmp_path / "w")
    assert found.code == 63
    told = [
        (one["filename"], one.get("leaks-fixed"), one.get("corruptions-fixed"))
        for one in json.loads(found.out)
    ]
    assert told == [("a.q", None, None), ("c-leak.q", 1, None), ("c-low.q", None, 2)]


# -- the library


def test_the_library_repairs(images: Path, tmp_path: Path) -> None:
    copy_named("c-low.q", images, tmp_path / "w")
    findings: list[str] = []
    result = qimg.check(tmp_path / "w" / "c-low.q", fix="all", report=findings.append)
    assert (result.corruptions, result.corruptions_fixed, result.leaks) == (0, 2, 0)
    assert any(line.startswith("Repairing cluster") for line in findings)
    assert run_real(["check", "c-low.q"], tmp_path / "w").code == 0


def test_the_library_refuses_what_cannot_be_repaired(images: Path, tmp_path: Path) -> None:
    copy_named("full.raw a.q", images, tmp_path / "w")
    with pytest.raises(NotSupported, match="This image format does not support checks"):
        qimg.check(tmp_path / "w" / "full.raw", format="raw", fix="all")
    with pytest.raises(QimgError, match="expecting 'leaks' or 'all'"):
        qimg.check(tmp_path / "w" / "a.q", fix="everything")


# -- images that were not closed


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """An image with lazy counts whose writer was killed."""
    for folder in ("real", "ours"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "real" / "l.q"
    run_real(["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M"]).ok()
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 128k", "-c", "sigraise 9", path],
        capture_output=True,
        check=False,
    )
    assert path.read_bytes()[79] == 1
    (tmp_path / "empty.raw").write_bytes(bytes(4 << 20))
    return tmp_path


def patch(path: Path, at: int, word: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(word.to_bytes(8, "big"))


#: What was damaged besides the counts: (place, word).
ALSO = {
    "nothing": None,
    "an entry with reserved bits": (0x40000, 0x8200000000050002),
    "an entry that leads out of the file": (0x40000, 0x8000010000050000),
    "a cluster that is used twice": (0x40000, 0x8000000000060000),
    "an L1 entry that is 0": (0x30000, 0),
}


@pytest.mark.parametrize("damage", ALSO)
def test_opening_a_dirty_image_for_writing_repairs_it_first(damage: str, killed: Path) -> None:
    """`convert -n` opens its target for writing; its own result is the same."""
    also = ALSO[damage]
    if also is not None:
        patch(killed / "real" / "l.q", *also)
    shutil.copyfile(killed / "real" / "l.q", killed / "ours" / "l.q")
    words = ["convert", "-n", "-f", "raw", "-O", "qcow2", "../empty.raw", "l.q"]
    real, ours = run_real(words, killed / "real"), run_qimg_inprocess(words, killed / "ours")
    assert ours == real._replace(err=NOISE.sub("", real.err))
    assert "Repairing cluster" in ours.err
    for folder in ("real", "ours"):
        assert (killed / folder / "l.q").read_bytes()[72:80] == bytes(8)
    verdicts = [run_real(["check", "l.q"], killed / folder).code for folder in ("real", "ours")]
    assert verdicts[1] <= verdicts[0]


@pytest.mark.parametrize(
    "line", ["info l.q", "map l.q", "check l.q", "convert -O raw l.q out", "compare l.q l.q"]
)
def test_reading_a_dirty_image_leaves_it_alone(line: str, killed: Path) -> None:
    folder = killed / "real"
    before = (folder / "l.q").read_bytes()
    run_qimg_inprocess(shlex.split(line), folder)
    assert (folder / "l.q").read_bytes() == before


def test_a_dirty_image_that_cannot_be_repaired_is_not_opened(killed: Path) -> None:
    """Its first L2 table lies over the L1 table of a snapshot."""
    path = killed / "ours" / "l.q"
    shutil.copyfile(killed / "real" / "l.q", path)
    data = bytearray(path.read_bytes())
    data += bytes(-len(data) % 65536)
    entry = (0x40000).to_bytes(8, "big") + (1).to_bytes(4, "big") + b"\0\1\0\1" + bytes(16) + bytes(4)
    entry += (24).to_bytes(4, "big") + bytes(8) + (4 << 20).to_bytes(8, "big") + bytes(8) + b"1s"
    data[60:72] = (1).to_bytes(4, "big") + len(data).to_bytes(8, "big")
    path.write_bytes(bytes(data) + entry)
    shutil.copyfile(path, killed / "real" / "l.q")
    words = ["convert", "-n", "-f", "raw", "-O", "qcow2", "../empty.raw", "l.q"]
    real, ours = run_real(words, killed / "real"), run_qimg_inprocess(words, killed / "ours")
    assert ours == real
    assert ours.code == 1
    assert "Could not open 'l.q': Could not repair dirty image: Input/output error" in ours.err
    assert path.read_bytes()[79] & 1
