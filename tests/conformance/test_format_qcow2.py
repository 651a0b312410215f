"""qcow2, in every shape, keeps the promises of `FormatSuite`."""

from __future__ import annotations

import pytest

from conformance.format_suite import FormatSuite


@pytest.mark.peer("qemu-img")
class TestQcow2(FormatSuite):
    format = "qcow2"
    compresses = True
    variants = (
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "lazy_refcounts=on",
    )


@pytest.mark.peer("qemu-img")
class TestQcow2WithSpace(FormatSuite):
    format = "qcow2"
    variants = ("preallocation=metadata", "preallocation=falloc", "preallocation=full")
