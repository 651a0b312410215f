"""Backing chains: what is opened, under which name, and how a failure deep below reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph.oracle import Gallery, open_ours, open_real
from qimg.context import Context
from qimg.errors import GateError, LocationError, OpenError
from qimg.graph.chain import MAX_CHAIN
from qimg.graph.gate import CLOSED, Inside
from qimg.graph.open import ImageSpec, open_disk, resolve_relative
from support.run import run_real

# name -> (backing name, recorded format); None: none is recorded.
OVERLAYS: dict[str, tuple[str, str | None]] = {
    "deep1.q": ("nosuch", "raw"),
    "deep2.q": ("deep1.q", "qcow2"),
    "deep3.q": ("deep2.q", "qcow2"),
    "unknown-protocol.q": ("x:y", "raw"),
    "json.q": ('json:{"driver":"raw","file.filename":"a.raw"}', "raw"),
    "json-other-format.q": ('json:{"driver":"qcow2","file.filename":"a.q"}', "raw"),
    "json-protocol.q": ('json:{"driver":"file","filename":"a.raw"}', None),
    "json-protocol-as-raw.q": ('json:{"driver":"file","filename":"a.raw"}', "raw"),
    "json-broken.q": ("json:{", "raw"),
    "json-nested.q": (
        'json:{"driver":"raw","offset":512,"file":{"driver":"qcow2","file.filename":"a.q"}}',
        "raw",
    ),
    "json-chain.q": ('json:{"driver":"qcow2","file.filename":"deep1.q"}', "qcow2"),
    "json-bogus.q": ('json:{"driver":"qcow2","file.filename":"a.q","bogus":1}', "qcow2"),
    "wrong-format.q": ("a.raw", "qcow2"),
    "probed.q": ("a.raw", None),
    "probed-qcow2.q": ("a.q", None),
    "probed-empty.q": ("empty", None),
    "protocol-format.q": ("a.raw", "file"),
    "directory.q": ("dir", "raw"),
    "file-prefix.q": ("file:a.raw", "raw"),
    "null.q": ("null-co://", "raw"),
    "sub/up.q": ("../a.raw", "raw"),
    "sub/file-prefix.q": ("file:base.raw", "raw"),
    "sub/dot.q": ("./a:b", "raw"),
    "sub/probed.q": ("base.raw", None),
}


@pytest.fixture(scope="module")
def chains(gallery: Gallery) -> Gallery:
    """The gallery with `OVERLAYS`."""
    for name, (backing, format) in OVERLAYS.items():
        gallery.overlay(name, backing, format)
    gallery.overlay("unknown-format.q", "a.raw", "raw", recorded=b"rxw")
    return gallery


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", [*OVERLAYS, "unknown-format.q"])
def test_a_chain_opens_or_fails_as_with_the_real_program(
    name: str, chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    real = open_real(["map", name], chains.folder)
    ours = open_ours(name)
    assert ours.err == real.err
    assert (ours.top is None) == (real.top is None)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "name", ["sub/ov.q", "./sub/../sub/ov.q", "sub/up.q", "json.q", "null.q", "probed.q"]
)
def test_images_of_a_chain_have_the_names_and_formats_that_info_gives(
    name: str, chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    shown = run_real(["info", "--backing-chain", name], chains.folder).ok().lines
    names = [line.removeprefix("image: ") for line in shown if line.startswith("image: ")]
    formats = [line.removeprefix("file format: ") for line in shown if line.startswith("file format: ")]
    with open_disk(ImageSpec(name), context=Context()) as disk:
        assert [layer.filename for layer in disk.layers] == names
        assert [layer.image.format_name for layer in disk.layers] == formats


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ["deep3.q", "unknown-protocol.q", "json-broken.q", "wrong-format.q"])
def test_info_of_a_broken_chain_names_the_image_that_cannot_be_opened(
    name: str, chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    real = open_real(["info", "--backing-chain", name], chains.folder)
    with pytest.raises(OpenError) as raised:
        open_disk(ImageSpec(name), context=Context(), for_info=True)
    assert f"qemu-img: {raised.value}" == real.err


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("for_info", [True, False])
@pytest.mark.parametrize(("top", "repeated"), [("ring1.q", "ring1.q"), ("ring2.q", "ring2.q")])
def test_a_chain_that_comes_back_to_an_image_is_an_error(
    top: str, repeated: str, for_info: bool, chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    chains.overlay("ring1.q", "ring2.q", "qcow2")
    chains.overlay("ring2.q", "ring1.q", "qcow2")
    with pytest.raises(GateError) as raised:
        open_disk(ImageSpec(top), context=Context(), for_info=for_info)
    assert str(raised.value) == f"Backing file '{repeated}' creates an infinite loop."
    assert f"qemu-img: {raised.value}\n" == run_real(["info", "--backing-chain", top], chains.folder).err


@pytest.mark.peer("qemu-img")
def test_a_chain_that_comes_back_under_another_name_is_an_error(
    chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    chains.overlay("self.q", "./self.q", "qcow2")
    with pytest.raises(GateError, match="creates an infinite loop"):
        open_disk(ImageSpec("self.q"), context=Context())


@pytest.mark.peer("qemu-img")
def test_a_loop_through_a_nested_description_is_an_error(
    chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    nested = 'json:{"driver":"raw","file":{"driver":"qcow2","file.filename":"inner.q"}}'
    chains.overlay("inner.q", nested, "raw")
    with pytest.raises(GateError, match="creates an infinite loop"):
        open_disk(ImageSpec("inner.q"), context=Context())


def _staircase(folder: Path, count: int) -> None:
    """``c0000.q`` on ``c0001.q`` on ... `count` of them; the last one has no file below."""
    assert (
        run_real(["create", "-q", "-f", "qcow2", "-u", "-b", "NNNN.q", "-F", "qcow2", "t", "1M"], folder).code
        == 0
    )
    template = (folder / "t").read_bytes()
    for number in range(count):
        (folder / f"{number:04}.q").write_bytes(template.replace(b"NNNN.q", b"%04d.q" % (number + 1)))


@pytest.mark.peer("qemu-img")
def test_two_hundred_images_make_a_chain(work: Path) -> None:
    _staircase(work, 250)
    assert run_real(["create", "-q", "-f", "qcow2", "0250.q", "1M"], work).code == 0
    with open_disk(ImageSpec("0000.q"), context=Context()) as disk:
        assert len(disk.layers) == 251
        assert disk.extents(0, disk.size)[0].depth == 250
    assert len(run_real(["info", "--backing-chain", "0000.q"], work).ok().out.split("image: ")) == 252


@pytest.mark.peer("qemu-img")
def test_a_chain_without_end_is_bounded(work: Path) -> None:
    _staircase(work, MAX_CHAIN + 1)
    with pytest.raises(OpenError) as raised:
        open_disk(ImageSpec("0000.q"), context=Context())
    assert str(raised.value).endswith(f"The backing chain has more than {MAX_CHAIN} images")


def test_descriptions_nested_without_end_are_bounded(work: Path) -> None:
    (work / "a.raw").write_bytes(bytes(512))
    text = "json:" + '{"driver":"raw","file":' * 100 + '{"driver":"file","filename":"a.raw"}' + "}" * 100
    with pytest.raises(OpenError, match="stand on one another more than 32 times"):
        open_disk(ImageSpec(text), context=Context())


# -- options that replace what the image names


@pytest.mark.peer("qemu-img")
def test_a_backing_file_given_by_option_is_read_instead_of_the_named_one(
    chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    text = "json:{'driver':'qcow2','file.filename':'deep1.q','backing.file.filename':'three'}"
    with open_disk(ImageSpec(text), context=Context()) as disk:
        assert [layer.filename for layer in disk.layers][1:] == ["three"]
        buf = bytearray(512)
        disk.read_into(buf, 0)
        assert bytes(buf) == b"abc".ljust(512, b"\0")


# -- names relative to an overlay


@pytest.mark.parametrize(
    ("overlay", "backing", "resolved"),
    [
        ("ov.q", "base.raw", "base.raw"),
        ("sub/ov.q", "base.raw", "sub/base.raw"),
        ("./sub/../ov.q", "../base.raw", "./sub/../../base.raw"),
        ("/images/ov.q", "base.raw", "/images/base.raw"),
        ("sub/ov.q", "/base.raw", "/base.raw"),
        ("sub/ov.q", "file:base.raw", "file:base.raw"),
        ("sub/ov.q", "nbd://host/export", "nbd://host/export"),
        ("sub/ov.q", 'json:{"driver":"raw"}', 'json:{"driver":"raw"}'),
        ("sub/ov.q", "./a:b", "sub/./a:b"),
        ("./c:ov.q", "base.raw", "./base.raw"),
        ("http://host/dir/ov.q", "base.raw", "http://host/dir/base.raw"),
        ('json:{"driver":"qcow2","file":{"driver":"raw","file":{"filename":"sub/ov.q"}}}', "b", "sub/b"),
    ],
)
def test_a_backing_name_is_relative_to_the_overlay(overlay: str, backing: str, resolved: str) -> None:
    assert resolve_relative(overlay, backing) == resolved


def test_an_overlay_without_a_directory_has_no_relative_backing_file() -> None:
    with pytest.raises(LocationError, match="Could not determine absolute backing filename"):
        resolve_relative('json:{"driver":"qcow2","file":{"driver":"null-co"}}', "b")


# -- the gate


@pytest.mark.peer("qemu-img")
def test_a_closed_gate_lets_no_image_name_a_file(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gallery.folder)
    with pytest.raises(GateError, match=r"'ov\.q' names 'a\.raw'"):
        open_disk(ImageSpec("ov.q"), context=Context(), gate=CLOSED)
    with pytest.raises(GateError, match=r"'ext\.q' names 'df\.raw'"):
        open_disk(ImageSpec("ext.q"), context=Context(), gate=CLOSED)
    with open_disk(ImageSpec("a.q"), context=Context(), gate=CLOSED) as disk:
        assert len(disk.layers) == 1


@pytest.mark.peer("qemu-img")
def test_a_closed_gate_does_not_mind_what_the_user_names(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gallery.folder)
    text = "json:{'driver':'qcow2','file.filename':'ov.q','backing.file.filename':'three'}"
    with open_disk(ImageSpec(text), context=Context(), gate=CLOSED) as disk:
        assert len(disk.layers) == 2


@pytest.mark.peer("qemu-img")
def test_a_gate_with_directories_refuses_what_lies_outside(
    chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    with open_disk(ImageSpec("sub/ov.q"), context=Context(), gate=Inside("sub")) as disk:
        assert len(disk.layers) == 2
    with pytest.raises(GateError, match="outside the allowed directories"):
        open_disk(ImageSpec("sub/up.q"), context=Context(), gate=Inside("sub"))
    with pytest.raises(GateError, match="outside the allowed directories"):
        open_disk(ImageSpec("null.q"), context=Context(), gate=Inside("."))
    (chains.folder / "sub" / "link.raw").symlink_to("../a.raw")
    chains.overlay("sub/link.q", "link.raw")
    with pytest.raises(GateError, match="outside the allowed directories"):
        open_disk(ImageSpec("sub/link.q"), context=Context(), gate=Inside("sub"))


@pytest.mark.peer("qemu-img")
def test_a_gate_sees_what_a_json_backing_name_describes(
    chains: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chains.folder)
    with pytest.raises(GateError, match=r"'json-nested\.q' names 'a\.q'"):
        open_disk(ImageSpec("json-nested.q"), context=Context(), gate=CLOSED)
