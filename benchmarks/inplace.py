"""Jobs that change an image where it is: commit, rebase, snapshot, resize. Each run gets fresh copies, in
memory and on disk, of all that it may change."""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path

from bench import Job, Workshop

CLUSTER = 64 << 10
GIB = 1 << 30


def jobs(shop: Workshop) -> list[Job]:
    """All of them."""
    chains = [Chain(shop, kind) for kind in ("raw", "qcow2")]
    return [*(job for chain in chains for job in chain.jobs()), *_changes(shop)]


class Chain:
    """An overlay with a tenth of its clusters, written in random order, on a base of this format, and another
    disk that differs from the base here and there."""

    def __init__(self, shop: Workshop, kind: str) -> None:
        self.shop = shop
        self.kind = kind
        self.base = shop.raw if kind == "raw" else shop.named(".qcow2")
        self.overlay = shop.named(f"-overlay-on-{kind}.qcow2")
        self.other = shop.named(f"-other.{kind}")
        self.before = shop.named("-before.raw")

    def jobs(self) -> list[Job]:
        """Both."""
        rebase = ("rebase", "-b", self.other, "-F", self.kind, "top.qcow2")
        return [
            Job(
                f"commit a tenth into {self.kind}",
                ("commit", "top.qcow2"),
                "1.5",
                before=self.make,
                fresh=self.fresh_pair,
                check=self.right_pair,
            ),
            Job(
                f"rebase a tenth from {self.kind} to {self.kind}",
                rebase,
                "1.5",
                before=self.make,
                fresh=self.fresh_top,
                check=self.right_top,
            ),
        ]

    def make(self) -> None:
        """The inputs."""
        shop = self.shop
        if self.kind == "raw":
            shop.real_files()
        else:
            shop.convert(self.base, "-O", "qcow2")
        shop.make(self.overlay, self._make_overlay)
        shop.make(self.other, self._make_other)
        shop.make(self.before, lambda path: shop.qemu_img("convert", "-O", "raw", self.overlay, path.name))

    @property
    def _size(self) -> int:
        return (self.shop.folder / self.shop.raw).stat().st_size

    def _make_overlay(self, path: Path) -> None:
        self.shop.qemu_img("create", "-f", "qcow2", "-b", self.base, "-F", self.kind, path.name)
        clusters = self._size // CLUSTER
        chosen = random.Random(1).sample(range(clusters), clusters // 10)
        self.shop.qemu_io(path.name, "qcow2", [(at * CLUSTER, CLUSTER, at % 255 + 1) for at in chosen])

    def _make_other(self, path: Path) -> None:
        self.shop.copy(self.base, path.name)
        step = self._size // 16
        self.shop.qemu_io(
            path.name,
            self.kind,
            [(at // 512 * 512, step // 51200 * 512, 7) for at in range(0, self._size, step)],
        )

    def fresh_top(self) -> None:
        """A copy of the overlay."""
        self.shop.copy(self.overlay, "top.qcow2")

    def fresh_pair(self) -> None:
        """A copy of the overlay, on a copy of the base."""
        self.fresh_top()
        self.shop.copy(self.base, "base.work")
        self.shop.qemu_img("rebase", "-u", "-b", "base.work", "-F", self.kind, "top.qcow2")

    def right_top(self) -> bool:
        """The overlay reads as before, and its tables are sound."""
        return self.shop.same("top.qcow2", self.before, "raw", "qcow2")

    def right_pair(self) -> bool:
        """So does the base."""
        return self.right_top() and self.shop.same("base.work", self.before, "raw", self.kind)


def _changes(shop: Workshop) -> list[Job]:
    """Changes of an image of 100 GiB that cost what its tables cost."""
    source, work = "scattered-100G.qcow2", "work.qcow2"
    python = (sys.executable, "-c", "pass")
    beside_python = " / bare python -c pass, CPU"

    def job(name: str, *words: str, other: tuple[str, ...] | None = None) -> Job:
        return Job(
            f"{name}, 100 GiB{'' if other is None else beside_python}",
            words,
            "-" if other is None else "0.33 (1 / 3)",
            before=partial(shop.make, source, partial(_scatter, shop)),
            fresh=partial(shop.copy, source, work),
            check=partial(shop.ask, "check", work),
            other=other,
            by_cpu=other is not None,
            rounds_factor=1 if other is None else 4,
        )

    snapshot, resize = ("snapshot", "-c", "one", work), ("resize", work, "+10G")
    return [
        job("snapshot -c", *snapshot),
        job("snapshot -c", *snapshot, other=python),
        job("resize +10G", *resize),
        job("resize +10G", *resize, other=python),
    ]


def _scatter(shop: Workshop, path: Path) -> None:
    """A thousand clusters, anywhere: each table is used."""
    shop.qemu_img("create", "-f", "qcow2", path.name, str(100 * GIB))
    chosen = random.Random(1).sample(range(100 * GIB // CLUSTER), 1000)
    shop.qemu_io(path.name, "qcow2", [(at * CLUSTER, CLUSTER, at % 255 + 1) for at in chosen])
