"""check: the consistency of images (check sheet)."""

from __future__ import annotations

from time import monotonic

from qimg.cli.common import (
    CommandError,
    Session,
    check_cache,
    for_each,
    format_name,
    image_spec,
    is_json,
    one_operand_at_least,
)
from qimg.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.base import CheckResult

_LONG = {
    "format=": "f",
    "repair=": "r",
    "output=": "output",
    "object=": "object",
    "image-opts": "image-opts",
    "force-share": "U",
}
CORRUPT = 2
LEAKS = 3
CANNOT_CHECK = 63
#: Findings, and seconds, after which findings are shown.
_MOST_LINES = 1000
_WAIT = 0.1


class Request:
    """What to check, and how."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.output: str | None = None
        self.repair: str | None = None
        self.cache = "writeback"
        self.quiet = False
        self.image_opts = False
        self.force_share = False


class Findings:
    """What a check finds, on its way to stderr. A broken image has millions of lines to tell, so they go out
    together, but none waits long."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lines: list[str] = []
        self._shown = 0.0  # when lines went out last

    def show(self, finding: str) -> None:
        """One finding, a line."""
        from qimg.findings import ErrorFinding

        if isinstance(finding, ErrorFinding):
            finding = f"{self._session.console.name}: {finding}"
        self._lines.append(finding)
        if len(self._lines) >= _MOST_LINES or monotonic() - self._shown > _WAIT:
            self.flush()

    def flush(self) -> None:
        """Let out what is there."""
        if self._lines:
            lines, self._lines = self._lines, []
            self._session.console.remark("\n".join(lines))
            self._shown = monotonic()


def run(session: Session, words: list[str]) -> int:
    """``check [--image-opts] [-q] [-f FMT] [--output=human|json] [-r leaks|all] [-T CACHE] [-U]
    FILENAME...``; the exit code: 0 clean, 1 failed, 2 corruptions, 3 leaks, 63 cannot be checked."""
    request = Request()
    operands = _parse(session, words, request)
    one_operand_at_least(operands)
    as_json = is_json(request.output)
    check_cache(request.cache, source=True)
    found: list[object] = []
    shown = 0

    def work(name: str) -> int:
        nonlocal shown
        code, result, rendered = _check(session, request, name)
        if result is None:
            return code
        if as_json:
            found.append(rendered)
        elif not request.quiet:
            from qimg.cli.render_text import check_summary

            session.console.out("\n" + check_summary(result) if shown else check_summary(result))
            shown += 1
        if result.check_errors:
            session.console.error("Check failed")
        return code

    code = for_each(session, operands, work)
    if as_json and not request.quiet and (found or len(operands) > 1):
        from qimg.cli.render_json import dumps

        session.console.out(dumps(found if len(operands) > 1 else found[0]) + "\n")
    return code


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "f:qr:T:U", _LONG)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "q":
            request.quiet = True
        elif key == "r":
            if value not in ("leaks", "all"):
                raise CommandError(
                    f"Unknown option value for -r (expecting 'leaks' or 'all'): {value}", usage=True
                )
            request.repair = value
        elif key == "T":
            request.cache = value
        elif key == "U":
            request.force_share = True
        elif key == "output":
            request.output = value
        elif key == "image-opts":
            request.image_opts = True
    return options.operands


def _check(
    session: Session, request: Request, name: str
) -> tuple[int, CheckResult | None, dict[str, object] | None]:
    """Exit code, result and JSON object of one image; the last two None where it cannot be checked."""
    from qimg.cli.render_json import check_object
    from qimg.jobs.check import check

    spec = image_spec(
        name,
        format=request.format,
        image_opts=request.image_opts,
        cache=request.cache,
        force_share=request.force_share,
    )
    findings = Findings(session)
    try:
        outcome = check(spec, report=findings.show, context=session.context, fix=request.repair)
    except NotSupported as error:
        session.console.error(str(error), error.hint)
        return CANNOT_CHECK, None, None
    finally:
        findings.flush()
    return _code(outcome.result), outcome.result, check_object(outcome, name)


def _code(result: CheckResult) -> int:
    if result.check_errors:
        return 1
    if result.corruptions:
        return CORRUPT
    return LEAKS if result.leaks else 0
