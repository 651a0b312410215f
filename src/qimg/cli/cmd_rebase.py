"""rebase: change the backing file of an image (rebase sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, Session, check_cache, format_name, image_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.cli.progressbar import ProgressBar

_LONG = {"object=": "object", "image-opts": "image-opts", "force-share": "U", "compress": "c"}
#: Options without a value -> the attribute of `Request` that they set.
_FLAGS = {
    "c": "compress",
    "p": "progress",
    "q": "quiet",
    "u": "unsafe",
    "U": "force_share",
    "image-opts": "image_opts",
}
#: Options whose value is taken as it is.
_TEXTS = {"b": "backing", "t": "cache", "T": "source_cache"}
#: Options that name a format.
_FORMATS = {"f": "format", "F": "backing_format"}


class Request:
    """Which image gets which backing file, and how. `backing` empty or None: none."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.backing: str | None = None
        self.backing_format: str | None = None
        self.cache = "writeback"
        self.source_cache = "writeback"
        self.compress = False
        self.force_share = False
        self.image_opts = False
        self.progress = False
        self.quiet = False
        self.unsafe = False


def run(session: Session, words: list[str]) -> int:
    """``rebase [OPTIONS] [-u] -b BACKING [-F BACKING_FMT] FILENAME``; the exit code."""
    from qimg.cli.progressbar import ProgressBar

    request = Request()
    operands = _parse(session, words, request)
    if len(operands) != 1:
        raise CommandError("Expecting one image file name", usage=True)
    if request.backing is None and not request.unsafe:
        raise CommandError("Must specify backing file (-b) or use unsafe mode (-u)", usage=True)
    bar = ProgressBar(session.console, shown=request.progress and not request.quiet)
    bar.start()
    try:
        check_cache(request.cache, source=False)
        check_cache(request.source_cache, source=True)
        _rebase(session, request, operands[0], bar)
        bar.complete()
    finally:
        bar.finish()
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "b:cf:pqt:uF:T:U", _LONG)
    for key, value in options:
        if key in _FLAGS:
            setattr(request, _FLAGS[key], True)
        elif key in _TEXTS:
            setattr(request, _TEXTS[key], value)
        elif key in _FORMATS:
            setattr(request, _FORMATS[key], format_name(value))
    return options.operands


def _rebase(session: Session, request: Request, name: str, bar: ProgressBar) -> None:
    from qimg.jobs.rebase import rebase

    spec = image_spec(name, format=request.format, image_opts=request.image_opts, cache=request.cache)
    rebase(
        spec,
        request.backing,
        backing_format=request.backing_format,
        unsafe=request.unsafe,
        compress=request.compress,
        source_cache=request.source_cache,
        share=request.force_share,
        progress=bar,
        context=session.context,
    )
