"""What a guest does to an image in the loops of faults: batches of random changes, and the same on a disk
that fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qimg.errors import QimgError
from qimg.storage.fault import CHANGE, FaultStorage, Rule
from support import crash
from support.faults import opened_through
from support.model import Guest

MIB = 1 << 20
#: Changes after which a run on a failing disk counts as endless.
_MOST = 400


def batches(
    path: Path, format: str, content: bytes, seed: int, *, count: int = 3, zeros: float = 0.25
) -> tuple[Callable[[], None], list[bytes]]:
    """A run of `count` batches of writes and zeros, with a flush behind each, over an image that holds
    `content`; and what the disk holds after each change. `zeros`: their share."""
    contents: list[bytes] = []

    def run() -> None:
        contents.clear()
        chance = random.Random(seed)
        with Guest(path, content, format=format) as guest:
            for _ in range(count):
                for _ in range(chance.choice((1, 3))):
                    offset = chance.randrange(len(content) // 512) * 512
                    length = min(chance.choice((512, 4096, 70144, MIB + 512)), len(content) - offset)
                    if chance.random() < zeros:
                        guest.zero(offset, length)
                    else:
                        guest.write(offset, chance.randbytes(16) * (length // 16))
                    contents.append(bytes(guest.content))
                guest.flush()

    with crash.unchanged(path.parent, [path.name]):
        run()
    return run, list(contents)


def failures(path: Path, run: Callable[[], object], *, step: int = 1) -> Iterator[int]:
    """Do the same to the same image again and again, while change n of its file fails; gives n each time that
    ends in an error, with the image as it was left. The last run is the one that succeeds."""
    before = path.read_bytes()
    for nth in range(1, _MOST, step):
        path.write_bytes(before)
        rules = [Rule(CHANGE, nth)]
        with opened_through(partial(FaultStorage, rules=rules), path.name):
            try:
                run()
                return
            except QimgError as error:
                assert "\n" not in str(error)
        yield nth
    pytest.fail(f"{_MOST} changes, and no end")
