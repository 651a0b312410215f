"""Filling an image from one disk where another one, which is to show below it, holds something else.

Two disks are read and compared by the image's units; what differs goes into the image, which has nothing
there. Zeros are noted as zeros where the format can do that.
"""

from __future__ import annotations

from qimg.errors import CorruptImage, QimgError, StorageError
from qimg.extent import ZERO
from qimg.jobs.engine import lock_and_local
from qimg.records import record
from qimg.units import round_down

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NamedTuple

    from qimg.extent import Extent
    from qimg.formats.base import Image
    from qimg.graph.disk import Disk
    from qimg.jobs.engine import Turn

    class Unsure(NamedTuple):
        """Guest bytes ``start .. start + length``, whole units, that are to be compared: what they are on the
        old disk (`before`) and on the new one (`after`)."""

        start: int
        length: int
        before: list[Extent]
        after: list[Extent]

    class Bunch(NamedTuple):
        """What one worker does in one go."""

        pieces: list[Unsure]

    Run = tuple[int, int]  # (start, length) in guest bytes
else:
    Unsure = record("Unsure", ("start", "length", "before", "after"))
    Bunch = record("Bunch", ("pieces",))

#: The largest unit that an image has, and so the largest piece.
CHUNK = 2 << 20
#: Bytes of smaller pieces: few enough that both sides are in the processor's cache when they are compared.
PIECE = 1 << 20
#: Bytes that one worker looks at in one go.
TOGETHER = 4 << 20


def together(pieces: Iterable[Unsure]) -> Iterator[Bunch]:
    """Pieces put together until they have `TOGETHER` bytes."""
    current: list[Unsure] = []
    total = 0
    for piece in pieces:
        current.append(piece)
        total += piece.length
        if total >= TOGETHER:
            yield Bunch(current)
            current, total = [], 0
    if current:
        yield Bunch(current)


class Filler:
    """Work on bunches: one instance serves all workers."""

    def __init__(self, image: Image, old: Disk | None, new: Disk | None, *, compress: bool) -> None:
        """What differs comes from `old`; None: a disk of zeros."""
        self._image = image
        self._old = old
        self._new = new
        self._compress = compress
        self._unit = image.granularity
        self._largest = max(PIECE, image.granularity)
        self._lock, self._local = lock_and_local()

    def __call__(self, bunch: Bunch, turn: Turn) -> int:
        """Compare and store; returns the bytes looked at."""
        old, new = self._buffers()
        for piece in bunch.pieces:
            self._read(self._old, piece.start, piece.before, old, "old")
            self._read(self._new, piece.start, piece.after, new, "new")
            self._store(piece, old, self._differing(piece, old, memoryview(new)), turn)
        turn.done()
        return sum(piece.length for piece in bunch.pieces)

    def _buffers(self) -> tuple[bytearray, bytearray]:
        buffers: tuple[bytearray, bytearray] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = bytearray(self._largest), bytearray(self._largest)
        return buffers

    def _read(self, disk: Disk | None, start: int, extents: list[Extent], buf: bytearray, which: str) -> None:
        view = memoryview(buf)
        for extent in extents:
            piece = view[extent.start - start : extent.start - start + extent.length]
            if extent.flags & ZERO or disk is None:
                piece[:] = bytes(extent.length)
                continue
            try:
                disk.read_extent(extent, piece)
            except (StorageError, CorruptImage) as error:
                raise QimgError(f"error while reading from {which} backing file") from error

    def _differing(self, piece: Unsure, old: bytearray, new: memoryview) -> list[Run]:
        """Units of `piece` that are not the same in both, joined."""
        # startswith compares in place, at the speed of memcmp; == of views goes byte by byte.
        if old.startswith(new[: piece.length]):
            return []
        runs: list[Run] = []
        end = piece.start + piece.length
        at = piece.start
        while at < end:
            stop = min(round_down(at, self._unit) + self._unit, end)
            low = at - piece.start
            if not old.startswith(new[low : stop - piece.start], low):
                if runs and sum(runs[-1]) == at:
                    runs[-1] = runs[-1][0], stop - runs[-1][0]
                else:
                    runs.append((at, stop - at))
            at = stop
        return runs

    # -- storing

    def _store(self, piece: Unsure, old: bytearray, runs: list[Run], turn: Turn) -> None:
        from qimg.vec.scan import data_runs

        view = memoryview(old)
        zeros: list[Run] = []
        data: list[Run] = []
        for start, length in runs:
            if not self._image.can_mark_zero:
                data.append((start, length))
                continue
            at = start - piece.start
            position = start
            for offset, size in data_runs(view[at : at + length], self._unit):
                if start + offset > position:
                    zeros.append((position, start + offset - position))
                data.append((start + offset, size))
                position = start + offset + size
            if position < start + length:
                zeros.append((position, start + length - position))
        encoded, plain = self._encode(piece, view, data) if self._compress else ([], data)
        if not (zeros or encoded or plain):
            return
        turn.take()
        with self._lock:
            for start, length in zeros:
                self._image.mark_zero(start, length)
            for start, code in encoded:
                self._image.write_encoded(start, code)
            places = [place for start, length in plain for place in self._image.allocate(start, length)]
        for place in places:
            at = place.start - piece.start
            assert place.source is not None and place.host is not None
            place.source.write(view[at : at + place.length], place.host)

    def _encode(
        self, piece: Unsure, view: memoryview, data: list[Run]
    ) -> tuple[list[tuple[int, bytes]], list[Run]]:
        """(offset, code) of the whole clusters in `data` that become smaller, and what is left."""
        cluster = self._image.cluster_size
        assert cluster is not None
        encoded: list[tuple[int, bytes]] = []
        plain: list[Run] = []
        for start, length in data:
            end = start + length
            at = start
            while at < end:
                stop = min(round_down(at, cluster) + cluster, end)
                code = None
                if at % cluster == 0 and (stop % cluster == 0 or stop == self._image.size):
                    part = view[at - piece.start : stop - piece.start]
                    full = part if len(part) == cluster else bytes(part).ljust(cluster, b"\0")
                    code = self._image.encode(full)
                if code is not None:
                    encoded.append((at, code))
                elif plain and sum(plain[-1]) == at:
                    plain[-1] = plain[-1][0], stop - plain[-1][0]
                else:
                    plain.append((at, stop - at))
                at = stop
        return encoded, plain


def fill_error(error: StorageError | CorruptImage) -> QimgError:
    """What is said of a write, or of a look into the image's own tables, that failed."""
    return QimgError(f"Error while writing to COW image: {error.reason}")
