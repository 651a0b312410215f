"""What a check finds, on its way from the format to the user.

A finding is one line of text. Most are told as they are; an `ErrorFinding` is one that the command line
shows under the program's name, as it shows errors.
"""

from __future__ import annotations


class ErrorFinding(str):
    """A finding that is an error of the check itself."""

    __slots__ = ()
