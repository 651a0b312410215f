"""``--object``: help is printed, everything else is made by `qimg.graph.objects`."""

from __future__ import annotations

from qimg.cli.common import Leave, Session
from qimg.graph import objects


def add_object(session: Session, text: str) -> None:
    """Create the object that `text` describes in the session's context, or print help and leave.

    Raises OptionError and other QimgErrors in the words of the real program."""
    lines = objects.help_lines(text)
    if lines is not None:
        session.console.out("\n".join(lines) + "\n")
        raise Leave
    objects.add_object(text, session.context.objects)
