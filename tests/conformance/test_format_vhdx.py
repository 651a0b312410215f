"""vhdx, dynamic and fixed, keeps the promises of `FormatSuite`."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from conformance.format_suite import FormatSuite, sectors
from qimg.extent import MAPPED, ZERO
from qimg.formats.base import Image
from support.run import run_real


class VhdxSuite(FormatSuite):
    format = "vhdx"
    real_measures = False
    refusal = "not a VHDX file"

    def test_the_map_is_the_real_programs(self, image: Image) -> None:
        """The real program knows nothing of where vhdx images have data; we do (docs/differences.md)."""
        words = ["map", "--output=json", "-f", "vhdx", image.file.name]
        whole = '[{ "start": 0, "length": 1310720, "depth": 0, "present": true, "zero": false, "data": true}]'
        assert run_real(words).ok().out.strip() == whole
        rows = list(qimg.map(image.file.name, format="vhdx"))
        file = Path(image.file.name).read_bytes()
        raw = Path(image.file.name).with_name("source.raw").read_bytes()
        for row in rows:
            content = raw[row.start : row.start + row.length]
            assert row.zero == (not any(content))
            if row.data:
                assert row.offset is not None
                assert file[row.offset : row.offset + row.length] == content
        assert sum(row.length for row in rows) == sectors(len(raw))

    def test_what_the_file_has_not_written_inside_a_block_is_known_to_be_zero(self, image: Image) -> None:
        raw = Path(image.file.name).with_name("source.raw").read_bytes()
        for extent in image.extents(0, image.size):
            if extent.flags & MAPPED:
                content = raw[extent.start : extent.start + extent.length]
                assert bool(extent.flags & ZERO) == (not any(content))


@pytest.mark.peer("qemu-img")
class TestVhdxDynamic(VhdxSuite):
    variants = ("", "block_size=1M", "block_state_zero=off,log_size=3M,block_size=2M")


@pytest.mark.peer("qemu-img")
class TestVhdxFixed(VhdxSuite):
    variants = ("subformat=fixed", "subformat=fixed,block_size=1M,block_state_zero=off")
