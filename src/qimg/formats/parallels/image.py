"""parallels: expandable images of Parallels, versions 1 and 2 (parallels sheet).

A header, the block allocation table (BAT), clusters. While a writer is at work the header says so; data goes
into clusters that nothing refers to, and the table follows after a barrier.
"""

from __future__ import annotations

from array import array
from contextlib import suppress

from qimg.errors import CorruptImage, LimitError, NotSupported, QimgError
from qimg.extent import HOLE
from qimg.formats.blocks import BlockCode, BlockImage, pieces_of
from qimg.formats.parallels.structs import IN_USE, WORD, Header, check_size
from qimg.formats.tables import WordTable
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.formats.base import BitmapData, CheckResult
    from qimg.storage.base import Storage

#: As many zeros as a piece of the table has bytes at most, and bytes copied together.
_NOTHING = bytes(WORD << 16)
_STEP = 1 << 20


class ParallelsImage(BlockImage):
    """One image."""

    format_name = "parallels"
    shows_cluster_size = False
    can_mark_zero = True

    def __init__(self, file: Storage, header: Header, context: Context, *, new: bool = False) -> None:
        """`new`: `header` is not in the file yet; the first `flush` writes it."""
        self.file = file
        self.header = header
        self.context = context
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.can_write = not new
        self.granularity = self.cluster_size if file.fixed_size else SECTOR
        self.zero_init = new and file.zero_init
        unit = self.cluster_size if header.is_v2 else SECTOR
        self.code = BlockCode(self.cluster_size, unit=unit, special={0: HOLE})
        self._bat = WordTable(file, Header.SIZE, header.bat_entries, size=WORD, big=False)
        self._pending = new
        self._marked = False  # the file says that it is in use
        self._end: int | None = header.data_start() if new else None
        self._holes: list[tuple[int, int]] = []
        self._dropped: list[int] = []

    def pieces(self, first: int, last: int, *, create: bool) -> Iterator[tuple[int, WordTable, int, int]]:
        return pieces_of(self._bat, first, last)

    def levels(self) -> list[list[WordTable]]:
        return [[self._bat]]

    def words(self) -> Iterator[tuple[int, int]]:
        """(guest cluster, word) of every cluster that has a place."""
        for first, table, low, high in self.pieces(0, self.header.bat_entries, create=False):
            words = table.words(low, high)
            if words.tobytes() == _NOTHING[: WORD * len(words)]:
                continue  # most of a large table
            for number, word in enumerate(words, first):
                if word:
                    yield number, word

    def validate(self, block: int, count: int, host: int) -> None:
        if host < self.header.table_end:
            raise CorruptImage(
                f"Cluster {block} lies inside the header",
                file=self.file.name,
                field="BAT",
                offset=Header.SIZE + WORD * block,
                found=host,
            )

    # -- writing

    def begin(self) -> None:
        if self._pending or self._marked:
            return
        if self.header.ext_offset:
            raise NotSupported("Writing to parallels images with a format extension is not supported")
        self._marked = True
        self.mark(IN_USE)

    def mark(self, value: int) -> None:
        """Write the header's word that says whether the image is in use. Durable when it returns."""
        self.header.in_use = value
        self.file.write(value.to_bytes(4, "little"), Header.offset_of("in_use"))
        self.file.flush()

    def allocate(self, start: int, length: int) -> list[Extent]:
        if start + length > self.header.bat_entries * self.cluster_size:
            raise LimitError("The image's table has no entries for the end of the disk")
        return super().allocate(start, length)

    @property
    def first(self) -> int:
        """Where clusters can begin, in bytes."""
        start = max(self.header.data_start(), self.header.least_data_offset)
        return round_up(start, self.code.unit)

    @property
    def end(self) -> int:
        """End of what is in use, in bytes."""
        if self._end is None:
            self.survey()
        assert self._end is not None
        return self._end

    def survey(self, start: int = 0) -> None:
        """Find the end of what is in use, and the room for clusters between `start` and it."""
        first = round_up(max(self.first, start), self.code.unit)
        hosts = array("Q", (self.code.host(word) for _number, word in self.words()))
        end = max(first, max(hosts) + self.cluster_size) if hosts else first
        self._holes = []
        if self.header.ext_offset:
            from qimg.formats.parallels.extension import extension_end

            end = max(end, extension_end(self.file, self.header))
        elif len(hosts) * self.cluster_size < end - first:
            self._holes = self._gaps(first, sorted(hosts))
        self._end = round_up(end, self.code.unit)

    def _gaps(self, at: int, hosts: list[int]) -> list[tuple[int, int]]:
        """(host offset, clusters) of the room between clusters at `hosts`, the last first."""
        found = []
        for host in hosts:
            count = (host - at) // self.cluster_size
            if count > 0:
                found.append((at, count))
            at = max(at, host + self.cluster_size)
        found.reverse()
        return found

    def place(self, block: int, count: int) -> tuple[int, int]:
        host = self.end
        if self._holes:
            host, room = self._holes.pop()
            if room > count:
                self._holes.append((host + count * self.cluster_size, room - count))
            count = min(count, room)
        else:
            if (host + count * self.cluster_size) // self.code.unit >> 32:
                raise LimitError("The image has no more room for clusters")
            self._end = host + count * self.cluster_size
        if host < self.file.size and self.granularity == SECTOR:
            self.file.zero(host, min(count * self.cluster_size, self.file.size - host))
        return host, count

    def mark_zero(self, start: int, length: int) -> None:
        """Whole clusters lose their place; what is less is written."""
        size = self.cluster_size
        end = start + length
        first, last = -(-start // size), (-(-end // size) if end == self.size else end // size)
        if first >= last:
            super().mark_zero(start, length)
            return
        if start < first * size:
            super().mark_zero(start, first * size - start)
        self._drop(first, last)
        if last * size < end:
            super().mark_zero(last * size, end - last * size)

    def clear_end(self) -> None:
        behind = -self.size % self.cluster_size
        if not behind:
            return
        (extent,) = self.extents(self.size - 1, 1)
        if extent.host is not None:
            self.file.zero(extent.host + 1, min(behind, self.file.size - extent.host - 1))

    def discard(self, start: int, length: int) -> None:
        size = self.cluster_size
        end = start + length
        first, last = -(-start // size), (-(-end // size) if end == self.size else end // size)
        if first < last:
            self._drop(first, last)

    def _drop(self, first: int, last: int) -> None:
        """Stage that clusters have no place. Their room is free when the table is written, not before."""
        self.begin()
        if self._end is None:
            self.survey()
        for _base, table, low, high in self.pieces(first, last, create=False):
            for index, word in enumerate(table.words(low, high), low):
                if word:
                    self._dropped.append(self.code.host(word))
                    table.put(index, array("I", [0]))

    def settle(self) -> None:
        if self._end is not None and not self.file.fixed_size and self.file.size < self._end:
            self.file.resize(self._end)

    def finish(self) -> None:
        for host in self._dropped:
            self.file.discard(host, self.cluster_size)
        if self._dropped:
            self._dropped.clear()
            self.survey()
        if self._pending:
            self.file.write(self.header.pack(), 0)
            self.file.flush()
            self._pending = False
        elif self._marked:
            self.trim()
            self.mark(0)
            self._marked = False

    def trim(self) -> None:
        """Cut off what nobody uses at the file's end: the real program calls it a leak."""
        if not self.file.fixed_size and self.file.size > self.end:
            self.file.resize(self.end)

    def close_clean(self) -> None:
        """Let `close` write that the image is not in use."""
        self._marked = True

    def close(self) -> None:
        if self._marked:
            # A job failed. What the file's table says is whole all the same: data went before it.
            self._marked = False
            with suppress(QimgError):
                self.mark(0)
        super().close()

    def copy_cluster(self, host: int, place: int) -> None:
        """Copy what lies at `host` to `place`, room that `place` gave. Not durable."""
        for at in range(0, self.cluster_size, _STEP):
            data = self.file.read(host + at, min(_STEP, self.cluster_size - at))
            self.file.write(data, place + at)

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        """Grow (qimg only). Clusters where a longer table needs the room move to the end before."""
        from qimg.formats.parallels.resize import grow

        if preallocation != "off":
            raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
        size = round_up(size, SECTOR)
        if size < self.size:
            raise NotSupported("Shrinking images is currently not supported")
        check_size(size, self.cluster_size)
        if not self.header.is_v2 and size // SECTOR >> 32:
            raise LimitError("The image size is too large for this image's version")
        grow(self, size)

    def switch(self) -> None:
        """Write the header as it is in memory, closed. Durable when it returns; the table is read again."""
        header = self.header
        header.in_use = 0
        self.file.write(header.pack(), 0)
        self.file.flush()
        self._marked = False
        self.size = header.size
        self._bat = WordTable(self.file, Header.SIZE, header.bat_entries, size=WORD, big=False)
        self._end = None

    # -- bitmaps

    def bitmaps(self) -> list[BitmapData]:
        from qimg.formats.parallels.extension import read_bitmaps

        return read_bitmaps(self.file, self.header)

    # -- check

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        from qimg.formats.parallels.check import Checker

        return Checker(self, report, fix).run()
