"""map: which guest range lies where (map sheet)."""

from __future__ import annotations

from qimg.cli.common import (
    Session,
    for_each,
    format_name,
    image_spec,
    is_json,
    one_operand_at_least,
    size_argument,
)
from qimg.errors import QimgError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qimg.jobs.map import MapEntry

_LONG = {
    "format=": "f",
    "output=": "output",
    "start-offset=": "s",
    "max-length=": "l",
    "object=": "object",
    "image-opts": "image-opts",
    "force-share": "U",
}


class Request:
    """What to map, and how. `start` and `length` in bytes."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.output: str | None = None
        self.start = 0
        self.length: int | None = None
        self.image_opts = False
        self.force_share = False


def run(session: Session, words: list[str]) -> int:
    """``map [--image-opts] [-f FMT] [-s OFFSET] [-l LENGTH] [--output=human|json] [-U] FILENAME...``; the
    exit code. Several files are our extension: a blank line between them, in JSON an array of arrays."""
    request = Request()
    options = session.options(words, "f:l:s:U", _LONG)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "l":
            request.length = size_argument("max length", value)
        elif key == "s":
            request.start = size_argument("start offset", value)
        elif key == "U":
            request.force_share = True
        elif key == "output":
            request.output = value
        elif key == "image-opts":
            request.image_opts = True
    one_operand_at_least(options.operands)
    show = _show_json if is_json(request.output) else _show_human
    return show(session, request, options.operands)


def _entries(session: Session, request: Request, name: str) -> Iterator[MapEntry]:
    """The extents of one image, which is opened before this returns: nothing is printed if that fails."""
    from qimg.jobs.map import MetadataError, map_extents

    spec = image_spec(
        name, format=request.format, image_opts=request.image_opts, force_share=request.force_share
    )
    entries = map_extents(spec, start=request.start, length=request.length, context=session.context)
    first: MapEntry | MetadataError
    try:
        first = next(entries)
    except MetadataError as error:
        first = error

    def all_entries() -> Iterator[MapEntry]:
        if isinstance(first, MetadataError):
            raise first
        yield first
        yield from entries

    return all_entries()


def _show_human(session: Session, request: Request, names: list[str]) -> int:
    from qimg.cli.render_text import MAP_HEADER

    shown = 0

    def show(name: str) -> int:
        nonlocal shown
        entries = _entries(session, request, name)
        session.console.out("\n" + MAP_HEADER if shown else MAP_HEADER)
        shown += 1
        _print_rows(session, entries)
        return 0

    return for_each(session, names, show)


def _print_rows(session: Session, entries: Iterable[MapEntry]) -> None:
    """Rows of what lies verbatim in a file. Raises QimgError at the first data that does not."""
    from qimg.cli.render_text import map_row

    for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise QimgError("File contains external, encrypted or compressed clusters.")
        session.console.out(map_row(entry))


def _print_array(session: Session, request: Request, name: str) -> None:
    """The JSON array of one image. Where the tables cannot be read to their end, it stays open."""
    from qimg.cli.render_json import map_rows
    from qimg.jobs.map import MetadataError

    opening = "["
    try:
        for text in map_rows(_entries(session, request, name)):
            session.console.out(text)
            opening = ",\n"
    except MetadataError:
        session.console.out(opening)
        raise
    session.console.out("\n")


def _show_json(session: Session, request: Request, names: list[str]) -> int:
    from qimg.cli.render_json import map_rows

    console = session.console
    if len(names) == 1:
        _print_array(session, request, names[0])
        return 0
    opening = "["

    def show(name: str) -> int:
        nonlocal opening
        console.out(opening)
        opening = ",\n"
        begun = False
        try:
            for text in map_rows(_entries(session, request, name)):
                console.out(text)
                begun = True
        except Exception:
            console.out("]" if begun else "[]")
            raise
        return 0

    code = for_each(session, names, show)
    console.out("]\n")
    return code
