"""How large a new image becomes: all its files together (vmdk sheet 3, 4)."""

from __future__ import annotations

from qimg.formats.base import Measure
from qimg.formats.vmdk import descriptor as text
from qimg.formats.vmdk.create import directory_sectors, extent_sizes, front_layout, table_count
from qimg.formats.vmdk.options import Plan
from qimg.formats.vmdk.structs import (
    GRAIN,
    GRAIN_SECTORS,
    REDUNDANT_SECTOR,
    SECTOR,
    TABLE_ENTRIES,
    TABLE_SECTORS,
)
from qimg.units import round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import MeasureSource
    from qimg.options import Value

#: A grain that cannot be deflated, with its marker: 64 KiB, stored in blocks, need no more.
_STORED = GRAIN + SECTOR


def measure(source: MeasureSource, options: dict[str, Value]) -> Measure:
    """`source` in a new image. For streams, what grains need that cannot be compressed."""
    plan = Plan(round_up(source.size, SECTOR), options)
    if plan.flat:
        whole = plan.size + _text_size(plan)
        return Measure(whole, whole)
    grains, tables = source.touched(GRAIN, GRAIN * TABLE_ENTRIES)
    if plan.kind == text.STREAM:
        return Measure(_stream(plan, grains, tables), _stream(plan, -(-plan.size // GRAIN), None))
    fixed = _front(plan)
    return Measure(fixed + grains * GRAIN, fixed + -(-plan.size // GRAIN) * GRAIN)


def _text_size(plan: Plan) -> int:
    """Bytes of a descriptor that stands apart. The name of the file is not known: a short one."""
    lines = [
        text.ExtentLine(
            text.READ_WRITE, size // SECTOR, text.FLAT if plan.flat else text.SPARSE, name.rpartition("/")[2]
        )
        for name, size in extent_sizes(plan, "disk.vmdk")
    ]
    found = text.Descriptor(text.NO_PARENT, text.NO_PARENT, plan.kind, plan.hint, lines)
    data = text.DiskData(plan.size, adapter=plan.adapter, hardware=plan.hardware, tools=plan.tools)
    return len(text.render(found, data))


def _front(plan: Plan) -> int:
    """Bytes of all that is not data in sparse extents."""
    if not plan.split:
        return front_layout(plan.size // SECTOR)[2] * SECTOR
    sizes = [size for _name, size in extent_sizes(plan, "disk.vmdk")]
    return _text_size(plan) + sum(front_layout(size // SECTOR)[2] * SECTOR for size in sizes)


def _stream(plan: Plan, grains: int, tables: int | None) -> int:
    """Bytes of a stream of so many stored grains; `tables` None: all there are."""
    needed = table_count(plan.size // SECTOR)
    if tables is None:
        tables = needed
    front = round_up(REDUNDANT_SECTOR, GRAIN_SECTORS)
    tail = 1 + directory_sectors(needed) + 3
    return (front + tables * (1 + TABLE_SECTORS) + tail) * SECTOR + grains * _STORED
