"""Every storage by protocol name. Adding one is one line in STORAGES (and one in PREFIXES for each
further name prefix). Modules are imported on first use.
"""

from __future__ import annotations

from qimg.errors import NotSupported, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.base import Storage

# name -> "module:class"; None: known by name, not written yet.
STORAGES: dict[str, str | None] = {
    "az": "qimg.storage.s3:Az",
    "blkdebug": "qimg.storage.filters.blkdebug:BlkDebug",
    "blklogwrites": "qimg.storage.filters.blklogwrites:BlkLogWrites",
    "blkreplay": None,
    "blkverify": "qimg.storage.filters.blkverify:BlkVerify",
    "compress": "qimg.storage.filters.layered:Compress",
    "copy-before-write": None,
    "copy-on-read": "qimg.storage.filters.layered:CopyOnRead",
    "file": "qimg.storage.posix:PosixFile",
    "ftp": "qimg.storage.ftp:FtpFile",
    "ftps": "qimg.storage.ftp:FtpsFile",
    "gluster": None,
    "gs": "qimg.storage.s3:Gs",
    "host_cdrom": None,
    "host_device": "qimg.storage.device:HostDevice",
    "http": "qimg.storage.http:HttpFile",
    "https": "qimg.storage.http:HttpsFile",
    "iscsi": "qimg.storage.iscsi:Iscsi",
    "iser": "qimg.storage.iscsi:Iser",
    "nbd": "qimg.storage.nbd.storage:NbdStorage",
    "nfs": "qimg.storage.nfs:Nfs",
    "null-aio": "qimg.storage.null:NullAio",
    "null-co": "qimg.storage.null:NullCo",
    "nvme": None,
    "preallocate": "qimg.storage.filters.preallocate:Preallocate",
    "quorum": "qimg.storage.filters.quorum:Quorum",
    "rbd": "qimg.storage.rbd:Rbd",
    "replication": None,
    "s3": "qimg.storage.s3:S3",
    "snapshot-access": None,
    "ssh": "qimg.storage.ssh:SshFile",
    "throttle": "qimg.storage.filters.throttle:Throttle",
    "vvfat": "qimg.storage.vvfat:VvFat",
}

# What may stand before the first colon of a file name (protocols sheet 1) -> the storage's name.
PREFIXES: dict[str, str] = {
    "az": "az",
    "blkdebug": "blkdebug",
    "blkverify": "blkverify",
    "fat": "vvfat",
    "file": "file",
    "ftp": "ftp",
    "ftps": "ftps",
    "gluster": "gluster",
    "gluster+tcp": "gluster",
    "gluster+unix": "gluster",
    "gs": "gs",
    "host_cdrom": "host_cdrom",
    "host_device": "host_device",
    "http": "http",
    "https": "https",
    "iscsi": "iscsi",
    "iser": "iser",
    "nbd": "nbd",
    "nbd+tcp": "nbd",
    "nbd+unix": "nbd",
    "nbds": "nbd",
    "nbds+unix": "nbd",
    "nfs": "nfs",
    "null-aio": "null-aio",
    "null-co": "null-co",
    "nvme": "nvme",
    "rbd": "rbd",
    "s3": "s3",
    "ssh": "ssh",
}


def protocol_of(name: str) -> str | None:
    """What stands before the first colon, None where a ``/`` comes first or there is no colon."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon and "/" not in prefix else None


_loaded: dict[str, type[Storage]] = {}


def supported() -> list[str]:
    """Names of the storages that can be opened, sorted."""
    return sorted(name for name, place in STORAGES.items() if place is not None)


def get(name: str) -> type[Storage]:
    """The storage class called `name`. Raises OptionError (no such driver), NotSupported (not written yet).

    What a class says of itself is in `Storage`: ``open_options``, ``create_options``, ``can_create``,
    ``parse(name)``, ``from_options(values, *, writable, cache, discard, context)``.
    """
    known = _loaded.get(name)
    if known is not None:
        return known
    if name not in STORAGES:
        raise OptionError(f"Unknown driver '{name}'", option="driver")
    place = STORAGES[name]
    if place is None:
        raise NotSupported(f"Protocol '{name}' is not supported yet")
    module_name, _, class_name = place.partition(":")
    module = __import__(module_name, fromlist=[class_name])
    found: type[Storage] = getattr(module, class_name)
    _loaded[name] = found
    return found
