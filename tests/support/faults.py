"""Faults under the whole program: files that a command opens by name get a filter on top."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qimg.storage import registry
from qimg.storage.base import Storage


@contextmanager
def opened_through(wrap: Callable[[Storage], Storage], *names: str) -> Iterator[None]:
    """While this lasts, each file with one of these base names is opened through `wrap`."""
    kind: Any = registry.get("file")

    class Wrapped(kind):  # type: ignore[misc]
        @classmethod
        def from_options(cls, values: dict[str, object], **more: object) -> Storage:
            opened: Storage = kind.from_options(values, **more)
            return wrap(opened) if os.path.basename(str(values["filename"])) in names else opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._loaded, "file", Wrapped)
        yield
