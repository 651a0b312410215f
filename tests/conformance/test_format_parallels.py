"""parallels keeps the promises of `FormatSuite`."""

from __future__ import annotations

import pytest

from conformance.format_suite import FormatSuite


@pytest.mark.peer("qemu-img")
class TestParallels(FormatSuite):
    format = "parallels"
    real_measures = False
    refusal = "Image not in Parallels format"
    variants = ("", "cluster_size=64k", "cluster_size=12k")
