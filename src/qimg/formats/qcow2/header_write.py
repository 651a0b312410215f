"""Putting another header in the place of the one that an image has (sections 2 and 3).

A disk writes single sectors whole, but not the sectors of a request together; and what the first sector leads
to, extensions and the backing file's name, goes on behind it. So where more than the first sector changes,
it leads to nothing behind it in the meantime: a bridge without feature names, which nobody needs, with the
name at a place that neither header uses. At any moment the image has its old header or its new one.
"""

from __future__ import annotations

from qimg.formats.qcow2.header import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.formats.qcow2.header import ParsedHeader
    from qimg.storage.base import Storage

_SECTOR = 512


def write_header(file: Storage, header: ParsedHeader) -> None:
    """Make `header` the image's. Durable when it returns.

    Raises LimitError where it does not fit, before any change; StorageError."""
    new = header.pack()
    old = bytes(file.read(0, len(new)))
    end = _end(new, old)
    if new[_SECTOR:] == old[_SECTOR:]:
        file.write(new[:_SECTOR], 0)
        file.flush()
        return
    before = parse(file)
    name = before.backing_name or b""
    bridge = before.bridge(end)
    if bridge is None or end + len(name) > len(new):
        # No room for a bridge: the sectors have to change together.
        file.write(new[:end], 0)
        file.flush()
        return
    if name:
        file.write(name, end)
        file.flush()
    for sectors, offset in ((bridge, 0), (new[_SECTOR:end], _SECTOR), (new[:_SECTOR], 0)):
        file.write(sectors, offset)
        file.flush()
    if name:
        file.write(bytes(len(name)), end)  # nothing leads there any more


def _end(new: bytes, old: bytes) -> int:
    """End of the last sector in which one of the two has anything."""
    return -(-max(len(new.rstrip(b"\0")), len(old.rstrip(b"\0"))) // _SECTOR) * _SECTOR
