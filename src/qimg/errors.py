"""Every exception that qimg raises.

::

    QimgError
    ├── OptionError        an option's name or value is wrong
    ├── LocationError      a file name, json: text or option string that describes no image
    ├── OpenError          opening failed; wraps the reason, names the image
    ├── FormatError        bytes on disk contradict the format
    │   ├── UnsupportedFeature   they may be right, but qimg cannot handle them
    │   └── CorruptImage         damage met while reading through the tables
    ├── StorageError       the bytes cannot be reached (carries errno and, for requests, the offset)
    │   └── LockError      another process uses the image in a conflicting way
    ├── NotSupported       this format or storage cannot do what was asked
    ├── LimitError         a size or count beyond what the format can hold
    ├── GateError          an image names a file that it may not make us open
    └── Cancelled          the caller asked a job to stop

``str(error)`` is one line fit for a user. `hint` is an optional second line. The fields that a class
stores are attributes of the instance.
"""

from __future__ import annotations

import os
from errno import EIO


def hide_passwords(text: str) -> str:
    """`text` with ``***`` in place of the passwords of URLs (``user:password@``, ``user%password@``)."""
    if "://" not in text or "@" not in text:
        return text
    import re

    return re.sub(r"""(\w://[^\s/:@%"]*[:%])[^\s/"]*@""", r"\1***@", text)


class QimgError(Exception):
    """Root of the tree. Raised itself only where no subclass fits. Its text shows no passwords of URLs."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return hide_passwords(self.message)


class OptionError(QimgError):
    """An option's name or value is wrong. `option` is its name where one is known."""

    def __init__(self, message: str, *, option: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


class LocationError(QimgError):
    """Text that should say where an image is, and does not."""


class OpenError(QimgError):
    """Opening `name` failed because of `reason`."""

    def __init__(self, name: str, reason: QimgError | str, *, hint: str | None = None) -> None:
        if hint is None and isinstance(reason, QimgError):
            hint = reason.hint
        super().__init__(f"Could not open '{name}': {reason}", hint=hint)
        self.name = name
        self.reason = reason


class FormatError(QimgError):
    """Bytes on disk contradict the format.

    `file` names the file, `field` is ``structure.field``, `offset` its byte offset in the file,
    `expected` and `found` are values or short descriptions. Each may be None where it has no meaning.
    `describe()` puts them into one line.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        field: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.file = file
        self.field = field
        self.offset = offset
        self.expected = expected
        self.found = found

    def describe(self) -> str:
        """The message with file, field, offset, expected and found, as far as they are known."""
        parts = []
        if self.file is not None:
            parts.append(f"file {self.file}")
        if self.field is not None:
            parts.append(f"field {self.field}")
        if self.offset is not None:
            parts.append(f"offset {self.offset:#x}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        return f"{self.message} ({', '.join(parts)})" if parts else self.message


class UnsupportedFeature(FormatError):
    """The image is (perhaps) sound but uses something that qimg does not handle."""


class CorruptImage(FormatError):
    """Damage met while reading or writing through the tables of an opened image.

    The request fails like one of a broken disk: `errno` and `reason` are those of an I/O error.
    `guest` is the guest offset from which on nothing can be said (what lies before can), or None.
    """

    errno = EIO

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        field: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        guest: int | None = None,
    ) -> None:
        super().__init__(message, file=file, field=field, offset=offset, expected=expected, found=found)
        self.guest = guest

    @property
    def reason(self) -> str:
        """The operating system's words for `errno`."""
        return os.strerror(self.errno)


class StorageError(QimgError):
    """The bytes cannot be reached. `errno` as of the operating system, `offset` in bytes or None."""

    def __init__(
        self,
        message: str,
        *,
        errno: int,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno
        self.offset = offset

    @property
    def reason(self) -> str:
        """The operating system's words for `errno`."""
        return os.strerror(self.errno)


class LockError(StorageError):
    """Another process uses the image in a way that conflicts with ours."""


class NotSupported(QimgError):
    """This format or storage cannot do what was asked."""


class LimitError(QimgError):
    """A size or count beyond what the format can hold."""


class GateError(QimgError):
    """An image names a file that it may not make us open."""


class Cancelled(QimgError):
    """The caller asked a running job to stop."""

    def __init__(self, message: str = "Cancelled") -> None:
        super().__init__(message)
