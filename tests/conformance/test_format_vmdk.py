"""vmdk, in every kind that can be created, keeps the promises of `FormatSuite`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qimg
from conformance.format_suite import FormatSuite
from qimg.extent import COMPRESSED
from qimg.formats.base import Image
from qimg.storage.posix import PosixFile


class VmdkSuite(FormatSuite):
    format = "vmdk"
    real_opens_empty = False
    real_measures = False
    refusal = "invalid VMDK image descriptor"

    def open(self, path: Path) -> Image:
        image = super().open(path)
        if image.files:
            image.attach_files([PosixFile.open(os.path.join(path.parent, name)) for name in image.files])
        return image


@pytest.mark.peer("qemu-img")
class TestVmdkSparse(VmdkSuite):
    variants = (
        "",
        "zeroed_grain=on",
        "subformat=twoGbMaxExtentSparse",
        "adapter_type=lsilogic,compat6=on,toolsversion=7",
    )

    def test_compressed_content_comes_out_of_the_real_program_as_it_went_in(
        self, tmp_path: Path, source: Path, variant: str
    ) -> None:
        """Compression may be asked for, and what is stored is plain, as with the real program."""
        path = tmp_path / "new"
        how = {"source_format": "raw", "format": "vmdk", "options": self.options(variant)}
        qimg.convert(source, path, compress=True, **how)
        self.same_for_real(path, source)
        with self.open(path) as image:
            assert not any(extent.flags & COMPRESSED for extent in image.extents(0, image.size))


@pytest.mark.peer("qemu-img")
class TestVmdkFlat(VmdkSuite):
    variants = ("subformat=monolithicFlat", "subformat=twoGbMaxExtentFlat")


@pytest.mark.peer("qemu-img")
class TestVmdkStream(VmdkSuite):
    compresses = True
    variants = ("subformat=streamOptimized", "subformat=streamOptimized,zeroed_grain=on")
