"""What a call brings along: where warnings go and which objects (secrets ...) exist.

The library raises errors and returns values; a warning is neither, so it goes through `Context.warn`.
The command line prints it; a library user gets it as a Python warning unless a function is given.
"""

from __future__ import annotations

from qimg.errors import OptionError

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


class Secret:
    """A passphrase; `data` are its bytes, in UTF-8."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


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

    def add_secret(self, id: str, data: bytes) -> None:
        """Let `data` be the secret called `id`, to which options like ``key-secret`` refer: what
        ``--object secret`` does on the command line."""
        self.objects[id] = Secret(data)

    def secret(self, id: str) -> bytes:
        """The passphrase that the secret object called `id` holds. Raises OptionError (luks sheet 8)."""
        if id not in self.objects:
            raise OptionError(f"No secret with id '{id}'", option="id")
        data = getattr(self.objects[id], "data", None)
        if not isinstance(data, bytes):
            raise OptionError(f"Object with id '{id}' is not a secret", option="id")
        if not _is_text(data):
            raise OptionError(f"Data from secret {id} is not valid UTF-8", option="id")
        return data


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data
