"""What every image format promises. A format's own test class is two lines: a subclass and its `format`.

The judge is the real program: what we write it has to read, and what it writes we have to read. The content
is made of 8-byte words, each its own address, so bytes that land in the wrong place show it.
"""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import qimg
from qimg.context import Context
from qimg.errors import Cancelled, NotSupported, QimgError
from qimg.extent import COMPRESSED, HOLE, MAPPED, ZERO, Extent, clip
from qimg.formats import registry
from qimg.formats.base import Image
from qimg.storage.posix import PosixFile
from support.build import content, write_raw
from support.run import Result, run_qimg_inprocess, run_real

KIB = 1024
MIB = 1 << 20
EXAMPLES = 40
#: Odd lengths become whole sectors; sizes around one sector, one cluster and one table are here.
SIZES = (0, 1, 512, 513, 4096, 65536, 66048, 70001, MIB - 512, 3 * MIB + 1000)
#: Clusters of 64 KiB: data, zeros, and nothing, also at both ends.
LAYOUT = "A-0BB--C0-AA-A--CC-B"
FLAGS = {0, COMPRESSED, MAPPED, MAPPED | ZERO, ZERO, HOLE}


def sectors(size: int) -> int:
    """`size` rounded up to whole sectors."""
    return -(-size // 512) * 512


class FormatSuite:
    """Subclass it and define `format`; `variants` are ``-o`` lists that change how an image is built."""

    format: str
    variants: ClassVar[tuple[str, ...]] = ("",)
    #: Qimg can make images of this format.
    creates = True
    #: Qimg can store data compressed in images of these variants.
    compresses = False
    #: The real program can open what it creates with size 0.
    real_opens_empty = True
    #: The real program can measure the format.
    real_measures = True
    #: What opening something else as this format says (regular expression).
    refusal: ClassVar[str | None] = None
    #: Our library, and what runs the two programs: formats whose images need keys put their own here.
    library: ClassVar[Any] = qimg
    real: ClassVar[Callable[..., Result]] = staticmethod(run_real)
    ours: ClassVar[Callable[..., Result]] = staticmethod(run_qimg_inprocess)

    # -- helpers

    @property
    def driver(self):
        return registry.get(self.format)

    def options(self, variant: str) -> dict[str, object]:
        return dict(pair.split("=", 1) for pair in variant.split(",") if pair)

    def real_image(self, folder: Path, source: Path, variant: str = "", *more: str) -> Path:
        """The raw file `source` in this format, written by the real program."""
        path = folder / f"real.{self.format}"
        options = ["-o", variant] if variant else []
        self.real(["convert", "-f", "raw", "-O", self.format, *options, *more, source, path], folder).ok()
        return path

    def open(self, path: Path) -> Image:
        """The image layer alone."""
        image: Image = self.driver.open(PosixFile.open(str(path)), context=Context())
        return image

    @pytest.fixture(params=[])
    def variant(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def __init_subclass__(cls) -> None:
        """Every test that takes `variant` runs once for each of the class's own."""

        @pytest.fixture(params=cls.variants, ids=lambda text: text or "default")
        def variant(self: FormatSuite, request: pytest.FixtureRequest) -> str:
            return str(request.param)

        cls.variant = variant  # type: ignore[method-assign]

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """A raw file of `LAYOUT`."""
        return write_raw(tmp_path / "source.raw", LAYOUT)

    @pytest.fixture
    def image(self, tmp_path: Path, source: Path, variant: str) -> Iterator[Image]:
        with self.open(self.real_image(tmp_path, source, variant)) as image:
            yield image

    def same_for_real(self, first: Path, second: Path) -> None:
        """The real program reads the same from the image `first` as from the raw file `second`."""
        result = self.real(["compare", "-f", self.format, "-F", "raw", first, second])
        assert result.code == 0, result.out + result.err

    def sound_for_real(self, path: Path) -> None:
        """The real program finds nothing wrong, if it can check the format."""
        result = self.real(["check", "-f", self.format, path])
        assert result.code in (0, 63), result.out + result.err

    # -- we write, the real program reads

    @pytest.mark.parametrize("size", SIZES)
    def test_a_new_image_of_any_size_is_sound_and_reads_as_zeros(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        if not self.creates:
            pytest.skip("images of this format cannot be made")
        path = tmp_path / "new"
        self.library.create(path, format=self.format, size=size, options=self.options(variant))
        found = self.library.info(path, format=self.format)
        assert (found.format, found.virtual_size) == (self.format, sectors(size))
        if not size and not self.real_opens_empty:
            return
        self.sound_for_real(path)
        assert f"({sectors(size)} bytes)" in self.real(["info", "-f", self.format, path]).ok().out
        zeros = tmp_path / "zeros.raw"
        zeros.write_bytes(b"")
        os.truncate(zeros, size)
        self.same_for_real(path, zeros)
        with self.library.open(path, format=self.format) as disk:
            assert disk.read(0, size + 512) == bytes(sectors(size))

    @pytest.mark.parametrize("size", SIZES)
    def test_content_of_any_size_comes_out_of_the_real_program_as_it_went_in(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        if not self.creates:
            pytest.skip("images of this format cannot be made")
        layout = (LAYOUT * 3)[: -(-size // (64 * KIB))]
        source = write_raw(tmp_path / "source.raw", layout, size=sectors(size))
        os.truncate(source, size)
        path = tmp_path / "new"
        self.library.convert(
            source, path, source_format="raw", format=self.format, options=self.options(variant)
        )
        if size or self.real_opens_empty:
            self.sound_for_real(path)
            self.same_for_real(path, source)
        with self.library.open(path, format=self.format) as disk:
            assert disk.size == sectors(size)
            assert disk.read(0, disk.size) == source.read_bytes().ljust(disk.size, b"\0")

    def test_compressed_content_comes_out_of_the_real_program_as_it_went_in(
        self, tmp_path: Path, source: Path, variant: str
    ) -> None:
        path = tmp_path / "new"
        how = {"source_format": "raw", "format": self.format, "options": self.options(variant)}
        if not self.compresses:
            if self.creates:
                with pytest.raises(QimgError):
                    self.library.convert(source, path, compress=True, **how)
            return
        self.library.convert(source, path, compress=True, **how)
        self.sound_for_real(path)
        self.same_for_real(path, source)
        with self.open(path) as image:
            assert any(extent.flags & COMPRESSED for extent in image.extents(0, image.size))

    def test_content_is_written_whole_without_looking_for_zeros(
        self, tmp_path: Path, source: Path, variant: str
    ) -> None:
        if not self.creates:
            pytest.skip("images of this format cannot be made")
        path = tmp_path / "new"
        self.library.convert(
            source,
            path,
            source_format="raw",
            format=self.format,
            options=self.options(variant),
            sparse_size=0,
        )
        self.sound_for_real(path)
        self.same_for_real(path, source)

    def test_a_conversion_that_is_stopped_leaves_no_image_that_claims_to_be_whole(
        self, tmp_path: Path, source: Path, variant: str
    ) -> None:
        if not self.creates:
            pytest.skip("images of this format cannot be made")
        path = tmp_path / "new"
        with pytest.raises(Cancelled):
            self.library.convert(
                source,
                path,
                source_format="raw",
                format=self.format,
                options=self.options(variant),
                cancelled=lambda: True,
            )
        found = self.real(["compare", "-f", self.format, "-F", "raw", path, source])
        assert found.code != 0

    def test_what_create_does_not_know_is_refused_and_nothing_is_made(self, tmp_path: Path) -> None:
        with pytest.raises(QimgError):
            self.library.create(tmp_path / "new", format=self.format, size=MIB, options={"bogus": 1})
        with pytest.raises(QimgError):
            self.library.create(tmp_path / "new", format=self.format, size=1 << 63)
        with pytest.raises(QimgError):
            self.library.create(tmp_path / "new", format=self.format)
        assert not (tmp_path / "new").exists()

    # -- the real program writes, we read

    @pytest.mark.parametrize("size", SIZES)
    def test_content_of_any_size_is_read_as_the_real_program_wrote_it(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        if not size and not self.real_opens_empty:
            pytest.skip("the real program makes nothing that it could open")
        layout = (LAYOUT * 3)[: -(-size // (64 * KIB))]
        source = write_raw(tmp_path / "source.raw", layout, size=sectors(size))
        path = self.real_image(tmp_path, source, variant)
        with self.library.open(path, format=self.format) as disk:
            assert disk.read(0, disk.size) == source.read_bytes().ljust(disk.size, b"\0")

    def test_reading_in_pieces_equals_reading_the_whole(self, image: Image, tmp_path: Path) -> None:
        whole = (tmp_path / "source.raw").read_bytes()
        with self.library.open(image.file.name, format=self.format) as disk:
            assert disk.read(0, disk.size) == whole.ljust(disk.size, b"\0")
            chance = random.Random(7)
            for _ in range(150):
                start = chance.randrange(disk.size)
                length = chance.choice((1, 511, 512, 4096, 65537, 300_000))
                assert disk.read(start, length) == whole[start : start + length]

    def test_several_threads_read_at_once(self, image: Image, tmp_path: Path) -> None:
        whole = (tmp_path / "source.raw").read_bytes()
        wrong: list[int] = []
        with self.library.open(image.file.name, format=self.format) as disk:

            def work(seed: int) -> None:
                chance = random.Random(seed)
                for _ in range(60):
                    start = chance.randrange(disk.size)
                    length = chance.randrange(1, 200_000)
                    if disk.read(start, length) != whole[start : start + length]:
                        wrong.append(start)

            threads = [Thread(target=work, args=(seed,)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong

    # -- extents

    def test_extents_ascend_without_gaps_and_neighbours_differ(self, image: Image) -> None:
        assert_contract(image.extents(0, image.size), 0, image.size)

    def test_extents_tell_the_truth(self, image: Image, tmp_path: Path) -> None:
        whole = (tmp_path / "source.raw").read_bytes().ljust(image.size, b"\0")
        for extent in image.extents(0, image.size):
            expected = whole[extent.start : extent.start + extent.length]
            if extent.flags & (ZERO | HOLE):
                assert not any(expected)
            elif extent.flags & MAPPED:
                assert extent.source is not None
                assert extent.host is not None
                assert extent.source.read(extent.host, extent.length) == expected
            else:
                buf = bytearray(extent.length)
                image.read_into(buf, extent.start)
                assert buf == expected

    def test_any_window_of_extents_is_the_whole_clipped(self, image: Image) -> None:
        whole = image.extents(0, image.size)

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(st.integers(0, image.size - 1), st.integers(1, image.size))
        def run(start: int, length: int) -> None:
            length = min(length, image.size - start)
            assume(length > 0)
            found = image.extents(start, length)
            assert_contract(found, start, length)
            assert found == list(clip(whole, start, length))

        run()

    def test_the_map_is_the_real_programs(self, image: Image) -> None:
        from support import release7

        words = ["map", "--output=json", "-f", self.format, image.file.name]
        assert release7.map_json(self.ours(words).ok().out) == self.real(words).ok().out

    # -- reading changes nothing

    def test_reading_never_writes(self, image: Image) -> None:
        path = Path(image.file.name)
        image.close()
        before = state(path.parent)
        with self.library.open(path, format=self.format) as disk:
            disk.read(0, disk.size)
            list(disk.extents())
        self.library.info(path, format=self.format)
        list(self.library.map(path, format=self.format))
        try:
            self.library.check(path, format=self.format)
        except NotSupported:
            pass
        self.library.compare(path, path, first_format=self.format, second_format=self.format)
        with tempfile.TemporaryDirectory() as elsewhere:
            self.library.convert(path, os.path.join(elsewhere, "copy"), source_format=self.format)
        assert state(path.parent) == before

    def test_files_are_opened_for_reading_only(self, image: Image) -> None:
        image.close()
        with self.library.open(image.file.name, format=self.format) as disk:
            disk.read(0, disk.size)
            modes = []
            for number in os.listdir("/proc/self/fd"):
                try:
                    if os.path.samefile(f"/proc/self/fd/{number}", image.file.name):
                        modes.append(fcntl.fcntl(int(number), fcntl.F_GETFL) & os.O_ACCMODE)
                except OSError:
                    continue
            assert set(modes) == {os.O_RDONLY}

    def test_closing_twice_is_fine(self, image: Image) -> None:
        image.close()
        image.close()

    # -- damage

    def test_a_file_that_was_cut_off_is_an_error_or_reads_as_far_as_it_goes(
        self, image: Image, tmp_path: Path
    ) -> None:
        path = Path(image.file.name)
        image.close()
        whole = path.read_bytes()
        chance = random.Random(3)
        lengths = {0, 1, 3, 4, 8, 63, 64, 71, 72, 100, 104, 112, 511, 512, 513, 4096, len(whole) - 1}
        lengths |= {chance.randrange(len(whole)) for _ in range(25)}
        cut = tmp_path / "cut"
        for length in sorted(length for length in lengths if 0 <= length < len(whole)):
            cut.write_bytes(whole[:length])
            self.read_everything(cut)

    def test_damaged_bytes_are_an_error_and_nothing_worse(self, image: Image, tmp_path: Path) -> None:
        """Only errors of ours come out, whatever stands in the first tables."""
        path = Path(image.file.name)
        image.close()
        whole = path.read_bytes()
        chance = random.Random(5)
        hurt = tmp_path / "hurt"
        places = sorted(
            {*range(0, min(len(whole), 160), 3)} | {chance.randrange(len(whole)) for _ in range(40)}
        )
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= chance.choice((1, 0x80, 0xFF))
            hurt.write_bytes(damaged)
            self.read_everything(hurt)

    def read_everything(self, path: Path) -> None:
        """All that reads, at most 4 MiB of it; raises what is not a QimgError."""
        context = Context(warn=lambda notice: None)
        try:
            self.library.info(path, format=self.format, context=context)
            with self.library.open(path, format=self.format, context=context) as disk:
                disk.read(0, min(disk.size, 4 * MIB))
                for number, _ in enumerate(disk.extents(0, 1 << 30)):
                    if number > 10_000:
                        break
        except QimgError as error:
            assert "\n" not in str(error)
        try:
            self.library.check(path, format=self.format, context=context)
        except QimgError as error:
            assert "\n" not in str(error)

    def test_another_format_is_not_taken_for_this_one(self, tmp_path: Path) -> None:
        path = tmp_path / "other"
        path.write_bytes(b"this is no image" * 64)
        if self.format == "raw":
            with self.library.open(path, format="raw") as disk:
                assert disk.read(0, disk.size) == path.read_bytes()
            return
        with pytest.raises(QimgError, match=self.refusal or f"not in {self.format} format"):
            self.library.open(path, format=self.format)

    # -- what the commands say of it

    def test_measure_predicts_what_the_real_program_predicts(
        self, tmp_path: Path, source: Path, variant: str
    ) -> None:
        if not self.driver.can_measure:
            pytest.skip("cannot be measured")
        if not self.real_measures:
            pytest.skip("only qimg measures it; the format's own tests hold it to what convert makes")
        words = ["measure", "-f", "raw", "-O", self.format, *(["-o", variant] if variant else []), source]
        expected = self.real(words).ok().lines
        found = self.library.measure(
            source, format="raw", output_format=self.format, options=self.options(variant)
        )
        assert [
            f"required size: {found.required}",
            f"fully allocated size: {found.fully_allocated}",
        ] == expected

    def test_a_round_through_this_format_and_the_real_program_changes_nothing(
        self, tmp_path: Path, variant: str
    ) -> None:
        if not self.creates:
            pytest.skip("images of this format cannot be made")
        source = self.real_image(tmp_path, write_raw(tmp_path / "source.raw", LAYOUT), variant)
        path = tmp_path / "again"
        self.library.convert(source, path, source_format=self.format, format=self.format)
        target = tmp_path / "content"
        self.real(["convert", "-f", self.format, "-O", "raw", path, target]).ok()
        assert target.read_bytes() == content(LAYOUT)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def assert_contract(extents: list[Extent], start: int, length: int) -> None:
    """What `Image.extents` promises of ``start .. start + length``."""
    at = start
    last: Extent | None = None
    for extent in extents:
        assert extent.start == at
        assert extent.length > 0
        assert extent.depth == 0
        assert extent.flags in FLAGS
        assert (extent.flags & MAPPED == 0) or extent.host is not None
        assert (extent.host is None) == (extent.source is None)
        if last is not None and last.flags == extent.flags and last.source is extent.source:
            follows = last.host is None or last.host + last.length == extent.host
            assert not (follows and (last.host is None) == (extent.host is None)), "neighbours of one kind"
        at += extent.length
        last = extent
    assert at == start + length
