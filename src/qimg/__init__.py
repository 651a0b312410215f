"""qimg: virtual disk images - create, convert, compare, check, inspect. The library.

>>> import qimg
>>> qimg.create("disk.qcow2", format="qcow2", size=1 << 20)
>>> with qimg.open("disk.qcow2") as disk:
...     disk.size, disk.read(0, 4)
(1048576, b'\\x00\\x00\\x00\\x00')

Functions take and return values, print nothing, and raise only `QimgError` and its subclasses (plus what
Python raises for wrong types). The command line stands on the same jobs. Names load when first used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.api import Disk as Disk
    from qimg.api import DiskFile as DiskFile
    from qimg.api import add_bitmap as add_bitmap
    from qimg.api import amend as amend
    from qimg.api import apply_snapshot as apply_snapshot
    from qimg.api import bench as bench
    from qimg.api import bitmaps as bitmaps
    from qimg.api import change_bitmap as change_bitmap
    from qimg.api import check as check
    from qimg.api import commit as commit
    from qimg.api import compare as compare
    from qimg.api import convert as convert
    from qimg.api import create as create
    from qimg.api import create_snapshot as create_snapshot
    from qimg.api import dd as dd
    from qimg.api import delete_snapshot as delete_snapshot
    from qimg.api import info as info
    from qimg.api import map as map
    from qimg.api import measure as measure
    from qimg.api import open as open
    from qimg.api import rebase as rebase
    from qimg.api import remove_bitmap as remove_bitmap
    from qimg.api import resize as resize
    from qimg.api import snapshots as snapshots
    from qimg.errors import Cancelled as Cancelled
    from qimg.errors import CorruptImage as CorruptImage
    from qimg.errors import FormatError as FormatError
    from qimg.errors import GateError as GateError
    from qimg.errors import LimitError as LimitError
    from qimg.errors import LocationError as LocationError
    from qimg.errors import LockError as LockError
    from qimg.errors import NotSupported as NotSupported
    from qimg.errors import OpenError as OpenError
    from qimg.errors import OptionError as OptionError
    from qimg.errors import QimgError as QimgError
    from qimg.errors import StorageError as StorageError
    from qimg.errors import UnsupportedFeature as UnsupportedFeature

__version__ = "0.1.0"

_API = (
    "Disk",
    "DiskFile",
    "add_bitmap",
    "amend",
    "apply_snapshot",
    "bitmaps",
    "change_bitmap",
    "bench",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "create_snapshot",
    "dd",
    "delete_snapshot",
    "info",
    "map",
    "measure",
    "open",
    "rebase",
    "remove_bitmap",
    "resize",
    "snapshots",
)
_ERRORS = (
    "Cancelled",
    "CorruptImage",
    "FormatError",
    "GateError",
    "LimitError",
    "LocationError",
    "LockError",
    "NotSupported",
    "OpenError",
    "OptionError",
    "QimgError",
    "StorageError",
    "UnsupportedFeature",
)

__all__ = [*_API, *_ERRORS]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _API:
        module = "qimg.api"
    elif name in _ERRORS:
        module = "qimg.errors"
    else:
        raise AttributeError(f"module 'qimg' has no attribute {name!r}")
    value: object = getattr(__import__(module, fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
