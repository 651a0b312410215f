"""Options of a qcow2 image that can be changed (sheet, section 17)."""

from __future__ import annotations

from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.options import NUM, STR, Option

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
    Option("encrypt.state", STR, None, "LUKS: make the chosen key slots 'active' or 'inactive'"),
    Option("encrypt.keyslot", NUM, None, "LUKS: the key slot to change, 0 to 7"),
    Option("encrypt.old-secret", STR, None, "LUKS: the key slots that this secret opens"),
    Option("encrypt.new-secret", STR, None, "LUKS: the secret to put into the key slot"),
    Option("encrypt.iter-time", NUM, None, "LUKS: time to spend on deriving a key, in milliseconds"),
)
