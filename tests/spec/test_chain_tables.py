"""`commit`, `rebase` and `convert -n` change images of chains as the real program does (commit, rebase, convert
sheets): tables of invocations, each run through both programs on copies of the same images.

The answers must be the same, and every image that either program changed, and those between such images, must
have the same content, header and map, and be sound; all by the real program's judgement (`image_differences`).
"""

# ruff: noqa: E501  (a line is a step, or an invocation)
from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from spec.chain_lines import COMMIT, CONVERT, REBASE
from spec.differential import as_release_7, cases
from support import peers
from support.build import assert_real_check_clean, real_content
from support.run import Result, run_qimg_inprocess, run_real
from support.twins import image_differences

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: `new NAME SIZE OPTIONS` makes a qcow2 image, `io NAME COMMAND...` writes through qemu-io.
SCRIPT = r"""
set -e
io() { local name=$1 f; shift; case $name in *.raw) f=raw;; *.vmdk) f=vmdk;; *.vdi) f=vdi;; *.vpc) f=vpc;; *.qed) f=qed;; *.qcow) f=qcow;; *) f=qcow2;; esac
       local args=(); for c in "$@"; do args+=(-c "${c/write/write -q}"); done
       qemu-io -t unsafe -f $f "${args[@]}" "$name" > io.log 2>&1 || { cat io.log >&2; exit 1; }
       ! grep -q failed io.log || { cat io.log >&2; exit 1; }; }
new() { local name=$1 size=$2; shift 2; qemu-img create -q -f qcow2 "$@" "$name" "$size"; }

# -- the chain base.q <- mid.q <- top.q, and shapes of it
new base.q 1M; io base.q 'write -P 1 0 256k' 'write -P 2 512k 128k' 'write -c -P 3 704k 64k' 'write -z 832k 64k'
new mid.q 1M -b base.q -F qcow2; io mid.q 'write -P 11 64k 100k' 'write -z 512k 64k' 'write -P 12 900k 50k'
new top.q 1M -b mid.q -F qcow2
io top.q 'write -P 21 128k 64k' 'write -z 192k 64k' 'write -c -P 22 704k 64k' 'write -P 0 576k 64k' 'write -P 23 1000k 5k'
for n in 1 2 3 4 5; do below=$([ $n = 1 ] && echo base.q || echo deep$((n-1)).q); new deep$n.q 1M -b $below -F qcow2; io deep$n.q "write -P 3$n $((n*70))k 60k" "write -z $((n*128))k 64k"; done
new none.q 1M; io none.q 'write -P 5 64k 64k'
new empty.q 1M -b base.q -F qcow2
new gone.q 1M -u -b nosuch.q -F qcow2

# -- other sizes
truncate -s 700000 short.raw; io short.raw 'write -P 6 0 500k' 'write -P 7 690000 1000' || true
new short.q 300k; io short.q 'write -P 6 0 300k'
new long.q 2M; io long.q 'write -P 8 0 2M'
new onshortraw.q 1M -b short.raw -F raw; io onshortraw.q 'write -P 41 64k 64k' 'write -z 256k 64k' 'write -P 42 960k 30k'
new onshort.q 1M -b short.q -F qcow2; io onshort.q 'write -P 41 0 10k' 'write -P 42 960k 64k'
new onlong.q 1000k -b long.q -F qcow2; io onlong.q 'write -P 41 64k 64k' 'write -z 936k 64k'
new dip.q 200k -b long.q -F qcow2; io dip.q 'write -P 43 64k 4k'
new ondip.q 1M -b dip.q -F qcow2; io ondip.q 'write -P 44 0 1k' 'write -P 45 700k 1k'
new big.q 3G -b base.q -F qcow2; io big.q 'write -P 46 2G 64k'

# -- raw bases
truncate -s 1M raw.raw; io raw.raw 'write -P 9 0 1M'
cp raw.raw other.raw; io other.raw 'write -P 10 300k 4k' 'write -P 10 700k 100k'
truncate -s 1M holes.raw; io holes.raw 'write -P 9 256k 64k'
new onraw.q 1M -b raw.raw -F raw; io onraw.q 'write -P 51 64k 64k' 'write -z 256k 64k' 'write -c -P 52 512k 64k'
new onholes.q 1M -b holes.raw -F raw; io onholes.q 'write -z 256k 64k' 'write -P 53 10k 1k'
cp raw.raw probed.raw; new probed.q 1M -b probed.raw -F raw; io probed.q 'write -P 51 64k 64k'

# -- features
new v2base.q 1M -o compat=0.10; io v2base.q 'write -P 1 0 1M'
new v2.q 1M -o compat=0.10 -b base.q -F qcow2; io v2.q 'write -P 61 64k 64k' 'write -P 62 700k 10k'
new v3onv2.q 1M -b v2base.q -F qcow2; io v3onv2.q 'write -z 128k 64k' 'write -P 61 960k 64k' 'write -z 10k 4k'
new v2dip.q 1M -o compat=0.10 -b short.q -F qcow2; io v2dip.q 'write -P 63 0 64k'
new extbase.q 1M -o extended_l2=on; io extbase.q 'write -P 1 0 3k' 'write -P 2 190k 100k'
new ext.q 1M -o extended_l2=on -b extbase.q -F qcow2; io ext.q 'write -P 71 2k 2k' 'write -z 192k 4k' 'write -P 72 230k 10k' 'write -z 256k 64k'
new extonbase.q 1M -o extended_l2=on -b base.q -F qcow2; io extonbase.q 'write -P 71 2k 2k' 'write -z 192k 4k' 'write -P 72 540k 10k'
new snapbase.q 1M; io snapbase.q 'write -P 1 0 512k'; qemu-img snapshot -c b snapbase.q
new snap.q 1M -b snapbase.q -F qcow2; io snap.q 'write -P 81 64k 64k'; qemu-img snapshot -c s snap.q; io snap.q 'write -P 82 128k 128k' 'write -c -P 83 512k 64k'
new zipbase.q 1M; for at in 0 64 128 192 256; do io zipbase.q "write -c -P 5 ${at}k 64k"; done
new onzip.q 1M -b zipbase.q -F qcow2; io onzip.q 'write -P 91 70k 3k' 'write -z 128k 64k' 'write -P 92 192k 64k'
new bits.q 1M -b base.q -F qcow2; qemu-img bitmap --add bits.q b0; io bits.q 'write -P 95 64k 64k'
new dfbase.q 1M -o data_file=df.raw; io dfbase.q 'write -P 1 0 256k'
new ondf.q 1M -b dfbase.q -F qcow2; io ondf.q 'write -P 96 64k 100k' 'write -z 192k 64k'
new dfo.q 1M -o data_file=dfo.raw -b base.q -F qcow2; io dfo.q 'write -P 97 64k 100k'
new small.q 256k -o cluster_size=512 -b base.q -F qcow2; io small.q 'write -P 98 1000 3000' 'write -z 128k 10k'
new large.q 5M -o cluster_size=2M -b base.q -F qcow2; io large.q 'write -P 98 2M 64k'
new smallbase.q 300k -o cluster_size=512; io smallbase.q 'write -P 1 0 100k'
new onsmall.q 300k -b smallbase.q -F qcow2; io onsmall.q 'write -P 99 64k 64k' 'write -z 0 64k'
new rb1.q 1M -o refcount_bits=1; io rb1.q 'write -P 1 0 100k'
new onrb1.q 1M -b rb1.q -F qcow2; io onrb1.q 'write -P 99 64k 128k'

# -- other formats below and above
for f in vmdk vdi qcow qed; do qemu-img create -q -f $f b.$f 1M; io b.$f 'write -P 1 0 256k'; new on$f.q 1M -b b.$f -F $f; io on$f.q 'write -P 2 64k 128k' 'write -P 0 200k 20k'; done
qemu-img create -q -f vpc -o force_size=on b.vpc 1M; io b.vpc 'write -P 1 0 256k'; new onvpc.q 1M -b b.vpc -F vpc; io onvpc.q 'write -P 2 64k 128k'
for f in vmdk vdi qcow qed; do qemu-img create -q -f $f s.$f 512k; new grow$f.q 1M -b s.$f -F $f; io grow$f.q 'write -P 2 64k 128k' 'write -P 3 900k 1k'; done
qemu-img create -q -f vmdk -b b.vmdk -F vmdk top.vmdk 1M; io top.vmdk 'write -P 4 64k 128k'
for f in qcow qed; do qemu-img create -q -f $f -b base.q -F qcow2 top.$f 1M; io top.$f 'write -P 4 64k 128k'; done

# -- targets of convert -n
new t.q 1M; io t.q 'write -P 33 0 512k'
new tsnap.q 1M; io tsnap.q 'write -P 33 0 512k'; qemu-img snapshot -c s tsnap.q
new tzip.q 1M; for at in 0 64 128 192 256; do io tzip.q "write -c -P 5 ${at}k 64k"; done
new tover.q 1M -b raw.raw -F raw; io tover.q 'write -P 33 64k 64k'
new tdf.q 1M -o data_file=tdf.raw; io tdf.q 'write -P 33 0 512k'
new tdfr.q 1M -o data_file=tdfr.raw,data_file_raw=on; io tdfr.q 'write -P 33 0 512k'
new text.q 1M -o extended_l2=on; io text.q 'write -P 33 1k 100k' 'write -P 34 256k 64k'
new tbits.q 1M; qemu-img bitmap --add tbits.q b0; io tbits.q 'write -P 33 0 128k'
new tv2.q 1M -o compat=0.10; io tv2.q 'write -P 33 0 512k'
new tbig.q 2M; io tbig.q 'write -P 33 0 2M'
new tless.q 512k
new tempty.q 1M
new t512.q 1M -o cluster_size=512; io t512.q 'write -P 33 0 128k'
truncate -s 1M t.raw; io t.raw 'write -P 33 0 1M'
truncate -s 2M tbig.raw; io tbig.raw 'write -P 33 0 2M'
truncate -s 512k tless.raw
rm io.log
"""

#: The type of the header extension with the backing format (qcow2 specification).
BACKING_FORMAT = bytes.fromhex("e2792aca")

FORMATS = {
    ".q": "qcow2",
    ".raw": "raw",
    ".vmdk": "vmdk",
    ".vdi": "vdi",
    ".vpc": "vpc",
    ".qed": "qed",
    ".qcow": "qcow",
}


class Known(NamedTuple):
    """How ours differs on purpose: `row` of docs/differences.md. `code`, `out`, `err`: ours, None: the same.
    `holds`: (image, source): only ours worked, the image then begins with what the source read as."""

    row: int
    reason: str
    code: int | None = None
    out: str | None = None
    err: str | None = None
    holds: tuple[str, str] | None = None


#: Zeros that the two programs write down differently, where both read the same: zeros that were written as data
#: are zero clusters after our commit, and nothing is written where zeros show already (67).
NOTED = re.compile(
    r"map: \d+-\d+ is (?:present\+)?zero at depth \d+, not present\+(?:zero|data) at depth \d+$"
    r"|info: format-specific is .*'cid': "  # a number at random for each change
)

#: `convert -n -c` onto data.
REPLACED = 121
#: `--target-is-zero` where the backing file of the target shows.
TRUSTED = 122

KNOWN: dict[str, Known] = {
    "commit growvmdk.q": Known(72, "grows", 0, "Image committed.\n", "", holds=("s.vmdk", "growvmdk.q")),
    "commit growvdi.q": Known(72, "grows", 0, "Image committed.\n", "", holds=("s.vdi", "growvdi.q")),
    "convert -n --target-is-zero -O qcow2 top.q tover.q": Known(
        TRUSTED, "the target is no disk of zeros: its backing file shows", holds=("tover.q", "top.q")
    ),
    "convert -n -O nosuch raw.raw t.q": Known(
        37, "the name of the format is looked at first", err="qemu-img: Unknown file format 'nosuch'\n"
    ),
    **{
        line: Known(
            REPLACED,
            "the real program cannot put compressed data where there is data already",
            code=0,
            err="",
            holds=(line.split()[-1], line.split()[-2]),
        )
        for line in cases(CONVERT)
        if " -c -O qcow2" in line and not line.endswith("tempty.q")
    },
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of chains that the real programs made."""
    peers.need("qemu-img"), peers.need("qemu-io")
    folder = tmp_path_factory.mktemp("chains")
    done = subprocess.run(["bash", "-c", SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _forget_backing_format(folder / "probed.q")
    return folder


def _forget_backing_format(path: Path) -> None:
    """As programs before 6.1 wrote it: the header extension becomes one that nobody knows."""
    data = path.read_bytes()
    assert data.count(BACKING_FORMAT) == 1
    path.write_bytes(data.replace(BACKING_FORMAT, b"\x12\x34\x56\x78"))


@pytest.fixture(scope="module")
def chains(stock: Path) -> dict[str, set[str]]:
    """Image -> the files that it is read from."""
    links: dict[str, set[str]] = {}
    for path in stock.iterdir():
        if path.suffix == ".raw":
            links[path.name] = set()
            continue
        shown = info(path)
        data = shown.get("format-specific", {}).get("data", {}).get("data-file")
        links[path.name] = {str(name) for name in (shown.get("backing-filename"), data) if name}
    found: dict[str, set[str]] = {}
    for name in links:
        chain: set[str] = set()
        more = {name}
        while more:
            chain |= more
            more = {below for one in more for below in links.get(one, ())} - chain
        found[name] = chain
    return found


def info(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """The real program's ``info`` of an image alone."""
    words = ["info", "-f", FORMATS[path.suffix], "--output=json", path.name]
    shown: dict[str, dict[str, dict[str, str]]] = json.loads(run_real(words, path.parent).ok().out)
    return shown


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real program's folder and ours, empty."""
    both = tmp_path_factory.mktemp("sides")
    for side in ("real", "ours"):
        (both / side).mkdir()
    return both / "real", both / "ours"


@pytest.fixture
def sides(stock: Path, folders: tuple[Path, Path]) -> tuple[Path, Path]:
    """The two folders as copies of the stock: what the line before changed is copied anew."""
    for side in folders:
        for name in set(os.listdir(side)) - set(os.listdir(stock)):
            (side / name).unlink()
        stale = [path for path in stock.iterdir() if _touched(path, side / path.name)]
        if stale:
            copy = ["cp", "-a", "--sparse=auto", "--remove-destination"]
            subprocess.run([*copy, *stale, side], check=True)
    return folders


def _touched(path: Path, copy: Path) -> bool:
    """Whether `copy`, made with the times of `path`, was written to or is not there."""
    if not copy.exists():
        return True
    old, now = path.stat(), copy.stat()
    return (old.st_size, old.st_mtime_ns) != (now.st_size, now.st_mtime_ns)


@pytest.mark.parametrize("line", cases(COMMIT))
def test_commit_leaves_the_chain_that_the_real_program_leaves(
    line: str, sides: tuple[Path, Path], stock: Path, chains: dict[str, set[str]]
) -> None:
    assert_same_chains(line, sides, stock, chains)


@pytest.mark.parametrize("line", cases(REBASE))
def test_rebase_leaves_the_overlay_that_the_real_program_leaves(
    line: str, sides: tuple[Path, Path], stock: Path, chains: dict[str, set[str]]
) -> None:
    assert_same_chains(line, sides, stock, chains)


@pytest.mark.parametrize("line", cases(CONVERT))
def test_convert_n_leaves_the_target_that_the_real_program_leaves(
    line: str, sides: tuple[Path, Path], stock: Path, chains: dict[str, set[str]]
) -> None:
    assert_same_chains(line, sides, stock, chains)


def assert_same_chains(line: str, sides: tuple[Path, Path], stock: Path, chains: dict[str, set[str]]) -> None:
    """Both programs answer `line` alike and leave chains that the real program cannot tell apart, or differ as
    `KNOWN` says."""
    words = shlex.split(line)
    real = run_real(words, sides[0])
    ours = as_release_7(line, run_qimg_inprocess(words, sides[1]))
    known = KNOWN.get(line, Known(0, ""))
    expected = Result(
        real.code if known.code is None else known.code,
        real.out if known.out is None else known.out,
        real.err if known.err is None else known.err,
    )
    problems = [] if ours == expected else [f"{ours}, not {expected}"]
    problems += _image_problems(sides, stock, chains, known, failed=ours.code != 0)
    assert not problems, "\n".join([line, *problems])


def _image_problems(
    sides: tuple[Path, Path], stock: Path, chains: dict[str, set[str]], known: Known, *, failed: bool
) -> list[str]:
    theirs, mine = sides
    names = {path.name for path in stock.iterdir()}
    for side in sides:
        found = set(os.listdir(side))
        if found != names:
            return [f"{side.name}: files {sorted(found ^ names)} came or went"]
    changed = [_changed(stock, side) for side in sides]
    if failed:
        return [f"{name} was changed by a command that failed" for name in sorted(changed[1])]
    if known.holds is not None:
        target, source = mine / known.holds[0], stock / known.holds[1]
        assert_real_check_clean(target, format=FORMATS[target.suffix])
        held = real_content(target, format=FORMATS[target.suffix])
        return [] if held.startswith(real_content(source)) else [f"{target.name} is no copy"]
    both = changed[0] | changed[1]
    # Those between a base and the image committed into it change with it.
    touched = both | {between for name in both for between in chains[name] & names if chains[between] & both}
    problems = []
    for name in sorted(names):
        if name not in touched:
            continue
        kind = FORMATS[Path(name).suffix]
        if name in ("df.raw", "dfo.raw", "tdf.raw"):
            continue  # a part of an image, compared with it
        found_here = image_differences(theirs / name, mine / name, kind)
        problems += [f"{name}: {text}" for text in found_here if not NOTED.search(text)]
        if kind == "qcow2" and not problems:
            problems += _snapshot_problems(theirs / name, mine / name)
    return problems


def _changed(stock: Path, side: Path) -> set[str]:
    touched = [path for path in stock.iterdir() if _touched(path, side / path.name)]
    return {path.name for path in touched if path.read_bytes() != (side / path.name).read_bytes()}


def _snapshot_problems(theirs: Path, mine: Path) -> list[str]:
    """Internal snapshots of ours that do not read as the real program's do."""
    shown: list[dict[str, str]] = list(info(mine).get("snapshots", ()))  # type: ignore[arg-type]
    return [
        f"{mine.name}: snapshot {row['name']} reads differently"
        for row in shown
        if real_content(mine, format="qcow2", snapshot=row["name"])
        != real_content(theirs, format="qcow2", snapshot=row["name"])
    ]
