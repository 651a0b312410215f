"""Whatever is given as a description ends in an opened disk or one of our errors, and leaves no file open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qimg.context import Context
from qimg.errors import QimgError
from qimg.graph.gate import Inside
from qimg.graph.objects import add_object, help_lines
from qimg.graph.open import ImageSpec, open_disk

_KEYS = st.sampled_from(
    [
        *("driver", "file", "filename", "backing", "data-file", "offset", "size", "read-only", "force-share"),
        *("node-name", "discard", "detect-zeroes", "cache", "cache.direct", "direct", "locking", "aio", "x"),
        *("lazy-refcounts", "overlap-check", "template", "l2-cache-size", "encrypt.format", "read-zeroes"),
        *(
            "file.filename",
            "file.driver",
            "backing.file.filename",
            "backing.driver",
            "data-file.filename",
            "0",
        ),
    ]
)
_SCALARS = st.sampled_from(
    [
        *(
            "raw",
            "qcow2",
            "file",
            "host_device",
            "null-co",
            "vmdk",
            "nbd",
            "x",
            "",
            "on",
            "off",
            "unmap",
            "64k",
        ),
        *("a.raw", "a.q", "ov.q", "ext.q", ".", "nosuch", "a\0b", "\ud800", "json:{}", "/dev/null"),
        *(None, True, False, 0, 1, 512, -1, 1.5, 1e300, 1 << 63, 1 << 70),
    ]
)
_OBJECTS = st.dictionaries(
    _KEYS, st.recursive(_SCALARS, lambda inner: st.dictionaries(_KEYS, inner) | st.lists(inner), max_leaves=8)
)

#: The images are the same for all examples, and nothing changes them.
_SETTINGS = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def images(gallery: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gallery as the working directory."""
    monkeypatch.chdir(gallery.folder)  # type: ignore[attr-defined]


def _open(text: str, *, image_opts: bool = False) -> None:
    """Open for reading, each way; only our errors may come out, and no descriptor may stay open."""
    before = len(os.listdir("/proc/self/fd"))
    for for_info in (False, True):
        try:
            open_disk(
                ImageSpec(text, image_opts=image_opts), context=Context(lambda _: None), for_info=for_info
            ).close()
        except QimgError as error:
            assert str(error)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.peer("qemu-img")
@pytest.mark.usefixtures("images")
@_SETTINGS
@given(_OBJECTS)
def test_any_json_description(description: dict[str, object]) -> None:
    _open("json:" + json.dumps(description))


@pytest.mark.peer("qemu-img")
@pytest.mark.usefixtures("images")
@_SETTINGS
@given(st.text("{}[]\",:\\ud08'abfile.rwqco2-1e\0\ud800", max_size=60))
def test_any_text(text: str) -> None:
    _open(text)
    _open("json:" + text)
    _open(text, image_opts=True)


@pytest.mark.peer("qemu-img")
@pytest.mark.usefixtures("images")
@_SETTINGS
@given(st.lists(st.tuples(_KEYS, _SCALARS.map(str)), max_size=6))
def test_any_option_string(pairs: list[tuple[str, str]]) -> None:
    _open(",".join(f"{key}={value}" for key, value in pairs), image_opts=True)


@_SETTINGS
@given(st.text('{}[]",:=secrtidaxhlp.0?\0\ud800', max_size=60) | _OBJECTS.map(json.dumps))
def test_any_object(text: str) -> None:
    if help_lines(text) is None:
        for start in ("", "secret,id=s,", "authz-list,id=a,"):
            try:
                add_object(start + text, {})
            except QimgError as error:
                assert str(error)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "name",
    [
        b"a\0b",
        b"\xff\xfe",
        b"a\nb",
        b"json:{\xff",
        b"json:[[[",
        b"json:{'file':{}}",
        b"/dev/zero",
        b":",
        b"a:b",
    ],
)
def test_any_backing_name(name: bytes, work: Path, gallery: object) -> None:
    image = (gallery.folder / "m1.q").read_bytes()  # type: ignore[attr-defined]
    start = image.index(b"nosuch")
    patched = bytearray(image)
    patched[start : start + len(name)] = name
    patched[16:20] = len(name).to_bytes(4, "big")
    (work / "x.q").write_bytes(patched)
    _open("x.q")
    with pytest.raises(QimgError):
        open_disk(ImageSpec("x.q"), context=Context(), gate=Inside("."))
