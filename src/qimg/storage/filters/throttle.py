"""The node ``throttle``: requests wait until the limits of a group let them pass (protocols sheet 2).

A limit is a bucket into which every request pours its bytes, or operations, and that leaks at the rate of the
limit. A request waits while the bucket holds more than a burst. Nodes of one group share its buckets.
"""

from __future__ import annotations

from _thread import allocate_lock
from time import monotonic, sleep

from qimg.errors import OptionError
from qimg.options import STR, Option
from qimg.storage.base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage

READ, WRITE = "read", "write"

#: Seconds of its rate that a limit without a burst lets pass at once.
_SLACK = 0.1


class _Bucket:
    """`rate` units a second; `burst` units a second for `length` seconds, 0: no burst."""

    def __init__(self, rate: int, burst: int, length: int) -> None:
        self._rate = rate
        self._room = burst * length if burst else rate * _SLACK
        self._level = 0.0
        self._time = 0.0

    def pour(self, units: int, now: float) -> float:
        """Add `units` at the time `now`; the seconds that whoever brings them has to wait."""
        self._level = max(0.0, self._level - (now - self._time) * self._rate)
        self._time = now
        over = self._level - self._room
        self._level += units
        return max(0.0, over / self._rate)


class ThrottleGroup:
    """The limits that several nodes share. `limits`: ``bps-total``, ``iops-read-max`` ... -> number."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._pouring = allocate_lock()
        self._operation = limits.get("iops-size", 0)
        self._buckets: dict[tuple[str, str], list[_Bucket]] = {
            (what, way): [
                _Bucket(rate, limits.get(f"{name}-max", 0), limits.get(f"{name}-max-length", 1))
                for name in (f"{what}-total", f"{what}-{way}")
                if (rate := limits.get(name, 0))
            ]
            for what in ("bps", "iops")
            for way in (READ, WRITE)
        }
        # A total is one bucket for both ways.
        for what in ("bps", "iops"):
            if limits.get(f"{what}-total"):
                self._buckets[what, WRITE][0] = self._buckets[what, READ][0]

    def wait(self, way: str, length: int) -> None:
        """Return when a request of `length` bytes may be made. `way`: READ or WRITE."""
        operations = -(-length // self._operation) if self._operation and length else 1
        with self._pouring:
            now = monotonic()
            delays = [bucket.pour(length, now) for bucket in self._buckets["bps", way]]
            delays += [bucket.pour(operations, now) for bucket in self._buckets["iops", way]]
        delay = max(delays, default=0.0)
        if delay > 0:
            sleep(delay)


class Throttle(Filter):
    """A node whose requests wait for its group."""

    driver = "throttle"
    children: ClassVar[tuple[str, ...]] = ("file",)
    identity: ClassVar[tuple[str, ...]] = ("throttle-group", "driver")
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("throttle-group", STR, None, "Id of the throttle-group object"),
    )

    named = False

    def __init__(self, child: Storage, group: ThrottleGroup) -> None:
        super().__init__(child)
        self._group = group

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        if "throttle-group" not in values:
            raise OptionError("Please specify a throttle group", option="throttle-group")
        id = str(values["throttle-group"])
        group = getattr(context.objects.get(id), "group", None)
        if group is None:
            raise OptionError(f"Throttle group '{id}' does not exist", option="throttle-group")
        return cls(children["file"], group)

    def read_into(self, buf: Buffer, offset: int) -> None:
        self._group.wait(READ, len(buf))
        super().read_into(buf, offset)

    def write(self, buf: Bytes, offset: int) -> None:
        self._group.wait(WRITE, len(buf))
        super().write(buf, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._group.wait(WRITE, length)
        super().zero(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        self._group.wait(WRITE, length)
        super().discard(offset, length)
