"""``vhd`` says ``vpc`` wherever a format is named (docs/differences.md); images record the real name."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from support.build import write_raw
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
LINES = """
info -f vhd base.vhd
map -f vhd base.vhd
map --image-opts driver=vhd,file.filename=base.vhd
compare -f vhd -F vhd base.vhd base.vhd
measure -O vhd --size 10M
create -f vhd -o help
create -f vhd new 5M
create -f qcow2 -b base.vhd -F vhd new
create -f qcow2 -o backing_file=base.vhd,backing_fmt=vhd new
create -f qed -o backing_file=base.vhd,backing_fmt=vhd new
convert -f vhd -O vhd -o force_size=on base.vhd new
convert -n --target-image-opts empty.raw driver=vhd,file.filename=base.vhd
convert -f vhd -O qcow2 -B base.vhd -F vhd base.vhd new
convert -O qcow2 -o backing_file=base.vhd,backing_fmt=vhd base.vhd new
dd -f vhd -O vhd if=base.vhd of=new
rebase -F vhd -b base.vhd over.qcow2
amend -o backing_file=base.vhd,backing_fmt=vhd over.qcow2
commit -f qcow2 over.qcow2
bench -c 1 -f vhd base.vhd
resize -f vhd base.vhd +1M
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A VHD with something in it, and an overlay."""
    run_real(["create", "-q", "-f", "vpc", "-o", "force_size=on", "base.vhd", "5M"], tmp_path).ok()
    run_peer("qemu-io", ["-f", "vpc", "-c", "write -P 7 0 1M", "base.vhd"], tmp_path).ok()
    words = ["create", "-q", "-f", "qcow2", "-b", "base.vhd", "-F", "vpc", "over.qcow2"]
    run_real(words, tmp_path).ok()
    write_raw(tmp_path / "empty.raw", "-")
    return tmp_path


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_a_command_takes_vhd_for_vpc(line: str, folder: Path) -> None:
    found = run_qimg_inprocess(line.split(), folder)
    assert (found.code, found.err) == (0, "")
    for name in ("over.qcow2", "new"):
        if (folder / name).exists():
            assert '"vhd"' not in run_real(["info", "--output=json", name], folder).ok().out


def test_the_library_takes_vhd_for_vpc(folder: Path) -> None:
    base, new, over = (folder / name for name in ("base.vhd", "new.vhd", "over.qcow2"))
    qimg.convert(base, new, source_format="vhd", format="vhd", options={"force_size": True})
    assert qimg.compare(base, new, first_format="vhd", second_format="vhd").verdict == "identical"
    assert qimg.info(new, format="vhd").format == "vpc"
    assert qimg.measure(size=5 * MIB, output_format="vhd").required > 0
    qimg.create(folder / "other", size=MIB, format="vhd")
    qimg.rebase(over, "new.vhd", backing_format="vhd", unsafe=True)
    assert "backing file format: vpc" in run_real(["info", over]).ok().out
    qimg.create(folder / "top", format="qcow2", backing=str(base), backing_format="vhd")
    assert "backing file format: vpc" in run_real(["info", folder / "top"]).ok().out
