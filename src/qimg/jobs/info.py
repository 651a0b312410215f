"""info: what an image says of itself, and what it occupies."""

from __future__ import annotations

from qimg.errors import hide_passwords
from qimg.graph.disk import Disk
from qimg.graph.open import ImageSpec, backing_location, open_disk
from qimg.storage.base import Filter
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import Image, SnapshotInfo
    from qimg.graph.disk import Layer
    from qimg.storage.base import Storage

#: Protocols that do not say whether they are dirty.
_TELL_NOTHING = ("ftp", "ftps", "http", "https", "nbd", "null-aio", "null-co", "ssh", "vvfat")


class ImageInfo:
    """One image, or one protocol node below it (`is_protocol`). Sizes in bytes, None: unknown or absent.

    `format_specific` has the JSON keys in their order; `children` are (name, info)."""

    def __init__(self, filename: str, format: str, virtual_size: int) -> None:
        self.filename = hide_passwords(filename)
        self.format = format
        self.virtual_size = virtual_size
        self.actual_size: int | None = None
        self.cluster_size: int | None = None
        self.encrypted = False
        self.dirty: bool | None = None
        self.backing_filename: str | None = None
        self.full_backing_filename: str | None = None
        self.backing_format: str | None = None
        self.snapshots: list[SnapshotInfo] = []
        self.format_specific: dict[str, object] | None = None
        self.children: list[tuple[str, ImageInfo]] = []
        self.is_protocol = False


def info(spec: ImageSpec, *, backing_chain: bool = False, context: Context) -> list[ImageInfo]:
    """The image, or with `backing_chain` every image of its chain from the top.

    Needs no keys, and without `backing_chain` no backing file. Raises OpenError."""
    with open_disk(spec, context=context, backing=backing_chain, for_info=True, raw_shares_all=True) as disk:
        return [describe(layer) for layer in disk.layers]


def describe(layer: Layer) -> ImageInfo:
    """What `info` tells of one opened image."""
    image = layer.image
    found = ImageInfo(layer.filename, image.format_name, image.size)
    found.actual_size = _actual_size(image)
    if image.shows_cluster_size:
        found.cluster_size = image.cluster_size
    found.encrypted = image.encrypted
    found.dirty = image.dirty
    if image.backing is not None:
        found.backing_filename = hide_passwords(image.backing.name)
        found.backing_format = image.backing.format
        full_name = backing_location(image)
        found.full_backing_filename = None if full_name is None else hide_passwords(full_name)
    found.snapshots = image.snapshots()
    found.format_specific = image.format_specific()
    below = describe_storage(image.file)
    if image.format_name in ("raw", below.format):
        # What shows the bytes of its file as they are says of itself what the file says.
        found.cluster_size = below.cluster_size
        found.dirty = below.dirty
    for name, storage in reversed(image.attached()):
        found.children.append((name, describe_storage(storage)))
    found.children += below.children if _is_protocol(image) else [("file", below)]
    return found


def _actual_size(image: Image) -> int | None:
    """Host bytes in use by the image's file and those attached to it."""
    used = [image.file.allocated_bytes(), *(storage.allocated_bytes() for _, storage in image.attached())]
    known = [size for size in used if size is not None]
    return sum(known) if len(known) == len(used) else None


def _is_protocol(image: Image) -> bool:
    return image.format_name == image.file.driver and not isinstance(_disk_below(image.file), Disk)


def _disk_below(storage: Storage) -> object:
    """The disk that a storage shows: where an image stands on another one."""
    return getattr(storage, "disk", None)


def describe_storage(storage: Storage) -> ImageInfo:
    """What `info` tells of a protocol node, or of an image that serves as one."""
    disk = _disk_below(storage)
    if isinstance(disk, Disk):
        return describe(disk.layers[0])
    found = ImageInfo(storage.name, storage.driver, round_up(storage.size, SECTOR))
    found.is_protocol = True
    found.actual_size = storage.allocated_bytes()
    if storage.children:
        found.children = [(name, describe_storage(child)) for name, child in reversed(storage.below())]
    if isinstance(storage, Filter) and storage.children and not storage.image_children:
        through = describe_storage(storage.child)
        found.cluster_size, found.dirty = through.cluster_size, through.dirty
    elif not storage.children and storage.driver not in _TELL_NOTHING:
        found.dirty = False
    if storage.driver == "file":
        found.format_specific = {}
    return found
