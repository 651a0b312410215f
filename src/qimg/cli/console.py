"""What the program says: results on stdout, everything else on stderr, and never a failure because of it.

Both go straight to the file descriptors. A closed or full stdout is not an error (common sheet, section 3),
and names with bytes that are no text come out as those bytes.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Notice

_BUFFER = 64 << 10


def _encode(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # a locale without our letters
        return text.encode("utf-8", "surrogateescape")


def _write_all(descriptor: int, data: bytes) -> bool:
    """Whether everything went out."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            import select

            select.select([], [descriptor], [])
        except OSError:
            return False
    return True


def guard_descriptors() -> None:
    """Open what was closed of 0, 1, 2, so that no image gets such a number and our text with it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class Console:
    """`name` is what the program calls itself in messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pending: list[str] = []
        self._size = 0
        self._stdout_works = True

    def out(self, text: str) -> None:
        """Result text, as it is; buffered."""
        self._pending.append(text)
        self._size += len(text)
        if self._size >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Send what `out` holds."""
        if not self._pending:
            return
        text = "".join(self._pending)
        self._pending.clear()
        self._size = 0
        if self._stdout_works:
            self._stdout_works = _write_all(1, _encode(text))

    def remark(self, text: str) -> None:
        """A line on stderr without the prefix."""
        self.flush()
        _write_all(2, _encode(text + "\n"))

    def error(self, message: str, hint: str | None = None) -> None:
        """``NAME: message``, then `hint` (its own line or lines) without the prefix."""
        self.remark(f"{self.name}: {message}" if hint is None else f"{self.name}: {message}\n{hint}")

    def warning(self, message: str, hint: str | None = None) -> None:
        """``NAME: warning: message``, then `hint`."""
        self.error(f"warning: {message}", hint)

    def notice(self, notice: Notice) -> None:
        """What a job wants to be told (`Context.warn`)."""
        if not notice.plain:
            self.warning(notice.text, notice.hint)
            return
        self.remark(notice.text if notice.hint is None else f"{notice.text}\n{notice.hint}")

    @property
    def usage_hint(self) -> str:
        """The second line of usage errors."""
        return f"Try '{self.name} --help' for more information"
