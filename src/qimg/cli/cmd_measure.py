"""measure: how large a new image would become (measure sheet)."""

from __future__ import annotations

from qimg.cli.common import (
    CommandError,
    OptionList,
    Session,
    format_name,
    image_spec,
    is_json,
    size_argument,
    snapshot_parameter,
)
from qimg.cli.getopt import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import Measure
    from qimg.jobs.convert import SnapshotParam

_LONG = {
    "image-opts": "image-opts",
    "object=": "object",
    "output=": "output",
    "size=": "size",
    "force-share": "U",
}


class Request:
    """What to measure: `size` bytes, or the image `name`."""

    def __init__(self) -> None:
        self.options = OptionList()
        self.output_format = "raw"
        self.output: str | None = None
        self.size: int | None = None
        self.name: str | None = None
        self.format: str | None = None
        self.snapshot: SnapshotParam | None = None
        self.image_opts = False
        self.force_share = False


def run(session: Session, words: list[str]) -> int:
    """``measure [--output=human|json] [-O FMT] [-o OPTIONS] [--size N | [--image-opts] [-f FMT]
    [-l SNAPSHOT] FILENAME]``; the exit code."""
    request = Request()
    operands = _parse(session, words, request)
    as_json = is_json(request.output)
    _check(request, operands)
    found = _measure(session, request)
    if as_json:
        from qimg.cli.render_json import dumps, measure_object

        session.console.out(dumps(measure_object(found)) + "\n")
    else:
        from qimg.cli.render_text import measure_lines

        session.console.out(measure_lines(found))
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "f:l:o:O:U", _LONG, refuse=_refuse)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "l":
            request.snapshot = snapshot_parameter(session, value)
        elif key == "o":
            request.options.add(value)
        elif key == "O":
            request.output_format = format_name(value)
        elif key == "U":
            request.force_share = True
        elif key == "image-opts":
            request.image_opts = True
        elif key == "output":
            request.output = value
        elif key == "size":
            request.size = size_argument("image size", value)
    return options.operands


def _refuse(session: Session, error: UsageError) -> CommandError:
    """This command's own way: getopt's sentence, then the whole help. qemu-img ends with 0 here, which
    scripts take for success; we do not (decisions 6)."""
    from qimg.cli.helptext import usage

    session.console.remark(f"measure: {error.plain}")
    session.console.out(usage(session.console.name, "measure"))
    return CommandError()


def _check(request: Request, operands: list[str]) -> None:
    if len(operands) > 1:
        raise CommandError("At most one filename argument is allowed.")
    if operands:
        request.name = operands[0]
    elif request.image_opts or request.format is not None or request.snapshot is not None:
        raise CommandError("--image-opts, -f, and -l require a filename argument.")
    if request.name is None and request.size is None:
        raise CommandError("Either --size N or one filename must be specified.")
    if request.name is not None and request.size is not None:
        raise CommandError("--size N cannot be used together with a filename.")


def _measure(session: Session, request: Request) -> Measure:
    from qimg.jobs.measure import OptionsRefused, measure

    spec = None
    if request.name is not None:
        spec = image_spec(
            request.name,
            format=request.format,
            image_opts=request.image_opts,
            force_share=request.force_share,
        )
    try:
        return measure(
            spec,
            size=request.size,
            output_format=request.output_format,
            options=request.options.pairs(),
            snapshot=request.snapshot,
            context=session.context,
        )
    except OptionsRefused as error:
        session.console.error(str(error), error.hint)
        raise CommandError(f"Invalid options for file format '{request.output_format}'") from error
