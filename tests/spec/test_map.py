"""`map` finds the same extents as the real program, in text and JSON (map sheet)."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

import json
from pathlib import Path

import pytest

from qimg.errors import GateError, OpenError
from spec.differential import Difference, assert_same, cases
from support.run import run_qimg, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

RAW = """
map empty.raw
map --output=json empty.raw
map hole.raw
map --output=json hole.raw
map 3.raw
map --output=json 3.raw
map --output=json 1000.raw
map odd.raw
map --output=json odd.raw
map holes.raw
map --output=json holes.raw
map --output=json -f raw holes.raw
map full.raw
map --output=json falloc.raw
map --output=json zeros.raw
map --output=json link.raw
map 'com,ma.raw'
map 'spa ce.raw'
map ümlaut.raw
map -f raw a.q
map --output=json -f raw big.q
"""

FEATURES = """
map empty.q
map --output=json empty.q
map zero.q
map --output=json zero.q
map --output=json odd.q
map --output=json sector.q
map a.q
map --output=json a.q
map data.q
map --output=json scattered.q
map scattered.q
map --output=json reversed.q
map --output=json v2.q
map v2c.q
map --output=json v2c.q
map --output=json v2z.q
map --output=json cs512.q
map --output=json cs1k.q
map cs2k.q
map --output=json cs4k.q
map --output=json cs8k.q
map cs16k.q
map --output=json cs128k.q
map --output=json cs512k.q
map cs1M.q
map --output=json cs2M.q
map --output=json rb1.q
map --output=json rb64.q
map zeros.q
map --output=json zeros.q
map --output=json onezero.q
map --output=json half.q
map big.q
map --output=json big.q
map huge.q
map --output=json huge.q
map zlib.q
map --output=json zlib.q
map zstd.q
map --output=json zstd.q
map --output=json packed.q
map packed4k.q
map --output=json packed4k.q
map --output=json dirty.q
map --output=json lazy.q
map meta.q
map --output=json meta.q
map meta2.q
map --output=json meta2.q
map --output=json metafalloc.q
map --output=json metafull.q
map --output=json metaext.q
map --output=json metav2.q
map ext.q
map --output=json ext.q
map ext16k.q
map --output=json ext16k.q
map ext2m.q
map --output=json ext2m.q
map --output=json extfull.q
map --output=json extgone.q
map df.q
map --output=json df.q
map dfraw.q
map --output=json dfraw.q
map dfext.q
map --output=json dfext.q
map --output=json dfmeta.q
map dfzero.q
map dfgone.q
map sub/dfrel.q
map --output=json sub/dfrel.q
map snap.q
map --output=json snap.q
map --output=json snapext.q
map --output=json bitmaps2.q
map p-extension.q
map --output=json p-corrupt.q
map p-incompatible.q
map p-magic.q
map --output=json t-262145.q
map t-500.q
"""

WINDOWS = """
map --output=json -s 64k a.q
map --output=json -s 70000 -l 300001 a.q
map -s 70000 -l 300001 a.q
map --output=json --start-offset=0x10000 --max-length=0x10000 a.q
map --output=json -s 1M a.q
map --output=json -s 2M a.q
map -s 2M a.q
map --output=json -l 0 a.q
map -l 0 a.q
map --output=json -s 1k -l 0 a.q
map --output=json -s 1048575 a.q
map --output=json -s 1048575 -l 8E a.q
map --output=json -s 7E -l 7E a.q
map --output=json -s 1 -l 1 a.q
map --output=json -s 65535 -l 2 a.q
map --output=json -s 65535 -l 2 full.raw
map --output=json -s 70000 odd.raw
map --output=json -s 70001 odd.raw
map --output=json -s 70000 -l 2 odd.raw
map --output=json -s 3 -l 70000 holes.raw
map -s 66000 -l 1k holes.raw
map --output=json -s 5G -l 1 big.q
map --output=json -s 5368709000 -l 3M big.q
map --output=json -s 3T huge.q
map --output=json -s 1k -l 3k ext.q
map --output=json -s 66000 -l 70000 ext.q
map --output=json -s 100 -l 70000 ext16k.q
map --output=json -s 1000 -l 100000 ov.q
map --output=json -s 655361 -l 2 ov.q
map --output=json -s 300000 -l 500000 short.q
map --output=json -s 900k -l 300k long.q
map --output=json -s 100k -l 100k cs512.q
map --output=json -s 1M -l 1M packed.q
map -s 100k -l 100k chain12.q
"""

CHAINS = """
map base.q
map --output=json base.q
map ov.q
map --output=json ov.q
map long.q
map --output=json long.q
map short.q
map --output=json short.q
map --output=json longer.q
map onraw.q
map --output=json onraw.q
map onholes.q
map --output=json onholes.q
map onodd.q
map --output=json onodd.q
map --output=json onempty.q
map --output=json onzero.q
map ext-ov.q
map --output=json ext-ov.q
map --output=json ext-ov2.q
map --output=json df-ov.q
map df-ov.q
map abs.q
map json.q
map --output=json json.q
map jsonplain.q
map --output=json jsonplain.q
map jsonwindow.q
map --output=json jsonwindow.q
map proto.q
map --output=json p-nofmt.q
map sub/rel.q
map --output=json sub/rel.q
map sub/rel2.q
map --output=json ./sub/rel2.q
map link.q
map chain12.q
map --output=json chain12.q
map --output=json chain1.q
map flat.q
map --output=json flat.q
map gone.q
map --output=json gone.q
map gonedeep.q
map sub/gone.q
map wrongformat.q
map unknownformat.q
map unknownproto.q
map jsongone.q
map jsonbad.q
map -U ov.q
map -f raw ov.q
"""

DAMAGE = """
map c-misaligned.q
map --output=json c-misaligned.q
map c-dataodd.q
map --output=json c-dataodd.q
map --output=json -l 256k c-dataodd.q
map --output=json -s 512k c-dataodd.q
map c-l2odd.q
map --output=json c-l2odd.q
map c-l2far.q
map --output=json c-l2far.q
map --output=json c-reserved.q
map c-beyond.q
map --output=json c-beyond.q
map --output=json c-truncated.q
map --output=json c-garbage.q
map c-v2zero.q
map --output=json c-v2zero.q
map c-extbad.q
map --output=json c-extbad.q
map c-df.q
map --output=json c-df.q
map c-back.q
map --output=json c-back.q
map --output=json c-lost.q
map c-refblock.q
map c-snapbad.q
map --output=json c-l1reserved.q
"""

PLACES = """
map nosuch
map dir
map ''
map /dev/null
map --output=json /dev/null
map nosuch:x
map file:a.q
map ./co:lon.raw
map -f nosuch a.q
map -f qcow2 full.raw
map 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.q"}}'
map --output=json 'json:{"driver":"raw","offset":"64k","size":65536,"file":{"driver":"file","filename":"holes.raw"}}'
map --output=json 'json:{"driver":"qcow2","backing":null,"file.filename":"ov.q"}'
map --output=json 'json:{"driver":"qcow2","backing":{"driver":"raw","file.filename":"full.raw"},"file.filename":"ov.q"}'
map --output=json 'json:{"driver":"null-co","size":"1M"}'
map 'json:{"driver":"raw","file":{"driver":"null-co","size":1048576}}'
map --output=json --image-opts driver=null-co,size=1M
map --output=json --image-opts driver=null-co,read-zeroes=on,size=2M
map --output=json --image-opts driver=raw,file.driver=null-co,file.size=1M
map --image-opts driver=raw,offset=64k,size=256k,file.filename=holes.raw
map --output=json --image-opts driver=raw,offset=64k,size=256k,file.filename=holes.raw
map --output=json -s 100k -l 100k --image-opts driver=raw,offset=64k,size=256k,file.filename=holes.raw
map --output=json --image-opts driver=raw,size=0,file.filename=holes.raw
map --output=json --image-opts driver=raw,offset=3M,file.filename=holes.raw
map --output=json --image-opts driver=raw,offset=64k,file.driver=raw,file.offset=64k,file.file.filename=holes.raw
map --output=json --image-opts driver=raw,offset=1536,file.filename=1500.raw
map --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.q
map --output=json --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.q
map --output=json --image-opts driver=raw,file.driver=qcow2,file.file.filename=zlib.q
map --image-opts driver=raw,file.driver=qcow2,file.file.filename=zlib.q
map --image-opts driver=qcow2,file.filename=nested.img
map --output=json --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=nested.q
map --output=json --image-opts driver=qcow2,file.filename=df.q,data-file.driver=file,data-file.filename=full.raw
map --output=json --image-opts driver=qcow2,file.filename=ov.q,backing.driver=raw,backing.file.filename=full.raw
map --image-opts driver=qcow2,file.filename=ov.q,backing=x
map --image-opts --format raw a.q
map --image-opts driver=raw,offset=1000,file.filename=holes.raw
map --output=json --image-opts driver=raw,file.driver=qcow2,file.file.filename=ov.q
"""

DIFFERENT = {
    "map c-refblock.q": Difference("refcounts are nothing that a map needs: they are not read", err=""),
    "map --image-opts driver=raw,offset=1000,file.filename=holes.raw": Difference(
        "the real program stops with a failed assertion",
        code=0,
        out="""\
Offset          Length          Mapped to       File
0               0xc18           0x3e8           holes.raw
0xfc18          0x1000          0x10000         holes.raw
0x1fc18         0x20000         0x20000         holes.raw
0xffc18         0x10000         0x100000        holes.raw
0x1ffc18        0x1000          0x200000        holes.raw
""",
        err="",
    ),
    "map --output=json --image-opts driver=raw,file.driver=qcow2,file.file.filename=ov.q": Difference(
        "the real program does not look at the backing files of an image on which raw stands",
        out="""\
[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "offset": 327680},
{ "start": 65536, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "offset": 327680},
{ "start": 131072, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false},
{ "start": 196608, "length": 65536, "depth": 0, "present": false, "zero": true, "data": false},
{ "start": 262144, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false},
{ "start": 327680, "length": 196608, "depth": 0, "present": false, "zero": true, "data": false},
{ "start": 524288, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false},
{ "start": 589824, "length": 65536, "depth": 0, "present": false, "zero": true, "data": false},
{ "start": 655360, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true},
{ "start": 720896, "length": 327680, "depth": 0, "present": false, "zero": true, "data": false}]
""",
    ),
}

CASES = cases(RAW, FEATURES, WINDOWS, CHAINS, DAMAGE, PLACES)


@pytest.mark.parametrize("line", CASES)
def test_map_finds_what_the_real_program_finds(line: str, images: Path) -> None:
    assert_same(line, images, DIFFERENT)


def test_every_listed_difference_is_a_case() -> None:
    assert set(DIFFERENT) <= set(CASES)


def rows(name: str, folder: Path, *words: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        run_qimg_inprocess(["map", "--output=json", *words, name], folder).ok().out
    )
    return found


def test_release_10_tells_compressed_data(images: Path) -> None:
    found = rows("zlib.q", images)
    assert [(row["start"], row["data"], row["compressed"]) for row in found] == [
        (0, True, True),
        (131072, False, False),
        (262144, True, False),
        (327680, False, False),
        (524288, True, True),
        (589824, False, False),
    ]


@pytest.mark.parametrize("name", ["ext.q", "ov.q", "cs512.q", "big.q", "holes.raw", "ext-ov2.q", "longer.q"])
def test_windows_put_together_are_the_whole(name: str, images: Path) -> None:
    whole = rows(name, images)
    size = int(str(whole[-1]["start"])) + int(str(whole[-1]["length"]))
    step = size // 7 | 1
    parts: list[dict[str, object]] = []
    for start in range(0, size, step):
        for row in rows(name, images, "-s", str(start), "-l", str(step)):
            parts.append(row)
            _join_last_two(parts)
    assert parts == whole


def _join_last_two(parts: list[dict[str, object]]) -> None:
    """Join the last row to the one before if it goes on in the same way."""
    if len(parts) < 2:
        return
    first, second = parts[-2:]
    moved = dict(second)
    for field in ("start", "offset"):
        if field in second:
            moved[field] = int(str(second[field])) - int(str(first["length"]))
    moved["length"] = first["length"]
    if moved == first:
        first["length"] = int(str(first["length"])) + int(str(second["length"]))
        parts.pop()


@pytest.mark.parametrize("name", ["loop1.q", "loop2.q", "loop4.q"])
def test_a_chain_that_loops_is_an_error(name: str, images: Path) -> None:
    """The real program never ends (differences, number 2)."""
    found = run_qimg(["map", name], images, timeout=20)
    assert (found.code, found.out) == (1, "")
    assert "creates an infinite loop" in found.err


def test_several_files_are_separated_by_an_empty_line(images: Path) -> None:
    one, two = (run_qimg_inprocess(["map", name], images).out for name in ("a.q", "full.raw"))
    both = run_qimg_inprocess(["map", "a.q", "full.raw"], images).ok()
    assert both.out == f"{one}\n{two}"


def test_several_files_in_json_are_an_array_of_arrays(images: Path) -> None:
    names = ("a.q", "zero.q", "full.raw")
    both = run_qimg_inprocess(["map", "--output=json", *names], images).ok()
    assert json.loads(both.out) == [rows(name, images) for name in names]


def test_one_bad_file_of_several_leaves_the_json_whole(images: Path) -> None:
    found = run_qimg_inprocess(["map", "--output=json", "nosuch", "c-l2odd.q", "c-dataodd.q", "a.q"], images)
    assert found.code == 1
    missing, odd, data, sound = json.loads(found.out)
    assert missing == odd == []
    assert [row["start"] for row in data] == [0, 65536, 131072]
    assert sound == rows("a.q", images)


def test_the_library_raises_what_the_command_prints(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qimg

    monkeypatch.chdir(images)
    with pytest.raises(OpenError, match="No such file or directory"):
        list(qimg.map("nosuch"))
    with pytest.raises(GateError, match="infinite loop"):
        list(qimg.map("loop1.q"))


def test_a_long_fragmented_image_is_mapped_row_by_row(tmp_path: Path) -> None:
    """Every second cluster of 4 KiB: as many rows as the real program finds, across table borders."""
    run_real(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "f.q", "8M"], tmp_path).ok()
    data = b"".join(b"x" * 4096 + bytes(4096) for _ in range(1024))
    (tmp_path / "f.raw").write_bytes(data)
    run_real(["convert", "-n", "-S", "4k", "-f", "raw", "-O", "qcow2", "f.raw", "f.q"], tmp_path).ok()
    assert len(rows("f.q", tmp_path)) == 2048
    assert_same("map --output=json f.q", tmp_path)
    assert_same("map f.q", tmp_path)
