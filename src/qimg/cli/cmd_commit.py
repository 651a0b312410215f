"""commit: write what an image holds into the image below it (commit sheet)."""

from __future__ import annotations

from qimg.cli.common import (
    CommandError,
    Session,
    check_cache,
    format_name,
    image_spec,
    size_argument,
)
from qimg.errors import OpenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.cli.progressbar import ProgressBar

_LONG = {"object=": "object", "image-opts": "image-opts"}


class Request:
    """What to commit, and where to. `rate_limit` in bytes a second, 0 for none."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.base: str | None = None
        self.cache = "writeback"
        self.rate_limit = 0
        self.keep = False
        self.image_opts = False
        self.progress = False
        self.quiet = False


def run(session: Session, words: list[str]) -> int:
    """``commit [OPTIONS] FILENAME``; the exit code."""
    from qimg.cli.progressbar import ProgressBar

    request = Request()
    operands = _parse(session, words, request)
    if len(operands) != 1:
        raise CommandError("Expecting one image file name", usage=True)
    check_cache(request.cache, source=False)
    bar = ProgressBar(session.console, shown=request.progress and not request.quiet)
    try:
        _commit(session, request, operands[0], bar)
        bar.complete()
    except OpenError:
        raise  # before there was anything to show
    except BaseException:
        bar.finish()
        raise
    bar.finish()
    if not request.quiet:
        session.console.out("Image committed.\n")
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "b:df:pqr:t:", _LONG)
    for key, value in options:
        if key == "b":
            request.base = value
            request.keep = True
        elif key == "d":
            request.keep = True
        elif key == "f":
            request.format = format_name(value)
        elif key == "p":
            request.progress = True
        elif key == "q":
            request.quiet = True
        elif key == "r":
            request.rate_limit = size_argument("rate limit", value)
        elif key == "t":
            request.cache = value
        elif key == "image-opts":
            request.image_opts = True
    return options.operands


def _commit(session: Session, request: Request, name: str, bar: ProgressBar) -> None:
    from qimg.jobs.commit import commit

    spec = image_spec(name, format=request.format, image_opts=request.image_opts, cache=request.cache)
    commit(
        spec,
        base=request.base,
        keep=request.keep,
        rate_limit=request.rate_limit,
        progress=bar,
        context=session.context,
    )
