"""A power cut or a failing disk at any moment while a qcow2 image is changed in place costs leaks at most.

The harness and its rules are those of `support.crash`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from support import crash, model
from support.model import KINDS, Guest, change

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: What is done between two flushes, as kinds of `model.change`.
MIXED = "wwwzdp"


def writing(
    path: Path, seed: int, batches: int, kinds: str = MIXED
) -> tuple[Callable[[], None], list[bytes]]:
    """An operation of this many batches, each made durable; what the disk holds after each change in it."""
    first = crash.guest_content(path)
    contents: list[bytes] = []

    def run() -> None:
        contents.clear()
        chance = random.Random(seed)
        with Guest(path, first) as guest:
            for _ in range(batches):
                for _ in range(chance.choice([1, 4])):
                    change(guest, chance, kinds, step=512)
                    contents.append(bytes(guest.content))
                guest.flush()

    with crash.unchanged(path.parent, [path.name, *data_files(path.parent)]):
        run()
    return run, list(contents)


def data_files(folder: Path) -> list[str]:
    """The image's data file if it has one."""
    return [name for name in ("image.data",) if (folder / name).exists()]


@pytest.mark.parametrize("name", KINDS)
def test_a_power_cut_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    run, contents = writing(path, 5, 3)
    crash.assert_survives(
        tmp_path,
        ["image"],
        run,
        files=data_files(tmp_path),
        between=contents,
        after=contents[-1],
        limit=60,
        seed=len(name),
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_request_that_fails_while_a_guest_writes(name: str, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name)
    run, contents = writing(path, 6, 2)
    crash.assert_survives_errors(
        tmp_path, ["image"], run, files=data_files(tmp_path), between=contents, again=True, limit=30
    )
