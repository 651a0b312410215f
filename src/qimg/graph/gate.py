"""Who may open what an image names: a policy object that is asked before every implicit open.

An image file comes from anywhere, yet its header can name a backing file or a data file. The gate is asked
with the storage's driver, its file name and the image that names it. It is never asked for what the user
named.
"""

from __future__ import annotations

import os

from qimg.errors import GateError


class Gate:
    """Lets everything through; subclasses refuse. The default of the command line."""

    def check(self, driver: str, filename: str, named_by: str) -> None:
        """Raise GateError unless `named_by` may make us open `filename` through the protocol `driver`."""


class Closed(Gate):
    """Nothing that an image names is opened."""

    def check(self, driver: str, filename: str, named_by: str) -> None:
        raise GateError(f"'{named_by}' names '{filename}', and opening what an image names is not allowed")


class Inside(Gate):
    """Only regular files inside the given directories (and those below them), symbolic links resolved."""

    def __init__(self, *directories: str) -> None:
        self._roots = [os.path.realpath(directory) for directory in directories]

    def check(self, driver: str, filename: str, named_by: str) -> None:
        if driver == "file" and "\0" not in filename:
            place = os.path.realpath(filename)
            if any(os.path.commonpath((root, place)) == root for root in self._roots):
                return
        raise GateError(f"'{named_by}' names '{filename}', which is outside the allowed directories")


OPEN = Gate()
CLOSED = Closed()
