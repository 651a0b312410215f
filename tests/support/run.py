"""Runs of the two programs that tests compare: the real qemu-img and ours.

=================== ===================================================================================
run_real            the real program, as a process
run_qimg            ours as a process: slow (an interpreter start), for what only a process shows:
                    signals, locks against ourselves, exit at a closed stdout, start-up
run_qimg_inprocess  ours by calling ``qimg.cli.main.main``: quick, what most differential tests use
run_both            the real one and ours (in process) with the same words, each in its own folder
start               any program, in the background
=================== ===================================================================================

All take the words after the program's name and give a `Result`. Output is text in which undecodable bytes
survive (surrogateescape). Ours is called ``qemu-img`` by default, so that messages compare as they stand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support import peers

Word = str | bytes | os.PathLike[str]

#: Seconds after which a program counts as hanging.
TIMEOUT = 60.0


class Result(NamedTuple):
    """What a run showed: exit code (negative: killed by that signal), standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Standard output by lines."""
        return self.out.splitlines()

    def ok(self) -> Result:
        """Itself; fails the test unless the exit code is 0."""
        assert self.code == 0, f"exit {self.code}\n{self.out}{self.err}"
        return self


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Ours without what would change messages or dates between the two programs."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
    environment.pop("POSIXLY_CORRECT", None)
    # Ours starts as an installed program does: from compiled modules.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.update(extra or {})
    return environment


def _run(
    command: Sequence[Word],
    cwd: os.PathLike[str] | str | None,
    env: Mapping[str, str] | None,
    input: str | None,
    timeout: float,
) -> Result:
    done = subprocess.run(
        [os.fsencode(word) for word in command],
        cwd=cwd,
        env=_environment(env),
        input=None if input is None else os.fsencode(input),
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, _text(done.stdout), _text(done.stderr))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def run_peer(
    program: str,
    args: Sequence[Word],
    cwd: os.PathLike[str] | str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """Any peer (``qemu-io``, ``nbdkit`` ...). Skips the test where it is missing."""
    return _run([peers.need(program), *args], cwd, env, input, timeout)


def run_real(
    args: Sequence[Word],
    cwd: os.PathLike[str] | str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """The real qemu-img. Skips the test where it is missing."""
    return run_peer("qemu-img", args, cwd, env=env, timeout=timeout)


def command(prog: str = "qemu-img") -> list[str]:
    """The words that start ours as a process under the name `prog`, with the interpreter of the tests."""
    start = f"import sys; sys.argv[0] = {prog!r}; from qimg.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", start]


def run_qimg(
    args: Sequence[Word],
    cwd: os.PathLike[str] | str | None = None,
    *,
    prog: str = "qemu-img",
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """Ours as a process of its own."""
    return _run([*command(prog), *args], cwd, env, None, timeout)


def run_qimg_inprocess(
    args: Sequence[Word],
    cwd: os.PathLike[str] | str | None = None,
    *,
    prog: str = "qemu-img",
    env: Mapping[str, str] | None = None,
) -> Result:
    """Ours inside this process: output is caught at the descriptors, so nothing escapes.

    An exception that leaves ``main`` (a traceback to a user) is raised here and fails the test.
    """
    from qimg.cli.main import main

    words = [os.fsdecode(word) for word in args]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _settings(prog, words, cwd, env), _captured(out.fileno(), err.fileno()):
            try:
                code = _exit_code(main())
            except SystemExit as stop:
                code = _exit_code(stop.code)
        out.seek(0)
        err.seek(0)
        return Result(code, _text(out.read()), _text(err.read()))


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    return code if isinstance(code, int) else 1


@contextmanager
def _settings(
    prog: str, words: list[str], cwd: os.PathLike[str] | str | None, env: Mapping[str, str] | None
) -> Iterator[None]:
    """argv, folder, environment and signal handlers for a call of ``main``, put back afterwards."""
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in handled}
    argv, folder, environment = sys.argv, os.getcwd(), dict(os.environ)
    sys.argv = [prog, *words]
    wanted = _environment(env)
    os.environ.update(wanted)
    for name in environment.keys() - wanted.keys():
        del os.environ[name]
    if cwd is not None:
        os.chdir(cwd)
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(folder)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _captured(out: int, err: int) -> Iterator[None]:
    """Descriptors 1 and 2, and Python's streams on them, lead to `out` and `err` for a while."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = streams
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])


class Both(NamedTuple):
    """The same words through both programs: `real` and `ours`, run in the folders `real_dir`, `our_dir`."""

    real: Result
    ours: Result
    real_dir: Path
    our_dir: Path


def run_both(args: Sequence[Word], real_dir: Path, our_dir: Path) -> Both:
    """The same words through the real program in `real_dir` and ours in `our_dir`.

    Use relative file names, and folders of the same content; names then compare as they stand. For
    commands that write nothing the two folders may be the same.
    """
    return Both(run_real(args, real_dir), run_qimg_inprocess(args, our_dir), real_dir, our_dir)


def start(words: Sequence[str], **pipes: int) -> subprocess.Popen[bytes]:
    """A program that goes on in the background, and that ends with this process however that ends: some of
    those that tests start would run for hours."""
    tied = ["setpriv", "--pdeathsig", "KILL", *words]
    return subprocess.Popen(tied, **pipes)  # type: ignore[call-overload, no-any-return]
