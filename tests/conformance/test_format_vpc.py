"""vpc, dynamic and fixed, keeps the promises of `FormatSuite`.

Only images that record their size exactly have the suite's sizes (``force_size``)."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from conformance.format_suite import LAYOUT, FormatSuite
from support.build import content, real_content, write_raw


class VpcSuite(FormatSuite):
    format = "vpc"
    real_measures = False
    refusal = "invalid VPC image"

    def test_a_round_through_this_format_and_the_real_program_changes_nothing(
        self, tmp_path: Path, variant: str
    ) -> None:
        source = self.real_image(tmp_path, write_raw(tmp_path / "source.raw", LAYOUT), variant)
        path = tmp_path / "again"
        options = self.options(variant)
        qimg.convert(source, path, source_format=self.format, format=self.format, options=options)
        assert real_content(path, format=self.format) == content(LAYOUT)


@pytest.mark.peer("qemu-img")
class TestVpcDynamic(VpcSuite):
    variants = ("force_size=on",)


@pytest.mark.peer("qemu-img")
class TestVpcFixed(VpcSuite):
    # The real program takes the footer of an empty fixed image, at offset 0, for a dynamic image's.
    real_opens_empty = False
    variants = ("subformat=fixed,force_size=on",)
