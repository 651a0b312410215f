"""Dirty bitmaps as others see them: the real program over NBD, and our reader."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path

from qimg.context import Context
from qimg.graph.open import ImageSpec, open_disk
from support.holders import qemu_nbd_serving
from support.run import run_peer, run_real

Ranges = list[tuple[int, int]]


def names(path: Path) -> list[str]:
    """Of the consistent bitmaps, as the real ``info`` lists them."""
    return [str(row["name"]) for row in listed(path) if "in-use" not in row["flags"]]  # type: ignore[operator]


def listed(path: Path) -> list[dict[str, object]]:
    """What the real ``info`` says of the bitmaps of a qcow2 image."""
    told = json.loads(run_real(["info", "-f", "qcow2", "--output=json", path], path.parent).ok().out)
    rows: list[dict[str, object]] = told["format-specific"]["data"].get("bitmaps", [])
    return rows


def dirty_ranges(path: Path) -> dict[str, Ranges]:
    """Name -> the guest ranges (start, end) that a server of the real program shows as dirty. A server shows
    only bitmaps that do not record: it is given a copy, in which recording has been switched off."""
    copy = path.with_name(path.name + ".served")
    copy.write_bytes(path.read_bytes())
    found = {}
    try:
        for name in names(path):
            run_real(["bitmap", "-f", "qcow2", "--disable", "--", copy, name], path.parent).ok()
            # An external data file is looked for in the current folder.
            with chdir(path.parent), qemu_nbd_serving(copy, read_only=True, options=("-B", name)) as socket:
                words = [f"--map=qemu:dirty-bitmap:{name}", "--json", f"nbd+unix:///?socket={socket}"]
                rows = json.loads(run_peer("nbdinfo", words).ok().out)
            found[name] = joined([(row["offset"], row["length"]) for row in rows if row["type"] == 1])
    finally:
        copy.unlink()
    return found


def joined(rows: Ranges) -> Ranges:
    """(start, length) of ranges as (start, end), neighbours as one."""
    ranges: Ranges = []
    for start, length in rows:
        if ranges and ranges[-1][1] == start:
            ranges[-1] = ranges[-1][0], start + length
        else:
            ranges.append((start, start + length))
    return ranges


def ours(path: Path) -> dict[str, tuple[int, bool, bytes | None]]:
    """Name -> (granularity, enabled, bits; None where inconsistent), as our reader has it."""
    spec = ImageSpec(str(path), format="qcow2")
    with chdir(path.parent), open_disk(spec, context=Context(), backing=False) as disk:
        return {
            bitmap.name: (
                bitmap.granularity,
                bitmap.enabled,
                None if bitmap.inconsistent else bytes(bitmap.bits),
            )
            for bitmap in disk.top.bitmaps()
        }
