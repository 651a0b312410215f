"""qcow keeps the promises of `FormatSuite`, plain and compressed."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from conformance.format_suite import SIZES, FormatSuite
from qimg.errors import QimgError


@pytest.mark.peer("qemu-img")
class TestQcow(FormatSuite):
    format = "qcow"
    compresses = True
    real_measures = False
    real_opens_empty = False
    refusal = "Image not in qcow format"

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_a_new_image_of_any_size_is_sound_and_reads_as_zeros(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        super().test_a_new_image_of_any_size_is_sound_and_reads_as_zeros(tmp_path, variant, size)

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_content_of_any_size_comes_out_of_the_real_program_as_it_went_in(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        super().test_content_of_any_size_comes_out_of_the_real_program_as_it_went_in(tmp_path, variant, size)

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_content_of_any_size_is_read_as_the_real_program_wrote_it(
        self, tmp_path: Path, variant: str, size: int
    ) -> None:
        super().test_content_of_any_size_is_read_as_the_real_program_wrote_it(tmp_path, variant, size)

    def test_there_are_no_images_without_content(self, tmp_path: Path) -> None:
        with pytest.raises(QimgError, match="Image size is too small, cannot be zero length"):
            qimg.create(tmp_path / "new", format="qcow", size=0)
        assert not (tmp_path / "new").exists()
