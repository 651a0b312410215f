"""A folder of the host as a disk with a FAT file system: the protocol ``fat:`` (protocols sheet), read only.

The folder's tree is read when the disk is opened, the files' content when somebody reads it. With
SOURCE_DATE_EPOCH in the environment names are in order and times none but the files' own, in UTC and not
younger than it says, so that the same tree gives the same disk.
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

import os
import stat
import time
from bisect import bisect_right
from errno import EIO

from qimg.context import Notice
from qimg.errors import LimitError, LocationError, NotSupported, OptionError, StorageError
from qimg.options import BOOL, NUM, STR, Option
from qimg.storage import fatnames
from qimg.storage.base import Limits, Storage
from qimg.storage.fatlayout import ENTRY, geometry
from qimg.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer
    from qimg.storage.fatlayout import Geometry

    # A part of the disk: its content, or the file that has it and the length of that file.
    Content = bytes | tuple[bytes, int]

_PREFIX = "fat:"
_TYPES = (12, 16, 32)
_MAX_LABEL = 11
_LABEL = b"QEMU VVFAT "
_MAX_FILE = (1 << 31) - 1
# Attributes of directory entries.
_VOLUME, _DIRECTORY, _ARCHIVE = 0x28, 0x10, 0x20
_EPOCH_YEAR = 1980


class _Entry:
    """A file or folder that has a place: `cluster` is its first one."""

    __slots__ = ("cluster", "folder", "path", "size")

    def __init__(self, path: bytes, size: int, folder: _Folder | None) -> None:
        self.path = path
        self.size = size
        self.folder = folder
        self.cluster = 0


class _Folder:
    """A folder of the disk. `entries` is its content; `patches`: where in there the clusters of which entries
    are to be filled in, once they are known; `names`: the short names in use."""

    def __init__(self, path: bytes, parent: _Entry | None) -> None:
        self.path = path
        self.parent = parent
        self.entries = bytearray()
        self.patches: list[tuple[int, _Entry]] = []
        self.names: set[bytes] = set()


class VvFat(Storage):
    """The disk."""

    driver = "vvfat"
    fixed_size = True
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("dir", STR, None, "The folder"),
        Option("fat-type", NUM, 0, "Bits of an entry of the file allocation table: 12, 16 or 32"),
        Option("floppy", BOOL, False, "A floppy, without a partition table"),
        Option("label", STR, None, "Name of the volume"),
        Option("rw", BOOL, False, "Write changes back to the folder"),
    )
    identity: ClassVar[tuple[str, ...]] = ("fat-type", "dir", "driver", "floppy", "label", "rw")
    named = False
    #: Where bytes lie in this place says nothing.
    addressed = False

    def __init__(
        self,
        folder: str,
        *,
        fat_type: int = 0,
        floppy: bool = False,
        label: str | None = None,
        warn: Callable[[Notice], None],
    ) -> None:
        """Read the tree. Raises StorageError, LimitError, OptionError."""
        self.limits = Limits()
        self.name = _json_name({"dir": folder, "driver": self.driver})
        if fat_type not in (0, *_TYPES):
            raise OptionError("Valid FAT types are only 12, 16 and 32", option="fat-type")
        raw_label = _LABEL if label is None else os.fsencode(label)
        if len(raw_label) > _MAX_LABEL:
            raise OptionError("vvfat label cannot be longer than 11 bytes", option="label")
        layout = geometry(fat_type, floppy=floppy)
        if layout is None:
            raise OptionError("FAT32 needs more clusters than a floppy has", option="fat-type")
        tree = _Tree(folder, layout, raw_label.ljust(_MAX_LABEL), warn)
        self._size = layout.sectors * SECTOR
        self._places, self._contents = tree.parts()

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        return parse_name(name)

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        if create:
            raise NotSupported(f"Protocol driver '{cls.driver}' does not support image creation")
        folder = values.get("dir")
        if folder is None:
            raise LocationError("vvfat block driver requires a 'dir' option")
        if values.get("rw", False):
            if not writable:
                raise OptionError("Unable to set VVFAT to 'rw' when drive is read-only", option="rw")
            raise NotSupported("Writing to a folder (fat:rw:) is not supported yet")
        if writable:
            raise NotSupported("Image is read-only")
        label = values.get("label")
        new = cls(
            str(folder),
            fat_type=int(values.get("fat-type", 0)),
            floppy=bool(values.get("floppy", False)),
            label=None if label is None else str(label),
            warn=(lambda notice: None) if context is None else context.warn,
        )
        values = {**values, "driver": cls.driver}
        new.name = _json_name({name: values[name] for name in cls.identity if name in values})
        return new

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf)
        while view:
            number = bisect_right(self._places, offset) - 1
            later = self._places[number + 1] if number + 1 < len(self._places) else offset + len(view)
            step = min(len(view), later - offset)
            done = 0
            if number >= 0:
                done = _read_part(self._contents[number], view[:step], offset - self._places[number])
            view[done:step] = bytes(step - done)
            view = view[step:]
            offset += step


def _json_name(options: dict[str, Value]) -> str:
    import json

    return "json:" + json.dumps(options, ensure_ascii=False)


def parse_name(name: str) -> dict[str, Value]:
    """The options that ``fat:[floppy:][12:|16:|32:]FOLDER`` says. The words may stand anywhere, words that
    are none of these are passed over; a single letter before the last colon belongs to the folder.

    Raises LocationError."""
    if not name.startswith(_PREFIX):
        raise LocationError("File name string must start with 'fat:'")
    types = [bits for bits in _TYPES if f"{bits}:" in name]
    last = name.rfind(":")
    drive = name[last - 2 : last - 1] == ":" and name[last - 1].isascii() and name[last - 1].isalpha()
    return {
        "fat-type": types[-1] if types else 0,
        "dir": name[last - 1 :] if drive else name[last + 1 :],
        "floppy": "floppy:" in name,
        "rw": ":rw:" in name,
    }


def _read_part(content: Content, view: memoryview, at: int) -> int:
    """Read from `at` of a part on; returns how many bytes of `view` it fills."""
    if isinstance(content, bytes):
        part = content[at : at + len(view)]
        view[: len(part)] = part
        return len(part)
    path, size = content
    wanted = min(len(view), size - at)
    if wanted <= 0:
        return 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            done = 0
            while done < wanted:
                count = os.preadv(fd, [view[done:wanted]], at + done)
                if not count:
                    raise StorageError(f"'{os.fsdecode(path)}' has become shorter", errno=EIO)
                done += count
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(
            f"Could not read '{os.fsdecode(path)}': {os.strerror(error.errno or EIO)}",
            errno=error.errno or EIO,
        ) from error
    return wanted


# -- the tree


def _stamp(seconds: float) -> bytes:
    """A time of day and a date, two bytes each."""
    epoch = _source_date()
    if epoch is None:
        moment = time.localtime(seconds)
    else:
        moment = time.gmtime(min(seconds, epoch))
    clock = moment.tm_sec // 2 | moment.tm_min << 5 | moment.tm_hour << 11
    date = moment.tm_mday | moment.tm_mon << 5 | moment.tm_year - _EPOCH_YEAR << 9
    return (clock & 0xFFFF).to_bytes(2, "little") + (date & 0xFFFF).to_bytes(2, "little")


def _source_date() -> int | None:
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _entry(name: bytes, attributes: int, status: os.stat_result, size: int) -> bytes:
    """A directory entry without its cluster."""
    created, used, changed = status.st_ctime, status.st_atime, status.st_mtime
    if _source_date() is not None:
        created = used = changed
    return b"".join(
        (
            name,
            bytes((attributes, 0, 0)),
            _stamp(created),
            _stamp(used)[2:],
            bytes(2),
            _stamp(changed),
            bytes(2),
        )
    ) + size.to_bytes(4, "little")


class _Tree:
    """The folder's tree: breadth first, each member's clusters behind those of the one before."""

    def __init__(self, folder: str, layout: Geometry, label: bytes, warn: Callable[[Notice], None]) -> None:
        self._layout = layout
        self._warn = warn
        self._next = 2
        self._chains: list[tuple[int, int]] = []
        self._root = _Folder(os.fsencode(folder), None)
        self._placed: list[_Entry] = []
        self._root.entries += label + bytes((_VOLUME,)) + bytes(ENTRY - len(label) - 1)
        self._read_all(folder)

    def _read_all(self, name: str) -> None:
        layout = self._layout
        waiting = self._members(self._root, name)
        if layout.root_entries and len(self._root.entries) > layout.root_entries * ENTRY:
            self._warn(Notice("Too many entries in root directory", plain=True))
            raise self._unreadable(name)
        if not layout.root_entries:
            self._place(len(self._root.entries))
        for entry in waiting:  # grows as folders are read
            if entry.folder is not None:
                entry.cluster = self._next
                waiting += self._members(entry.folder, name, entry)
                entry.size = len(entry.folder.entries)
            entry.cluster = self._place(entry.size)
            self._placed.append(entry)

    @staticmethod
    def _unreadable(name: str) -> StorageError:
        return StorageError(f"Could not read directory {name}", errno=EIO)

    def _place(self, size: int) -> int:
        """Clusters for `size` bytes. Raises LimitError."""
        first = self._next
        count = -(-size // self._layout.cluster_size)
        self._next += count
        if self._next - 1 > self._layout.last_cluster:
            raise LimitError(f"Directory does not fit in {self._layout.capacity}")
        self._chains.append((first, count))
        return first

    def _members(self, folder: _Folder, name: str, own: _Entry | None = None) -> list[_Entry]:
        """Fill `folder`; returns the members that need a place. `name`: what the whole tree is called."""
        try:
            names = os.listdir(folder.path)
            if _source_date() is not None:
                names.sort()
            if own is not None:
                self._add_dots(folder, own)
        except (OSError, ValueError):
            raise self._unreadable(name) from None
        found = [self._add(folder, member, name, own) for member in names]
        return [entry for entry in found if entry is not None]

    def _add_dots(self, folder: _Folder, own: _Entry) -> None:
        """The entries of the folder itself and of the one that it is in."""
        for name, entry in ((b".", own), (b"..", folder.parent)):
            status = os.stat(os.path.join(folder.path, name))
            if entry is not None:
                folder.patches.append((len(folder.entries), entry))
            folder.entries += _entry(name.ljust(_MAX_LABEL), _DIRECTORY, status, 0)

    def _add(self, folder: _Folder, name: bytes, whole: str, own: _Entry | None) -> _Entry | None:
        path = os.path.join(folder.path, name)
        try:
            status = os.stat(path)
        except OSError:
            return None  # a link that leads nowhere, or it is gone
        inside = stat.S_ISDIR(status.st_mode)
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        if size > _MAX_FILE:
            self._warn(Notice(f"File {os.fsdecode(path)} is larger than 2GB", plain=True))
            raise self._unreadable(whole)
        short = fatnames.short_name(name, folder.names)
        folder.names.add(short)
        try:
            folder.entries += fatnames.long_entries(name.decode(), short)
        except UnicodeDecodeError:
            self._warn(Notice(f"vvfat: invalid UTF-8 name: {os.fsdecode(name)}", plain=True))
        entry = _Entry(path, size, _Folder(path, own) if inside else None)
        if inside or size:
            folder.patches.append((len(folder.entries), entry))
        folder.entries += _entry(short, _DIRECTORY if inside else _ARCHIVE, status, size)
        return entry if inside or size else None

    # -- the disk

    def parts(self) -> tuple[list[int], list[Content]]:
        """Offsets of all parts of the disk that are not zeros, ascending, and their content."""
        layout = self._layout
        found: list[tuple[int, Content]] = list(layout.start_sectors(self._next - 2))
        table = bytes(layout.table(self._chains))
        found += [(place, table) for place in layout.fat_places]
        root = layout.root_place if layout.root_entries else layout.cluster_place(2)
        found.append((root, self._patched(self._root)))
        for entry in self._placed:
            place = layout.cluster_place(entry.cluster)
            if entry.folder is None:
                found.append((place, (entry.path, entry.size)))
            else:
                found.append((place, self._patched(entry.folder)))
        return [place for place, _ in found], [content for _, content in found]

    @staticmethod
    def _patched(folder: _Folder) -> bytes:
        """The folder's entries with the clusters that are known now."""
        for at, entry in folder.patches:
            folder.entries[at + 20 : at + 22] = (entry.cluster >> 16).to_bytes(2, "little")
            folder.entries[at + 26 : at + 28] = (entry.cluster & 0xFFFF).to_bytes(2, "little")
        return bytes(folder.entries)
