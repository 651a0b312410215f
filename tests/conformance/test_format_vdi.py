"""vdi, dynamic and static, keeps the promises of `FormatSuite`."""

from __future__ import annotations

import pytest

from conformance.format_suite import FormatSuite


@pytest.mark.peer("qemu-img")
class TestVdi(FormatSuite):
    format = "vdi"
    real_measures = False
    refusal = "Unsupported VDI image size|Image not in VDI format"
    variants = ("", "static=on")
