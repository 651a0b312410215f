"""`amend` does what the real program does, in the same words (amend sheet; qcow2 sheet 17)."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spec.differential import as_release_7, cases
from spec.test_resize import assert_same_image, info
from support.build import assert_real_check_clean, build, content, io, real_content
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

IMAGES = """
create -f raw a.raw 1M
create -f raw back.raw 4M
create -f vmdk a.vmdk 1M
create -f qcow2 a.q 1M
create -f qcow2 -o compat=0.10 v2.q 1M
create -f qcow2 -o compat=0.10 v2snap.q 1M
create -f qcow2 -o lazy_refcounts=on lazy.q 1M
create -f qcow2 -o refcount_bits=8 rb8.q 1M
create -f qcow2 snap.q 1M
create -f qcow2 resnap.q 1M
create -f qcow2 -o cluster_size=512 small.q 200k
create -f qcow2 -o extended_l2=on ext.q 1M
create -f qcow2 -o extended_l2=on,refcount_bits=8 ext8.q 1M
create -f qcow2 -o data_file=df.raw df.q 1M
create -f qcow2 -o data_file=df8.raw,refcount_bits=8 df8.q 1M
create -f qcow2 -o data_file=dfr.raw,data_file_raw=on dfr.q 1M
create -f qcow2 -o compression_type=zstd zstd.q 1M
create -f qcow2 -o compression_type=zstd zstdc.q 1M
create -f qcow2 zip.q 1M
create -f qcow2 -b back.raw -F raw over.q 1M
create -f qcow2 -b back.raw -F raw ragged.q 60k
create -f qcow2 -o compat=0.10 -b back.raw -F raw v2over.q 1M
create -f qcow2 -o compat=0.10 -b a.raw -F raw v2same.q 1M
create -f qcow2 -u -b nosuch.raw -F raw gone.q 1M
"""
_DATA = ("write -P 1 0 64k", "write -P 2 192k 100k", "write -z 512k 64k", "write -z 192k 64k")
_NAMES = ("a.q", "lazy.q", "rb8.q", "df.q", "dfr.q", "zstd.q", "snap.q", "resnap.q", "over.q")
_FILLS = {
    **dict.fromkeys(_NAMES, _DATA),
    "v2.q": ("write -P 1 0 64k", "write -P 2 192k 100k"),
    "small.q": ("write -P 1 0 70k", "write -z 30k 10k", "write -z 100k 10k"),
    "zip.q": ("write -c -P 1 0 64k", "write -z 64k 64k"),
    "zstdc.q": ("write -c -P 1 0 64k",),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that the real programs made."""
    folder = tmp_path_factory.mktemp("stock")
    for line in cases(IMAGES):
        run_real(shlex.split(line.replace("create", "create -q", 1)), folder).ok()
    io(folder / "back.raw", ["write -q -P 7 0 4M"], format="raw")
    for name, commands in _FILLS.items():
        io(folder / name, [command.replace("write", "write -q", 1) for command in commands])
    io(folder / "v2snap.q", ["write -q -P 1 0 64k"])
    for name in ("snap.q", "v2snap.q", "resnap.q"):
        run_real(["snapshot", "-c", "s", name], folder).ok()
    io(folder / "snap.q", ["write -q -z 0 128k", "write -q -P 9 512k 64k", "write -q -z -u 192k 64k"])
    run_real(["snapshot", "-c", "t", "snap.q"], folder).ok()
    run_real(["resize", "-q", "resnap.q", "2M"], folder).ok()
    return folder


@pytest.fixture
def sides(stock: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two copies of the stock: the real program's folder and ours."""
    for side in ("real", "ours"):
        shutil.copytree(stock, tmp_path / side)
    yield tmp_path / "real", tmp_path / "ours"
    shutil.rmtree(tmp_path / "ours")


WORDS = """
amend
amend a.q
amend -o compat=0.10
amend -o compat=0.10 a.q b.q
amend -f qcow2 -o compat=0.10
amend -o help
amend -o help a.q b.q
amend -o help nosuch
amend -f nosuch -o help
amend -f raw -o help
amend -o help a.raw
amend -t foo -o help a.q
amend -p -f nosuch -o help
amend -p -o help nosuch
amend -f nosuch -o size=1M a.q
amend -o size=1M a.raw
amend -f raw -o size=1M a.raw
amend -p -f raw -o size=1M a.raw
amend -o size=1M nosuch
amend -p -o size=1M nosuch
amend -o size=1M gone.q
amend -t foo -o compat=1.1 a.q
amend -t foo -o compat=1.1 nosuch
amend -t foo -o compat=1.1
amend -t foo -o bogus=1 a.q
amend -p -t foo -o compat=1.1 a.q
amend -p -o compat=1.1
amend -U -o compat=1.1 a.q
amend -z -o compat=1.1 a.q
amend --forc -o bogus=1 a.q
amend -o
amend -o '' a.q
amend -o , a.q
amend -o compat=1.1, a.q
amend -o ,compat=1.1 a.q
amend -o bogus=1 a.q
amend -p -o bogus=1 a.q
amend -o compat=1.1,bogus=1 a.q
amend -o size=2M -o bogus=1 a.q
amend -o bogus=1,cluster_size=4k a.q
amend -o cluster_size=4k,bogus=1 a.q
amend -o cluster_size=4k a.q
amend -o cluster_size=64k a.q
amend -o cluster_size=zz a.q
amend -o cluster_size=4k,size=zz a.q
amend -o bogus=1,size=zz a.q
amend -o size=zz,bogus=1 a.q
amend -o preallocation=off a.q
amend -o extended_l2=off a.q
amend -o extended_l2=x a.q
amend -o compression_type=zlib a.q
amend -o encryption=on a.q
amend -o encrypt.format=luks a.q
amend -o encrypt.key-secret=x a.q
amend -o encrypt.bogus=1 a.q
amend -o encrypt.state=active,cluster_size=4k a.q
amend -o encrypt.state=active a.q
amend -o encrypt.state=foo a.q
amend -o encrypt.keyslot=x a.q
amend -o encrypt.keyslot=1 a.q
amend -o encrypt.state=active,data_file=x a.q
amend --force -o encrypt.state=inactive a.q
amend -o compat=1.2 a.q
amend -o compat= a.q
amend -o compat a.q
amend -o size=zz a.q
amend -o size=-1 a.q
amend -o size=1000 a.q
amend -o size=1 a.q
amend -o size=3P a.q
amend -o size=8E a.q
amend -o size=18446744073709551615 a.q
amend -o size=2M v2snap.q
amend -o size=1M v2snap.q
amend -o size=2M v2over.q
amend -o size=2M,compat=0.10 v2over.q
amend -o lazy_refcounts=1 a.q
amend -o refcount_bits=x a.q
amend -o refcount_bits=3 a.q
amend -o refcount_bits=0 a.q
amend -o refcount_bits=-1 a.q
amend -o refcount_bits=128 a.q
amend -o refcount_bits=3,compat=1.2 a.q
amend -o refcount_bits=3,data_file=x a.q
amend -o refcount_bits=8 v2.q
amend -o refcount_bits=8,compat=0.10 a.q
amend -o refcount_bits=8,compat=0.10,data_file=x a.q
amend -o refcount_bits=16,compat=0.10,size=1000 a.q
amend -o refcount_bits=1 snap.q
amend -o refcount_bits=1,size=2M snap.q
amend -o refcount_bits=1,compat=1.1 v2snap.q
amend -o lazy_refcounts=on v2.q
amend -o lazy_refcounts=on,compat=0.10 a.q
amend -o size=1000,lazy_refcounts=on,compat=0.10 a.q
amend -o backing_file=x,lazy_refcounts=on,compat=0.10 a.q
amend -o compat=0.10 rb8.q
amend -o compat=0.10 df.q
amend -o compat=0.10 df8.q
amend -o compat=0.10 ext.q
amend -o compat=0.10 ext8.q
amend -o compat=0.10 resnap.q
amend -o compat=0.10,size=3M snap.q
amend -o compat=0.10 zstdc.q
amend -o compat=0.10,size=1000 rb8.q
amend -o backing_file=x a.q
amend -o backing_file= a.q
amend -o backing_fmt=raw a.q
amend -o backing_file=back.raw over.q
amend -o backing_fmt=raw over.q
amend -o backing_file=back.raw,backing_fmt=qcow2 over.q
amend -o backing_file=./back.raw,backing_fmt=raw over.q
amend -o data_file=x a.q
amend -o data_file= a.q
amend -o data_file_raw=on a.q
amend -o data_file_raw=on df.q
amend -o data_file_raw=on,data_file=x a.q
amend --image-opts -f raw -o compat=1.1 driver=qcow2,file.filename=a.q
amend --image-opts -o compat=0.10 driver=qcow2,file.filename=a.q,read-only=on
amend --image-opts -o size=1M driver=raw,file.filename=a.raw
"""

CHANGES = """
amend -o compat=1.1 a.q
amend -o compat=v3 v2.q
amend -o compat=1.1 v2snap.q
amend -o compat=1.1,size=2M v2snap.q
amend -o compat=1.1,size=2M v2over.q
amend -o compat=1.1,lazy_refcounts=on v2.q
amend -o compat=1.1 v2over.q
amend -o compat=0.10 a.q
amend -o compat=v2 v2.q
amend -o compat=0.10 lazy.q
amend -o compat=0.10 small.q
amend -o compat=0.10 over.q
amend -o compat=0.10 zip.q
amend -o compat=0.10 zstd.q
amend -o compat=0.10,size=2M a.q
amend -o compat=0.10,size=300k a.q
amend -o compat=0.10,size=2M over.q
amend -o compat=0.10,size=64k ragged.q
amend -o compat=0.10,lazy_refcounts=off lazy.q
amend -o lazy_refcounts=on a.q
amend -o lazy_refcounts a.q
amend -o nolazy_refcounts lazy.q
amend -o lazy_refcounts=off v2.q
amend -o size=0 a.q
amend -o size=1M a.q
amend -o size=2M a.q
amend -o size=2M v2.q
amend -o size=10M v2same.q
amend -o size=300k a.q
amend -o size=64k a.q
amend -o size=2M over.q
amend -o size=100M ragged.q
amend -o size=300k snap.q
amend -o size=100M rb8.q
amend -o size=2M df.q
amend -o size=300k dfr.q
amend -o size=2M -o lazy_refcounts=on a.q
amend -o backing_file=back.raw,backing_fmt=raw over.q
amend -o data_file=other.raw df.q
amend -o data_file= dfr.q
amend -o data_file_raw=off df.q
amend -o data_file_raw=off dfr.q
amend -o data_file_raw=on dfr.q
amend -o data_file=x.raw,data_file_raw=off dfr.q
amend -o refcount_bits=16 a.q
amend -o refcount_bits=16 v2.q
amend -q -o compat=1.1 v2.q
amend -t none -o compat=1.1 v2.q
amend -t writethrough -o compat=0.10 a.q
amend --force -o compat=1.1 v2.q
amend -o compat=1.1 --image-opts driver=qcow2,file.filename=v2.q
amend -p -q -o compat=1.1 v2.q
amend -p -o lazy_refcounts=on a.q
amend -p -o size=2M a.q
"""

REFCOUNTS = """
amend -o refcount_bits=1 a.q
amend -o refcount_bits=2 a.q
amend -o refcount_bits=8 snap.q
amend -o refcount_bits=64 a.q
amend -o refcount_bits=64 small.q
amend -o refcount_bits=16 rb8.q
amend -o refcount_bits=4,compat=1.1 v2.q
amend -o refcount_bits=32,compat=1.1,size=3M,lazy_refcounts=on v2snap.q
amend -o refcount_bits=16,compat=0.10 rb8.q
amend -o refcount_bits=16,compat=0.10,size=2M rb8.q
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
    assert ours == real
    assert ours.code == 1
    for path in stock.iterdir():
        assert (sides[1] / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("line", cases(CHANGES, REFCOUNTS))
def test_the_image_becomes_what_the_real_program_makes_of_it(
    line: str, sides: tuple[Path, Path], stock: Path
) -> None:
    real, ours = both(line, sides)
    assert ours == real
    assert ours.code == 0
    for path in stock.glob("*.q"):
        mine, theirs = sides[1] / path.name, sides[0] / path.name
        if theirs.read_bytes() == path.read_bytes():
            continue
        if "data_file=" in line:
            assert info(mine) == info(theirs)
        else:
            assert_same_image(theirs, mine)


def test_progress_ends_whatever_happens(sides: tuple[Path, Path]) -> None:
    """An image that is refused is not reported to be 100 % done (docs/differences.md)."""
    for options in ("backing_file=x", "size=1000"):
        real, ours = both(f"amend -p -o {options} a.q", sides)
        assert (ours.code, ours.err) == (real.code, real.err)
        assert real.out == "    (0.00/100%)\r    (100.00/100%)\r\n"
        assert ours.out == "    (0.00/100%)\r\n"


def test_a_rewrite_tells_how_far_it_is(sides: tuple[Path, Path]) -> None:
    ours = run_qimg_inprocess(["amend", "-p", "-o", "compat=0.10", "a.q"], sides[1]).ok()
    assert ours.out.startswith("    (0.00/100%)\r")
    assert ours.out.endswith("    (100.00/100%)\r\n")


def test_help_lists_the_options_of_the_format(sides: tuple[Path, Path]) -> None:
    for line in (
        "amend -f qcow2 -o help",
        "amend -f qcow2 -o '?' nosuch",
        "amend -o bogus,help a.q",
        "amend -f qcow2 -o help x y",
        "amend -t foo -f qcow2 -o help",
        "amend -p -o help a.q",
        "amend --image-opts -o help driver=qcow2,file.filename=a.q",
    ):
        real, ours = both(line, sides)
        assert (ours.code, ours.err) == (real.code, real.err) == (0, "")
        assert _without_descriptions(ours.out) == _without_descriptions(real.out)


def _without_descriptions(text: str) -> list[str]:
    return [line.split(" - ")[0] for line in text.splitlines()]


def test_zero_clusters_become_what_version_2_has(tmp_path: Path) -> None:
    """Every state shows the same as before, whoever shares what with whom."""
    for backing in (None, "back.raw"):
        if backing is not None:
            io(make_raw(tmp_path / backing), ["write -q -P 7 0 1M"], format="raw")
        path = build(tmp_path / "a.q", "A0#BC-##DE", backing=backing, backing_format="raw")
        run_real(["snapshot", "-c", "one", "a.q"], tmp_path).ok()
        io(path, ["write -q -z 0 64k", "write -q -P 3 64k 64k", "write -q -z -u 192k 64k"])
        run_real(["snapshot", "-c", "two", "a.q"], tmp_path).ok()
        run_real(["snapshot", "-c", "three", "a.q"], tmp_path).ok()
        io(path, ["write -q -z 256k 128k", "write -q -z 0 64k"])
        before = [real_content(path), *(real_content(path, snapshot=str(n)) for n in (1, 2, 3))]
        run_qimg_inprocess(["amend", "-o", "compat=0.10", "a.q"], tmp_path).ok()
        assert_real_check_clean(path)
        assert info(path)["format-specific"]["data"]["compat"] == "0.10"
        assert [real_content(path), *(real_content(path, snapshot=str(n)) for n in (1, 2, 3))] == before
        run_real(["snapshot", "-d", "one", "a.q"], tmp_path).ok()
        run_real(["snapshot", "-a", "two", "a.q"], tmp_path).ok()
        assert_real_check_clean(path)
        assert real_content(path) == before[2]
        path.unlink()


def test_a_downgrade_keeps_what_snapshots_share_with_a_cluster_that_was_cleared(
    sides: tuple[Path, Path],
) -> None:
    """The real program writes its zeros into the snapshot's data (docs/differences.md)."""
    before = [real_content(sides[0] / "snap.q", snapshot=id) for id in "12"]
    real, ours = both("amend -o compat=0.10 snap.q", sides)
    assert ours == real == Result(0, "", "")
    assert_real_check_clean(sides[1] / "snap.q")
    assert [real_content(sides[1] / "snap.q", snapshot=id) for id in "12"] == before
    assert real_content(sides[0] / "snap.q", snapshot="1") != before[0], "the real program is mended"


def make_raw(path: Path) -> Path:
    """An empty raw file."""
    path.write_bytes(bytes(1 << 20))
    return path


def test_snapshots_of_version_2_get_what_version_3_demands(tmp_path: Path) -> None:
    """A snapshot that does not say how large its disk is has the size of the image."""
    path = build(tmp_path / "a.q", "AB-C", options="compat=0.10")
    run_real(["snapshot", "-c", "s", "a.q"], tmp_path).ok()
    cut_extra_data(path)
    run_qimg_inprocess(["amend", "-o", "compat=1.1", "a.q"], tmp_path).ok()
    assert_real_check_clean(path)
    run_real(["resize", "-q", "a.q", "1M"], tmp_path).ok()
    run_real(["snapshot", "-a", "s", "a.q"], tmp_path).ok()
    assert real_content(path) == content("AB-C")


def cut_extra_data(path: Path) -> None:
    """Take the extra data out of the only snapshot of an image."""
    raw = bytearray(path.read_bytes())
    table = int.from_bytes(raw[64:72], "big")
    extra = int.from_bytes(raw[table + 36 : table + 40], "big")
    names = raw[table + 40 + extra : table + 40 + extra + 16]
    raw[table + 36 : table + 40] = bytes(4)
    raw[table + 40 : table + 40 + extra + 16] = names.ljust(extra + 16, b"\0")
    path.write_bytes(raw)


def test_unknown_extensions_and_header_tails_survive(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "AB")
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[100:104], "big")
    known = bytes(raw[length : length + 392])  # the feature names
    unknown = bytes.fromhex("1234567800000003") + b"xyz\0\0\0\0\0"
    raw[length : length + 392 + 32] = b"tail-tail" + bytes(7) + known + unknown
    raw[100:104] = (length + 16).to_bytes(4, "big")
    path.write_bytes(raw)
    for options in ("lazy_refcounts=on", "size=1M", "refcount_bits=8"):
        run_qimg_inprocess(["amend", "-o", options, "a.q"], tmp_path).ok()
        after = path.read_bytes()
        assert after[length : length + 9] == b"tail-tail", options
        assert unknown in after[:1024], options
        assert_real_check_clean(path)


def test_a_header_that_would_not_fit_is_refused_before_any_change(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 200)
    folder.mkdir()
    make_raw(folder / ("x" * 190))
    name = f"{'d' * 200}/{'x' * 190}"
    options = "compat=0.10,cluster_size=512"
    run_real(["create", "-q", "-f", "qcow2", "-o", options, "-b", name, "-F", "raw", "a.q"], tmp_path).ok()
    before = (tmp_path / "a.q").read_bytes()
    words = ["amend", "-o", "compat=1.1", "a.q"]
    ours = run_qimg_inprocess(words, tmp_path)
    assert (tmp_path / "a.q").read_bytes() == before
    assert ours == run_real(words, tmp_path)
    assert ours.code == 1


def test_bitmaps_are_not_trusted_any_more_after_a_downgrade(tmp_path: Path) -> None:
    path = build(tmp_path / "a.q", "AB")
    run_real(["bitmap", "--add", "a.q", "b0"], tmp_path).ok()
    shutil.copy(path, tmp_path / "b.q")
    real = run_real(["amend", "-o", "compat=0.10", "b.q"], tmp_path)
    ours = run_qimg_inprocess(["amend", "-o", "compat=0.10", "a.q"], tmp_path)
    assert ours == real == Result(0, "", "")
    theirs = run_real(["info", "-U", "b.q"], tmp_path)
    mine = run_real(["info", "-U", "a.q"], tmp_path)
    assert mine.err == theirs.err
    assert "must all be considered inconsistent" in mine.err


def test_the_library_amends(tmp_path: Path) -> None:
    import qimg

    path = build(tmp_path / "a.q", "AB0C")
    told: list[tuple[int, int]] = []
    qimg.amend(path, {"compat": "0.10", "size": 1 << 20}, progress=lambda *share: told.append(share))
    assert told[-1][0] == told[-1][1]
    assert info(path)["format-specific"]["data"]["compat"] == "0.10"
    assert real_content(path) == content("AB0C").ljust(1 << 20, b"\0")
    with pytest.raises(qimg.OptionError, match="Unknown compatibility level"):
        qimg.amend(path, {"compat": "2.0"})
