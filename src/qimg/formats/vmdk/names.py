"""Names of extent files (vmdk sheet 3.2)."""

from __future__ import annotations


def base_name(path: str) -> str:
    """`path` without its folders: behind the last ``/``, else the last backslash, else the last ``:``."""
    return path[_cut(path) :]


def _cut(path: str) -> int:
    for mark in "/\\:":
        at = path.rfind(mark)
        if at >= 0:
            return at + 1
    return 0


def flat_name(path: str) -> str:
    """The extent file of a flat image called `path`."""
    return _numbered(path, "-flat")


def split_name(path: str, letter: str, number: int) -> str:
    """The extent file number `number` (from 1 on) of a split image; `letter` is ``s`` or ``f``."""
    return _numbered(path, f"-{letter}{number:03d}")


def _numbered(path: str, middle: str) -> str:
    cut = _cut(path)
    name = path[cut:]
    dot = name.rfind(".")
    if dot < 0:
        dot = len(name)
    return f"{path[:cut]}{name[:dot]}{middle}{name[dot:]}"
