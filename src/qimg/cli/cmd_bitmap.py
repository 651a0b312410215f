"""bitmap: add, remove, clear, switch and merge persistent dirty bitmaps (bitmap sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, Session, format_name, image_spec, size_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.jobs.bitmap import Action

_LONG = {
    "add": "add",
    "remove": "remove",
    "clear": "clear",
    "enable": "enable",
    "disable": "disable",
    "merge=": "merge",
    "source-file=": "b",
    "source-format=": "F",
    "granularity=": "g",
    "object=": "object",
    "image-opts": "image-opts",
}


class Request:
    """What to do to which bitmap. `actions`: (kind, bitmap to merge or empty) in the order given."""

    def __init__(self) -> None:
        self.actions: list[tuple[str, str]] = []
        self.format: str | None = None
        self.granularity: int | None = None
        self.source: str | None = None
        self.source_format: str | None = None
        self.image_opts = False

    def has(self, kind: str) -> bool:
        """Whether one of the actions is of this kind."""
        return any(action == kind for action, _ in self.actions)


def run(session: Session, words: list[str]) -> int:
    """``bitmap (--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b FILE [-F FMT]]
    [-g GRANULARITY] [--image-opts | -f FMT] FILENAME BITMAP``; the exit code."""
    request = Request()
    operands = _parse(session, words, request)
    _check(request, operands)
    from qimg.jobs.bitmap import bitmap

    source = None
    target = image_spec(operands[0], format=request.format, image_opts=request.image_opts)
    if request.source is not None:
        source = image_spec(request.source, format=request.source_format, image_opts=False)
    bitmap(
        target,
        operands[1],
        _actions(request),
        granularity=request.granularity,
        source=source,
        context=session.context,
    )
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "b:f:F:g:", _LONG)
    for key, value in options:
        if key == "b":
            request.source = value
        elif key == "f":
            request.format = format_name(value)
        elif key == "F":
            request.source_format = format_name(value)
        elif key == "g":
            request.granularity = size_argument("granularity", value)
        elif key == "image-opts":
            request.image_opts = True
        else:
            request.actions.append((key, value))
    return options.operands


def _check(request: Request, operands: list[str]) -> None:
    """Raise CommandError for what does not go together."""
    if not request.actions:
        raise CommandError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if len(operands) != 2:
        raise CommandError("Expecting filename and bitmap name")
    if request.granularity and not request.has("add"):
        raise CommandError("granularity only supported with --add")
    if request.source_format is not None and request.source is None:
        raise CommandError("-F only supported with -b")
    if request.source is not None and not request.has("merge"):
        raise CommandError("Merge bitmap source file only supported with --merge")


def _actions(request: Request) -> list[Action]:
    from qimg.jobs.bitmap import Action

    return [Action(kind, source if kind == "merge" else None) for kind, source in request.actions]
