"""How a header is refused: one line, and which field it is about."""

from __future__ import annotations

from qimg.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qimg.ondisk import Struct
    from qimg.storage.base import Storage


def refuse(
    file: Storage,
    header: Struct,
    message: str,
    field: str,
    *,
    kind: type[FormatError] = FormatError,
    expected: object = None,
    hint: str | None = None,
) -> NoReturn:
    """Raise `kind` for `field` of `header`, the structure that `file` begins with."""
    raise kind(
        message,
        file=file.name,
        field=f"header.{field}",
        offset=header.offset_of(field),
        expected=expected,
        found=getattr(header, field),
        hint=hint,
    )
