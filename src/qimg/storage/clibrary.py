"""C libraries that are used where they are found: loaded at run time, with the types of their functions."""

from __future__ import annotations

import ctypes
import ctypes.util

from qimg.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Signature = tuple[Any, ...]  # the result's type, then the arguments'


def load(name: str, version: str, package: str, functions: dict[str, Signature]) -> ctypes.CDLL:
    """The library ``lib<name>.so``, of `version` if that is there, with typed `functions`.

    Raises NotSupported, which names Debian's `package`, where it is missing or lacks one of them."""
    message = f"This needs the library lib{name} (Debian: apt-get install {package})"
    for file in (f"lib{name}.so.{version}", ctypes.util.find_library(name)):
        if file is None:
            continue
        try:
            library = ctypes.CDLL(file, use_errno=True)
            for function, (result, *arguments) in functions.items():
                getattr(library, function).restype = result
                getattr(library, function).argtypes = arguments
        except (OSError, AttributeError):
            continue
        return library
    raise NotSupported(message)


def address(view: memoryview) -> ctypes.Array[ctypes.c_char]:
    """`view`, writable or not, as an argument of type ``c_void_p``; it must outlive the call."""
    if view.readonly:
        return (ctypes.c_char * len(view)).from_buffer_copy(view)
    return (ctypes.c_char * len(view)).from_buffer(view)
