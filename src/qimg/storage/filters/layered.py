"""The nodes ``copy-on-read`` and ``compress``: how an image with layers is used (protocols sheet 2).

They stand on the guest's view of a disk, which knows its layers and its format (`graph.nested.DiskStorage`).
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

from qimg.errors import OptionError
from qimg.storage.base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Storage


class CopyOnRead(Filter):
    """What is read from lower layers is written into the top one."""

    driver = "copy-on-read"
    children: ClassVar[tuple[str, ...]] = ("file",)
    identity: ClassVar[tuple[str, ...]] = ("driver",)
    named = False

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        """Raises OptionError where nothing can be written."""
        if not children["file"].writable:
            raise OptionError("Block node is read-only")
        return cls(children["file"])

    def read_into(self, buf: Buffer, offset: int) -> None:
        self.child.copy_up(offset, len(buf))
        super().read_into(buf, offset)


class Compress(Filter):
    """What is written is stored compressed."""

    driver = "compress"
    children: ClassVar[tuple[str, ...]] = ("file",)
    identity: ClassVar[tuple[str, ...]] = ("driver",)
    named = False

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        """Raises NotSupported where the image below cannot store compressed data."""
        children["file"].compress_writes()
        return cls(children["file"])
