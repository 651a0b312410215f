"""luks keeps the promises of `FormatSuite`, once somebody hands out the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import qimg
from conformance.format_suite import SIZES, FormatSuite, sectors
from qimg.context import Context
from qimg.formats.base import Image
from qimg.storage.posix import PosixFile
from support import luks
from support.luks import SECRETS, opts
from support.run import Result, Word, run_qimg_inprocess, run_real

#: Options of creation that every image needs; no iterations, no time.
QUICK = {"key-secret": "s", "iter-time": 0}

Where = str | Path


class Library:
    """What the suite asks of `qimg`, with the secret ``s`` for images of format ``luks``."""

    def create(self, path: Where, *, options: dict[str, object] | None = None, **how: object) -> None:
        qimg.create(path, options={**QUICK, **(options or {})}, context=luks.context(), **how)

    def convert(
        self,
        source: Where,
        target: Where,
        *,
        source_format: str,
        format: str = "raw",
        options: dict[str, object] | None = None,
        **how: object,
    ) -> None:
        if format == "luks":
            options = {**QUICK, **(options or {})}
        where, kind = named(source, source_format)
        how |= {"format": format, "options": options, "context": luks.context()}
        qimg.convert(where, target, source_format=kind, **how)

    def open(self, path: Where, *, format: str, context: Context | None = None) -> object:
        return qimg.open(named(path, format)[0], context=luks.context())

    def check(self, path: Where, *, format: str, context: Context | None = None) -> object:
        return qimg.check(named(path, format)[0], context=luks.context())

    def map(self, path: Where, *, format: str) -> object:
        return qimg.map(named(path, format)[0], context=luks.context())

    def compare(self, first: Where, second: Where, *, first_format: str, second_format: str) -> object:
        places = (named(first, first_format)[0], named(second, second_format)[0])
        return qimg.compare(*places, context=luks.context())

    info = staticmethod(qimg.info)  # needs no key


def named(path: Where, format: str) -> tuple[Where, str | None]:
    """What an image is called, and the format that is still to be said."""
    return (luks.name(str(path)), None) if format == "luks" else (path, format)


def keyed(run: Callable[..., Result]) -> Callable[..., Result]:
    """`run` with images named by option strings that give them the secret ``s``."""

    def call(words: Sequence[Word], *more: object) -> Result:
        left = iter(words)
        verb, said, formats, places = next(left), [], [], []
        for word in left:
            if word in ("-f", "-F"):
                formats.append(next(left))
            elif str(word).startswith("-"):
                said += [word, next(left)] if word == "-O" else [word]
            else:
                places.append(word)
        for number, format in enumerate(formats):
            plain = f"driver={format},file.filename={places[number]}"
            places[number] = opts(places[number]) if format == "luks" else plain
        return run([verb, *said, *SECRETS, "--image-opts", *places], *more)

    return call


@pytest.mark.peer("qemu-img")
class TestLuks(FormatSuite):
    format = "luks"
    variants = ("", "cipher-mode=cbc,ivgen-alg=essiv,cipher-alg=aes-128")
    refusal = "Volume is not in LUKS format"
    #: It can, but measures its own speed for seconds; tests/formats/test_luks.py knows what comes out.
    real_measures = False
    library = Library()
    real = staticmethod(keyed(run_real))
    ours = staticmethod(keyed(run_qimg_inprocess))

    def real_image(self, folder: Path, source: Path, variant: str = "", *more: str) -> Path:
        """An empty image of ours that the real program fills: to make one costs it seconds."""
        path = folder / "real.luks"
        size = source.stat().st_size
        qimg.create(
            path,
            format="luks",
            size=size,
            options={**QUICK, **self.options(variant)},
            context=luks.context(),
        )
        if size:
            words = ["convert", "-n", *SECRETS, "--image-opts", f"driver=raw,file.filename={source}"]
            run_real([*words, "--target-image-opts", opts(path)]).ok()
        return path

    def open(self, path: Path) -> Image:
        file = PosixFile.open(str(path))
        image: Image = self.driver.open(file, options={"key-secret": "s"}, context=luks.context())
        return image

    @pytest.mark.parametrize("size", SIZES)
    def test_a_new_image_of_any_size_is_sound_and_reads_as_zeros(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        """It does not: what was never written reads as noise, and as the same noise for both programs."""
        path = tmp_path / "new"
        self.library.create(path, format="luks", size=size, options=self.options(variant))
        assert self.library.info(path).virtual_size == sectors(size)
        assert f"({sectors(size)} bytes)" in run_real(["info", path]).ok().out
        found = luks.content(path)
        assert luks.our_content(path) == found
        assert len(found) == sectors(size)
        assert not any(not any(found[at : at + 512]) for at in range(0, len(found), 512))
