"""Options of a qcow2 image that can be changed (sheet, section 17)."""

from __future__ import annotations

from qimg.formats.keyslots import slot_options
from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.options import Option

_AS_CREATED = (
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
)

AMEND_OPTIONS: tuple[Option, ...] = (
    *(option for option in CREATE_OPTIONS if option.name in _AS_CREATED),
    *slot_options("encrypt."),
)
