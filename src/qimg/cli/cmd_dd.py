"""dd: copy a part of a disk, counted in blocks, into a new image (dd sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, Session, format_name, image_spec, size_argument

_LONG = {"object=": "object", "image-opts": "image-opts", "force-share": "U"}
INT_MAX = (1 << 31) - 1


class Request:
    """What to copy, and how. `block_size` in bytes, `count` and `skip` in blocks."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.output_format = "raw"
        self.image_opts = False
        self.force_share = False
        self.source: str | None = None
        self.target: str | None = None
        self.block_size = 512
        self.count: int | None = None
        self.skip = 0


def run(session: Session, words: list[str]) -> int:
    """``dd [--image-opts] [-U] [-f FMT] [-O OUT_FMT] [bs=SIZE] [count=N] [skip=N] if=INPUT of=OUTPUT``; the
    exit code."""
    from qimg.jobs.dd import DdRequest, dd

    request = Request()
    for operand in _parse(session, words, request):
        _operand(request, operand)
    if request.source is None or request.target is None:
        raise CommandError("Must specify both input and output files")
    spec = image_spec(
        request.source,
        format=request.format,
        image_opts=request.image_opts,
        force_share=request.force_share,
    )
    job = DdRequest(
        spec,
        request.target,
        output_format=request.output_format,
        block_size=request.block_size,
        count=request.count,
        skip=request.skip,
    )
    if not dd(job, context=session.context):
        # An empty image is what was asked for, in a way: no failure (dd sheet, trap 2).
        session.console.error(f"{request.source}: cannot skip to specified offset")
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "f:O:U", _LONG)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "O":
            request.output_format = format_name(value)
        elif key == "U":
            request.force_share = True
        elif key == "image-opts":
            request.image_opts = True
    return options.operands


def _operand(request: Request, operand: str) -> None:
    """Take one ``NAME=VALUE``; the last one of a name counts. Raises CommandError."""
    name, equals, value = operand.partition("=")
    if not equals or name not in ("bs", "count", "if", "of", "skip"):
        raise CommandError(f"unrecognized operand {name}")
    if name == "if":
        request.source = value
    elif name == "of":
        request.target = value
    elif name == "bs":
        request.block_size = size_argument("bs", value, low=1, high=INT_MAX)
    elif name == "count":
        request.count = size_argument("count", value)
    else:
        request.skip = size_argument("skip", value)
