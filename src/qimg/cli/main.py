"""The program: finds the command, imports that one module, and turns whatever happens into an exit code."""

from __future__ import annotations

import os
import sys

from qimg import __version__
from qimg.cli import signals
from qimg.cli.common import CommandError, Leave, Session, show_failure, usage_failure
from qimg.cli.console import Console, guard_descriptors
from qimg.cli.getopt import Getopt, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.cli.trace import Trace

#: The release of qemu-img whose command line and output this is; callers compare it with what they need.
COMPATIBLE = "10.0.0"

# name -> "module:function" taking (session, words) and returning the exit code.
COMMANDS: dict[str, str] = {
    "amend": "qimg.cli.cmd_amend:run",
    "bench": "qimg.cli.cmd_bench:run",
    "bitmap": "qimg.cli.cmd_bitmap:run",
    "check": "qimg.cli.cmd_check:run",
    "commit": "qimg.cli.cmd_commit:run",
    "compare": "qimg.cli.cmd_compare:run",
    "convert": "qimg.cli.cmd_convert:run",
    "create": "qimg.cli.cmd_create:run",
    "dd": "qimg.cli.cmd_dd:run",
    "info": "qimg.cli.cmd_info:run",
    "map": "qimg.cli.cmd_map:run",
    "measure": "qimg.cli.cmd_measure:run",
    "rebase": "qimg.cli.cmd_rebase:run",
    "resize": "qimg.cli.cmd_resize:run",
    "snapshot": "qimg.cli.cmd_snapshot:run",
}


def main(argv: list[str] | None = None) -> int:
    """Run the program with `argv` (program name first; default: the process's); the exit code.

    Never raises, never prints a traceback (QIMG_DEBUG=1 shows it)."""
    words = list(sys.argv if argv is None else argv)
    guard_descriptors()
    signals.set_defaults()
    console = Console(program_name(words[0] if words else ""))
    code = _guard(console, 1, _start, console, words)
    console.flush()
    return code


def entry() -> None:
    """What ``bin/qimg`` and ``python -m qimg`` do: run, and end the process at once.

    Everything is written by then. The interpreter's own way out takes a tenth of the time of a short
    command, and would end with 120 where stdout is closed."""
    os._exit(main())


def program_name(path: str) -> str:
    """What the program calls itself: the name it was called by, but `qimg` when Python runs it by module."""
    name = os.path.basename(path)
    return "qimg" if name in ("", "-c", "-m", "__main__.py") else name


def version_text(name: str) -> str:
    """The two lines of ``--version``. Called as qemu-img, callers get a first line that they can parse."""
    if name == "qemu-img":
        first = f"qemu-img version {COMPATIBLE} (qimg {__version__})"
    else:
        first = f"qimg version {__version__} (compatible with qemu-img {COMPATIBLE})"
    return f"{first}\nCopyright (c) 2025-2026 the qimg authors\n"


def _guard(console: Console, failure: int, work: Callable[..., int], *arguments: object) -> int:
    """Call `work`; any exception becomes one line (with its hint) and an exit code, `failure` unless it
    says otherwise."""
    try:
        return work(*arguments)
    except Leave as leave:
        return leave.code
    except CommandError as error:
        for line in error.lines:
            console.error(line)
        if error.usage:
            console.remark(console.usage_hint)
        return error.code or (1 if error.usage else failure)
    except Exception as error:  # noqa: BLE001  one line, whatever it is
        show_failure(console, error)
    return failure


def _start(console: Console, words: list[str]) -> int:
    """Global options, then the command."""
    program = words[0] if words and program_name(words[0]) == os.path.basename(words[0]) else console.name
    parser = Getopt(
        words[1:], "hVT:", {"help": "h", "version": "V", "trace=": "T"}, before=program, stop=True
    )
    trace: Trace | None = None
    try:
        for key, value in parser:
            if key == "h":
                _print_help(console)
                return 0
            if key == "V":
                console.out(version_text(console.name))
                return 0
            trace = trace or _make_trace(console)
            if trace.add(value):
                return 0
    except UsageError as error:
        raise usage_failure(None, error) from None
    if not parser.operands:
        raise CommandError("Not enough arguments", usage=True)
    command, arguments = parser.operands[0], parser.operands[1:]
    if trace is None:
        return _run_command(console, command, arguments)
    return trace.around(command, lambda: _run_command(console, command, arguments))


def _print_help(console: Console) -> None:
    from qimg.cli.helptext import usage

    console.out(usage(console.name, None))


def _make_trace(console: Console) -> Trace:
    from qimg.cli.trace import Trace

    return Trace(console)


def _run_command(console: Console, command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise CommandError(f"Command not found: {command}", usage=True)
    module_name, _, function = COMMANDS[command].partition(":")
    module = __import__(module_name, fromlist=[function])
    failure: int = getattr(module, "FAILURE", 1)
    return _guard(console, failure, getattr(module, function), Session(console, command), arguments)
