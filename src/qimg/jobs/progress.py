"""How a job tells its caller that it moves on."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Progress(Protocol):
        """`update` is called from the thread that called the job, with `done` <= `total` (bytes)."""

        #: Whether it is worth knowing `total` exactly before the work starts.
        exact: bool

        def update(self, done: int, total: int) -> None:
            """Take notice."""

    Cancelled = Callable[[], bool]


class Callback:
    """A `Progress` around a plain function ``f(done, total)``."""

    exact = True

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self._function = function

    def update(self, done: int, total: int) -> None:
        """Pass on."""
        self._function(done, total)
