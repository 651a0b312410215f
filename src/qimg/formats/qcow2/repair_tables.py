"""Where the tables of a damaged image lie, and what they are called (qcow2 sheet, section 11)."""

from __future__ import annotations

from qimg.formats.qcow2.structs import MAX_L1_BYTES, REFTABLE_OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qimg.formats.qcow2.check import Checker


class TableNames:
    """All tables but the L2 tables, as they are now. Units: host clusters."""

    def __init__(self, checker: Checker) -> None:
        self.stored = checker.stored  # whose blocks are known
        bits = checker.cluster_bits
        self._ranges = [
            (offset >> bits, (offset + length - 1 >> bits) + 1, name)
            for offset, length, name in _ranges(checker)
            if length > 0
        ]
        self._blocks = {(word & REFTABLE_OFFSET_MASK) >> bits for _index, word in checker.stored.entries()}

    def name(self, cluster: int, *, besides: str = "") -> str | None:
        """What lies at `cluster`, other than the table called `besides`; None: nothing."""
        for first, stop, name in self._ranges:
            if first <= cluster < stop and name != besides:
                return name
        return "refcount block" if cluster in self._blocks else None


def _ranges(checker: Checker) -> Iterator[tuple[int, int, str]]:
    parsed, header = checker.header, checker.header.header
    yield 0, parsed.cluster_size, "qcow2_header"
    yield header.l1_table_offset, header.l1_size * 8, "active L1 table"
    table = header.refcount_table_clusters * parsed.cluster_size
    yield header.refcount_table_offset, table, "refcount table"
    if checker.snapshots is not None:
        yield header.snapshots_offset, checker.snapshots.length, "snapshot table"
        for snapshot in checker.snapshots.snapshots:
            entry = snapshot.entry
            yield entry.l1_table_offset, min(entry.l1_size * 8, MAX_L1_BYTES), "inactive L1 table"
    if parsed.bitmaps is not None:
        yield parsed.bitmaps.directory_offset, parsed.bitmaps.directory_size, "bitmap directory"
