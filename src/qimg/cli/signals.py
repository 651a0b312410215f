"""Signals (common sheet, sections 3 and 13), without the standard library's wrapper, which imports enum."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the interpreter's own module behind `signal`

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def set_defaults() -> None:
    """An interrupt ends the process at once, as any other program; SIGUSR1 is for jobs with progress."""
    if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    _signal.signal(_signal.SIGUSR1, _signal.SIG_IGN)


def on_report(action: Callable[[], None]) -> None:
    """Call `action` in the main thread whenever SIGUSR1 asks for a report."""
    _signal.signal(_signal.SIGUSR1, lambda *_: action())
