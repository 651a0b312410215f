"""amend: change options of creation in an image that exists (amend sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, OptionList, Session, check_cache, format_name, image_spec
from qimg.cli.progressbar import ProgressBar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.options import Option

_LONG = {"object=": "object", "image-opts": "image-opts", "force": "force"}


class Request:
    """What to change, and where."""

    def __init__(self) -> None:
        self.options = OptionList()
        self.format: str | None = None
        self.cache = "writeback"
        self.progress = False
        self.quiet = False
        self.image_opts = False
        self.force = False


def run(session: Session, words: list[str]) -> int:
    """``amend [--image-opts] [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILENAME``; the exit code."""
    request = Request()
    operands = _parse(session, words, request)
    if not request.options:
        raise CommandError("Must specify options (-o)", usage=True)
    bar = ProgressBar(session.console, shown=request.progress and not request.quiet)
    try:
        _amend(session, request, operands, bar)
    finally:
        bar.finish()
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "f:o:pqt:", _LONG)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "o":
            request.options.add(value)
        elif key == "p":
            request.progress = True
        elif key == "q":
            request.quiet = True
        elif key == "t":
            request.cache = value
        elif key == "image-opts":
            request.image_opts = True
        elif key == "force":
            request.force = True
    return options.operands


def _amend(session: Session, request: Request, operands: list[str], bar: ProgressBar) -> None:
    from qimg.jobs.amend import amend, amend_options, amend_options_of

    if request.options.wants_help and request.format is not None:
        _print_options(session, request.format, amend_options(request.format))
        return
    if len(operands) != 1:
        raise CommandError("Expecting one image file name")
    check_cache(request.cache, source=False)
    spec = image_spec(operands[0], format=request.format, image_opts=request.image_opts, cache=request.cache)
    if request.options.wants_help:
        _print_options(session, *amend_options_of(spec, context=session.context))
        return
    amend(spec, request.options.pairs(), force=request.force, progress=bar, context=session.context)
    bar.complete()


def _print_options(session: Session, format: str, options: tuple[Option, ...]) -> None:
    from qimg.cli.render_text import option_rows

    session.console.out(f"Amend options for '{format}':\n" + option_rows(options))
