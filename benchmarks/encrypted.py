"""Jobs that encrypt and decrypt a disk of real files.

Both programs write into an image that is there: the real one measures its own speed for two seconds whenever
it makes one, which says nothing about copying, and fails at that now and then.
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

from bench import Job, Workshop

_SECRET = ("--object", "secret,id=key,data=benchmark")


def jobs(shop: Workshop) -> list[Job]:
    """All of them."""
    image, empty, target = shop.named(".luks"), shop.named(".empty.luks"), "target.luks"
    raw = f"driver=raw,file.filename={shop.raw}"
    return [
        Job(
            "convert luks to raw",
            ("convert", *_SECRET, "--image-opts", _luks(image), "-O", "raw", "target.raw"),
            "3",
            "target.raw",
            before=partial(_make, shop, image, "convert", "-f", "raw", "-O", "luks", shop.raw, "{}"),
            check=partial(shop.same, "target.raw", shop.raw, "raw", "raw"),
        ),
        Job(
            "convert raw to luks",
            ("convert", "-n", *_SECRET, "--image-opts", raw, "--target-image-opts", _luks(target)),
            "3",
            target,
            before=partial(_make, shop, empty, "create", "-f", "luks", "{}", str(shop.content * 5 // 4)),
            fresh=partial(shop.copy, empty, target),
            check=partial(shop.ask, "compare", *_SECRET, "--image-opts", raw, _luks(target)),
        ),
    ]


def _luks(name: str) -> str:
    return f"driver=luks,file.filename={name},key-secret=key"


def _make(shop: Workshop, name: str, *words: str) -> None:
    """An image made by ours: ``iter-time=0`` costs it no time. ``{}`` in `words` is its name."""
    shop.real_files()

    def build(path: Path) -> None:
        said = [word.format(path.name) for word in (*words, *_SECRET, "-o", "key-secret=key,iter-time=0")]
        subprocess.run([*shop.ours, *said], cwd=shop.folder, check=True, stdout=subprocess.DEVNULL)

    shop.make(name, build)
