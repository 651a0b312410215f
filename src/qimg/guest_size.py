"""A new size for a disk, with what a format has to know of the disk that it is a layer of."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class GuestSize(int):
    """Guest bytes.

    shown   bytes of the backing disk, which would show through where the disk grows; 0 where there is none.
    settle  ``settle(end, shows)``: make the unit that the guest offset `end` lies in read as zeros behind
            `end`, staged; `shows`: what is below would show through there. The format calls it once
            everything is checked, and before it lets the disk grow: only whoever has the whole chain can
            fill up a unit.
    """

    shown: int = 0
    settle: Callable[[int, bool], None] | None = None

    @classmethod
    def of(cls, size: int, shown: int, settle: Callable[[int, bool], None]) -> GuestSize:
        """`size` bytes over a backing disk of `shown` bytes."""
        new = cls(size)
        new.shown = shown
        new.settle = settle
        return new
