"""Crashes and failing disks under any in-place operation, judged by the real program.

For a test of an operation that changes images, this is all::

    from support import crash

    def test_a_crash_of_resize_leaves_leaks_at_most(tmp_path):
        build(tmp_path / "a.q", "AB-C")
        crash.assert_survives(tmp_path, ["a.q"], lambda: qimg.resize(tmp_path / "a.q", size))

The operation takes no arguments and works on files of `folder` by whatever way opens files through the
storage registry: the library, the command line in process, `support.model.Guest`. It is run once with
recorders on the images named (the first is the one it is about; name every image that it may change, a
backing file for ``commit``) and on other `files` that it changes (data files). Then the harness goes over
the gaps between barriers and makes the states that a power cut may leave: any of the writes in the gap
lost, written in part (whole sectors of 512 bytes), discarded space full of rubbish, sizes not set. Of each
state it holds, by means of the real program:

* ``check`` finds nothing, or leaks (each image named that is qcow2; one marked dirty is repaired first);
* each sector the guest reads is what it was before, or what it is afterwards, or what one of the contents
  `between` has there. So what the operation does not touch does not change. With `atomic` the whole content
  is one of these, not a mixture;
* each internal snapshot that is there before and afterwards is there, and every one has its content;
* when the operation has returned, all of it is durable: what no barrier covers makes no difference.

`assert_survives_errors` does the same with a disk that fails: at each change in turn the request fails
with EIO, and each write with ENOSPC too. The operation has to raise a QimgError, or come to its right end.

Pieces, for other rules: `record` gives a `Recording`, `Recording.states` the states, `Judge` judges. The
numbers of states are capped (`limit`), and which are taken hangs on `seed`: the same every time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from qimg.errors import QimgError
from qimg.storage.base import Storage
from qimg.storage.fault import CHANGE, WRITE, FaultStorage, Rule
from qimg.storage.record import DISCARD, FLUSH, RESIZE, Event, RecordStorage
from qimg.storage.record import WRITE as WRITTEN
from support import secrets
from support.faults import opened_through
from support.run import run_real

SECTOR = 512
#: States that one test looks at by default: at about 20 ms each.
LIMIT = 160
Operation = Callable[[], object]
Files = dict[str, bytes]


class State(NamedTuple):
    """What may be left: the content of each file. `what` says how, `durable`: the operation had returned."""

    files: Files
    what: str
    durable: bool


# -- states of a recording


class _Piece(NamedTuple):
    """An event of the file `name`; `sectors` are those of a write that came through, None: all."""

    name: str
    event: Event
    sectors: frozenset[int] | None = None


def _apply(content: bytearray, piece: _Piece, rubbish: bytes) -> None:
    event = piece.event
    if event.kind == RESIZE:
        del content[event.offset :]
        content.extend(bytes(event.offset - len(content)))
        return
    if event.kind == DISCARD:
        length = min(event.length, len(content) - event.offset)
        if length > 0:
            content[event.offset : event.offset + length] = (rubbish * (length // len(rubbish) + 1))[:length]
        return
    data = event.data if event.kind == WRITTEN else bytes(event.length)
    end = event.offset + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if piece.sectors is None:
        content[event.offset : end] = data
        return
    for number in piece.sectors:
        low, high = max(event.offset, number * SECTOR), min(end, (number + 1) * SECTOR)
        content[low:high] = data[low - event.offset : high - event.offset]


def _torn(piece: _Piece, chance: random.Random) -> _Piece:
    """A write of which not all sectors came through: the first ones, the last ones, or any."""
    event = piece.event
    first, last = event.offset // SECTOR, (event.offset + event.length - 1) // SECTOR
    if event.kind in (RESIZE, DISCARD) or first >= last:
        return piece
    cut = chance.randint(first, last - 1)
    sectors = chance.choice(
        [
            range(first, cut + 1),
            range(cut + 1, last + 1),
            [number for number in range(first, last + 1) if chance.random() < 0.5],
        ]
    )
    return piece._replace(sectors=frozenset(sectors))


class _Gap(NamedTuple):
    """What was not durable at a moment, `number` events after the start, on top of the durable `files`."""

    number: int
    files: Files
    pending: list[_Piece]


class Recording:
    """What an operation did to some files: their contents `before`, the `events` in order with file names."""

    def __init__(self, before: Files, events: list[tuple[str, Event]]) -> None:
        self.before = before
        self.events = events

    def _barriers(self) -> list[int]:
        """Numbers of the events that make something durable, and that of the end."""
        found = []
        pending = set()
        for number, (name, event) in enumerate(self.events):
            if event.kind != FLUSH:
                pending.add(name)
            elif name in pending:
                found.append(number)
                pending.remove(name)
        return [*found, len(self.events)]

    def _gaps(self, wanted: Collection[int]) -> Iterator[_Gap]:
        """Those before the events `wanted`, one after the other."""
        durable = {name: bytearray(content) for name, content in self.before.items()}
        pending: list[_Piece] = []
        for number, (name, event) in enumerate([*self.events, ("", None)]):
            if number in wanted:
                yield _Gap(number, {key: bytes(value) for key, value in durable.items()}, list(pending))
            if event is None:
                return
            if event.kind != FLUSH:
                pending.append(_Piece(name, event))
                continue
            for piece in pending:
                if piece.name == name:
                    _apply(durable[name], piece, b"\0")
            pending = [piece for piece in pending if piece.name != name]

    def states(self, *, limit: int = LIMIT, seed: int = 0) -> Iterator[State]:
        """At most `limit` states, all different, in the order of time. Each gap has its share; if there are
        more gaps than shares, the first and last gaps and some between are looked at."""
        chance = random.Random(seed)
        barriers = self._barriers()
        share = max(3, limit // len(barriers))
        if share * len(barriers) > limit:
            inner = range(4, len(barriers) - 8)
            wanted = set(chance.sample(inner, min(len(inner), max(0, limit // share - 12))))
            barriers = [
                number
                for at, number in enumerate(barriers)
                if at < 4 or at >= len(barriers) - 8 or at in wanted
            ]
        seen: set[tuple[int, ...]] = set()
        for gap in self._gaps(barriers):
            found = 0
            last = gap.number == len(self.events)
            tried: set[object] = set()
            # A choice may give a state that was seen before.
            for choice in range(share * 3):
                what, pieces = _chosen(gap.pending, choice, chance)
                rubbish = chance.choice([b"\0", b"\xd5\x80\x00\x01"])
                again = last and choice < 2  # durable: to be looked at anyhow
                way = (rubbish, *((id(piece.event), piece.sectors) for piece in pieces))
                if way in tried and not again:
                    continue
                tried.add(way)
                state = _state(gap, what, pieces, rubbish, durable=last)
                # Contents that are kept remember their hash: only what has changed is gone over.
                content = tuple(hash(state.files[name]) for name in sorted(state.files))
                if content in seen and not again:
                    continue
                seen.add(content)
                yield state
                found += 1
                if found == share:
                    break


def _state(gap: _Gap, what: str, pieces: list[_Piece], rubbish: bytes, *, durable: bool) -> State:
    changed = {name: bytearray(gap.files[name]) for name in {piece.name for piece in pieces}}
    for piece in pieces:
        _apply(changed[piece.name], piece, rubbish)
    files = {**gap.files, **{name: bytes(content) for name, content in changed.items()}}
    return State(files, f"before event {gap.number}: {what}", durable)


def _chosen(pending: list[_Piece], choice: int, chance: random.Random) -> tuple[str, list[_Piece]]:
    """The `choice`-th way to lose some of what is pending, and what is left."""
    count = len(pending)
    if choice == 0 or not count:
        return "all lost", []
    if choice == 1:
        return "none lost", pending
    way = chance.randrange(6)
    if way == 0:
        kept = chance.randrange(count)
        return f"all but the first {kept} of {count} lost", pending[:kept]
    if way == 1:
        one = chance.randrange(count)
        return f"only number {one} of {count} not lost", [pending[one]]
    if way == 2:
        one = chance.randrange(count)
        return f"number {one} of {count} lost", pending[:one] + pending[one + 1 :]
    upto = chance.randint(1, count)
    odds = chance.choice([0.2, 0.5, 0.9, 1.0 if way == 5 else 0.5])
    pieces = [piece for piece in pending[:upto] if chance.random() < odds]
    what = f"some of the first {upto} of {count} lost"
    if way < 5 or not pieces:
        return what, pieces
    torn = set(chance.sample(range(len(pieces)), chance.randint(1, min(3, len(pieces)))))
    return f"{what}, some torn", [
        _torn(piece, chance) if at in torn else piece for at, piece in enumerate(pieces)
    ]


def record(folder: Path, names: Sequence[str], operation: Operation) -> Recording:
    """Run `operation` with recorders on the files called `names` in `folder`."""
    before = {name: (folder / name).read_bytes() for name in names}
    clock: list[tuple[RecordStorage, Event]] = []
    with opened_through(lambda file: RecordStorage(file, clock), *names):
        operation()
    return Recording(before, [(os.path.basename(place.name), event) for place, event in clock])


# -- judging


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder in memory, where the system has one, in which the other files of `folder` can be found."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    place = Path(tempfile.mkdtemp(prefix="states-", dir=memory))
    try:
        for entry in os.scandir(folder):
            os.symlink(entry.path, place / entry.name)
        yield place
    finally:
        shutil.rmtree(place)


def is_qcow2(content: bytes) -> bool:
    """Whether a file starts as a qcow2 image does."""
    return content[:4] == b"QFI\xfb"


def _format(content: bytes) -> str:
    return "qcow2" if is_qcow2(content) else "raw"


def _dirty(content: bytes) -> bool:
    return content[7] >= 3 and bool(content[79] & 1)


def guest_content(path: Path, snapshot: str | None = None) -> bytes:
    """What the real program reads of an image (qcow2 if it starts so, else raw) over its chain."""
    with path.open("rb") as file:
        format = _format(file.read(4))
    chosen = [] if snapshot is None else ["-l", f"snapshot.id={snapshot}"]
    target = path.with_name(path.name + ".guest")
    run_real(["convert", *chosen, "-O", "raw", *secrets.words(path, format), target], path.parent).ok()
    content = target.read_bytes()
    target.unlink()
    return content


def snapshot_ids(path: Path) -> list[str]:
    """Ids of the internal snapshots, as the real program lists them."""
    shown = json.loads(run_real(["info", "-U", "--output=json", path], path.parent).ok().out)
    return [str(row["id"]) for row in shown.get("snapshots", [])]


def backing_name(path: Path) -> str | None:
    """The backing file that the image names."""
    shown = json.loads(run_real(["info", "-U", "--output=json", path], path.parent).ok().out)
    name: str | None = shown.get("backing-filename")
    return name


class Contents(NamedTuple):
    """What images of a folder hold for their guests: by file name, and snapshots by name and id."""

    images: Files
    snapshots: dict[tuple[str, str], bytes]

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> Contents:
        """As the real program reads them."""
        images, snapshots = {}, {}
        for name in names:
            images[name] = guest_content(folder / name)
            if _has_snapshots(folder / name):
                for id in snapshot_ids(folder / name):
                    snapshots[name, id] = guest_content(folder / name, id)
        return cls(images, snapshots)


def _has_snapshots(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    return is_qcow2(head) and any(head[60:64])


class Judge:
    """Looks at states of some files in the folder `place` (see `scratch`)."""

    def __init__(
        self,
        place: Path,
        names: Sequence[str],
        before: Contents,
        after: Contents,
        *,
        between: Sequence[bytes] = (),
        atomic: bool = False,
    ) -> None:
        """`between`: what the first of `names` may hold as well."""
        self._place = place
        self._names = names
        self._after = after
        self._atomic = atomic
        self._allowed = {
            name: [before.images[name], after.images[name], *(between if name == names[0] else ())]
            for name in names
        }
        self._snapshots = [before.snapshots, after.snapshots]
        self._kept = before.snapshots.keys() & after.snapshots.keys()
        self.looked_at = 0

    def put(self, files: Files) -> None:
        """Write a state's files."""
        for name, content in files.items():
            path = self._place / name
            path.unlink(missing_ok=True)
            path.write_bytes(content)

    def look(self, files: Files, what: str, *, finished: bool = False) -> None:
        """Fails the test, with `what`, unless the files are as they have to be; `finished`: as at the end."""
        self.looked_at += 1
        self.put(files)
        for name in self._names:
            if is_qcow2(files[name]):
                self._check(name, dirty=_dirty(files[name]), what=what)
        for name in self._names:
            found = guest_content(self._place / name)
            allowed = [self._after.images[name]] if finished else self._allowed[name]
            wrong = difference(found, allowed, atomic=self._atomic or finished)
            assert wrong is None, f"{what}: {name}: {wrong}"
            if self._kept or _has_snapshots(self._place / name):
                self._look_at_snapshots(name, what)

    def _look_at_snapshots(self, name: str, what: str) -> None:
        ids = snapshot_ids(self._place / name)
        missing = {id for image, id in self._kept if image == name} - set(ids)
        assert not missing, f"{what}: {name}: snapshots {missing} are gone"
        for id in ids:
            allowed = [contents[name, id] for contents in self._snapshots if (name, id) in contents]
            found = guest_content(self._place / name, id)
            assert found in allowed, f"{what}: {name}: snapshot {id} has changed"

    def _check(self, name: str, *, dirty: bool, what: str) -> None:
        repair = ["-r", "all"] if dirty else []
        words = secrets.words(self._place / name, name=name)
        checked = run_real(["check", *repair, *words], self._place)
        assert checked.code in (0, 3), f"{what}: {name}: check: {checked.code} {checked.out}{checked.err}"


def difference(found: bytes, allowed: Sequence[bytes], *, atomic: bool = False) -> str | None:
    """What is wrong with the content `found`: None if every sector (`atomic`: all of it) is as in one of the
    contents `allowed`, whose lengths may differ."""
    if found in allowed:
        return None
    if len(found) not in map(len, allowed):
        return f"size {len(found)}"
    for start in range(0, len(found), SECTOR):
        sector = found[start : start + SECTOR]
        if not any(
            content[start : start + SECTOR].ljust(len(sector), b"\0") == sector for content in allowed
        ):
            return f"sector at {start:#x} reads as {sector[:8].hex()}..."
    return "neither the old content nor the new" if atomic else None


@contextmanager
def unchanged(folder: Path, names: Sequence[str]) -> Iterator[Files]:
    """The contents of the files, which are as they were afterwards."""
    files = {name: (folder / name).read_bytes() for name in names}
    try:
        yield files
    finally:
        restore(folder, files)


def restore(folder: Path, files: Files) -> None:
    """Give files these contents again, in place."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def assert_survives(
    folder: Path,
    names: Sequence[str],
    operation: Operation,
    *,
    files: Sequence[str] = (),
    between: Sequence[bytes] = (),
    after: bytes | None = None,
    atomic: bool = False,
    limit: int = LIMIT,
    seed: int = 0,
) -> Recording:
    """Hold all that the module says of crashes. `after`: what the first image has to hold at the end, from
    a source other than ours. The files are left as the operation leaves them."""
    before = Contents.of(folder, names)
    recording = record(folder, [*names, *files], operation)
    assert recording.events, "the operation changes nothing: there is nothing to test"
    at_end = _at_end(folder, names, after)
    with scratch(folder) as place:
        judge = Judge(place, names, before, at_end, between=between, atomic=atomic)
        for state in recording.states(limit=limit, seed=seed):
            judge.look(state.files, state.what, finished=state.durable)
    return recording


def _at_end(folder: Path, names: Sequence[str], after: bytes | None) -> Contents:
    """What the images hold after the operation; fails where the real program finds fault with them."""
    for name in names:
        if is_qcow2((folder / name).read_bytes()[:4]):
            checked = run_real(["check", *secrets.words(folder / name, name=name)], folder)
            assert checked.code == 0, f"at the end: {name}: {checked.out}{checked.err}"
    at_end = Contents.of(folder, names)
    if after is not None:
        wrong = difference(at_end.images[names[0]], [after], atomic=True)
        assert wrong is None, f"at the end: {wrong}"
    return at_end


# -- failing disks


def _moments(total: int, limit: int, seed: int) -> list[int]:
    """At most `limit` of 1 .. `total`: the first, the last and some between."""
    numbers = range(1, total + 1)
    edge = {*numbers[: limit // 4], *numbers[-(limit // 4) :]}
    rest = [number for number in numbers if number not in edge]
    return sorted(edge | set(random.Random(seed).sample(rest, min(len(rest), limit - len(edge)))))


def _run_failing(names: Sequence[str], operation: Operation, rule: Rule | None) -> tuple[bool, int, int]:
    """Whether the operation came to its end with this rule in the files taken together; the changes and the
    writes that it asked for."""
    rules = _Rules(rule)
    with opened_through(lambda file: _Shared(file, rules), *names):
        try:
            operation()
        except QimgError as error:
            assert "\n" not in str(error), "one line"
            return False, rules.changes, rules.writes
    return True, rules.changes, rules.writes


class _Rules:
    """One rule for several files: requests are counted together."""

    def __init__(self, rule: Rule | None) -> None:
        self.rule = rule
        self.changes = 0
        self.writes = 0


class _Shared(FaultStorage):
    """A file whose requests count together with those of others."""

    def __init__(self, child: Storage, rules: _Rules) -> None:
        super().__init__(child)
        self._shared = rules

    def _count(self, operation: str) -> Rule | None:
        if super()._count(operation) is not None:  # pragma: no cover  (it has no rules of its own)
            raise AssertionError
        shared, rule = self._shared, self._shared.rule
        if operation not in ("read", "extents"):
            shared.changes += 1
        shared.writes += operation == WRITE
        if rule is None or (operation in ("read", "extents")):
            return None
        if rule.operation == CHANGE:
            return rule if shared.changes == rule.nth else None
        return rule if operation == rule.operation and shared.writes == rule.nth else None


def assert_survives_errors(
    folder: Path,
    names: Sequence[str],
    operation: Operation,
    *,
    files: Sequence[str] = (),
    between: Sequence[bytes] = (),
    atomic: bool = False,
    again: bool = False,
    limit: int = LIMIT // 2,
    seed: int = 0,
) -> None:
    """Hold all that the module says of failing disks. `again`: when the disk works again, the operation,
    repeated on what the failure left, comes to its right end. The files are left as they were before."""
    before = Contents.of(folder, names)
    everything = [*names, *files]
    with unchanged(folder, everything) as kept, scratch(folder) as place:
        finished, changes, writes = _run_failing(everything, operation, None)
        assert finished, "the operation fails even without faults"
        assert changes, "the operation changes nothing: there is nothing to test"
        judge = Judge(place, names, before, _at_end(folder, names, None), between=between, atomic=atomic)
        rules = [Rule(CHANGE, nth) for nth in _moments(changes, limit * 2 // 3, seed)]
        rules += [Rule(WRITE, nth, errno.ENOSPC) for nth in _moments(writes, limit // 3, seed)]
        for rule in rules:
            restore(folder, kept)
            what = f"{os.strerror(rule.errno)} at {rule.operation} {rule.nth}"
            finished, *_ = _run_failing(everything, operation, rule)
            left = {name: (folder / name).read_bytes() for name in everything}
            judge.look(left, what, finished=finished)
            if again and not finished:
                operation()
                left = {name: (folder / name).read_bytes() for name in everything}
                judge.look(left, f"{what}, then again", finished=True)
