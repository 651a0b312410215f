"""qed, with clusters and tables of any size, keeps the promises of `FormatSuite`."""

from __future__ import annotations

import pytest

from conformance.format_suite import FormatSuite


@pytest.mark.peer("qemu-img")
class TestQed(FormatSuite):
    format = "qed"
    real_measures = False
    refusal = "Image not in QED format"
    variants = ("", "cluster_size=4k,table_size=2", "cluster_size=64k,table_size=16", "cluster_size=1M")
