"""dmg, cloop and bochs are only read: every command answers for an image of another product as the real
program does."""

from __future__ import annotations

import bz2
import shlex
from pathlib import Path

import pytest

from support import release7
from support.run import Result, run_qimg_inprocess, run_real

SAMPLES = Path(__file__).parents[1] / "samples"
IMAGES = {"dmg": "simple-dmg.dmg", "cloop": "simple-pattern.cloop", "bochs": "empty.bochs"}
#: What Debian's build says of the decoders that it leaves out.
MODULE = "qemu: module block-block-dmg-"

LINES = """
create -f FMT new 1M
create -f FMT -o help
convert -O FMT a.raw new
convert -c -O FMT a.raw new
dd if=IMAGE of=new -O FMT bs=64k count=2
measure -O FMT a.raw
measure -O FMT --size 1M
measure -O raw IMAGE
measure -O qcow2 IMAGE
info IMAGE
info -U IMAGE
info -f FMT IMAGE
info --output=json IMAGE
info --backing-chain overlay
map IMAGE
map --output=json IMAGE
map --output=json -s 65536 -l 4096 IMAGE
map --output=json overlay
check IMAGE
check --output=json IMAGE
check -r all IMAGE
check -f FMT -r leaks IMAGE
resize IMAGE 2M
resize -f FMT IMAGE +1M
snapshot -l IMAGE
snapshot -c a IMAGE
snapshot -d a IMAGE
commit IMAGE
rebase -u -b a.raw -F raw IMAGE
rebase -b a.raw -F raw IMAGE
amend -o size=1M IMAGE
bitmap --add IMAGE b
bench -w -c 3 IMAGE
compare IMAGE a.raw
compare IMAGE overlay
convert -l snapshot.name=a IMAGE new
convert -O raw -S 0 IMAGE new
convert -O raw -r 1G IMAGE new
dd if=IMAGE of=new bs=64k count=2 skip=1
info -f FMT a.raw
resize -f FMT a.raw 1M
"""


@pytest.fixture(params=list(IMAGES))
def format(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name: str = request.param
    for folder in ("real", "ours"):
        (tmp_path / folder).mkdir()
        data = bz2.decompress((SAMPLES / f"{IMAGES[name]}.bz2").read_bytes())
        (tmp_path / folder / IMAGES[name]).write_bytes(data)
        (tmp_path / folder / "a.raw").write_bytes(bytes(range(256)) * 4096)
        words = ["create", "-f", "qcow2", "-b", IMAGES[name], "-F", name, "overlay"]
        run_real(words, tmp_path / folder).ok()
    return name


def as_release_7(line: str, ours: Result) -> Result:
    out = ours.out
    if line.startswith("info"):
        out = release7.info_json(out) if "json" in line else release7.info_human(out)
    elif line.startswith("map"):
        out = release7.map_json(out)
    return Result(ours.code, out, release7.errors(ours.err))


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("line", [line for line in LINES.splitlines() if line])
def test_a_command_answers_as_the_real_program_does(format: str, line: str, tmp_path: Path) -> None:
    words = shlex.split(line.replace("FMT", format).replace("IMAGE", IMAGES[format]))
    real = run_real(words, tmp_path / "real")
    ours = as_release_7(line, run_qimg_inprocess(words, tmp_path / "ours"))
    told = [text for text in real.err.splitlines(keepends=True) if not text.startswith(MODULE)]
    assert ours == real._replace(err="".join(told))
    assert (tmp_path / "ours" / "new").exists() == (tmp_path / "real" / "new").exists()
    if (tmp_path / "real" / "new").exists():
        assert (tmp_path / "ours" / "new").read_bytes() == (tmp_path / "real" / "new").read_bytes()


@pytest.mark.peer("qemu-img")
def test_it_serves_as_a_backing_file(format: str, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    run_qimg_inprocess(["convert", "-O", "qcow2", "-c", "overlay", "copy"], folder).ok()
    run_real(["compare", "copy", IMAGES[format]], folder).ok()
    run_qimg_inprocess(["rebase", "-b", "", "overlay"], folder)
    run_real(["compare", "overlay", IMAGES[format]], folder).ok()


def test_committing_to_it_is_refused_and_changes_nothing(format: str, tmp_path: Path) -> None:
    path = tmp_path / "ours" / IMAGES[format]
    before = path.read_bytes()
    refused = run_qimg_inprocess(["commit", "overlay"], tmp_path / "ours")
    assert refused.code == 1
    assert refused.err.endswith("Image is read-only\n")
    assert path.read_bytes() == before
