"""Images that descriptions are tried on, made by the real program, and the comparison of both programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from qimg.context import Context, Notice
from qimg.errors import QimgError
from qimg.graph.open import ImageSpec, open_disk
from support.run import run_real

# The recorded backing format's header extension becomes an unknown one, which is ignored.
_BACKING_FORMAT = bytes.fromhex("E2792ACA")
_IGNORED = bytes.fromhex("12345678")


class Gallery:
    """A folder with images. `overlay` adds a qcow2 image that names a backing file which need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def overlay(
        self, name: str, backing: str, format: str | None = "raw", *, recorded: bytes | None = None
    ) -> None:
        """`format` None: none is recorded; `recorded`: bytes of the same length to record instead."""
        words = ["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format or "raw", name, "1M"]
        assert run_real(words, self.folder).code == 0
        path = self.folder / name
        image = path.read_bytes()
        if format is None:
            path.write_bytes(image.replace(_BACKING_FORMAT, _IGNORED, 1))
        if recorded is not None:
            assert format is not None and len(recorded) == len(format)
            place = image.index(_BACKING_FORMAT) + 8
            path.write_bytes(image[:place] + recorded + image[place + len(recorded) :])


class Outcome(NamedTuple):
    """What an open showed: the lines on standard error; name, format and size of the top image or None."""

    err: str
    top: tuple[str, str, int] | None


def open_ours(
    text: str,
    command: str = "map",
    *,
    image_opts: bool = False,
    format: str | None = None,
    force_share: bool = False,
    writable: bool = False,
) -> Outcome:
    """Open as `command` (info or map) would, with what the command line would print."""
    lines: list[str] = []

    def warn(notice: Notice) -> None:
        lines.append(notice.text if notice.plain else f"qemu-img: warning: {notice.text}")
        lines.extend([notice.hint] if notice.hint else [])

    spec = ImageSpec(text, image_opts=image_opts, format=format, force_share=force_share)
    info = command == "info"
    try:
        with open_disk(
            spec,
            context=Context(warn),
            backing=not info,
            for_info=info,
            raw_shares_all=True,
            writable=writable,
        ) as disk:
            top = disk.layers[0]
            return Outcome("\n".join(lines), (top.filename, top.image.format_name, disk.size))
    except QimgError as error:
        lines.append(f"qemu-img: {error}")
        lines.extend([error.hint] if error.hint else [])
        return Outcome("\n".join(lines), None)


def open_real(words: list[str], folder: Path) -> Outcome:
    """What the real program says; fields of `top` are filled for info only. Compare names by `same_name`."""
    result = run_real(words, folder)
    err = result.err.strip()
    if result.code != 0:
        assert err
        return Outcome(err, None)
    found = re.search(r"^image: (.*)\nfile format: (\S+)\nvirtual size: .*\((\d+) bytes\)", result.out)
    if found is None:
        return Outcome(err, ("", "", 0))
    return Outcome(err, (found[1], found[2], int(found[3])))


def same_name(left: str, right: str) -> bool:
    """Whether two displayed names are equal; the order of keys in ``json:`` names does not count."""
    if left.startswith("json:") and right.startswith("json:"):
        return bool(json.loads(left[5:]) == json.loads(right[5:]))
    return left == right
