"""Crashes and failing disks while bitmaps change, and while they record: they are old, new or in use, and
never wrong where they claim to be right."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.graph.open import ImageSpec, open_disk
from qimg.storage.fault import CHANGE, WRITE, FaultStorage, Rule
from support import crash
from support.faults import opened_through
from support.model import Guest
from support.run import run_peer, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
Found = dict[str, tuple[bool, bytes] | None]
Operation = Callable[[Path], object]

#: What a change does, and whether it may come in two steps.
CHANGES: dict[str, Operation] = {
    "add": lambda path: qimg.add_bitmap(path, "new", granularity=512),
    "remove": lambda path: qimg.remove_bitmap(path, "b0"),
    "clear": lambda path: qimg.change_bitmap(path, "fine", clear=True),
    "disable": lambda path: qimg.change_bitmap(path, "b0", enabled=False),
    "merge": lambda path: qimg.change_bitmap(path, "b0", merge=["fine"]),
}
LAYOUTS = {
    "default": "cluster_size=64k",
    "small clusters": "cluster_size=512",
    "counts of one bit": "cluster_size=4k,refcount_bits=1",
}


def make(folder: Path, options: str, *, bitmaps: bool = True) -> Path:
    """An image of 2 MiB with two bitmaps and some data."""
    path = folder / "a.q"
    run_real(["create", "-q", "-f", "qcow2", "-o", options, path, str(2 * MIB)]).ok()
    if bitmaps:
        run_real(["bitmap", "--add", path, "b0"]).ok()
        run_real(["bitmap", "--add", "-g", "512", path, "fine"]).ok()
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write -P 1 0 200k", "-c", "write -P 2 1M 64k", path]).ok()
    if bitmaps:
        run_real(["bitmap", "--clear", path, "b0"]).ok()
    return path


def found_in(path: Path) -> Found:
    """Name -> enabled and bits; None for those that are in use."""
    spec = ImageSpec(str(path), format="qcow2")
    with open_disk(spec, context=Context(lambda _: None), backing=False) as disk:
        return {
            bitmap.name: None if bitmap.inconsistent else (bitmap.enabled, bytes(bitmap.bits))
            for bitmap in disk.top.bitmaps()
        }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_of_a_change_leaves_the_old_bitmaps_or_the_new_ones(
    change: str, layout: str, tmp_path: Path
) -> None:
    survive(make(tmp_path, LAYOUTS[layout]), CHANGES[change])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_crash_of_the_first_and_of_the_last_leaves_one_or_none(layout: str, tmp_path: Path) -> None:
    path = make(tmp_path, LAYOUTS[layout], bitmaps=False)
    survive(path, lambda path: qimg.add_bitmap(path, "b0"))
    survive(path, lambda path: qimg.remove_bitmap(path, "b0"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["base.q", "b" * 200, "b" * 250])
def test_a_crash_never_costs_the_backing_file(name: str, layout: str, tmp_path: Path) -> None:
    run_real(["create", "-q", "-f", "qcow2", tmp_path / name, str(2 * MIB)]).ok()
    run_peer("qemu-io", ["-f", "qcow2", "-c", "write -P 3 0 2M", tmp_path / name]).ok()
    path = tmp_path / "a.q"
    words = ["create", "-q", "-f", "qcow2", "-o", LAYOUTS[layout], "-b", name, "-F", "qcow2", path]
    run_real(words).ok()
    survive(path, lambda path: qimg.add_bitmap(path, "b0"))
    survive(path, lambda path: qimg.add_bitmap(path, "b1"))
    survive(path, lambda path: qimg.remove_bitmap(path, "b0"))
    survive(path, lambda path: qimg.remove_bitmap(path, "b1"))
    assert qimg.info(path).backing_filename == name


def survive(path: Path, operation: Operation) -> None:
    old = found_in(path)
    before = crash.Contents.of(path.parent, [path.name])
    recording = crash.record(path.parent, [path.name], lambda: operation(path))
    new = found_in(path)
    assert old != new
    assert run_real(["check", path]).code == 0
    with crash.scratch(path.parent) as place:
        judge = crash.Judge(place, [path.name], before, crash.Contents.of(path.parent, [path.name]))
        for state in recording.states(limit=60):
            judge.look(state.files, state.what, finished=state.durable)
            assert found_in(place / path.name) in ([new] if state.durable else [old, new]), state.what


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_failing_disk_leaves_the_old_bitmaps_or_the_new_ones(
    change: str, layout: str, tmp_path: Path
) -> None:
    path = make(tmp_path, LAYOUTS[layout])
    original = path.read_bytes()
    old = found_in(path)
    finished, counts = run_failing(path, CHANGES[change], None)
    assert finished
    new = found_in(path)
    rules = [Rule(CHANGE, nth) for nth in range(1, counts["change"] + 1)]
    rules += [Rule(WRITE, nth, errno.ENOSPC, torn=True) for nth in range(1, counts["write"] + 1)]
    rules += [Rule(CHANGE, nth, power_cut=True) for nth in range(1, counts["change"] + 1)]
    for rule in rules:
        path.write_bytes(original)
        finished, _ = run_failing(path, CHANGES[change], rule)
        assert found_in(path) in ([new] if finished else [old, new]), (rule.operation, rule.nth)
        assert run_real(["check", path]).code in (0, 3), (rule.operation, rule.nth)


def run_failing(path: Path, operation: Operation, rule: Rule | None) -> tuple[bool, dict[str, int]]:
    """Whether the operation came to its end with a disk that obeys `rule`; requests by kind."""
    faults: list[FaultStorage] = []

    def wrap(file: object) -> FaultStorage:
        faults.append(FaultStorage(file, [] if rule is None else [rule]))  # type: ignore[arg-type]
        return faults[-1]

    with opened_through(wrap, path.name):
        try:
            operation(path)
        except qimg.QimgError as error:
            assert "\n" not in str(error)
            return False, faults[0].counts
    return True, faults[0].counts


# -- recording


@contextmanager
def opened(path: Path) -> Iterator[Guest]:
    """A guest of the image, which is closed whatever happens."""
    guest = Guest(path)
    try:
        yield guest
        guest.image.flush()
    finally:
        guest.close()


def some_writes(path: Path) -> None:
    """Two batches of changes."""
    with opened(path) as guest:
        guest.write(512 * 1024, b"\5" * 65536)
        guest.zero(0, 65536)
        guest.write(MIB, b"\6" * 1000)
        guest.image.flush()
        guest.discard(MIB, 65536)
        guest.write(2 * MIB - 65536, b"\7" * 65536)


def covered(bits: bytes, granularity: int, before: bytes, now: bytes) -> bool:
    """Whether every sector that changed has its bit."""
    for start in range(0, len(before), 512):
        if before[start : start + 512] != now[start : start + 512]:
            bit = start // granularity
            if bit // 8 >= len(bits) or not bits[bit // 8] >> bit % 8 & 1:
                return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_crash_leaves_consistent_knows_of_every_change(layout: str, tmp_path: Path) -> None:
    path = make(tmp_path, LAYOUTS[layout])
    run_real(["bitmap", "--add", path, "clean"]).ok()
    run_real(["bitmap", "--disable", path, "fine"]).ok()
    assert_recorded(path, some_writes)


def assert_recorded(path: Path, operation: Operation) -> None:
    granularity = {bitmap.name: bitmap.granularity for bitmap in qimg.bitmaps(path)}
    before = crash.Contents.of(path.parent, [path.name])
    resting = found_in(path)["fine"]
    recording = crash.record(path.parent, [path.name], lambda: operation(path))
    after = crash.Contents.of(path.parent, [path.name])
    assert run_real(["check", path]).code == 0
    states = {"in use": 0, "consistent": 0}
    with crash.scratch(path.parent) as place:
        for state in recording.states(limit=160):
            (place / path.name).unlink(missing_ok=True)
            (place / path.name).write_bytes(state.files[path.name])
            checked = run_real(["check", path.name], place)
            assert checked.code in (0, 3), f"{state.what}: {checked.out}{checked.err}"
            now = crash.guest_content(place / path.name)
            found = found_in(place / path.name)
            assert found.keys() == {"b0", "fine", "clean"}
            assert found["fine"] == resting, "one that does not record is not lost"
            for name in ("b0", "clean"):
                states["consistent" if found[name] else "in use"] += 1
                if found[name] is not None:
                    bits = found[name][1]  # type: ignore[index]
                    assert covered(bits, granularity[name], before.images[path.name], now), state.what
            if state.durable:
                assert now == after.images[path.name]
                assert found["clean"] is not None
    assert states["in use"] > 20
    assert states["consistent"] > 2


def test_what_a_failing_disk_leaves_consistent_knows_of_every_change(tmp_path: Path) -> None:
    path = make(tmp_path, "cluster_size=64k")
    original, before = path.read_bytes(), crash.guest_content(path)
    granularity = {bitmap.name: bitmap.granularity for bitmap in qimg.bitmaps(path)}
    finished, counts = run_failing(path, some_writes, None)
    assert finished
    for nth in range(1, counts["change"] + 1):
        path.write_bytes(original)
        finished, _ = run_failing(path, some_writes, Rule(CHANGE, nth))
        assert run_real(["check", path]).code in (0, 3), nth
        now = crash.guest_content(path)
        for name, found in found_in(path).items():
            assert found is not None or not finished, nth
            if found is not None:
                assert covered(found[1], granularity[name], before, now), nth


@pytest.mark.parametrize("size", [MIB + 512, 20 * MIB])
def test_a_crash_of_a_resize_leaves_bitmaps_that_fit_or_are_in_use(size: int, tmp_path: Path) -> None:
    path = make(tmp_path, "cluster_size=512")  # a table's entry spans 2 MiB of the fine one
    old = found_in(path)
    recording = crash.record(tmp_path, [path.name], lambda: qimg.resize(path, size, shrink=size < 2 * MIB))
    new = found_in(path)
    assert None not in new.values()
    in_use = 0
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=200):
            (place / path.name).unlink(missing_ok=True)
            (place / path.name).write_bytes(state.files[path.name])
            checked = run_real(["check", path.name], place)
            assert checked.code in (0, 3), f"{state.what}: {checked.out}{checked.err}"
            found = found_in(place / path.name)
            in_use += None in found.values()
            if state.durable:
                assert found == new
            for name, value in found.items():
                assert value is None or value in (old[name], new[name]), state.what
    assert in_use > 5
