"""Growing parallels images (qimg only; parallels sheet, section 1).

The table is followed by the data. Where a longer one needs the room of the first clusters, they move::

    clusters        copied to the end
    barrier
    table           says where they are now
    barrier
    file's length   the new data area lies inside the file
    barrier
    data offset     in the header
    barrier
    new entries     zeros; the header does not tell of them yet
    barrier
    header          one write: size, entries, closed
"""

from __future__ import annotations

from array import array

from qimg.formats.parallels.structs import WORD, Header
from qimg.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.parallels.image import ParallelsImage


def grow(image: ParallelsImage, size: int) -> None:
    """Give the image `size` bytes, not less than it has. Raises LimitError, NotSupported, StorageError."""
    header = image.header
    image.begin()
    image.clear_end()
    _forget_behind(image)
    image.settle()
    entries = max(-(-size // image.cluster_size), header.bat_entries)
    end = Header.SIZE + WORD * entries
    if end > header.data_start():
        _make_room(image, round_up(end, image.cluster_size if header.is_v2 else SECTOR))
    image.levels()[0][0].write()
    if entries > header.bat_entries:
        image.file.zero(header.table_end, end - header.table_end, unmap=False)
    image.file.flush()
    image.survey()
    image.trim()
    header.bat_entries = entries
    header.set_size(size)
    image.switch()


def _forget_behind(image: ParallelsImage) -> None:
    """Stage that there is nothing behind the disk's end, where the table is longer than the disk."""
    bat = image.levels()[0][0]
    first = -(-image.size // image.cluster_size)
    for number, table, low, high in image.pieces(first, image.header.bat_entries, create=False):
        if any(table.words(low, high)):
            bat.put(number, array("I", bytes(WORD * (high - low))))


def _make_room(image: ParallelsImage, start: int) -> None:
    """Move the clusters that begin before `start`; data begins there then."""
    image.survey(start)
    for number, word in image.words():
        host = image.code.host(word)
        if host < start:
            place, _count = image.place(number, 1)
            image.copy_cluster(host, place)
            image.levels()[0][0].put(number, array("I", [image.code.word(place)]))
    image.settle()
    image.file.flush()
    image.levels()[0][0].write()
    image.file.flush()
    if not image.file.fixed_size and image.file.size < start:
        image.file.resize(start)
        image.file.flush()
    image.header.data_offset = start // SECTOR
    image.file.write(image.header.data_offset.to_bytes(4, "little"), Header.offset_of("data_offset"))
    image.file.flush()
