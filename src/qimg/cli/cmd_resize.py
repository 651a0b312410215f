"""resize: change the size of the guest's disk (resize sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, Session, format_name, image_spec
from qimg.options import parse_size_option

_LONG = {
    "object=": "object",
    "image-opts": "image-opts",
    "preallocation=": "preallocation",
    "shrink": "shrink",
}
_SHRINKING = (
    "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an"
    " operation, make sure there is no important data there."
)


class Request:
    """Which image to resize, and how. `size` in bytes, relative to the present one where `sign` is not 0."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.preallocation = "off"
        self.quiet = False
        self.shrink = False
        self.image_opts = False
        self.sign = 0
        self.size = 0


def run(session: Session, words: list[str]) -> int:
    """``resize [--image-opts] [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILENAME [+|-]SIZE``; the exit
    code. The last word is the size whatever it looks like, so it is not an option's."""
    if len(words) < 2:
        raise CommandError("Not enough arguments", usage=True)
    request = Request()
    operands = _parse(session, words[:-1], request)
    if len(operands) != 1:
        raise CommandError("Expecting image file name and size", usage=True)
    _parse_size(words[-1], request)
    _resize(session, request, operands[0])
    if not request.quiet:
        session.console.out("Image resized.\n")
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "f:q", _LONG)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "q":
            request.quiet = True
        elif key == "image-opts":
            request.image_opts = True
        elif key == "shrink":
            request.shrink = True
        elif key == "preallocation":
            if value not in ("off", "metadata", "falloc", "full"):
                raise CommandError(f"Invalid preallocation mode '{value}'")
            request.preallocation = value
    return options.operands


def _parse_size(text: str, request: Request) -> None:
    """Raises OptionError."""
    request.sign = {"+": 1, "-": -1}.get(text[:1], 0)
    request.size = parse_size_option("size", text[1:] if request.sign else text)


def _resize(session: Session, request: Request, name: str) -> None:
    from qimg.jobs.resize import ShrinkRefused, resize

    spec = image_spec(name, format=request.format, image_opts=request.image_opts)
    try:
        resize(
            spec,
            request.sign * request.size if request.sign else request.size,
            relative=bool(request.sign),
            preallocation=request.preallocation,
            shrink=request.shrink,
            context=session.context,
        )
    except ShrinkRefused as error:
        session.console.error(str(error))
        session.console.warning(_SHRINKING)
        raise CommandError from error
