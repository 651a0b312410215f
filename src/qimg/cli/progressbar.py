"""Progress (common sheet, section 13): ``-p`` on stdout, or a report on stderr after SIGUSR1."""

from __future__ import annotations

from qimg.cli.signals import on_report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.cli.console import Console


class ProgressBar:
    """A `Progress` for one job: with `shown` it writes records, else it answers signals.

    A record is due at 0, at 100, and when the share has grown by more than `step` percent since the last.
    """

    def __init__(self, console: Console, *, shown: bool, step: float = 1.0) -> None:
        self.exact = shown
        self._console = console
        self._shown = shown
        self._step = step
        self._last: float | None = None
        self._asked = False
        if not shown:
            on_report(self._ask)

    def _ask(self) -> None:
        self._asked = True

    def start(self) -> None:
        """The first record, unless it was written already."""
        if self._last is None:
            self._record(0.0)

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are through."""
        self.start()
        share = 100.0 * done / total if total else 0.0
        if share - (self._last or 0.0) > self._step or (share == 100.0 and self._last != 100.0):
            self._record(share)
        if self._asked:
            self._asked = False
            self._console.remark(f"    ({self._last:.2f}/100%)")

    def complete(self) -> None:
        """The work is done; a record of its own, as the real program writes."""
        self._record(100.0)

    def finish(self) -> None:
        """The newline that ends the records, whatever became of the work."""
        if self._shown:
            self._console.out("\n")
            self._console.flush()

    def _record(self, share: float) -> None:
        self._last = share
        if self._shown:
            self._console.out(f"    ({share:.2f}/100%)\r")
            self._console.flush()
