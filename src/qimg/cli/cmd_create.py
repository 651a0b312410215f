"""create: make a new image (create sheet)."""

from __future__ import annotations

from qimg.cli.common import (
    CommandError,
    OptionList,
    Session,
    format_name,
    print_creation_options,
    size_argument,
)
from qimg.errors import QimgError, hide_passwords


class Request:
    """What to create. `size` in bytes."""

    def __init__(self) -> None:
        self.options = OptionList()
        self.backing: str | None = None
        self.backing_format: str | None = None
        self.format = "raw"
        self.unsafe = False
        self.quiet = False
        self.name = ""
        self.size: int | None = None


def run(session: Session, words: list[str]) -> int:
    """``create [-f FMT] [-b BACKING [-F FMT]] [-u] [-q] [-o OPTIONS] FILENAME [SIZE]``; the exit code."""
    request = Request()
    operands = _parse(session, words, request)
    if request.options.wants_help:
        print_creation_options(session, request.format, operands[0] if operands else None)
        return 0
    if not operands:
        raise CommandError("Expecting image file name", usage=True)
    request.name = operands[0]
    if len(operands) > 1:
        request.size = size_argument("image size", operands[1])
    if len(operands) > 2:
        raise CommandError(f"Unexpected argument: {operands[2]}", usage=True)
    try:
        _create(session, request)
    except QimgError as error:
        raise QimgError(f"{request.name}: {error}", hint=error.hint) from error
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "b:f:F:o:qu", {"object=": "object"})
    for key, value in options:
        if key == "b":
            request.backing = value
        elif key == "f":
            request.format = format_name(value)
        elif key == "F":
            request.backing_format = format_name(value)
        elif key == "o":
            request.options.add(value)
        elif key == "q":
            request.quiet = True
        elif key == "u":
            request.unsafe = True
    return options.operands


def _create(session: Session, request: Request) -> None:
    from qimg.jobs.create import plan_create, run_create

    plan = plan_create(
        request.name,
        format=request.format,
        size=request.size,
        options=request.options.pairs(),
        backing=request.backing,
        backing_format=request.backing_format,
        unsafe=request.unsafe,
        context=session.context,
    )
    if not request.quiet:
        shown = "".join(f" {key}={value}" for key, value in plan.shown)
        session.console.out(hide_passwords(f"Formatting '{request.name}', fmt={plan.format}{shown}\n"))
        session.console.flush()
    run_create(plan, context=session.context)
