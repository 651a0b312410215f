"""What several commands share: leaving, sizes, ``-o`` lists, cache modes, the words of their errors."""

from __future__ import annotations

import os

from qimg.cli.getopt import Getopt, UsageError
from qimg.context import Context
from qimg.errors import OptionError, QimgError
from qimg.options import split_pairs
from qimg.units import INT64_MAX, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qimg.cli.console import Console
    from qimg.graph.open import ImageSpec
    from qimg.jobs.convert import SnapshotParam

CACHE_MODES = ("none", "off", "writeback", "writethrough", "directsync", "unsafe")
EXCLUSIVE_FORMAT = "--image-opts and --format are mutually exclusive"


class Leave(Exception):
    """The command is done (help was shown, say); exit with `code`."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)
        self.code = code


class CommandError(Exception):
    """A refusal made by the command line itself: `lines`, each with the prefix, then the exit code (None:
    what the command's failures end with).

    `usage` adds the line that points to ``--help``.
    """

    def __init__(self, *lines: str, code: int | None = None, usage: bool = False) -> None:
        super().__init__(*lines)
        self.lines = lines
        self.code = code
        self.usage = usage


def show_failure(console: Console, error: Exception) -> None:
    """Say in one line, with its hint, what stopped the work; QIMG_DEBUG=1 puts the traceback before it."""
    if os.environ.get("QIMG_DEBUG", "0") not in ("", "0"):
        import traceback

        console.remark("".join(traceback.format_exception(error)).rstrip("\n"))
    console.error(*_describe(error))


def _describe(error: Exception) -> tuple[str, str | None]:
    if isinstance(error, QimgError):
        return str(error), error.hint
    if isinstance(error, MemoryError):
        return "Cannot allocate memory", None
    if isinstance(error, RecursionError):
        return "The image nests its structures too deeply", None
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror or error}", None
    return f"Internal error (QIMG_DEBUG=1 shows more): {type(error).__name__}: {error}", None


class Session:
    """One run of one command: its `console`, the `context` of its jobs, and its name (`command`)."""

    def __init__(self, console: Console, command: str) -> None:
        self.console = console
        self.command = command
        self.context = Context(warn=console.notice)

    def options(
        self,
        words: Sequence[str],
        short: str,
        long: dict[str, str],
        *,
        refuse: Callable[[Session, UsageError], CommandError] | None = None,
    ) -> Options:
        """The options of the command in `words`; ``-h`` and ``--object`` are dealt with on the way.

        `refuse` makes the refusal of a wrong option, `usage_failure` unless given."""
        parser = Getopt(words, f"h{short}", {"help": "h", **long}, before=self.command)
        return Options(self, parser, refuse or usage_failure)

    def help(self) -> None:
        """Print the usage text and leave."""
        from qimg.cli.helptext import usage

        self.console.out(usage(self.console.name, self.command))
        raise Leave


class Options:
    """Iterate for the ``(key, value)`` pairs that the command has to look at; then read `operands`."""

    def __init__(
        self, session: Session, parser: Getopt, refuse: Callable[[Session, UsageError], CommandError]
    ) -> None:
        self._session = session
        self._parser = parser
        self._refuse = refuse

    @property
    def operands(self) -> list[str]:
        """The words that are no options."""
        return self._parser.operands

    def __iter__(self) -> Iterator[tuple[str, str]]:
        try:
            for key, value in self._parser:
                if key == "h":
                    self._session.help()
                elif key == "object":
                    from qimg.cli.objects import add_object

                    add_object(self._session, value)
                else:
                    yield key, value
        except UsageError as error:
            raise self._refuse(self._session, error) from None


def usage_failure(_: object, error: UsageError) -> CommandError:
    """The refusal of a wrong option in qemu-img's words."""
    if error.missing:
        return CommandError(f"missing argument for option '{error.word}'", usage=True)
    return CommandError(f"unrecognized option '{error.word}'", usage=True)


def format_name(text: str) -> str:
    """A format as ``-f``, ``-F`` and ``-O`` take it: ``vhd`` is another word for ``vpc``."""
    from qimg.formats.registry import own_name

    return own_name(text)


def one_operand_at_least(operands: list[str]) -> None:
    """Raise CommandError where the command has nothing to look at."""
    if not operands:
        raise CommandError("Expecting one image file name", usage=True)


def is_json(output: str | None) -> bool:
    """Whether ``--output`` asks for JSON. Raises CommandError for what is neither."""
    if output is None or output == "human":
        return False
    if output == "json":
        return True
    raise CommandError("--output must be used with human or json as argument.")


def size_argument(what: str, text: str, *, low: int = 0, high: int = INT64_MAX) -> int:
    """A size in bytes given as an operand or an option's value (section 4a). Raises CommandError."""
    try:
        value = parse_size(text)
    except ValueError:
        raise _not_a_size(what) from None
    if not low <= value <= high:
        raise CommandError(f"Invalid {what} specified. Must be between {low} and {high}.")
    return value


def _not_a_size(what: str) -> CommandError:
    return CommandError(
        f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
        "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
    )


def check_cache(mode: str, *, source: bool) -> None:
    """Raise CommandError unless `mode` is a cache mode."""
    if mode not in CACHE_MODES:
        kind = "source cache" if source else "cache"
        raise CommandError(f"Invalid {kind} option: {mode}")


class OptionList:
    """The ``-o`` arguments of a command, joined (section 6)."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, text: str) -> None:
        """One more ``-o``. Raises CommandError for a list that starts or ends with a separator."""
        trailing = len(text) - len(text.rstrip(","))
        if not text or text.startswith(",") or trailing % 2:
            raise CommandError(f"Invalid option list: {text}")
        self._texts.append(text)

    @property
    def wants_help(self) -> bool:
        """Whether any element of any list is ``help`` or ``?``."""
        return any(value is None and name in ("help", "?") for name, value in self._elements())

    def pairs(self) -> list[tuple[str, str]]:
        """(name, text) of each element; a bare ``key`` is on, a bare ``nokey`` turns ``key`` off."""
        pairs = []
        for name, value in self._elements():
            if value is None:
                name, value = (name[2:], "off") if name.startswith("no") else (name, "on")
            pairs.append((name, value))
        return pairs

    def _elements(self) -> list[tuple[str, str | None]]:
        return split_pairs(",".join(self._texts))


def print_creation_options(session: Session, format: str, name: str | None) -> None:
    """The table of ``-o help``: of the format, or with a target's `name` of its protocol too."""
    from qimg.cli.render_text import option_table
    from qimg.jobs.create import creation_options

    options = creation_options(format, name, context=session.context)
    session.console.out(option_table(options, None if name is not None else format))


def snapshot_parameter(session: Session, text: str) -> SnapshotParam:
    """The argument of ``convert -l``. Raises CommandError.

    ``snapshot.id=..,snapshot.name=..`` when it starts with ``snapshot.``, else an id or a name."""
    from qimg.jobs.convert import SnapshotParam

    if not text.startswith("snapshot."):
        return SnapshotParam(id_or_name=text)
    chosen: dict[str, str] = {}
    for name, value in split_pairs(text):
        if value is None:
            name, value = warn_short_form(session, name)
        if name not in ("snapshot.id", "snapshot.name"):
            raise CommandError(f"Invalid parameter '{name}'", f"Failed in parsing snapshot param '{text}'")
        chosen[name] = value
    return SnapshotParam(id=chosen.get("snapshot.id"), name=chosen.get("snapshot.name"))


def warn_short_form(session: Session, name: str) -> tuple[str, str]:
    """What an element without ``=`` means; says that it had better be written out."""
    bare, value = (name[2:], "off") if name.startswith("no") else (name, "on")
    session.console.warning(
        f"short-form boolean option '{name}' deprecated", f"Please use {bare}={value} instead"
    )
    return bare, value


def image_spec(
    text: str, *, format: str | None, image_opts: bool, cache: str = "writeback", force_share: bool = False
) -> ImageSpec:
    """One image operand. Raises OptionError where a format is forced on an option string."""
    from qimg.graph.open import ImageSpec

    if image_opts and format is not None:
        raise OptionError(EXCLUSIVE_FORMAT)
    return ImageSpec(text, format=format, image_opts=image_opts, cache=cache, force_share=force_share)


def for_each(session: Session, operands: list[str], work: Callable[[str], int]) -> int:
    """Do `work` for every image, whatever becomes of the others; the worst exit code."""
    if len(operands) == 1:
        return work(operands[0])
    worst = 0
    for operand in operands:
        try:
            code = work(operand)
        except (CommandError, Leave):
            raise
        except Exception as error:  # noqa: BLE001  the other images still count
            show_failure(session.console, error)
            code = 1
        worst = _worse(worst, code)
    return worst


def _worse(one: int, other: int) -> int:
    """Of two exit codes the one that tells of more trouble: 1 (failed), 2 (corrupt), 3 (leaks), 63, 0."""
    order = (0, 63, 3, 2, 1)
    return max(one, other, key=order.index)
