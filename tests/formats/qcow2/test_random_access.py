"""Writing into qcow2 images that the real program made: any place, any kind of image.

What a guest does goes through `support.model.Guest`; the real program judges: the check is clean (no leaks
either), the content is that of a bytearray, internal snapshots hold what they held.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support import crash, model
from support.model import KINDS, Guest, assert_holds, change

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KINDS)
def test_any_changes_leave_a_clean_image_of_the_right_content(name: str, seed: int, tmp_path: Path) -> None:
    path = model.prepare(tmp_path, name, seed)
    before = crash.Contents.of(tmp_path, ["image"])
    chance = random.Random(seed)
    with Guest(path) as guest:
        for _ in range(20):
            change(guest, chance, "wwwwzdpf" if seed else "wwwwzdp")
            assert guest.read() == guest.content, "staged changes show at once"
    assert_holds(path, guest.content)
    after = crash.Contents.of(tmp_path, ["image"])
    assert after.snapshots == before.snapshots
    assert guest.notices == []
