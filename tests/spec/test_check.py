"""`check` finds the same as the real program, and says it in the same words (check sheet; qcow2 sheet 15)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec.differential import assert_same, cases
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SOUND = """
check empty.q
check --output=json empty.q
check zero.q
check --output=json zero.q
check odd.q
check a.q
check --output=json a.q
check --output=human a.q
check data.q
check scattered.q
check --output=json scattered.q
check reversed.q
check v2.q
check --output=json v2.q
check v2c.q
check v2z.q
check rb1.q
check rb2.q
check --output=json rb4.q
check rb8.q
check --output=json rb32.q
check rb64.q
check cs512.q
check --output=json cs512.q
check cs1k.q
check cs2k.q
check --output=json cs4k.q
check cs8k.q
check cs128k.q
check --output=json cs1M.q
check cs2M.q
check zeros.q
check --output=json half.q
check big.q
check huge.q
check zlib.q
check --output=json zlib.q
check zstd.q
check packed.q
check --output=json packed4k.q
check lazy.q
check dirty.q
check --output=json dirty.q
check meta.q
check meta2.q
check --output=json metafull.q
check metaext.q
check metav2.q
check ext.q
check --output=json ext.q
check ext16k.q
check ext2m.q
check extgone.q
check df.q
check --output=json df.q
check dfraw.q
check dfext.q
check dfmeta.q
check snap.q
check --output=json snap.q
check snapext.q
check snapv2.q
check snapclock.q
check bitmaps.q
check --output=json bitmaps.q
check bitmaps2.q
check --output=json bitmaps2.q
check ov.q
check --output=json ov.q
check chain12.q
check ext-ov2.q
check df-ov.q
check nested.q
check -q a.q
check -q --output=json a.q
check -U a.q
check -T none a.q
check -T unsafe --output json a.q
check -f qcow2 a.q
check --format=qcow2 a.q
"""

DAMAGED = "\n".join(
    f"check {more}c-{name}.q"
    for name in [
        "leak",
        "double",
        "lost",
        "low",
        "copied",
        "uncopied",
        "misaligned",
        "dataodd",
        "l2far",
        "l2odd",
        "reserved",
        "l1reserved",
        "refblock",
        "reftable",
        "beyond",
        "truncated",
        "zcopied",
        "zlow",
        "zbeyond",
        "garbage",
        "zgarbage",
        "snaplow",
        "snapbad",
        "extbad",
        "v2zero",
        "df",
        "rb1",
        "rb64",
        "bitmap",
        "dirty",
    ]
    for more in ("", "--output=json ")
)

QUIET = """
check -q c-leak.q
check -q c-low.q
check -q c-misaligned.q
check -q --output=json c-snaplow.q
check -q c-refblock.q
check -q holes.raw
check c-back.q
check p-corrupt.q
check --output=json p-corrupt.q
check p-extension.q
check p-compatible.q
check p-autoclear.q
check p-nofmt.q
check p-incompatible.q
check p-version4.q
check p-l1far.q
check p-l1odd.q
check t-500.q
check t-65536.q
check t-200000.q
check --output=json t-200000.q
check t-262145.q
check t-71.q
"""

OTHER = """
check full.raw
check --output=json full.raw
check -q full.raw
check empty.raw
check hole.raw
check -f raw a.q
check --output=json -f raw a.q
check p-magic.q
check t-3.q
check nosuch
check ''
check dir
check /dev/null
check dangling.raw
check nosuch:x
check file:a.q
check ./co:lon.raw
check -f qcow2 full.raw
check -f nosuch a.q
check --output=json nosuch
check gone.q
check --output=json gone.q
check gonedeep.q
check wrongformat.q
check unknownformat.q
check jsonbad.q
check dfgone.q
check --output=json link.q
check sub/rel2.q
check 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.q"}}'
check --output=json 'json:{"driver":"qcow2","file.filename":"a.q"}'
check 'json:{"driver":"qcow2","backing":null,"file.filename":"gone.q"}'
check 'json:{"driver":"null-co"}'
check --image-opts driver=qcow2,file.filename=a.q
check --output=json --image-opts driver=qcow2,file.filename=a.q
check --output=json --image-opts driver=qcow2,file.filename=c-leak.q
check --image-opts driver=qcow2,file.filename=gone.q,backing=
check --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.q
check --image-opts driver=qcow2,file.driver=raw,file.file.filename=a.q
check --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=nested.q
check --image-opts driver=null-co,size=1M
check --image-opts driver=qcow2,file.filename=a.q,bogus=1
check --image-opts -f qcow2 a.q
check -T foo a.q
check --output=foo a.q
check -r foo a.q
check
"""

CASES = cases(SOUND, DAMAGED, QUIET, OTHER)


@pytest.mark.parametrize("line", CASES)
def test_check_says_what_the_real_program_says(line: str, images: Path) -> None:
    assert_same(line, images)


def test_every_exit_code_is_among_the_cases(images: Path) -> None:
    """0 sound, 1 failed, 2 corruptions, 3 leaks, 63 no check for the format."""
    names = ("a.q", "c-l2far.q", "c-leak.q", "c-refblock.q", "full.raw", "nosuch")
    found = {run_real(["check", name], images).code for name in names}
    assert found == {0, 1, 2, 3, 63}


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["a.q", "empty.q"], 0),
        (["a.q", "c-leak.q"], 3),
        (["c-leak.q", "c-low.q", "a.q"], 2),
        (["full.raw", "a.q"], 63),
        (["full.raw", "c-leak.q"], 3),
        (["c-low.q", "nosuch", "a.q"], 1),
    ],
)
def test_several_files_give_the_worst_exit_code(names: list[str], code: int, images: Path) -> None:
    assert run_qimg_inprocess(["check", *names], images).code == code
    assert run_qimg_inprocess(["check", "-q", *names], images).code == code


def test_several_files_are_separated_by_an_empty_line(images: Path) -> None:
    one, two = (run_qimg_inprocess(["check", name], images) for name in ("a.q", "c-leak.q"))
    both = run_qimg_inprocess(["check", "a.q", "c-leak.q"], images)
    assert both == (3, f"{one.out}\n{two.out}", two.err)


def test_several_files_in_json_are_an_array(images: Path) -> None:
    one, two = (
        json.loads(run_qimg_inprocess(["check", "--output=json", name], images).out)
        for name in ("a.q", "c-leak.q")
    )
    found = run_qimg_inprocess(["check", "--output=json", "a.q", "nosuch", "full.raw", "c-leak.q"], images)
    assert json.loads(found.out) == [one, two]
