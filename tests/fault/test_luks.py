"""A crash or a failing disk while key slots change costs no passphrase that is to stay, nor ever the last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from qimg.crypto.luks import LuksHeader
from qimg.errors import QimgError, StorageError
from qimg.storage.fault import FaultStorage, Rule
from qimg.storage.memory import MemoryStorage
from support import crash, luks
from support.faults import opened_through
from support.luks import PASSPHRASES

#: The smallest keys: material of 62.5 KiB a slot.
SMALL = {"cipher_alg": "aes-128", "cipher_mode": "cbc"}

Change = Callable[[Path], None]


def amend(secret: str, *, force: bool = False, **options: object) -> Change:
    said = {name.replace("_", "-"): value for name, value in options.items()}

    def change(path: Path) -> None:
        qimg.amend(luks.name(path, secret), said, force=force, context=luks.context())

    return change


#: What was done to the image before, and the change; images begin with "s" in slot 0.
CHANGES: dict[str, tuple[list[Change], Change]] = {
    "add": ([], amend("s", state="active", new_secret="n", iter_time=0)),
    "add where a sector ends": ([], amend("s", state="active", new_secret="n", keyslot=6, iter_time=0)),
    "overwrite another": (
        [amend("s", state="active", new_secret="n", iter_time=0)],
        amend("s", state="active", new_secret="o", keyslot=1, iter_time=0, force=True),
    ),
    "overwrite the only one": (
        [],
        amend("s", state="active", new_secret="n", keyslot=0, iter_time=0, force=True),
    ),
    "erase": (
        [amend("s", state="active", new_secret="n", iter_time=0)],
        amend("n", state="inactive", keyslot=0),
    ),
    "erase by secret": (
        [amend("s", state="active", new_secret="n", keyslot=6, iter_time=0)],
        amend("s", state="inactive", old_secret="n"),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return luks.make(tmp_path_factory.mktemp("luks") / "a.luks", 4096, **SMALL)


def working(content: bytes) -> set[str]:
    """Ids of the secrets that open the volume."""
    area = MemoryStorage(content)
    header = LuksHeader.read(area)
    found = set()
    for id, text in PASSPHRASES.items():
        if id != "w" and any(header.open_slot(area, number, text.encode()) for number in range(8)):
            found.add(id)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_crash_leaves_every_passphrase_that_is_to_stay_and_always_one(
    name: str, whole: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(whole, tmp_path / "a.luks"))
    first, change = CHANGES[name]
    for step in first:
        step(path)
    before = working(path.read_bytes())
    recording = crash.record(tmp_path, ["a.luks"], lambda: change(path))
    after = working(path.read_bytes())
    assert after
    assert after != before
    seen = 0
    for state in recording.states(limit=15):
        found = working(state.files["a.luks"])
        assert found, state.what
        assert before & after <= found <= before | after, state.what
        if state.durable:
            assert found == after, state.what
        seen += 1
    assert seen > 4


@pytest.mark.parametrize("name", ["add where a sector ends", "overwrite the only one", "erase"])
def test_a_failing_disk_is_an_error_and_leaves_the_same(name: str, whole: Path, tmp_path: Path) -> None:
    prepared = Path(shutil.copy(whole, tmp_path / "prepared"))
    first, change = CHANGES[name]
    for step in first:
        step(prepared)
    before = working(prepared.read_bytes())
    path = tmp_path / "a.luks"
    counted: list[FaultStorage] = []

    def counting(file: object) -> FaultStorage:
        counted.append(FaultStorage(file))  # type: ignore[arg-type]
        return counted[-1]

    shutil.copy(prepared, path)
    with opened_through(counting, "a.luks"):
        change(path)
    after = working(path.read_bytes())
    total = counted[0].counts["change"]
    for nth in sorted({*range(1, min(total, 6)), total}):
        shutil.copy(prepared, path)
        rule = Rule("change", nth, power_cut=True, torn=True)
        with (
            opened_through(lambda file, rule=rule: FaultStorage(file, [rule]), "a.luks"),
            pytest.raises(QimgError) as raised,
        ):
            change(path)
        assert isinstance(raised.value, StorageError)
        found = working(path.read_bytes())
        assert found, nth
        assert before & after <= found <= before | after, nth
