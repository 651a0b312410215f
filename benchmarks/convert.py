"""Jobs that move a disk of real files from one format to another."""

from __future__ import annotations

from functools import partial

from bench import Job, Workshop

ZSTD = ("-c", "-o", "compression_type=zstd")
STREAM = ("-o", "subformat=streamOptimized")


def jobs(shop: Workshop) -> list[Job]:
    """All of them."""
    inputs: dict[str, tuple[str, tuple[str, ...]]] = {"raw": (shop.raw, ())}

    def source(name: str, kind: str, *words: str) -> None:
        inputs[name] = (shop.named(f".{name.replace(' ', '-')}"), ("-O", kind, *words))

    for kind in ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "qcow"):
        source(kind, kind)
    source("qcow2 zlib", "qcow2", "-c")
    source("qcow2 zstd", "qcow2", *ZSTD)
    source("vmdk streamOptimized", "vmdk", *STREAM)

    def job(start: str, end: str, *more: str, wanted: str = "1.3", note: str = "") -> Job:
        name, words = inputs[start]
        target = f"target.{end}"
        return Job(
            f"convert {start} to {end}{note}",
            ("convert", *more, "-f", start.split(maxsplit=1)[0], "-O", end, name, target),
            wanted,
            target,
            before=partial(shop.convert, name, *words) if words else shop.real_files,
            check=partial(shop.same, target, shop.raw, "raw", end),
        )

    plain = [("raw", "raw"), ("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")]
    packed = [
        job("raw", "qcow2", "-c", wanted="8, size 1.06", note=" -c"),
        job("raw", "qcow2", *ZSTD, wanted="1.3", note=" -c, zstd"),
        job("qcow2 zlib", "raw", wanted="1.5"),
        job("qcow2 zstd", "raw", wanted="1.2"),
        job("raw", "vmdk", *STREAM, wanted="10, size 1.06", note=" streamOptimized"),
        job("vmdk streamOptimized", "raw", wanted="2"),
        job("vmdk streamOptimized", "qcow2", wanted="2"),
    ]
    others = [
        both
        for kind in ("vmdk", "vdi", "vpc", "vhdx", "qed", "qcow")
        for both in (("raw", kind), (kind, "raw"))
    ]
    return [*(job(*both, wanted="1.5") for both in plain), *packed, *(job(*both) for both in others)]
