"""Names, ``json:`` descriptions and option strings mean what they mean to the real program, or fail alike.

One description a line in ``descriptions.txt`` and ``option_strings.txt``; differences that are meant have
tests of their own in ``test_differences.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from graph.oracle import Gallery, open_ours, open_real, same_name

HERE = Path(__file__).parent
DESCRIPTIONS = ["", *(HERE / "descriptions.txt").read_text().splitlines()]
OPTION_STRINGS = ["", *(HERE / "option_strings.txt").read_text().splitlines()]

pytestmark = pytest.mark.peer("qemu-img")


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_info_of_a_name_is_as_with_the_real_program(
    text: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare_info(text, gallery, monkeypatch, image_opts=False)


@pytest.mark.parametrize("text", OPTION_STRINGS)
def test_info_of_an_option_string_is_as_with_the_real_program(
    text: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare_info(text, gallery, monkeypatch, image_opts=True)


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_opening_the_chain_of_a_name_is_as_with_the_real_program(
    text: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gallery.folder)
    real = open_real(["map", text], gallery.folder)
    ours = open_ours(text)
    assert ours.err == real.err
    assert (ours.top is None) == (real.top is None)


@pytest.mark.parametrize("text", OPTION_STRINGS)
def test_opening_the_chain_of_an_option_string_is_as_with_the_real_program(
    text: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gallery.folder)
    real = open_real(["map", "--image-opts", text], gallery.folder)
    ours = open_ours(text, image_opts=True)
    assert ours.err == real.err
    assert (ours.top is None) == (real.top is None)


def _compare_info(text: str, gallery: Gallery, monkeypatch: pytest.MonkeyPatch, *, image_opts: bool) -> None:
    monkeypatch.chdir(gallery.folder)
    words = ["info", "--image-opts", text] if image_opts else ["info", text]
    real = open_real(words, gallery.folder)
    ours = open_ours(text, "info", image_opts=image_opts)
    assert ours.err == real.err
    if real.top is None:
        assert ours.top is None
        return
    assert ours.top is not None
    assert same_name(ours.top[0], real.top[0]), (ours.top[0], real.top[0])
    assert ours.top[1:] == real.top[1:]
