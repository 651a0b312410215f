"""The node ``blkverify``: an image beside a raw copy of what it should hold (protocols sheet 2).

Reads compare the two, writes go to both: a difference is an error of the image's format.
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

import errno

from qimg.errors import LocationError, StorageError
from qimg.storage.base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage


class BlkVerify(Filter):
    """`child` is what is looked at, `raw` what it should be."""

    driver = "blkverify"
    children: ClassVar[tuple[str, ...]] = ("raw", "test")
    image_children: ClassVar[tuple[str, ...]] = ("test",)
    identity: ClassVar[tuple[str, ...]] = ("driver",)

    def __init__(self, child: Storage, raw: Storage) -> None:
        super().__init__(child)
        self.name = f"blkverify:{raw.name}:{child.name}"
        self.named = child.named and raw.named
        self.fixed_size = True
        self._raw = raw

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        raw, colon, test = name.removeprefix("blkverify:").partition(":")
        if not colon:
            raise LocationError("blkverify requires raw copy and original image path")
        return {"raw": raw, "test": test}

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        return cls(children["test"], children["raw"])

    def below(self) -> list[tuple[str, Storage]]:
        return [("test", self.child), ("raw", self._raw)]

    def read_into(self, buf: Buffer, offset: int) -> None:
        super().read_into(buf, offset)
        expected = self._raw.read(offset, len(buf))
        if expected != buf:
            at = next(place for place, byte in enumerate(expected) if byte != buf[place])
            raise StorageError(
                f"blkverify: read offset={offset} bytes={len(buf)} contents mismatch at offset {offset + at}",
                errno=errno.EIO,
                offset=offset + at,
            )

    def write(self, buf: Bytes, offset: int) -> None:
        self._raw.write(buf, offset)
        super().write(buf, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._raw.zero(offset, length, unmap)
        super().zero(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        """Not passed on: the two might read differently afterwards."""

    def flush(self) -> None:
        self._raw.flush()
        super().flush()

    def lock(self, use: int, share: int) -> None:
        self._raw.lock(use, share)
        super().lock(use, share)

    def allocated_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self._raw.close()
        super().close()
