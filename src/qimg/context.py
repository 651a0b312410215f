"""What a call brings along: where warnings go and which objects (secrets ...) exist.

The library raises errors and returns values; a warning is neither, so it goes through `Context.warn`.
The command line prints it; a library user gets it as a Python warning unless a function is given.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class QimgWarning(UserWarning):
    """Something that the caller should know and that did not stop the work."""


class Notice:
    """One thing to tell: `text`, an optional second line `hint`, and whether it is a plain remark that
    the command line prints without its prefix (findings of a check, the raw-probe warning)."""

    __slots__ = ("hint", "plain", "text")

    def __init__(self, text: str, *, hint: str | None = None, plain: bool = False) -> None:
        self.text = text
        self.hint = hint
        self.plain = plain


def _as_python_warning(notice: Notice) -> None:
    import warnings

    text = notice.text if notice.hint is None else f"{notice.text}\n{notice.hint}"
    warnings.warn(text, QimgWarning, stacklevel=4)


class Context:
    """`warn` receives every Notice; `objects` maps ids to the user's objects (``--object``)."""

    __slots__ = ("objects", "warn")

    def __init__(
        self,
        warn: Callable[[Notice], None] = _as_python_warning,
        objects: dict[str, object] | None = None,
    ) -> None:
        self.warn = warn
        self.objects = {} if objects is None else objects
