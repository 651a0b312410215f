"""compare: whether a guest would see the same in two images (compare sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, Session, check_cache, format_name, image_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.cli.progressbar import ProgressBar

_LONG = {"object=": "object", "image-opts": "image-opts", "force-share": "U"}
#: Exit codes: what differs is 1, as are usage errors.
DIFFERENT = 1
FAILURE = 2
NO_ALLOCATION = 3
NO_DATA = 4
#: Percent between two records of ``-p`` (the other commands: 1).
STEP = 2.0


class Request:
    """What to compare, and how."""

    def __init__(self) -> None:
        self.formats: list[str | None] = [None, None]
        self.cache = "writeback"
        self.strict = False
        self.progress = False
        self.quiet = False
        self.image_opts = False
        self.force_share = False


def run(session: Session, words: list[str]) -> int:
    """``compare [--image-opts] [-f FMT] [-F FMT] [-T CACHE] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2``; the
    exit code: 0 equal, 1 different, 2 cannot open, 3 no allocation status, 4 cannot read."""
    from qimg.cli.progressbar import ProgressBar

    request = Request()
    operands = _parse(session, words, request)
    if len(operands) != 2:
        raise CommandError("Expecting two image file names", usage=True)
    bar = ProgressBar(session.console, shown=request.progress and not request.quiet, step=STEP)
    try:
        check_cache(request.cache, source=True)
        return _compare(session, request, operands, bar)
    finally:
        bar.finish()


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "f:F:pqsT:U", _LONG)
    for key, value in options:
        if key == "f":
            request.formats[0] = format_name(value)
        elif key == "F":
            request.formats[1] = format_name(value)
        elif key == "p":
            request.progress = True
        elif key == "q":
            request.quiet = True
        elif key == "s":
            request.strict = True
        elif key == "T":
            request.cache = value
        elif key == "U":
            request.force_share = True
        elif key == "image-opts":
            request.image_opts = True
    return options.operands


def _compare(session: Session, request: Request, operands: list[str], bar: ProgressBar) -> int:
    from qimg.cli.render_text import verdict
    from qimg.jobs.compare import AllocationError, ReadError, compare

    first, second = (
        image_spec(
            name,
            format=format,
            image_opts=request.image_opts,
            cache=request.cache,
            force_share=request.force_share,
        )
        for name, format in zip(operands, request.formats, strict=True)
    )
    say = (lambda _: None) if request.quiet else session.console.out
    try:
        comparison = compare(
            first,
            second,
            strict=request.strict,
            progress=bar,
            warn_size=lambda: say("Warning: Image size mismatch!\n"),
            context=session.context,
        )
    except AllocationError as error:
        raise CommandError(str(error), code=NO_ALLOCATION) from error
    except ReadError as error:
        raise CommandError(str(error), code=NO_DATA) from error
    bar.start()
    say(verdict(comparison))
    return 0 if comparison.verdict == "identical" else DIFFERENT
