"""`info` on every kind of image says what the real program says (info sheet)."""

# ruff: noqa: E501  (a line of a table is an invocation)
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spec.differential import Difference, assert_same, cases
from support import release7
from support.run import run_qimg, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

RAW = """
info empty.raw
info hole.raw
info --output=json 3.raw
info 1000.raw
info --output=json 1500.raw
info odd.raw
info --output=json odd.raw
info holes.raw
info full.raw
info falloc.raw
info zeros.raw
info link.raw
info --output=json link.raw
info --output=json 'spa ce.raw'
info 'com,ma.raw'
info ümlaut.raw
info --output=json ümlaut.raw
info -f raw a.q
info -f raw --output=json t-71.q
info --output=json p-magic.q
info t-3.q
"""

FEATURES = """
info empty.q
info zero.q
info --output=json zero.q
info --output=json odd.q
info --output=json sector.q
info a.q
info --output=json a.q
info v2.q
info --output=json v2.q
info v2c.q
info --output=json rb1.q
info --output=json rb2.q
info --output=json rb4.q
info --output=json rb8.q
info rb32.q
info rb64.q
info cs512.q
info --output=json cs512.q
info cs1k.q
info --output=json cs4k.q
info cs2M.q
info --output=json cs1M.q
info big.q
info huge.q
info --output=json huge.q
info zlib.q
info zstd.q
info --output=json zstd.q
info --output=json packed.q
info packed4k.q
info lazy.q
info dirty.q
info --output=json dirty.q
info meta.q
info --output=json metafalloc.q
info metafull.q
info --output=json metaext.q
info metav2.q
info ext.q
info --output=json ext.q
info ext16k.q
info --output=json ext2m.q
info df.q
info --output=json df.q
info dfraw.q
info --output=json dfraw.q
info dfext.q
info --output=json dfgone.q
info sub/dfrel.q
info snap.q
info --output=json snap.q
info snapv2.q
info --output=json snapv2.q
info snapclock.q
info --output=json snapclock.q
info bitmaps.q
info --output=json bitmaps.q
info bitmaps2.q
info --output=json bitmaps2.q
info --format qcow2 a.q
info -fqcow2 --output json a.q
info -U a.q
info a.q --output=human
info --out=json --force-share a.q
"""

HEADERS = """
info p-corrupt.q
info --output=json p-corrupt.q
info p-extension.q
info p-compatible.q
info p-autoclear.q
info p-incompatible.q
info p-incompatible2.q
info p-incompatiblenamed.q
info p-version4.q
info p-cluster8.q
info p-rb7.q
info p-cryptbad.q
info p-aes.q
info --output=json p-aes.q
info p-l1far.q
info p-l1odd.q
info p-headerlength.q
info p-compressiontype.q
info t-20.q
info t-71.q
info t-72.q
info t-100.q
info t-104.q
info t-500.q
info t-65536.q
info t-262145.q
info c-l2far.q
info c-snapbad.q
info --output=json c-bitmap.q
info c-refblock.q
info -f qcow2 full.raw
info -f qcow2 empty.raw
info -f nosuch a.q
info -f file a.q
"""

CHAINS = """
info ov.q
info --output=json ov.q
info --backing-chain ov.q
info --backing-chain --output=json ov.q
info --backing-chain a.q
info --backing-chain --output=json a.q
info --backing-chain full.raw
info --backing-chain longer.q
info --backing-chain --output=json onraw.q
info --backing-chain onodd.q
info --backing-chain onempty.q
info --backing-chain ext-ov2.q
info --backing-chain df-ov.q
info --backing-chain --output=json chain12.q
info --backing-chain p-nofmt.q
info p-nofmt.q
info abs.q
info --backing-chain abs.q
info --output=json json.q
info --backing-chain json.q
info --backing-chain --output=json jsonplain.q
info jsonwindow.q
info --backing-chain jsonwindow.q
info --backing-chain --output=json jsonwindow.q
info --backing-chain proto.q
info --output=json proto.q
info sub/rel.q
info --output=json sub/rel2.q
info --backing-chain sub/rel2.q
info --backing-chain ./sub/../sub/rel2.q
info gone.q
info --output=json gone.q
info --backing-chain gone.q
info --backing-chain --output=json gone.q
info gonedeep.q
info --backing-chain gonedeep.q
info --backing-chain sub/gone.q
info link.q
info --backing-chain link.q
info --backing-chain wrongformat.q
info wrongformat.q
info --output=json unknownformat.q
info --backing-chain unknownformat.q
info unknownproto.q
info --backing-chain unknownproto.q
info --backing-chain jsongone.q
info --output=json jsonbad.q
info --backing-chain jsonbad.q
info loop1.q
info --output=json loop4.q
info --backing-chain loop1.q
info --backing-chain loop2.q
info --backing-chain loop4.q
info -U --backing-chain ov.q
info -f raw --backing-chain ov.q
info -f qcow2 --backing-chain ov.q
info --backing-chain -f qcow2 --output=json chain2.q
"""

PLACES = """
info file:a.q
info file:nosuch
info --output=json file:./co:lon.raw
info ./co:lon.raw
info co:lon.raw
info file:co:lon.raw
info nosuch:x
info nosuch
info ''
info dir
info /dev/null
info --output=json /dev/null
info /dev/zero
info dangling.raw
info dir/nosuch
info a.q/x
info ./sub/../a.q
info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.q"}}'
info --output=json 'json:{"driver":"raw","offset":"64k","size":65536,"file":{"driver":"file","filename":"holes.raw"}}'
info 'json: {"file.filename":"a.q"}'
info 'json:{"filename":"a.q"}'
info 'json:{"driver":"qcow2","file":"a.q"}'
info 'json:{"driver":"qcow2"'
info 'json:{}'
info 'json:[]'
info json:
info 'json:{"driver":"qcow2","file.filename":"a.q","bogus":1}'
info 'json:{"driver":"nosuch","file.filename":"a.q"}'
info 'json:{"driver":"null-co","size":"1M"}'
info --output=json 'json:{"driver":"raw","file":{"driver":"null-co","size":1048576}}'
info "json:{'driver':'raw','file.filename':'full.raw'}"
info -f raw 'json:{"driver":"qcow2","file.filename":"a.q"}'
info -U 'json:{"driver":"qcow2","file.filename":"a.q"}'
info 'json:{"driver":"qcow2","backing":null,"file.filename":"ov.q"}'
info --backing-chain 'json:{"driver":"qcow2","backing":null,"file.filename":"ov.q"}'
info --backing-chain 'json:{"driver":"qcow2","file.filename":"ov.q"}'
info --image-opts driver=null-co,size=1M
info --output=json --image-opts driver=null-co,size=1M
info --image-opts driver=raw,file.driver=null-co,file.size=1M
info --output=json --image-opts driver=raw,file.filename=full.raw
info --output=json --image-opts driver=file,filename=full.raw
info --output=json --image-opts driver=raw,file.driver=raw,file.file.filename=full.raw
info --output=json --image-opts driver=qcow2,file.driver=raw,file.file.filename=a.q
info --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.q
info --output=json --image-opts driver=raw,file.driver=qcow2,file.file.filename=dirty.q
info --output=json --image-opts driver=raw,file.driver=qcow2,file.file.filename=cs4k.q
info --image-opts driver=qcow2,file.driver=null-co
info --output=json --image-opts driver=raw,offset=64k,size=256k,file.filename=holes.raw
info --image-opts driver=raw,offset=512,size=1k,file.filename=1500.raw
info --image-opts driver=raw,size=0,file.filename=holes.raw
info --image-opts driver=raw,size=1000,file.filename=holes.raw
info --image-opts driver=raw,offset=4M,file.filename=holes.raw
info --image-opts driver=raw,offset=1000,file.filename=holes.raw
info --image-opts driver=raw,offset=2M,size=2M,file.filename=holes.raw
info --image-opts driver=raw,offset=foo,file.filename=holes.raw
info --image-opts driver=raw,offset=-1,file.filename=holes.raw
info --image-opts driver=qcow2,file.filename=a.q
info --image-opts driver=qcow2,file.filename=ov.q,backing.driver=raw,backing.file.filename=full.raw
info --backing-chain --image-opts driver=qcow2,file.filename=ov.q,backing.driver=raw,backing.file.filename=full.raw
info --image-opts driver=qcow2,file.filename=ov.q,backing=
info --backing-chain --image-opts driver=qcow2,file.filename=ov.q,backing=
info --image-opts driver=qcow2,file.filename=df.q,data-file.driver=file,data-file.filename=full.raw
info --image-opts driver=qcow2,file.filename=a.q,bogus=1
info --image-opts driver=qcow2,file.filename=a.q,file.bogus=1
info --image-opts file.filename=a.q
info --image-opts filename=a.q
info --image-opts driver=nosuch,file.filename=a.q
info --image-opts driver=qcow2
info --image-opts driver=file
info --image-opts a.q
info --image-opts driver=qcow2,file.filename=nosuch
info --image-opts driver=qcow2,file.filename=a.q,read-only=maybe
info --image-opts driver=raw,file.filename=com,,ma.raw
info --image-opts driver=raw,file.filename=co:lon.raw
info --image-opts driver=raw,file=full.raw
info -U --image-opts driver=qcow2,file.filename=a.q,force-share=off
info --image-opts driver=qcow2,file.filename=a.q,force-share=on
info --image-opts driver=qcow2,file.driver=file,file.filename=dir
info --image-opts driver=qcow2,file.filename=
info --image-opts --format qcow2 a.q
info --image-opts driver=qcow2,file.filename=nested.img
info --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=nested.q
"""

#: qimg shows the chain that the other commands use: here, no backing file. Standard error of ours.
CUT_OFF = {
    "info --backing-chain --image-opts driver=qcow2,file.filename=ov.q,backing=": (
        'qemu-img: warning: Use of "backing": "" is deprecated; use "backing": null instead\n'
    ),
    """info --backing-chain 'json:{"driver":"qcow2","backing":null,"file.filename":"ov.q"}'""": "",
}

CASES = cases(RAW, FEATURES, HEADERS, CHAINS, PLACES)


@pytest.mark.parametrize("line", CASES)
def test_info_says_what_the_real_program_says(line: str, images: Path) -> None:
    if line in CUT_OFF:
        alone = run_real(["info", "ov.q"], images).out
        reason = "the real program does not heed the user's word that there is no backing file"
        assert_same(line, images, {line: Difference(reason, out=alone, err=CUT_OFF[line])})
        return
    assert_same(line, images)


def test_every_listed_difference_is_a_case() -> None:
    assert set(CUT_OFF) <= set(CASES)


@pytest.mark.parametrize("name", [b"bad\xff.raw", b"new\nline.raw"])
def test_names_that_are_no_text_are_shown_as_they_are(name: bytes, images: Path) -> None:
    real, ours = run_real(["info", name], images), run_qimg(["info", name], images)
    assert ours.out.startswith(real.out)
    assert (ours.code, ours.err) == (0, "")
    real, ours = (run(["info", "--output=json", name], images) for run in (run_real, run_qimg))
    assert (ours.code, release7.info_json(ours.out), ours.err) == real


def test_release_10_adds_a_block_for_each_node_below(images: Path) -> None:
    """Layout of the info sheet, "10 (since 8.0)"; 7.2 has nothing to compare with."""
    out = run_qimg_inprocess(["info", "odd.raw"], images).out
    assert out == (
        "image: odd.raw\n"
        "file format: raw\n"
        "virtual size: 68.5 KiB (70144 bytes)\n"
        "disk size: 4 KiB\n"
        "Child node '/file':\n"
        "    filename: odd.raw\n"
        "    protocol type: file\n"
        "    file length: 68.5 KiB (70144 bytes)\n"
        "    disk size: 4 KiB\n"
    )


def test_release_10_nests_an_image_below_an_image(images: Path) -> None:
    words = ["info", "--image-opts", "driver=raw,file.driver=qcow2,file.file.filename=v2.q"]
    out = run_qimg_inprocess(words, images).out
    size = os.stat(images / "v2.q").st_blocks * 512 >> 10
    assert out.endswith(
        "cluster_size: 65536\n"
        "Child node '/file':\n"
        "    image: v2.q\n"
        "    file format: qcow2\n"
        "    virtual size: 4 MiB (4194304 bytes)\n"
        f"    disk size: {size} KiB\n"
        "    cluster_size: 65536\n"
        "    Format specific information:\n"
        "        compat: 0.10\n"
        "        compression type: zlib\n"
        "        refcount bits: 16\n"
        "    Child node '/file/file':\n"
        "        filename: v2.q\n"
        "        protocol type: file\n"
        "        file length: 512 KiB (524288 bytes)\n"
        f"        disk size: {size} KiB\n"
    )


def test_release_10_json_has_the_children_first(images: Path) -> None:
    out = run_qimg_inprocess(["info", "--output=json", "odd.raw"], images).out
    found = json.loads(out)
    assert list(found) == ["children", "virtual-size", "filename", "format", "actual-size", "dirty-flag"]
    assert found["children"] == [
        {
            "name": "file",
            "info": {
                "children": [],
                "virtual-size": 70144,
                "filename": "odd.raw",
                "format": "file",
                "actual-size": 4096,
                "format-specific": {"type": "file", "data": {}},
                "dirty-flag": False,
            },
        }
    ]
    assert '"data": {\n                    }\n' in out


# -- several files, our extension (decisions 7)


def test_several_files_are_separated_by_an_empty_line(images: Path) -> None:
    one, two = (run_qimg_inprocess(["info", name], images).out for name in ("a.q", "full.raw"))
    both = run_qimg_inprocess(["info", "a.q", "full.raw"], images).ok()
    assert both.out == f"{one}\n{two}"


def test_several_files_in_json_are_an_array(images: Path) -> None:
    one, two = (
        json.loads(run_qimg_inprocess(["info", "--output=json", name], images).out)
        for name in ("ov.q", "full.raw")
    )
    both = run_qimg_inprocess(["info", "--output=json", "ov.q", "full.raw"], images).ok()
    assert json.loads(both.out) == [one, two]
    chains = run_qimg_inprocess(["info", "--output=json", "--backing-chain", "ov.q", "full.raw"], images).ok()
    assert [[image["filename"] for image in chain] for chain in json.loads(chains.out)] == [
        ["ov.q", "base.q"],
        ["full.raw"],
    ]


def test_one_bad_file_of_several_does_not_hide_the_others(images: Path) -> None:
    alone = run_qimg_inprocess(["info", "full.raw"], images)
    missing = run_qimg_inprocess(["info", "nosuch"], images)
    found = run_qimg_inprocess(["info", "nosuch", "full.raw"], images)
    assert found == (1, alone.out, missing.err)
    found = run_qimg_inprocess(["info", "--output=json", "nosuch", "full.raw"], images)
    assert (found.code, found.err) == (1, missing.err)
    assert [image["filename"] for image in json.loads(found.out)] == ["full.raw"]


def test_a_fifo_is_refused_instead_of_waited_for(images: Path) -> None:
    """The real program waits for a writer without end."""
    found = run_qimg(["info", "fifo"], images, timeout=20)
    assert (found.code, found.out) == (1, "")
    assert (
        found.err == "qemu-img: Could not open 'fifo': 'file' driver requires 'fifo' to be a regular file\n"
    )
