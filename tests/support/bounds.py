"""Bounds on what a piece of work may take of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
_SELF = Path("/proc/self")


@contextmanager
def bounded(*, memory: int = 256 * MIB, seconds: float = 20) -> Iterator[None]:
    """Fails where the work needs more `memory` (bytes), at its peak, than was in use before, or more
    `seconds`."""
    (_SELF / "clear_refs").write_text("5")  # forget the peak so far (proc(5))
    before, begun = _status("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - begun < seconds
    assert _status("VmHWM") - before < memory


def _status(name: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    lines = (_SELF / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10
