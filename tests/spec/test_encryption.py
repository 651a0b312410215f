"""qcow2 with LUKS, qcow and qcow2 with the old AES encryption: the same words through both programs."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import qimg
from qimg.context import Notice
from qimg.errors import OptionError
from qimg.formats.protection import AES_WARNING
from spec.differential import as_release_7, assert_same, cases
from support import luks
from support.build import write_raw
from support.run import Both, run_both, run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: What stands for long words in the tables.
SHORT = {
    "$S": "--object secret,id=s,data=pass --object secret,id=w,data=wrong --object secret,id=n,data=new",
    "$L": "--image-opts driver=qcow2,file.filename=luks.q,encrypt.key-secret=s",
    "$A": "--image-opts driver=qcow2,file.filename=aes.q,encrypt.key-secret=s",
    "$Q": "--image-opts driver=qcow,file.filename=aes.qcow,encrypt.key-secret=s",
    "$V": "--image-opts driver=qcow2,file.filename=aover.q,encrypt.key-secret=s",
    "$O": "--image-opts driver=qcow2,file.filename=over.q,backing.encrypt.key-secret=s",
    "$T": "--target-image-opts -f raw other.raw",
    "$AES": "encrypt.format=aes,encrypt.key-secret=s",
    "$LUKS": "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
}
#: Encrypted images that the tables change or make, and their formats.
FORMATS = {
    "luks.q": "qcow2",
    "aes.q": "qcow2",
    "aover.q": "qcow2",
    "aes.qcow": "qcow",
    "new.q": "qcow2",
    "new.qcow": "qcow",
}


def expanded(line: str) -> str:
    """A line of a table with the long words."""
    for short in sorted(SHORT, key=len, reverse=True):
        line = line.replace(short, SHORT[short])
    return line


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encrypted images that the real program made and filled, and others."""
    folder = tmp_path_factory.mktemp("encrypted")
    secret = shlex.split(SHORT["$S"])
    write_raw(folder / "mixed.raw", "A-0BB--C0-AA-A--")
    write_raw(folder / "other.raw", "BBB0C--A---AAAA-")
    for name, format, options in (
        ("luks.q", "qcow2", SHORT["$LUKS"]),
        ("aes.q", "qcow2", SHORT["$AES"]),
        ("aes.qcow", "qcow", SHORT["$AES"]),
    ):
        made = ["create", "-q", *secret, "-f", format, "-o", options, name, "1M"]
        luks.real(made, folder).ok()
        described = f"driver={format},file.filename={name},encrypt.key-secret=s"
        target = ["-n", "--target-image-opts", "-f", "raw", "mixed.raw", described]
        run_real(["convert", *secret, *target], folder).ok()
    described = "driver=qcow2,file.filename=luks.q,encrypt.key-secret=s"
    run_real(["snapshot", *secret, "-c", "snap", "--image-opts", described], folder).ok()
    run_peer("qemu-io", [*secret, "-c", "write -q -P 9 0 70k", "--image-opts", described], folder).ok()
    run_real(["create", "-q", "-f", "qcow2", "-b", "luks.q", "-F", "qcow2", "over.q"], folder).ok()
    run_real(["create", "-q", "-f", "qcow2", "plain.q", "1M"], folder).ok()
    over = ["-b", "mixed.raw", "-F", "raw", "aover.q"]
    run_real(["create", "-q", *secret, "-f", "qcow2", "-o", SHORT["$AES"], *over], folder).ok()
    described = SHORT["$V"].split()[1]
    run_peer("qemu-io", [*secret, "-c", "write -q -P 8 100k 70k", "--image-opts", described], folder).ok()
    return folder


READING = """
info luks.q
info aes.q
info aes.qcow
info --output=json luks.q
info --output=json aes.q
info --output=json aes.qcow
info $S $L
info $S $L,encrypt.format=luks
info --image-opts driver=qcow2,file.filename=luks.q,encrypt.format=luks
info --image-opts driver=qcow2,file.filename=luks.q,encrypt.key-secret=nosuch
info $S --image-opts driver=qcow2,file.filename=luks.q,encrypt.key-secret=w
info --backing-chain over.q
info --image-opts driver=qcow2,file.filename=luks.q,encrypt.format=aes
info --image-opts driver=qcow2,file.filename=luks.q,encrypt.bogus=1
info --image-opts driver=qcow2,file.filename=plain.q,encrypt.format=aes
info --image-opts driver=qcow2,file.filename=plain.q,encrypt.key-secret=nosuch
info --image-opts driver=qcow,file.filename=aes.qcow,encrypt.format=luks
info 'json:{"driver":"qcow2","encrypt":{"key-secret":"s"},"file.filename":"luks.q"}'
# without a key nothing else is possible
check luks.q
check aes.q
check aes.qcow
map luks.q
map aes.q
map aes.qcow
snapshot -l luks.q
snapshot -l aes.qcow
measure -O raw luks.q
convert -O raw luks.q out
convert -O raw aes.q out
convert -O raw aes.qcow out
compare luks.q luks.q
compare aes.q mixed.raw
dd if=luks.q of=out
map over.q
# with one
check $S $L
check --output=json $S $L
check $S $A
check $S $Q
map $S $L
map --output=json $S $L
map --output=json $S $A
map --output=json $S $Q
map --output=json $S $O
snapshot -l $S $L
snapshot -l $S $Q
measure -O raw $S $L
measure -O qcow2 $S $L
measure -O qcow2 -o encrypt.format=luks --size 1G
measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret=nosuch --size 1G
measure -O qcow2 -o $LUKS,encrypt.cipher-alg=foo $S --size 1G
measure -O qcow2 -o $LUKS,encrypt.cipher-alg=3des $S --size 1G
measure -O qcow2 -o $AES $S --size 1G
measure -O qcow2 -o encryption=on --size 1G
compare $S $A driver=raw,file.filename=mixed.raw
compare $S $Q driver=raw,file.filename=mixed.raw
compare $S $L driver=raw,file.filename=mixed.raw
compare $S $A driver=qcow,file.filename=aes.qcow,encrypt.key-secret=s
compare $S $L driver=qcow2,file.filename=over.q,backing.encrypt.key-secret=s
# with a wrong one
check $S --image-opts driver=qcow2,file.filename=luks.q,encrypt.key-secret=w
check $S --image-opts driver=qcow2,file.filename=aes.q,encrypt.key-secret=w
map --output=json $S --image-opts driver=qcow,file.filename=aes.qcow,encrypt.key-secret=w
map $S --image-opts driver=qcow2,file.filename=luks.q,encrypt.key-secret=nosuch
map $S --image-opts driver=qcow2,file.filename=luks.q,encrypt.key-secret=s,encrypt.format=aes
map $S --image-opts driver=qcow2,file.filename=aes.q,encrypt.key-secret=s,encrypt.format=luks
map $S --image-opts driver=qcow2,file.filename=aes.q,encrypt.key-secret=s,encrypt.cipher-alg=x
map $S --image-opts driver=qcow2,file.filename=aes.q,encrypt.key-secret.x=s
map $S --image-opts driver=qcow2,file.filename=aes.q,encrypt=s
map $S --image-opts driver=qcow,file.filename=aes.qcow,encrypt.key-secret=s,encrypt.bogus=x
map --object secret,id=s,data=YQBi,format=base64 $L
map --object secret,id=s,data=/w==,format=base64 $A
map --object authz-simple,id=s,identity=x $L
map --object secret,id=s,data= $L
bench -c 1 $L
amend -o encrypt.state=active luks.q
resize luks.q 2M
rebase -u -b '' luks.q
commit over.q
"""


@pytest.mark.parametrize("line", cases(READING))
def test_an_encrypted_image_is_read_or_refused_as_by_the_real_program(line: str, images: Path) -> None:
    assert_same(expanded(line), images)


class Twice:
    """Folders with the same images: what the real program changes, and what ours does."""

    def __init__(self, images: Path, base: Path) -> None:
        self.real, self.ours = base / "real", base / "ours"
        shutil.copytree(images, self.real)
        shutil.copytree(images, self.ours)

    def run(self, line: str) -> Both:
        """A line in both."""
        words = shlex.split(expanded(line))
        both = run_both(words, self.real, self.ours)
        for _ in range(40):
            if luks._UNSURE not in both.real.err:
                break
            both = both._replace(real=run_real(words, self.real))
        ours = as_release_7(line, both.ours)
        return both._replace(
            ours=ours._replace(err=ours.err.replace(f"qemu-img: warning: {AES_WARNING}\n", ""))
        )

    def same(self, name: str) -> None:
        """The real program reads the same from both images of this name, and finds ours sound."""
        described = [
            f"driver={FORMATS[name]},file.filename={folder / name},encrypt.key-secret=s"
            if name in FORMATS
            else f"driver=raw,file.filename={folder / name}"
            for folder in (self.real, self.ours)
        ]
        secret = shlex.split(SHORT["$S"])
        run_real(["compare", *secret, "--image-opts", *described]).ok()
        assert run_real(["check", *secret, "--image-opts", described[1]]).code in (0, 63)


@pytest.fixture
def twice(images: Path, tmp_path: Path) -> Iterator[Twice]:
    yield Twice(images, tmp_path)


#: Lines, one case each, and the images to compare afterwards (before the colon).
CHANGES = """
new.q: create $S -f qcow2 -o $AES new.q 1M
new.q: create $S -f qcow2 -o encryption=on,encrypt.key-secret=s new.q 1M
new.q: create $S -f qcow2 -o $AES,compat=0.10,cluster_size=512 new.q 1M
new.q: create $S -f qcow2 -o $LUKS new.q 1M
new.qcow: create $S -f qcow -o encryption=on,encrypt.key-secret=s new.qcow 1M
new.q: convert $S -O qcow2 -o $AES mixed.raw new.q
new.q: convert $S -O qcow2 -o $AES,extended_l2=on,cluster_size=16k mixed.raw new.q
new.q: convert $S -O qcow2 -o $LUKS,compat=0.10,cluster_size=4k,encrypt.cipher-alg=aes-128 mixed.raw new.q
new.qcow: convert $S -O qcow -o $AES mixed.raw new.qcow
new.qcow: convert $S -O qcow -o $AES $L new.qcow
new.q: convert $S -O qcow2 -o $AES $Q new.q
luks.q: convert $S -n $T driver=qcow2,file.filename=luks.q,encrypt.key-secret=s
aes.q: convert $S -n $T driver=qcow2,file.filename=aes.q,encrypt.key-secret=s
aes.qcow: convert $S -n $T driver=qcow,file.filename=aes.qcow,encrypt.key-secret=s
luks.q: snapshot $S -a snap $L
luks.q: snapshot $S -d snap $L
aes.q: snapshot $S -c other $A
luks.q: resize $S $L 2M
luks.q: resize $S --shrink $L 300k
aes.q: resize $S $A +200k
aes.q: resize $S --preallocation=metadata $A 1M
luks.q: bitmap $S --add $L b0
luks.q: check $S -r all $L
aes.q: amend $S -o compat=0.10 $A
luks.q: amend $S -o refcount_bits=32,lazy_refcounts=on $L
luks.q: amend $S -o encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10 $L
aover.q: rebase $S -b '' $V
mixed.raw: commit $S $V
aover.q: commit $S -d $V
luks.q: commit $S $O
"""


@pytest.mark.parametrize("case", cases(CHANGES))
def test_an_encrypted_image_is_changed_as_by_the_real_program(case: str, twice: Twice) -> None:
    name, _, line = case.partition(": ")
    both = twice.run(line)
    assert both.ours == both.real
    twice.same(name)


#: Lines that are refused, or change nothing that can be compared.
REFUSED = """
create -f qcow2 -o encrypt.format=luks new.q 1M
create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=nosuch new.q 1M
create $S -f qcow2 -o $LUKS,encrypt.cipher-alg=foo new.q 1M
create $S -f qcow2 -o $LUKS,encrypt.cipher-alg=3des new.q 1M
create $S -f qcow2 -o $LUKS,encrypt.cipher-alg=cast5-128 new.q 1M
create $S -f qcow2 -o $LUKS,encrypt.cipher-mode=foo new.q 1M
create $S -f qcow2 -o $LUKS,encrypt.hash-alg=foo new.q 1M
create $S -f qcow2 -o $AES,encrypt.iter-time=10 new.q 1M
create $S -f qcow2 -o $AES,encryption=on new.q 1M
create $S -f qcow2 -o encryption=off,encrypt.key-secret=s new.q 1M
create -f qcow2 -o encryption=off new.q 1M
create -f qcow -o encryption=off new.qcow 1M
create -f qcow -o encryption=on new.qcow 1M
create -f qcow -o encrypt.format=aes,encrypt.key-secret=nosuch new.qcow 1M
create $S -f qcow -o $LUKS new.qcow 1M
create $S -f qcow -o encrypt.format=luks,encrypt.key-secret=s new.qcow 1M
create $S -f qcow -o encrypt.format=foo,encrypt.key-secret=s new.qcow 1M
create $S -f qcow -o $AES,encryption=on new.qcow 1M
create $S -f qcow -o encrypt.key-secret=s new.qcow 1M
create $S -f qcow2 -b aes.q -F qcow2 new.q
create $S -f qcow2 -b aes.qcow -F qcow new.q
create $S -f qcow2 -b luks.q -F qcow2 -u new.q 1M
convert $S -c -O qcow2 -o $AES mixed.raw new.q
convert $S -c -O qcow2 -o $LUKS mixed.raw new.q
convert $S -c -O qcow -o $AES mixed.raw new.qcow
convert -O qcow2 -o encrypt.format=aes mixed.raw new.q
convert $S -n -O qcow2 mixed.raw luks.q
amend $S -o encrypt.keyslot=1 $L
amend $S -o encrypt.state=foo $L
amend $S -o encrypt.state=active $L
amend $S -o encrypt.state=active,encrypt.new-secret=nosuch $L
amend $S -o encrypt.state=active,encrypt.new-secret=n,encrypt.old-secret=s $L
amend $S -o encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=8 $L
amend $S -o encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=-1 $L
amend $S -o encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0 $L
amend $S -o encrypt.state=inactive $L
amend $S -o encrypt.state=inactive,encrypt.new-secret=n $L
amend $S -o encrypt.state=inactive,encrypt.keyslot=1 $L
amend $S -o encrypt.state=inactive,encrypt.keyslot=0 $L
amend $S -o encrypt.state=inactive,encrypt.keyslot=0,encrypt.iter-time=1 $L
amend $S -o encrypt.state=inactive,encrypt.old-secret=w $L
amend $S -o encrypt.state=inactive,encrypt.old-secret=s $L
amend $S -o encrypt.state=inactive,encrypt.old-secret=nosuch $L
amend $S -o encrypt.cipher-alg=aes-256 $L
amend $S -o encrypt.key-secret=s $L
amend $S -o compat=9,encrypt.state=foo $L
amend $S -o refcount_bits=3,encrypt.state=foo $L
amend $S -o size=2M,encrypt.state=inactive,encrypt.keyslot=0 $L
amend $S -o encrypt.state=active,encrypt.new-secret=n $A
"""


@pytest.mark.parametrize("line", cases(REFUSED))
def test_what_cannot_be_done_is_refused_with_the_same_words(line: str, twice: Twice) -> None:
    before = {path.name: path.read_bytes() for path in twice.ours.iterdir()}
    both = twice.run(line)
    assert both.ours == both.real
    if both.ours.code:
        assert {path.name: path.read_bytes() for path in twice.ours.iterdir()} == before


def test_a_slot_is_given_up_so_that_its_passphrase_no_longer_opens(twice: Twice) -> None:
    secret = shlex.split(SHORT["$S"])
    opened = "driver=qcow2,file.filename=luks.q,encrypt.key-secret={}".format
    for options in (
        "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=5,encrypt.iter-time=0",
        "encrypt.state=inactive,encrypt.keyslot=0",
    ):
        words = ["amend", *secret, "-o", options, "--image-opts", opened("s")]
        run_qimg_inprocess(words, twice.ours).ok()
    refused = run_real(["check", *secret, "--image-opts", opened("s")], twice.ours)
    assert refused.err.endswith("Invalid password, cannot unlock any keyslot\n")
    run_real(["check", *secret, "--image-opts", opened("n")], twice.ours).ok()


@pytest.mark.parametrize(
    ("options", "required", "whole"),
    [
        # As the real program says for 1 GiB: each time, it makes keys for seconds.
        ("", 2490368, 1076232192),
        ("encrypt.cipher-alg=aes-128,cluster_size=4k", 3690496, 1077432320),
    ],
)
def test_a_luks_header_counts_when_sizes_are_measured(options: str, required: int, whole: int) -> None:
    chosen = dict(pair.split("=") for pair in options.split(",") if pair)
    chosen |= {"encrypt.format": "luks", "encrypt.key-secret": "s"}
    found = qimg.measure(size=1 << 30, output_format="qcow2", options=chosen, context=luks.context())
    assert (found.required, found.fully_allocated) == (required, whole)


def test_encrypted_images_take_no_compressed_data(twice: Twice) -> None:
    # The real program begins, and then fails to write.
    line = "convert $S -c -n --target-image-opts -f raw other.raw driver=qcow2,file.filename=luks.q,{}"
    before = (twice.ours / "luks.q").read_bytes()
    both = twice.run(line.format("encrypt.key-secret=s"))
    assert (both.real.code, both.ours.code) == (1, 1)
    assert both.ours.err == "qemu-img: Compression not supported for this file format\n"
    assert (twice.ours / "luks.q").read_bytes() == before


def test_making_an_image_with_the_old_encryption_warns_once(tmp_path: Path) -> None:
    notices: list[Notice] = []
    context = luks.context()
    context.warn = notices.append
    for format in ("qcow2", "qcow"):
        options = {"encrypt.format": "aes", "encrypt.key-secret": "s"}
        qimg.create(tmp_path / format, format=format, size=1 << 20, options=options, context=context)
        assert [notice.text for notice in notices] == [AES_WARNING]
        notices.clear()


def test_an_image_that_is_there_stays_where_the_secret_is_missing(tmp_path: Path) -> None:
    for format in ("qcow2", "qcow"):
        path = tmp_path / format
        path.write_bytes(b"precious")
        options = {"encrypt.format": "aes", "encrypt.key-secret": "nosuch"}
        with pytest.raises(OptionError, match="No secret with id 'nosuch'"):
            qimg.create(path, format=format, size=1 << 20, options=options, context=luks.context())
        assert path.read_bytes() == b"precious"
