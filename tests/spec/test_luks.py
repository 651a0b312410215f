"""luks in every command does what the real program does, in the same words (luks sheet)."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from spec.differential import as_release_7, cases
from support import luks
from support.luks import SECRETS, content, io, make, opts, real, slots
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

M = 1 << 20


def expand(line: str) -> list[str]:
    """The words of a line of the tables: ``S`` is all secrets, ``@NAME`` the option string of an image,
    ``@NAME:ID`` with another secret than ``s``, ``@NAME:`` without any."""
    words: list[str] = []
    for word in shlex.split(line):
        if word == "S":
            words += SECRETS
        elif word.startswith("@"):
            name, colon, id = word[1:].partition(":")
            words.append(opts(name, (id or None) if colon else "s"))
        else:
            words.append(word)
    return words


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images: `a` by the real program, the others by ours with content by the real one."""
    folder = tmp_path_factory.mktemp("stock")
    real(
        ["create", "-q", "-f", "luks", *SECRETS, "-o", "key-secret=s,iter-time=10", "a.luks", "1M"], folder
    ).ok()
    make(folder / "two.luks", 4096, cipher_alg="aes-128", cipher_mode="cbc")
    for number in range(1, 8):
        shutil.copy(folder / "two.luks", folder / "full.luks")
        change = {"state": "active", "new-secret": "n", "iter-time": 0}
        words = ["amend", *SECRETS, "--image-opts", opts("full.luks")]
        text = ",".join(f"{name}={value}" for name, value in change.items())
        run_qimg_inprocess([*words, "-o", text], folder).ok()
        shutil.copy(folder / "full.luks", folder / "two.luks")
        if number == 1:
            shutil.copy(folder / "full.luks", folder / "pair.luks")
    (folder / "two.luks").unlink()
    make(folder / "one.luks", 4096, cipher_alg="aes-128", cipher_mode="cbc")
    io(folder / "a.luks", ["write -q -P 7 0 1M", "write -q -P 9 64k 512"])
    for name in ("one.luks", "pair.luks", "full.luks"):
        io(folder / name, ["write -q -P 5 0 4k"])
    (folder / "a.raw").write_bytes(b"\7" * 65536 + b"\x09" * 512 + b"\7" * (M - 66048))
    (folder / "small.raw").write_bytes(b"\5" * 4096)
    return folder


@pytest.fixture
def sides(stock: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of the stock: the real program's folder and ours."""
    for side in ("real", "ours"):
        shutil.copytree(stock, tmp_path / side)
    return tmp_path / "real", tmp_path / "ours"


def both(line: str, sides: tuple[Path, Path]) -> tuple[Result, Result]:
    words = expand(line)
    return as_release_7(line, run_qimg_inprocess(words, sides[1])), real(words, sides[0])


# -- what changes nothing

READING = cases("""
info a.luks
info --output=json a.luks
info -f luks a.luks
info S --image-opts @a.luks
info --image-opts @a.luks:
info --image-opts @a.luks:nosuch
info S --image-opts @a.luks:w
info --output=json S --image-opts @one.luks
info pair.luks
info full.luks
info S --image-opts driver=luks,key-secret=s,file.filename=a.luks,foo=1
map a.luks
map S --image-opts @a.luks
map --output=json S --image-opts @a.luks
map --output=json S --image-opts @a.luks:w
map --output=json S --image-opts @a.luks -s 64k -l 64k
check a.luks
check S --image-opts @a.luks
check -r all S --image-opts @a.luks
check --output=json S --image-opts @a.luks
compare a.luks a.raw
compare S --image-opts @a.luks driver=raw,file.filename=a.raw
compare S --image-opts driver=raw,file.filename=a.raw @a.luks
compare S --image-opts @a.luks @a.luks
compare S --image-opts @a.luks @pair.luks:n
compare S --image-opts @pair.luks @pair.luks:n
compare S --image-opts @pair.luks:w @pair.luks:n
compare S --image-opts @pair.luks:nosuch @pair.luks:n
snapshot -l a.luks
snapshot -l S --image-opts @a.luks
snapshot -c x S --image-opts @a.luks
snapshot -d x S --image-opts @a.luks
snapshot -a x S --image-opts @a.luks
commit S --image-opts @a.luks
convert a.luks out
convert -O raw S --image-opts @a.luks:w out
convert -O raw S --image-opts @a.luks:nosuch out
convert -O raw S --image-opts @a.luks: out
convert -O raw --object secret,id=s,file=nosuch --image-opts @a.luks out
convert -O raw S -l s --image-opts @a.luks out
resize a.luks 2M
resize S --image-opts @a.luks 512k
resize S --image-opts @a.luks:w 2M
resize S --image-opts @a.luks 8E
resize S --preallocation=foo --image-opts @a.luks 2M
amend -f luks -o help
amend -o help a.luks
amend -o help S --image-opts @a.luks
amend -o state=active a.luks
create -f luks out 1M
create -f luks -o key-secret=s out 1M
create -f luks S -o key-secret=s out
create -f luks S -o key-secret=s,foo=1 out 1M
create -f luks S -o key-secret=s,cipher-alg=foo out 1M
create -f luks S -o key-secret=s,cipher-alg=camellia-256 out 1M
create -f luks S -o key-secret=s,cipher-alg=des out 1M
create -f luks S -o key-secret=s,cipher-alg=3des out 1M
create -f luks S -o key-secret=s,cipher-mode=foo out 1M
create -f luks S -o key-secret=s,ivgen-alg=foo out 1M
create -f luks S -o key-secret=s,ivgen-hash-alg=foo out 1M
create -f luks S -o key-secret=s,hash-alg=foo out 1M
create -f luks S -o key-secret=s,hash-alg=whirlpool out 1M
create -f luks S -o key-secret=s,iter-time=foo out 1M
create -f luks S -o cipher-alg=foo out 1M
create -f luks S -o key-secret=s,cipher-alg=foo,hash-alg=foo out 1M
create -f luks S -o key-secret=s,cipher-alg=cast5-128,cipher-mode=xts out 1M
create -f luks S -o key-secret=s,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1 out 1M
create -f luks S -o key-secret=s,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha512 out 1M
create -f luks S -o key-secret=s,preallocation=foo out 1M
create -f luks S -o key-secret=s -b a.raw -F raw out 1M
measure -O luks --size 1M
measure -O luks S -o key-secret=nosuch --size 1M
measure -O luks S -o key-secret=s,cipher-alg=foo --size 1M
convert -O luks a.raw out
convert -O luks S -o key-secret=nosuch a.raw out
convert -c -O luks S -o key-secret=s a.raw out
""")


@pytest.mark.parametrize("line", READING)
def test_what_changes_nothing_answers_as_the_real_program_does(line: str, stock: Path) -> None:
    before = luks.states(stock)
    ours, expected = both(line, (stock, stock))
    assert ours == expected
    assert luks.states(stock) == before
    assert not (stock / "out").exists()


# -- what changes something; adding a slot costs the real program seconds of measuring, so one line does

CHANGING = cases("""
resize S --image-opts @a.luks 2M
resize S --image-opts @a.luks +1000
resize --shrink S --image-opts @a.luks 500000
resize --preallocation=full S --image-opts @a.luks 3M
resize --preallocation=falloc S --image-opts @a.luks 3M
convert -n S --image-opts driver=raw,file.filename=small.raw --target-image-opts @one.luks
convert -n S --image-opts @pair.luks:n --target-image-opts @one.luks
convert -n S --image-opts driver=raw,file.filename=a.raw --target-image-opts @one.luks
convert -n S --image-opts @pair.luks --target-image-opts @one.luks:w
convert -O raw S --image-opts @a.luks out
convert -O qcow2 S --image-opts @a.luks out
convert -O raw S --image-opts @a.luks @pair.luks out
bench -w -c 3 -s 4k S --image-opts @a.luks
amend S --image-opts @pair.luks -o keyslot=1
amend S --image-opts @pair.luks -o state=foo
amend S --image-opts @pair.luks -o state=active
amend S --image-opts @pair.luks -o state=active,old-secret=s
amend S --image-opts @pair.luks -o state=active,old-secret=s,new-secret=n
amend S --image-opts @pair.luks -o state=active,new-secret=n,keyslot=8
amend S --image-opts @pair.luks -o state=active,new-secret=n,keyslot=-1
amend S --image-opts @pair.luks -o state=active,new-secret=n,keyslot=1
amend S --image-opts @pair.luks -o state=active,new-secret=nosuch
amend S --image-opts @pair.luks:w -o state=active,new-secret=o
amend S --image-opts @full.luks -o state=active,new-secret=o
amend S --image-opts @pair.luks:n -o state=active,new-secret=o,iter-time=1
amend S --image-opts @pair.luks -o state=inactive
amend S --image-opts @pair.luks -o state=inactive,new-secret=n
amend S --image-opts @pair.luks -o state=inactive,keyslot=1,new-secret=n
amend S --image-opts @pair.luks -o state=inactive,keyslot=1,iter-time=10
amend S --image-opts @pair.luks -o state=inactive,keyslot=8
amend S --image-opts @pair.luks -o state=inactive,keyslot=-1
amend S --image-opts @pair.luks -o state=inactive,keyslot=1
amend S --image-opts @pair.luks -o state=inactive,keyslot=0
amend S --image-opts @pair.luks -o state=inactive,keyslot=3
amend --force S --image-opts @pair.luks -o state=inactive,keyslot=3
amend S --image-opts @pair.luks -o state=inactive,keyslot=1,old-secret=s
amend S --image-opts @pair.luks -o state=inactive,keyslot=1,old-secret=n
amend S --image-opts @pair.luks -o state=inactive,old-secret=n
amend S --image-opts @pair.luks -o state=inactive,old-secret=w
amend S --image-opts @pair.luks -o state=inactive,old-secret=nosuch
amend S --image-opts @one.luks -o state=inactive,old-secret=s
amend S --image-opts @one.luks -o state=inactive,keyslot=0
amend --force S --image-opts @one.luks -o state=inactive,keyslot=0
amend --force S --image-opts @one.luks -o state=inactive,old-secret=s
amend S --image-opts @full.luks -o state=inactive,old-secret=n
amend S --image-opts @pair.luks -o cipher-alg=aes-256
amend S --image-opts @pair.luks -o foo=1
amend S --image-opts @pair.luks -o size=2M
""")


@pytest.mark.parametrize("line", CHANGING)
def test_what_changes_something_changes_the_same(line: str, sides: tuple[Path, Path]) -> None:
    ours, expected = both(line, sides)
    if line.startswith("bench"):
        ours, expected = (result._replace(out="") for result in (ours, expected))
    assert ours == expected
    names = sorted(os.listdir(sides[0]))
    assert sorted(os.listdir(sides[1])) == names
    for name in names:
        first, second = (side / name for side in sides)
        if name.endswith(".luks"):
            assert second.stat().st_size == first.stat().st_size
            assert slots(second) == slots(first), name
        elif name != "out":
            assert second.read_bytes() == first.read_bytes()
    for word in expand(line):
        if word.startswith("driver=luks") and expected.code == 0 and "amend" not in line:
            name = word.split(",")[1].removeprefix("file.filename=")
            assert content(sides[1] / name)[: 1 << 20] == content(sides[0] / name)[: 1 << 20]


@pytest.mark.parametrize(
    ("image", "options", "active", "opening"),
    [
        ("pair.luks", "keyslot=5", [0, 1, 5], "sno"),
        ("pair.luks", "keyslot=1", [0, 1], "so"),
        ("one.luks", "keyslot=0", [0], "o"),
        ("one.luks", "", [0, 1], "so"),
    ],
)
def test_the_real_program_opens_slots_that_were_added_or_overwritten(
    image: str, options: str, active: list[int], opening: str, sides: tuple[Path, Path]
) -> None:
    path = sides[1] / image
    said = f"state=active,new-secret=o,iter-time=0,{options}".rstrip(",")
    run_qimg_inprocess(["amend", "--force", *SECRETS, "--image-opts", opts(path), "-o", said]).ok()
    assert [number for number, is_active in enumerate(slots(path)) if is_active] == active
    for id in luks.PASSPHRASES:
        words = [
            "compare",
            *SECRETS,
            "--image-opts",
            opts(path, id),
            f"driver=raw,file.filename={sides[0]}/small.raw",
        ]
        assert run_real(words).code == (0 if id in opening else 2)
