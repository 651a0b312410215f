"""From a file to an image: which kind of vmdk it is (vmdk sheet 1-5)."""

from __future__ import annotations

from qimg.errors import FormatError
from qimg.formats.vmdk import descriptor as text
from qimg.formats.vmdk.header import parse_cowd, parse_sparse
from qimg.formats.vmdk.image import VmdkImage
from qimg.formats.vmdk.place import DescriptorPlace
from qimg.formats.vmdk.sparse import SparsePart
from qimg.formats.vmdk.structs import COWD, KDMV, SparseHeader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.vmdk.header import Geometry
    from qimg.storage.base import Storage

#: Longest magic; a file that is shorter is nothing.
_SMALLEST = 4


def open_image(file: Storage, *, writable: bool) -> VmdkImage:
    """The image in `file`; its `files` are still to be attached. Raises FormatError, UnsupportedFeature,
    StorageError."""
    if file.size < _SMALLEST:
        raise FormatError("File is too small, not a valid image", file=file.name)
    magic = bytes(file.read(0, _SMALLEST))
    if magic == KDMV:
        return _open_sparse(file, writable=writable)
    if magic == COWD:
        place = DescriptorPlace.embedded(file)
        found = place.parse(extents=False)
        found.create_type = "vmfsSparse"
        image = VmdkImage(file, found, place, writable=writable)
        image.set_parts([_make(file, parse_cowd(file), "", writable, image.backing is not None)])
        return image
    place = DescriptorPlace(file, 0, None)
    return _open_text(file, place, writable=writable)


def _open_text(file: Storage, place: DescriptorPlace, *, writable: bool) -> VmdkImage:
    image = VmdkImage(file, place.parse(extents=True), place, writable=writable)
    image.expect_files()
    return image


def _open_sparse(file: Storage, *, writable: bool) -> VmdkImage:
    first = SparseHeader.unpack(bytes(file.read(0, SparseHeader.SIZE)))
    place = DescriptorPlace.embedded(file, first)
    if not first.capacity and first.descriptor_offset:
        # Only text, as ESX writes it, unless it describes this very file: then the disk has no bytes.
        found = place.parse(extents=False)
        if found.create_type not in (text.MONOLITHIC_SPARSE, text.STREAM):
            return _open_text(file, place, writable=writable)
    _header, geometry = parse_sparse(file, writable=writable)
    found = place.parse(extents=False)
    found.create_type = text.STREAM if geometry.compressed else text.MONOLITHIC_SPARSE
    image = VmdkImage(file, found, place, writable=writable)
    image.set_parts([_make(file, geometry, "", writable, image.backing is not None)])
    return image


def sparse_part(file: Storage, *, kind: str, writable: bool, covered: bool) -> SparsePart:
    """An extent that a descriptor names: hosted sparse or COWD. Raises FormatError, UnsupportedFeature."""
    if file.size >= _SMALLEST and bytes(file.read(0, _SMALLEST)) == COWD:
        return _make(file, parse_cowd(file), kind, writable, covered)
    header, geometry = parse_sparse(file, writable=writable)
    if not header.capacity:
        raise FormatError("An extent without sectors", file=file.name, field="header.capacity")
    return _make(file, geometry, kind, writable, covered)


def _make(file: Storage, geometry: Geometry, kind: str, writable: bool, covered: bool) -> SparsePart:
    if geometry.compressed:
        from qimg.formats.vmdk.stream import StreamPart

        return StreamPart(file, geometry, kind=kind, writable=writable, covered=covered)
    return SparsePart(file, geometry, kind=kind, writable=writable, covered=covered)
