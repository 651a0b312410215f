"""resize: a larger disk (qimg only; the real program has none for vhdx).

The size is one item of the metadata, and changes through the log. Before, the BAT gets words for the new
blocks, which nobody looks at yet; where its region is too short it moves behind the blocks, by one write of
the region table, while the copy of the table still tells of the old one.
"""

from __future__ import annotations

from array import array

from qimg.errors import LimitError, NotSupported
from qimg.extent import MAPPED
from qimg.formats.vhdx.bat import WORD
from qimg.formats.vhdx.metadata import LEAVE_ALLOCATED, Metadata
from qimg.formats.vhdx.structs import LOG_SECTOR, MAX_SIZE, MIB, PRESENT, REGION_TABLES, ZEROED
from qimg.units import SECTOR, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.vhdx.bat import Bat
    from qimg.formats.vhdx.image import VhdxImage

_STEP = 1 << 16


def grow(image: VhdxImage, size: int, preallocation: str) -> None:
    """Give the disk `size` bytes, rounded up to sectors. Raises NotSupported, LimitError, StorageError."""
    if preallocation != "off":
        raise NotSupported(f"Unsupported preallocation mode: {preallocation}")
    size = round_up(int(size), SECTOR)
    if size < image.size:
        raise NotSupported("Shrinking images is currently not supported")
    if size > MAX_SIZE:
        raise LimitError("Image size too large; max of 64TB")
    if size == image.size:
        return
    image.begin()
    image.flush()
    old = image.metadata
    new = Metadata(old.block_size, old.flags, size, old.size_at)
    if new.words * WORD > image.regions.bat.length:
        _move_bat(image, new.words * WORD)
    _clear_tail(image)
    first = old.blocks
    image.metadata = new
    image.bat = image.open_bat(image.regions.bat.offset)
    _add_blocks(image, first)
    _set_size(image)
    image.size = size


def _clear_tail(image: VhdxImage) -> None:
    """The bytes of the last block behind the disk's end, which come to light."""
    rest = -image.size % image.cluster_size
    last = image.bat.blocks - 1
    if not rest:
        return
    index = image.bat.index(last)
    for _at, _stop, flags, host in image.code.runs(image.bat.words(index, index + 1)):
        if flags & MAPPED and host is not None:
            end = host + image.cluster_size
            image.next_place()  # counts the whole block
            low = end - rest
            high = min(end, image.file.size)
            if low < high:
                image.file.zero(low, high - low)


def _move_bat(image: VhdxImage, needed: int) -> None:
    """A longer BAT region behind everything; the old one stays as it is."""
    length = round_up(needed, MIB)
    place = image.take_room(length)
    if place < image.file.size:
        image.file.zero(place, min(length, image.file.size - place))
    image.settle()
    old = image.regions.bat
    for at in range(0, old.length, _STEP):
        step = min(_STEP, old.length - at)
        data = image.file.read(old.offset + at, step)
        if any(data):
            image.file.write(data, place + at)
    image.file.flush()
    raw = image.regions.moved(place, length)
    for at in REGION_TABLES:
        image.file.write(raw, at)
        image.file.flush()


def _add_blocks(image: VhdxImage, first: int) -> None:
    """Words of the blocks from `first` on, durable in their places: nobody looks at them yet."""
    bat, block = image.bat, image.cluster_size
    fixed = image.metadata.flags & LEAVE_ALLOCATED
    for number, _table, low, high in bat.pieces(first, bat.blocks):
        count = high - low
        words = array("Q", [ZEROED]) * count
        if fixed:
            host = image.place(number, count)[0] | PRESENT
            words = array("Q", range(host, host + count * block, block))
        bat.put(low, words)
        if number:
            _clear_bitmap_word(bat, number)
        if bat.staged > _STEP:
            bat.write()
    image.settle()
    bat.write()
    image.file.flush()


def _clear_bitmap_word(bat: Bat, number: int) -> None:
    """The word of the sector bitmap before a block that begins a chunk."""
    if number % bat.ratio == 0:
        bat.put(bat.index(number) - 1, array("Q", [0]))


def _set_size(image: VhdxImage) -> None:
    """The item of the metadata, through the log: it may lie on two sectors."""
    at, value = image.metadata.size_at, image.metadata.size.to_bytes(8, "little")
    start = round_down(at, LOG_SECTOR)
    length = round_up(at + len(value), LOG_SECTOR) - start
    raw = bytearray(image.file.read(start, length))
    raw[at - start : at - start + len(value)] = value
    image.journal.commit(
        [(start + first, bytes(raw[first : first + LOG_SECTOR])) for first in range(0, length, LOG_SECTOR)]
    )
