"""``-T``: which events of a run to report on stderr, or into a file (common sheet, section 1)."""

from __future__ import annotations

import os
import time

from qimg.cli.common import Leave
from qimg.errors import QimgError
from qimg.options import split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.cli.console import Console

#: What can be traced. The names of qimg's own events: those of qemu-img are about its insides.
EVENTS = ("qimg_command_begin", "qimg_command_end")


class Trace:
    """The events that are on, and where they go."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._enabled: set[str] = set()
        self._path: str | None = None
        self._file: int | None = None
        self._started = time.monotonic()

    def add(self, text: str) -> bool:
        """One ``-T`` argument. True: it asked for the list of events, which is printed.

        Raises QimgError, Leave."""
        chosen = self._parse(text)
        pattern = chosen.get("enable")
        if pattern in ("help", "?"):
            self._console.out("".join(f"{name}\n" for name in EVENTS))
            return True
        if pattern is not None:
            self._enable(pattern, "")
        if "events" in chosen:
            self._read_events(chosen["events"])
        self._path = chosen.get("file", self._path)
        return False

    def _parse(self, text: str) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for place, (name, value) in enumerate(split_pairs(text)):
            if value is None and place == 0:
                name, value = "enable", name
            elif value is None and name in ("help", "?"):
                name, value = "enable", "help"
            elif value is None:
                bare, value = (name[2:], "off") if name.startswith("no") else (name, "on")
                self._console.warning(
                    f"short-form boolean option '{name}' deprecated", f"Please use {bare}={value} instead"
                )
                name = bare
            if name not in ("enable", "events", "file"):
                raise QimgError(f"Invalid parameter '{name}'")
            chosen[name] = value
        return chosen

    def _enable(self, pattern: str, where: str) -> None:
        """Switch events on, or off where `pattern` starts with a dash; `where` precedes a complaint."""
        name = pattern.removeprefix("-")
        if "*" in name or "?" in name:
            from fnmatch import fnmatchcase

            matching = {event for event in EVENTS if fnmatchcase(event, name)}
        elif name in EVENTS:
            matching = {name}
        elif not name:
            return
        else:
            self._console.remark(f"{self._console.name}:{where} warning: trace event '{name}' does not exist")
            return
        self._enabled = self._enabled - matching if pattern.startswith("-") else self._enabled | matching

    def _read_events(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                lines = os.fsdecode(file.read(1 << 20)).splitlines()
        except OSError as error:
            self._console.remark(f"{self._console.name}:{path}: {error.strerror}")
            raise Leave(1) from error
        for number, line in enumerate(lines, start=1):
            pattern = line.strip()
            if pattern and not pattern.startswith("#"):
                self._enable(pattern, f"{path}:{number}:")

    def around(self, command: str, work: Callable[[], int]) -> int:
        """Report the begin and the end of `work`. Raises QimgError where the file cannot be opened."""
        self._open()
        self._emit("qimg_command_begin", command)
        code = work()
        self._emit("qimg_command_end", f"{command} code {code}")
        return code

    def _open(self) -> None:
        if self._path is None:
            return
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise QimgError(f"Error opening logfile {self._path}: {error.strerror}") from error

    def _emit(self, event: str, detail: str) -> None:
        """Report `event`, if it is on: its name, the seconds since ``-T`` was read, and `detail`."""
        if event not in self._enabled:
            return
        line = f"{event} {time.monotonic() - self._started:.6f} {detail}"
        if self._file is None:
            self._console.remark(line)
            return
        try:
            os.write(self._file, os.fsencode(line + "\n"))
        except OSError:
            self._file = None
