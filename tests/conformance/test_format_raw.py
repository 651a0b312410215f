"""raw keeps the promises of `FormatSuite`."""

from __future__ import annotations

import pytest

from conformance.format_suite import FormatSuite


@pytest.mark.peer("qemu-img")
class TestRaw(FormatSuite):
    format = "raw"


@pytest.mark.peer("qemu-img")
class TestRawWithSpace(FormatSuite):
    format = "raw"
    variants = ("preallocation=falloc", "preallocation=full")
