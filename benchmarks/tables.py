"""Jobs that read and write tables, not the guest's bytes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import Job, Workshop

CLUSTER = 64 << 10


def jobs(shop: Workshop) -> list[Job]:
    """All of them."""
    size = "64G" if shop.quick else "1T"
    big = f"metadata-{size}.qcow2"
    empty = "empty-1T.raw" if shop.quick else "empty-15T.raw"
    scattered = f"scattered-{_pieces(shop)}.qcow2"
    qcow2 = shop.named(".qcow2")
    metadata = ("-f", "qcow2", "-o", "preallocation=metadata")

    def make_big() -> None:
        shop.make(big, lambda path: shop.qemu_img("create", *metadata, path.name, size))

    def make_empty() -> None:
        shop.make(empty, lambda path: shop.qemu_img("create", "-f", "raw", path.name, empty[6:-4]))

    def make_scattered() -> None:
        shop.make(scattered, partial(_scatter, shop))

    def make_small() -> None:
        shop.make("small.qcow2", lambda path: shop.qemu_img("create", "-f", "qcow2", path.name, "1G"))

    def make_qcow2() -> None:
        shop.convert(qcow2, "-O", "qcow2")

    def into(
        name: str, source: str, wanted: str, before: Callable[[], None], *, full_only: bool = False
    ) -> Job:
        kind = source.rpartition(".")[2]
        words = ("convert", "-f", kind, "-O", "qcow2", source, "target.qcow2")
        check = partial(shop.same, "target.qcow2", source, kind, "qcow2")
        return Job(name, words, wanted, "target.qcow2", before=before, check=check, full_only=full_only)

    pieces = f"{_pieces(shop)} scattered clusters"
    return [
        Job("compare raw with qcow2", ("compare", shop.raw, qcow2), "1.5", before=make_qcow2),
        Job(f"check {size} of metadata", ("check", big), "5", before=make_big),
        Job(f"map {size} of metadata", ("map", "--output=json", big), "5", before=make_big),
        Job(f"measure {size} of metadata", ("measure", "-O", "qcow2", big), "5", before=make_big),
        into(f"convert {size} of metadata", big, "memory 200 MiB", make_big, full_only=True),
        into(f"convert {empty[6:-4]} of nothing", empty, "0.3 s", make_empty),
        Job(f"check {pieces}", ("check", scattered), "2", before=make_scattered),
        Job(f"map {pieces}", ("map", "--output=json", scattered), "2", before=make_scattered),
        into(f"convert {pieces}", scattered, "2", make_scattered, full_only=True),
        Job(
            f"create {size}, preallocation=metadata",
            ("create", *metadata, "target.qcow2", size),
            "3",
            "target.qcow2",
            check=lambda: shop.ask("check", "target.qcow2"),
        ),
        Job("map --output=json qcow2", ("map", "--output=json", qcow2), before=make_qcow2),
        Job("info of a small qcow2", ("info", "small.qcow2"), before=make_small, rounds_factor=4),
        Job(
            "info of a small qcow2 / bare python -c pass, CPU",
            ("info", "small.qcow2"),
            "0.5 (1 / 2)",
            before=make_small,
            other=(sys.executable, "-c", "pass"),
            by_cpu=True,
            rounds_factor=8,
        ),
    ]


def _pieces(shop: Workshop) -> int:
    return 1000 if shop.quick else 100_000


def _scatter(shop: Workshop, path: Path) -> None:
    """Clusters written in random order, every other one left out: none lies behind its neighbour."""
    count = _pieces(shop)
    shop.qemu_img("create", "-f", "qcow2", path.name, str(2 * count * CLUSTER))
    order = random.Random(1).sample(range(count), count)
    shop.qemu_io(path.name, "qcow2", [(2 * at * CLUSTER, CLUSTER, at % 255 + 1) for at in order])
