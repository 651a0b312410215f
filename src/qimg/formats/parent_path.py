"""What Microsoft's differencing images name as their parents: paths of the machine that made them."""

from __future__ import annotations


def plain_file(relative: str, *absolute: str) -> str:
    """The file to look for, relative to the image's folder: the relative path, else the last part of an
    absolute one, for its folders are another machine's. Empty where nothing is named; never a protocol."""
    name = relative.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    for path in absolute:
        name = name or path.replace("\\", "/").rsplit("/", 1)[-1]
    # What looks like a protocol or a drive letter is a name.
    return f"./{name}" if ":" in name else name
