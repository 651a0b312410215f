"""`compare` gives the same verdict and exit code as the real program (compare sheet)."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

from pathlib import Path

import pytest

from spec.differential import Difference, assert_same, cases
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

EQUAL = """
compare a.q a.q
compare full.raw data.q
compare data.q full.raw
compare data.q data4k.q
compare data.q reversed.q
compare data.q extfull.q
compare data.q metafull.q
compare empty.q hole.raw
compare zeros.raw empty.q
compare meta.q hole.raw
compare onezero.q empty.q
compare zero.q empty.raw
compare zero.q zero.q
compare packed.q holes.raw
compare packed4k.q full.raw
compare ov.q flat.q
compare ov.q flat.raw
compare flat.raw ov.q
compare abs.q base.q
compare json.q base.q
compare proto.q sub/rel2.q
compare link.q sub/rel2.q
compare jsonplain.q full.raw
compare dirty.q lazy.q
compare dfraw.q dfraw.data
compare df.q dfraw.q
compare dfraw.q df.q
compare link.raw holes.raw
compare file:a.q ./a.q
compare chain12.q chain12.q
compare huge.q huge.q
compare big.q big.q
compare snap.q snap.q
compare -U a.q a.q
compare -q a.q a.q
compare -T none a.q flat.q
compare -T directsync full.raw data.q
compare -f qcow2 -F raw data.q full.raw
compare -fraw -Fqcow2 full.raw data.q
compare -f raw -F raw a.q a.q
compare -p a.q a.q
compare -p data.q full.raw
compare -p zero.q zero.q
compare -p -q a.q a.q
compare -p ov.q flat.q
compare -p cs128k.q cs128k.q
"""

DIFFERENT_CONTENT = """
compare full.raw full2.raw
compare full2.raw full.raw
compare -q full.raw full2.raw
compare -p full.raw full2.raw
compare a.q data.q
compare -p a.q data.q
compare -q -p a.q data.q
compare a.q full.raw
compare zeros.raw full.raw
compare hole.raw full.raw
compare full.raw hole.raw
compare empty.q data.q
compare scattered.q a.q
compare a.q scattered.q
compare -p scattered.q a.q
compare ov.q base.q
compare base.q ov.q
compare ext.q ext-ov.q
compare chain12.q chain11.q
compare chain0.q chain12.q
compare -p chain0.q chain12.q
compare zlib.q zstd.q
compare cs512.q a.q
compare 3.raw 4.raw
compare 4.raw 3.raw
compare 1000.raw 1500.raw
compare 1500.raw odd.raw
compare odd.raw 1000.raw
compare -f raw data.q data.q
compare -F raw full.raw a.q
compare meta2.q meta.q
compare snap.q a.q
compare holes.raw a.q
compare df.q a.q
"""

SIZES = """
compare full.raw long.raw
compare long.raw full.raw
compare -p full.raw long.raw
compare -q full.raw long.raw
compare full.raw ld.raw
compare ld.raw full.raw
compare -p full.raw ld.raw
compare -p ld.raw full.raw
compare -q full.raw ld.raw
compare zero.q hole.raw
compare hole.raw empty.raw
compare zero.q full.raw
compare full.raw zero.q
compare -p empty.raw hole.raw
compare base.q long.q
compare long.q base.q
compare short.q base.q
compare longer.q long.q
compare empty.q meta.q
compare huge.q big.q
compare big.q empty.q
compare big.q huge.q
compare sector.q zero.q
compare odd.q onodd.q
compare -s full.raw long.raw
compare -s -p full.raw long.raw
compare -s -q full.raw long.raw
compare -s zero.q hole.raw
compare -s full2.raw ld.raw
"""

STRICT = """
compare -s a.q a.q
compare -s full.raw data.q
compare -s data.q full.raw
compare -s data.q data4k.q
compare -s data4k.q data.q
compare -s data.q reversed.q
compare -s reversed.q full.raw
compare -s extfull.q data.q
compare -s metafull.q data.q
compare -s hole.raw empty.q
compare -s empty.q hole.raw
compare -s zeros.raw hole.raw
compare -s empty.q onezero.q
compare -s onezero.q empty.q
compare -s zero.q empty.raw
compare -s zero.q zero.q
compare -s empty.q empty.q
compare -s falloc.raw hole.raw
compare -s falloc.raw zeros.raw
compare -s packed.q holes.raw
compare -s packed4k.q full.raw
compare -s zlib.q zlib.q
compare -s zlib.q zstd.q
compare -s zlib.q v2c.q
compare -s ov.q flat.q
compare -s flat.q ov.q
compare -s ov.q flat.raw
compare -s abs.q base.q
compare -s base.q ov.q
compare -s long.q long.q
compare -s long.q holes.raw
compare -s chain12.q chain12.q
compare -s chain12.q chain11.q
compare -s chain1.q chain0.q
compare -s ext-ov.q base.q
compare -s ext.q ext.q
compare -s extgone.q ext.q
compare -s dirty.q lazy.q
compare -s dfraw.q dfraw.data
compare -s df.q dfraw.q
compare -s dfmeta.q empty.q
compare -s meta.q metafalloc.q
compare -s meta.q metaext.q
compare -s cs512.q cs1k.q
compare -s cs4k.q cs8k.q
compare -s cs32k.q cs128k.q
compare -s cs1M.q cs2M.q
compare -s cs4k.q cs4k.q
compare -s huge.q huge.q
compare -s big.q big.q
compare -s full.raw full2.raw
compare -s -p full.raw full2.raw
compare -s -q a.q data.q
compare -s -p a.q data.q
compare -s zeros.q v2z.q
compare -s odd.raw odd.raw
compare -s half.q onezero.q
compare -s onraw.q full.raw
compare -s jsonplain.q full.raw
compare -s bitmaps2.q a.q
compare --image-opts -s driver=null-co,size=64k,read-zeroes=on driver=null-co,size=64k,read-zeroes=on
compare --image-opts -s driver=null-co,size=64k driver=null-co,size=64k
compare --image-opts -s driver=null-co,size=1M,read-zeroes=on driver=raw,file.filename=hole.raw
compare --image-opts -s driver=null-co,size=1M driver=raw,file.filename=full.raw
"""

FAILURES = """
compare nosuch a.q
compare a.q nosuch
compare nosuch nosuch2
compare -p nosuch a.q
compare -q nosuch a.q
compare dir a.q
compare a.q /dev/null
compare gone.q a.q
compare a.q gonedeep.q
compare wrongformat.q a.q
compare p-incompatible.q a.q
compare p-l1far.q a.q
compare t-71.q a.q
compare dfgone.q df.q
compare -f nosuch a.q a.q
compare -F nosuch a.q a.q
compare -F qcow2 a.q full.raw
compare -f qcow2 full.raw a.q
compare -T foo a.q a.q
compare -T foo nosuch a.q
compare nosuch:x a.q
compare '' a.q
compare 'json:{"driver":' a.q
compare a.q
compare
compare a.q a.q a.q
compare --image-opts -f raw a.q a.q
compare --image-opts a.q a.q
compare --image-opts driver=qcow2,file.filename=a.q driver=qcow2,file.filename=nosuch
compare -s p-corrupt.q a.q
compare p-corrupt.q a.q
"""

DAMAGE = """
compare c-misaligned.q a.q
compare a.q c-misaligned.q
compare -q c-misaligned.q a.q
compare -p c-misaligned.q empty.q
compare -s c-misaligned.q a.q
compare c-l2odd.q empty.q
compare -q c-l2odd.q empty.q
compare -p empty.q c-l2odd.q
compare c-l2far.q empty.q
compare c-beyond.q a.q
compare c-truncated.q a.q
compare c-lost.q a.q
compare c-garbage.q zlib.q
compare zlib.q c-garbage.q
compare -q c-garbage.q zlib.q
compare -p c-garbage.q zlib.q
compare -s c-garbage.q zlib.q
compare c-garbage.q empty.q
compare c-zgarbage.q zstd.q
compare c-zbeyond.q zlib.q
compare c-extbad.q ext.q
compare c-v2zero.q v2z.q
compare c-df.q df.q
compare -s c-df.q df.q
compare c-back.q a.q
compare c-misaligned.q full.raw
compare c-dataodd.q empty.q
compare c-refblock.q a.q
"""

PLACES = """
compare 'json:{"driver":"qcow2","file.filename":"a.q"}' a.q
compare --image-opts driver=qcow2,file.filename=a.q driver=qcow2,file.filename=a.q
compare --image-opts driver=raw,offset=64k,file.filename=holes.raw driver=raw,file.filename=holes.raw
compare --image-opts driver=raw,offset=64k,size=64k,file.filename=holes.raw driver=null-co,size=64k,read-zeroes=on
compare --image-opts driver=null-co,size=64k driver=null-co,size=64k
compare --image-opts driver=null-co,size=64k driver=raw,size=64k,file.filename=hole.raw
compare --image-opts driver=raw,file.driver=qcow2,file.file.filename=ov.q driver=raw,file.filename=flat.raw
compare --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=nested.q driver=qcow2,file.filename=a.q
compare --image-opts driver=raw,file.driver=qcow2,file.file.filename=zlib.q driver=qcow2,file.filename=zlib.q
compare --image-opts driver=qcow2,file.filename=ov.q,backing= driver=qcow2,file.filename=ov.q
compare 'com,ma.raw' 'spa ce.raw'
compare ümlaut.raw co:lon.raw
compare ümlaut.raw ./co:lon.raw
"""

AHEAD = "tables are read some way ahead: damage behind the difference that decides is told as well"
UNALIGNED = (
    "qcow2: Image is corrupt: Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: {})"
)
SUPPRESSED = "; further non-fatal corruption events will be suppressed\n"
RAW_ON_OVERLAY = "driver=raw,file.driver=qcow2,file.file.filename=ov.q"
DIFFERENT = {
    "compare c-misaligned.q full.raw": Difference(AHEAD, err=UNALIGNED.format("0x1") + SUPPRESSED),
    "compare c-dataodd.q empty.q": Difference(AHEAD, err=UNALIGNED.format("0x5") + SUPPRESSED),
    "compare -s c-df.q df.q": Difference(
        AHEAD,
        err="qcow2: Image is corrupt: Compressed cluster entry found in image with external data file"
        f" (L2 offset: 0x40000, L2 index: 0xa){SUPPRESSED}",
    ),
    f"compare --image-opts {RAW_ON_OVERLAY} driver=raw,file.filename=flat.raw": Difference(
        "the real program does not look at the backing files of an image on which raw stands, and finds zeros",
        code=0,
        out="Images are identical.\n",
    ),
    "compare c-refblock.q a.q": Difference("refcounts are not read: they are not needed", err=""),
}

CASES = cases(EQUAL, DIFFERENT_CONTENT, SIZES, STRICT, FAILURES, DAMAGE, PLACES)


@pytest.mark.parametrize("line", CASES)
def test_compare_says_what_the_real_program_says(line: str, images: Path) -> None:
    assert_same(line, images, DIFFERENT)


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(CASES)


def test_every_exit_code_is_among_the_cases(images: Path) -> None:
    pairs = [
        ("a.q", "a.q"),
        ("a.q", "data.q"),
        ("a.q", "nosuch"),
        ("c-l2odd.q", "a.q"),
        ("zlib.q", "c-garbage.q"),
    ]
    assert [run_real(["compare", *pair], images).code for pair in pairs] == [0, 1, 2, 3, 4]


# -- strict mode, case by case: overlays, bases of other sizes, tables of other spans

Step = tuple[str, str, list[str]]

SHAPES: dict[str, list[Step]] = {
    "data in the base, data above": [
        ("b.q", "1M", ["write -P 1 0 1M"]),
        ("one.q", "1M -b b.q -F qcow2", ["write -P 1 64k 64k"]),
        ("two.q", "1M", ["write -P 1 0 1M"]),
    ],
    "data of base and overlay that ends before the end": [
        ("b.q", "1M", ["write -P 1 0 128k"]),
        ("one.q", "1M -b b.q -F qcow2", ["write -P 1 64k 64k"]),
        ("two.q", "1M", ["write -P 1 0 128k"]),
    ],
    "halves in the other order": [
        ("one.q", "1M", ["write -P 1 0 1M"]),
        ("two.q", "1M", ["write -P 1 512k 512k", "write -P 1 0 512k"]),
    ],
    "halves in the other order, a hole behind": [
        ("one.q", "1M", ["write -P 1 0 512k"]),
        ("two.q", "1M", ["write -P 1 256k 256k", "write -P 1 0 256k"]),
    ],
    "an empty overlay of a longer base": [
        ("b.q", "2M", []),
        ("one.q", "1M -b b.q -F qcow2", []),
        ("two.q", "1M", []),
    ],
    "an empty overlay of a shorter base": [
        ("b.q", "512k", []),
        ("one.q", "1M -b b.q -F qcow2", []),
        ("two.q", "1M", []),
    ],
    "past the end of the base is like zero clusters": [
        ("b.q", "512k", []),
        ("one.q", "4M -b b.q -F qcow2", ["write -P 1 0 512k", "write -P 1 1M 64k"]),
        (
            "two.q",
            "4M",
            ["write -P 1 0 512k", "write -P 1 1M 64k", "write -z 512k 512k", "write -z 1088k 3008k"],
        ),
    ],
    "a base that ends in data": [
        ("b.q", "512k", ["write -P 1 0 512k"]),
        ("one.q", "1M -b b.q -F qcow2", []),
        ("two.q", "1M", ["write -P 1 0 512k"]),
    ],
    "a short image between long ones": [
        ("b.q", "2M", []),
        ("m.q", "1M -b b.q -F qcow2", []),
        ("one.q", "4M -b m.q -F qcow2", []),
        ("two.q", "4M", ["write -z 1M 3M"]),
    ],
    "bases that get shorter": [
        ("b.q", "1M", []),
        ("m.q", "2M -b b.q -F qcow2", []),
        ("one.q", "4M -b m.q -F qcow2", []),
        ("two.q", "4M -b b.q -F qcow2", []),
    ],
    "small clusters, a hole to the end": [
        ("one.q", "30M -o cluster_size=4k", ["write -P 1 0 1M"]),
        ("two.q", "30M", ["write -P 1 0 1M"]),
    ],
    "small clusters, data nearly to the end": [
        ("one.q", "30M -o cluster_size=4k", ["write -P 1 0 29M"]),
        ("two.q", "30M", ["write -P 1 0 29M"]),
    ],
    "small clusters below large ones": [
        ("b.q", "8M -o cluster_size=4k", []),
        ("one.q", "8M -b b.q -F qcow2", []),
        ("two.q", "8M", []),
    ],
    "large clusters below small ones": [
        ("b.q", "8M", []),
        ("one.q", "8M -b b.q -F qcow2 -o cluster_size=4k", []),
        ("two.q", "8M -o cluster_size=4k", []),
    ],
    "subclusters halve what a table tells": [
        ("one.q", "600M -o extended_l2=on,cluster_size=16k", []),
        ("two.q", "600M -o cluster_size=16k", []),
    ],
    "more than two GiB in one run": [
        ("one.q", "40G -o cluster_size=2M", []),
        ("two.q", "40G", []),
    ],
    "just two GiB": [
        ("one.q", "2147483648 -o cluster_size=2M", []),
        ("two.q", "2147483648", []),
    ],
    "a sector less than two GiB": [
        ("one.q", "2147483136 -o cluster_size=2M", []),
        ("two.q", "2147483136", []),
    ],
    "preallocated metadata": [
        ("one.q", "4M -o preallocation=metadata", []),
        ("two.q", "4M -o preallocation=metadata,cluster_size=4k", []),
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_strict_mode_draws_the_line_where_the_real_program_does(shape: str, tmp_path: Path) -> None:
    for name, how, commands in SHAPES[shape]:
        size, *options = how.split()
        run_real(["create", "-q", "-f", "qcow2", *options, name, size], tmp_path).ok()
        words = [word for command in commands for word in ("-c", command)]
        if words:
            run_peer("qemu-io", ["-t", "unsafe", "-f", "qcow2", *words, name], tmp_path).ok()
    assert_same("compare -s one.q two.q", tmp_path)
    assert_same("compare -s two.q one.q", tmp_path)
    assert_same("compare one.q two.q", tmp_path)


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_compressed_clusters_are_told_one_by_one(size: str, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\1" * (1 << 20))
    for name, cluster in (("one.q", size), ("two.q", "64k")):
        words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster}", "a.raw", name]
        run_real(words, tmp_path).ok()
    assert_same("compare -s one.q two.q", tmp_path)
    assert_same("compare -s one.q a.raw", tmp_path)


# -- many workers: large images, where the first difference must still be the one reported


@pytest.mark.parametrize("at", [0, 1 << 20, (20 << 20) + 70001, (64 << 20) - 1])
def test_the_first_difference_of_a_large_image_is_reported(at: int, tmp_path: Path) -> None:
    for name in ("one.raw", "two.raw"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 << 20)
            file.seek(8 << 20)
            file.write(b"\7" * (30 << 20))
    with (tmp_path / "two.raw").open("r+b") as file:
        for offset in (at, at + (3 << 20), (63 << 20) + 5):
            if offset < 64 << 20:
                file.seek(offset)
                file.write(b"\xff")
    assert_same("compare one.raw two.raw", tmp_path)
    assert_same("compare two.raw one.raw", tmp_path)


@pytest.mark.parametrize(("cluster", "code"), [(400, 1), (319, 3), (100, 3)])
def test_damage_counts_only_before_the_first_difference(cluster: int, code: int, tmp_path: Path) -> None:
    """They differ at 20 MiB, cluster 320; the entry of `cluster` is damaged."""
    run_real(["create", "-q", "-f", "qcow2", "one.q", "32M"], tmp_path).ok()
    run_peer("qemu-io", ["-t", "unsafe", "-c", "write -q -P 1 0 32M", "one.q"], tmp_path).ok()
    damaged = bytearray((tmp_path / "one.q").read_bytes())
    table = int.from_bytes(damaged[0x30000:0x30008], "big") & 0x00FFFFFFFFFFFE00
    damaged[table + 8 * cluster + 6] ^= 2
    (tmp_path / "bad.q").write_bytes(damaged)
    run_peer("qemu-io", ["-t", "unsafe", "-c", "write -q -P 2 20M 64k", "one.q"], tmp_path).ok()
    words = ["compare", "bad.q", "one.q"]
    real, ours = run_real(words, tmp_path), run_qimg_inprocess(words, tmp_path)
    assert real.code == code
    assert (ours.code, ours.out) == (real.code, real.out)
    assert ours.err.endswith(real.err)


def test_progress_reaches_its_end_in_long_images(images: Path) -> None:
    """How many records there are between is not promised: the real program looks at one table at a time."""
    out = run_qimg_inprocess(["compare", "-p", "big.q", "big.q"], images).ok().out
    assert out.startswith("    (0.00/100%)\r    (")
    assert out.endswith("    (100.00/100%)\rImages are identical.\n\n")
