"""Nothing: the protocols ``null-co`` and ``null-aio``, whose writes vanish (protocols sheet 2)."""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

from qimg.errors import LocationError, NotSupported, OptionError
from qimg.extent import ABSENT, MAPPED, ZERO, Extent
from qimg.options import BOOL, NUM, SIZE, Option
from qimg.storage.base import Limits, Storage
from qimg.units import GIB, INT64_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes


class NullCo(Storage):
    """A place of fixed length that takes every write and keeps none.

    A read leaves the buffer as it is, unless `read_zeroes`. Every request takes `latency_ns` nanoseconds.
    """

    driver = "null-co"
    fixed_size = True
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("size", SIZE, GIB, "Length of the place"),
        Option("latency-ns", NUM, 0, "Time that a request takes, in nanoseconds"),
        Option("read-zeroes", BOOL, False, "Whether reads give zeros"),
    )

    identity: ClassVar[tuple[str, ...]] = ("read-zeroes", "driver", "size")

    def __init__(
        self, *, size: int = GIB, latency_ns: int = 0, read_zeroes: bool = False, writable: bool = False
    ) -> None:
        self.name = f"{self.driver}://"
        self.writable = writable
        self.limits = Limits()
        self._size = size
        self._latency_ns = latency_ns
        self._read_zeroes = read_zeroes

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        if name != f"{cls.driver}://":
            raise LocationError(f"The only allowed filename for this driver is '{cls.driver}://'")
        return {}

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        if create:
            raise NotSupported(f"Protocol driver '{cls.driver}' does not support image creation")
        latency = int(values.get("latency-ns", 0))
        if latency > INT64_MAX:
            raise OptionError("latency-ns is invalid", option="latency-ns")
        new = cls(
            size=int(values.get("size", GIB)),
            latency_ns=latency,
            read_zeroes=bool(values.get("read-zeroes", False)),
            writable=writable,
        )
        new.named = not any(name in values for name in cls.identity)
        return new

    @property
    def size(self) -> int:
        return self._size

    def _wait(self) -> None:
        if self._latency_ns:
            from time import sleep

            sleep(self._latency_ns / 1e9)

    def read_into(self, buf: Buffer, offset: int) -> None:
        self._wait()
        if self._read_zeroes:
            view = memoryview(buf)
            view[:] = bytes(len(view))

    def write(self, buf: Bytes, offset: int) -> None:
        self._wait()

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._wait()

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = start + length
        inside = max(start, min(end, self._size))
        if inside > start:
            flags = ZERO if self._read_zeroes else MAPPED | ABSENT
            yield Extent(start, inside - start, flags, 0, start, self)
        if inside < end:
            yield Extent(inside, end - inside, ZERO, 0, inside, self)

    def resize(self, size: int, preallocation: str = "off") -> None:
        if size > self._size:
            raise NotSupported(f"Cannot grow '{self.name}'")

    def flush(self) -> None:
        self._wait()

    def allocated_bytes(self) -> int | None:
        return 0


class NullAio(NullCo):
    """The same under its other name."""

    driver = "null-aio"
