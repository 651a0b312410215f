"""Any sequence of changes of a chain of images, beside a model of plain bytes.

The chain is ``top``, which may be encrypted, over ``mid`` over ``base.raw``. The model knows the bytes that
each image shows, those of each internal snapshot, and which parts were written to since a bitmap was switched
on; it knows no formats. After every step the real program's check is clean; at the end it reads all that the
model holds.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.errors import QimgError
from support import crash, secrets
from support.model import Guest, change, mixed_stretches
from support.qcow2 import make
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MAXIMUM = 600 << 10
#: Options of the top image.
METHODS = ("", "", secrets.AES, f"{secrets.LUKS},encrypt.cipher-alg=aes-128")
CONTEXT = secrets.context(warn=lambda _: None)


class Bitmap:
    """What the model knows of a bitmap: whether it records, and bytes that it has to know (start, length)."""

    def __init__(self) -> None:
        self.enabled = True
        self.dirty: list[tuple[int, int]] = []


class Layer:
    """One qcow2 image: `path` (`where` as functions take it), what it shows, its snapshots by id, bitmaps by
    name."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.where = secrets.where(path) if secrets.is_encrypted(path) else str(path)
        self.content = bytearray(content)
        self.snapshots: dict[str, bytes] = {}
        self.bitmaps: dict[str, Bitmap] = {}

    def touch(self, before: bytes) -> None:
        """The content was `before`: what differs was written to."""
        now = bytes(self.content)
        for start in range(0, min(len(before), len(now)), 512):
            if before[start : start + 512] != now[start : start + 512]:
                for bitmap in self.bitmaps.values():
                    if bitmap.enabled:
                        bitmap.dirty.append((start, min(512, len(now) - start)))

    def look_again(self) -> None:
        """What snapshots show through their holes has changed."""
        for id in self.snapshots:
            self.snapshots[id] = self.snapshot(id)

    def snapshot(self, id: str) -> bytes:
        """What the real program reads after going back to this snapshot (``convert -l`` shows it in the size
        of the disk as it is now). It does not go back while there are bitmaps."""
        copy = self.path.with_name("copy")
        copy.write_bytes(self.path.read_bytes())
        for name in self.bitmaps:
            run_real(["bitmap", "--remove", *secrets.words(copy), name]).ok()
        back = ["snapshot", "-a", id, *secrets.words(copy, None)]
        if run_real(back).code:
            # On the way the real program counts every cluster once more than before or after.
            run_real(["amend", "-o", "refcount_bits=16", *secrets.words(copy)]).ok()
            run_real(back).ok()
        return crash.guest_content(copy)


def _make_top(path: Path, size: int, options: str, method: str) -> None:
    """An overlay over ``mid``."""
    if not method:
        make(path, size, options, "-b", "mid", "-F", "qcow2")
        return
    chosen = dict(pair.split("=") for pair in f"{options},{method}".split(","))
    over = {"backing": "mid", "backing_format": "qcow2"}
    qimg.create(path, format="qcow2", size=size, options=chosen, context=CONTEXT, **over)  # type: ignore[arg-type]


class Chain:
    """Three images in `folder`. Each public method is one change, drawn from `chance`."""

    def __init__(self, folder: Path, case: Any) -> None:
        options, sizes, seed = case
        self.folder = folder
        self.modern = "0.10" not in options[0] and "0.10" not in options[1]
        chance = random.Random(seed)
        self.base = folder / "base.raw"
        self.base.write_bytes(mixed_stretches(sizes[0], chance))
        (folder / "other.raw").write_bytes(mixed_stretches(sizes[0], chance))
        below = self.base.read_bytes()
        make(folder / "mid", sizes[1], options[0], "-b", "base.raw", "-F", "raw")
        _make_top(folder / "top", sizes[2], options[1], METHODS[seed % len(METHODS)])
        self.mid = Layer(folder / "mid", below[: sizes[1]].ljust(sizes[1], b"\0"))
        self.top = Layer(folder / "top", bytes(self.mid.content[: sizes[2]]).ljust(sizes[2], b"\0"))
        self.log: list[str] = []
        self._number = 0

    def _refusable(self, run: Callable[[], None]) -> bool:
        """Whether it was done: what cannot be done (counts at their limit, version 2) changes nothing."""
        try:
            run()
        except QimgError as error:
            self.log.append(f"  refused: {error}")
            return False
        return True

    # -- steps

    def write(self, chance: random.Random) -> None:
        if not self.top.content:
            return
        before = bytes(self.top.content)
        with Guest(self.top.path, before) as guest:
            for _ in range(chance.randint(1, 5)):
                change(guest, chance, "wwwzdpf")
        self.top.content = guest.content
        self.top.touch(before)

    def resize(self, chance: random.Random) -> None:
        layer = chance.choice([self.top, self.top, self.mid])
        size = chance.randrange(1, MAXIMUM // 512) * 512
        if layer is self.mid and size < len(layer.content):
            return  # what the top image shows through it would change
        if not self._refusable(lambda: qimg.resize(layer.where, size, shrink=True, context=CONTEXT)):
            return
        layer.content = layer.content[:size].ljust(size, b"\0")
        for bitmap in layer.bitmaps.values():
            bitmap.dirty = [(start, length) for start, length in bitmap.dirty if start + length <= size]

    def create_snapshot(self, chance: random.Random) -> None:
        layer = chance.choice([self.top, self.mid])
        if len(layer.snapshots) < 4 and self._refusable(
            lambda: qimg.create_snapshot(layer.where, f"n{chance.randrange(3)}", context=CONTEXT)
        ):
            layer.snapshots[qimg.snapshots(layer.where, context=CONTEXT)[-1].id] = bytes(layer.content)

    def apply_snapshot(self, chance: random.Random) -> None:
        if not self.top.snapshots:
            return
        id = chance.choice(sorted(self.top.snapshots))
        if self._refusable(lambda: qimg.apply_snapshot(self.top.where, id, context=CONTEXT)):
            self.top.content = bytearray(self.top.snapshots[id])

    def delete_snapshot(self, chance: random.Random) -> None:
        layer = chance.choice([self.top, self.mid])
        if not layer.snapshots:
            return
        first: dict[str, str] = {}
        for row in qimg.snapshots(layer.where, context=CONTEXT):
            first.setdefault(row.name, row.id)
        name = chance.choice(sorted(first))
        qimg.delete_snapshot(layer.where, name, context=CONTEXT)
        del layer.snapshots[first[name]]

    def commit(self, chance: random.Random) -> None:
        if crash.backing_name(self.top.path) != "mid":
            return
        before = bytes(self.mid.content)
        if not self._refusable(
            lambda: qimg.commit(self.top.where, keep=chance.random() < 0.5, context=CONTEXT)
        ):
            # A base that cannot grow, for example: nothing has reached it.
            return
        self.mid.content[: len(self.top.content)] = self.top.content
        self.mid.touch(before)
        self.top.look_again()

    def rebase(self, chance: random.Random) -> None:
        name = chance.choice(["mid", "base.raw", "other.raw", ""])
        kind = "qcow2" if name == "mid" else "raw"
        if self._refusable(
            lambda: qimg.rebase(self.top.where, name, backing_format=kind if name else None, context=CONTEXT)
        ):
            assert crash.backing_name(self.top.path) == (name or None)
        self.top.look_again()

    def add_bitmap(self, chance: random.Random) -> None:
        layer = chance.choice([self.top, self.mid])
        self._number += 1
        name = f"b{self._number}"
        granularity = chance.choice([None, 512, 4096, 65536])
        if len(layer.bitmaps) < 3 and self._refusable(
            lambda: qimg.add_bitmap(layer.where, name, granularity=granularity, context=CONTEXT)
        ):
            layer.bitmaps[name] = Bitmap()

    def change_bitmap(self, chance: random.Random) -> None:
        layer = chance.choice([self.top, self.mid])
        if not layer.bitmaps:
            return
        name = chance.choice(sorted(layer.bitmaps))
        bitmap = layer.bitmaps[name]
        what = chance.choice(["clear", "switch", "remove", "merge"])
        if what == "clear":
            qimg.change_bitmap(layer.where, name, clear=True, context=CONTEXT)
            bitmap.dirty = []
        elif what == "switch":
            bitmap.enabled = not bitmap.enabled
            qimg.change_bitmap(layer.where, name, enabled=bitmap.enabled, context=CONTEXT)
        elif what == "remove":
            qimg.remove_bitmap(layer.where, name, context=CONTEXT)
            del layer.bitmaps[name]
        else:
            other = chance.choice(sorted(layer.bitmaps))
            qimg.change_bitmap(layer.where, name, merge=[other], context=CONTEXT)
            bitmap.dirty = bitmap.dirty + layer.bitmaps[other].dirty

    # -- what has to be so

    def check(self) -> None:
        """Both images are sound."""
        for layer in (self.mid, self.top):
            checked = run_real(["check", *secrets.words(layer.path)])
            assert checked.code == 0, f"{layer.path.name}: {checked.out}{checked.err}"

    def compare(self) -> None:
        """The real program reads what the model holds; bitmaps know what was written to."""
        for layer in (self.mid, self.top):
            name = layer.path.name
            wrong = crash.difference(crash.guest_content(layer.path), [bytes(layer.content)], atomic=True)
            assert wrong is None, f"{name}: {wrong}"
            assert crash.snapshot_ids(layer.path) == list(layer.snapshots)
            for id, content in layer.snapshots.items():
                wrong = crash.difference(layer.snapshot(id), [content], atomic=True)
                assert wrong is None, f"{name}: snapshot {id}: {wrong}"
            self._compare_bitmaps(layer)

    def _compare_bitmaps(self, layer: Layer) -> None:
        if not layer.bitmaps:
            return
        found = {bitmap.name: bitmap for bitmap in qimg.bitmaps(layer.where, context=CONTEXT)}
        assert list(found) == list(layer.bitmaps)
        for name, known in layer.bitmaps.items():
            bitmap = found[name]
            assert not bitmap.inconsistent
            assert bitmap.enabled == known.enabled
            for start, length in known.dirty:
                for bit in range(start // bitmap.granularity, (start + length - 1) // bitmap.granularity + 1):
                    byte = bitmap.bits[bit // 8] if bit // 8 < len(bitmap.bits) else 0
                    assert byte >> bit % 8 & 1, f"{layer.path.name}: {name} does not know {start:#x}"


STEPS = [
    "write",
    "write",
    "write",
    "resize",
    "create_snapshot",
    "apply_snapshot",
    "delete_snapshot",
    "commit",
    "rebase",
    "add_bitmap",
    "change_bitmap",
]


@st.composite
def options(draw: st.DrawFn) -> str:
    """A layout of qcow2."""
    bits = draw(st.integers(9, 17))
    if draw(st.integers(0, 4)) == 0:
        return f"cluster_size={1 << bits},compat=0.10"
    chosen = [f"cluster_size={1 << bits}", f"refcount_bits={draw(st.sampled_from([16, 16, 1, 2, 8, 64]))}"]
    if bits >= 14 and draw(st.booleans()):
        chosen.append("extended_l2=on")
    if draw(st.integers(0, 5)) == 0:
        chosen.append("lazy_refcounts=on")
    return ",".join(chosen)


sizes = st.integers(1, MAXIMUM // 512).map(lambda sectors: sectors * 512)
cases = st.tuples(st.tuples(options(), options()), st.tuples(sizes, sizes, sizes), st.integers(0, 1 << 16))
steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1 << 16)), min_size=1, max_size=14)


def run(folder: Path, case: Any, todo: list[tuple[str, int]]) -> None:
    chain = Chain(folder, case)
    for name, seed in todo:
        chain.log.append(f"{name} {seed}")
        try:
            getattr(chain, name)(random.Random(seed))
            chain.check()
        except BaseException as error:
            error.add_note("\n".join([str(case), *chain.log]))
            raise
    try:
        chain.compare()
    except AssertionError as error:
        error.add_note("\n".join([str(case), *chain.log]))
        raise


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases, todo=steps)
def test_any_sequence_of_changes_leaves_sound_images_of_the_right_content(case: Any, todo: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), case, todo)
