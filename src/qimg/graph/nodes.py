"""Building nodes: one image (or one storage) from its location, with what its options name below it.

A node is a storage (protocol) or an image (format) on top of its child ``file``. Backing files are not
opened here but in `chain`.
"""

from __future__ import annotations

from qimg.context import Notice
from qimg.errors import LocationError, OptionError, StorageError
from qimg.formats import registry as formats
from qimg.graph.gate import OPEN
from qimg.graph.location import (
    JSON_PREFIX,
    Location,
    check_encodable,
    find_protocol,
    is_identifier,
    refuse_more,
    refuse_reference,
)
from qimg.graph.probe import PROBE_BYTES, probe
from qimg.options import parse_bool
from qimg.storage import registry as storages
from qimg.storage.base import USE_ALL, USE_READ, USE_RESIZE, USE_WRITE, USE_WRITE_UNCHANGED, Filter
from qimg.storage.handles import make_room

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qimg.context import Context
    from qimg.formats.base import Image
    from qimg.graph.disk import Disk
    from qimg.graph.gate import Gate
    from qimg.graph.jsonopts import Json
    from qimg.graph.location import Options
    from qimg.options import Option, Value
    from qimg.storage.base import Storage

    # What tells whether an image has been met before.
    Identity = tuple[object, ...]

# Who uses what and lets others do what (common sheet 11): (use, share) for `Storage.lock`.
READ_EXCLUDING_WRITERS = (USE_READ, USE_READ | USE_WRITE_UNCHANGED)
READ_SHARED = (USE_READ, USE_ALL)
NO_USE_EXCLUDING_WRITERS = (0, USE_READ | USE_WRITE_UNCHANGED)
NO_USE = (0, USE_ALL)
WRITE_EXCLUSIVE = (USE_READ | USE_WRITE | USE_RESIZE, USE_READ | USE_WRITE_UNCHANGED)
WRITE_SHARED = (USE_READ | USE_WRITE, USE_ALL)
# A raw image that may have to grow.
WRITE_RESIZING = (USE_READ | USE_WRITE | USE_RESIZE, USE_ALL & ~USE_RESIZE)
# An image that stops making sense while others write to what it stands on.
READ_ALONE = (USE_READ, USE_WRITE_UNCHANGED)
# An external data file: others may write to it (it can be a plain raw image) but not change its length.
READ_DATA_FILE = (USE_READ, USE_ALL & ~USE_RESIZE)
WRITE_DATA_FILE = (USE_READ | USE_WRITE | USE_RESIZE, USE_ALL & ~USE_RESIZE)
CREATE = (USE_WRITE | USE_RESIZE, USE_ALL & ~USE_RESIZE)

# name -> (past the page cache, every write synchronous, flushes dropped); common sheet 12.
_CACHE = {
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, True, False),
    "writethrough": (False, True, False),
    "writeback": (False, False, False),
    "unsafe": (False, False, True),
}
_CACHE_NAMES = {
    (True, False, False): "none",
    (True, True, False): "directsync",
    (False, True, False): "writethrough",
    (False, False, False): "writeback",
    (True, False, True): "direct-unsafe",
    (True, True, True): "direct-unsafe",
    (False, False, True): "unsafe",
    (False, True, True): "unsafe",
}

# Options that change what a node shows, and so have to be part of the name of a node that has them.
_SIGNIFICANT = {
    "raw": ("offset", "size"),
    "luks": ("key-secret", "header.*"),
    "qcow": ("encrypt.key-secret",),
    "qcow2": ("encrypt.key-secret",),
}

_DISCARD = {"ignore": False, "off": False, "unmap": True, "on": True}
_RAW_WARNING = """\
WARNING: Image format was not specified for '{}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be\
 restricted.
         Specify the 'raw' format explicitly to remove the restrictions."""
_MAX_NODE_NAME = 31
_DATA_FILE = "data-file"
#: Options of formats that describe a node with a part of the image: guest data, or a LUKS header.
_PARTS = (_DATA_FILE, "header")
_LOCAL = ("file", "host_device", "host_cdrom")


class Mode:
    """How a node is opened; its children inherit this, changed by their own options.

    `writable` and `force_share` as everywhere; `direct`, `sync`, `no_flush` make up the cache mode;
    `discard` lets discards through; `blocked`: a node's options forbid the writing that is wanted; `late`:
    opened for writing but locked, and told of, as if for reading: whoever writes takes the locks for that;
    `native`: files that do not say otherwise are used with the kernel's asynchronous I/O (``-n``).
    """

    __slots__ = (
        "blocked",
        "direct",
        "discard",
        "force_share",
        "late",
        "native",
        "no_flush",
        "sync",
        "writable",
    )

    def __init__(self, *, writable: bool, force_share: bool, cache: str) -> None:
        if cache not in _CACHE:
            raise OptionError(f"Invalid cache option: {cache}", option="cache")
        self.writable = writable
        self.force_share = force_share
        self.direct, self.sync, self.no_flush = _CACHE[cache]
        self.discard = True
        self.blocked = False
        self.late = False
        self.native = False

    @property
    def cache(self) -> str:
        """The cache mode's name, as storages take it."""
        return _CACHE_NAMES[self.direct, self.sync, self.no_flush]

    def copy(self) -> Mode:
        """The same for a child, to be changed."""
        new = Mode.__new__(Mode)
        for name in self.__slots__:
            setattr(new, name, getattr(self, name))
        return new

    def read_only(self) -> Mode:
        """The same for a backing file."""
        new = self.copy()
        new.writable = new.blocked = new.late = False
        return new

    def written_late(self) -> Mode:
        """The same for a backing file that will be written to."""
        new = self.read_only()
        new.writable = new.late = True
        return new

    def with_options(self, location: Location) -> Mode:
        """Take the options of access out of `location`. Raises OptionError, LocationError."""
        new = self.copy()
        read_only = take_bool(location, "read-only")
        take_bool(location, "auto-read-only")
        if read_only and new.writable:
            new.writable = False
            new.blocked = True
        force_share = take_bool(location, "force-share")
        new.force_share = new.force_share if force_share is None else force_share
        direct = take_bool(location, "cache.direct")
        new.direct = new.direct if direct is None else direct
        no_flush = take_bool(location, "cache.no-flush")
        new.no_flush = new.no_flush if no_flush is None else no_flush
        discard = location.text("discard")
        if discard in _DISCARD:
            new.discard = _DISCARD[discard]  # Wrong values are told of later, as the real program does.
        if new.force_share and (new.writable or read_only is False):
            raise LocationError("force-share=on can only be used with read-only images")
        return new


class Node:
    """One opened node.

    driver       name of its format or storage.
    storage      what it is to a node on top of it.
    image        the opened image, None for a storage.
    plain        the file name that alone would open the same, None where options are needed.
    description  the node as nested JSON options.
    guessed      its format was probed.
    location     what is left of its options: those of backing files, and unknown ones.
    name         its ``node-name``, None where it has none.
    """

    __slots__ = ("description", "driver", "guessed", "image", "location", "name", "plain", "storage")

    def __init__(
        self,
        driver: str,
        storage: Storage,
        location: Location,
        plain: str | None,
        description: dict[str, Json],
    ) -> None:
        self.driver = driver
        self.storage = storage
        self.location = location
        self.plain = plain
        self.description = description
        self.image: Image | None = None
        self.guessed = False
        self.name: str | None = None

    @property
    def filename(self) -> str:
        """What the node is called: its plain name or ``json:{...}``."""
        if self.plain is not None:
            return self.plain
        from qimg.graph import jsonopts

        return JSON_PREFIX + jsonopts.dump(self.description)

    def close(self) -> None:
        """Close all that belongs to it. Never raises."""
        (self.storage if self.image is None else self.image).close()

    def check_left(self) -> None:
        """Raise LocationError where options are left that nothing took."""
        for name in self.location.options:
            if self.image is None:
                raise LocationError(f"Block protocol '{self.driver}' doesn't support the option '{name}'")
            raise LocationError(f"Block format '{self.driver}' does not support the option '{name}'")


class Builder:
    """Opens nodes for one `open_disk`: the context, the gate, what the disk is for, names in use."""

    def __init__(
        self,
        context: Context,
        *,
        gate: Gate = OPEN,
        for_check: bool = False,
        for_info: bool = False,
        keyless: bool = False,
        open_chain: Callable[[Builder, Location, Mode, str | None], tuple[Disk, Node]] | None = None,
    ) -> None:
        """`keyless`: encrypted images need no key, for they are not read. `open_chain` opens a format node
        that serves as a child, with its backing files."""
        self.context = context
        self.gate = gate
        self.for_check = for_check
        self.for_info = for_info
        self._keyless = keyless
        self._open_chain = open_chain
        self._names: set[str] = set()
        #: Nodes that others may refer to, by ``node-name``.
        self.named: dict[str, Node] = {}
        #: An image of the disk was opened with force-share.
        self.shared = False
        #: External data files that were opened.
        self.data_files: list[Storage] = []
        # For `chain`: images on the way from the top to here, and how many chains that way is made of.
        self.path: set[Identity] = set()
        self.nesting = 0

    # -- images

    def image(self, location: Location, mode: Mode, *, named_by: str | None = None) -> Node:
        """Open the image at `location` (``json:`` already expanded). A protocol driver given explicitly
        serves as an image of its own. `named_by`: the image whose header names it, None: the user did.

        Raises QimgError subclasses without the image's name in front."""
        driver = take_driver(location)
        if driver is not None and is_protocol(driver):
            node = self.protocol(location, mode, driver, named_by)
            try:
                node.image = formats.get("raw").open(
                    node.storage, writable=mode.writable, context=self.context
                )
                node.image.format_name = driver
                node.storage.lock(*self._locks(mode, raw=True))
            except BaseException:
                node.storage.close()
                raise
            return node
        return self._format(location, mode, driver, named_by)

    def _format(self, location: Location, mode: Mode, driver: str | None, named_by: str | None) -> Node:
        mode = mode.with_options(location)
        file = self._referred(location, "file")
        if file is None:
            options = location.take_child("file")
            location.options.pop("file", None)
            if location.filename is None and not options:
                if driver is None:
                    raise LocationError("Must specify either driver or file")
                raise LocationError('A block device must be specified for "file"')
            file = self.child(Location(location.filename, options), mode, named_by)
        try:
            return self._format_on(file, location, mode, driver)
        except BaseException:
            file.storage.close()
            raise

    def _format_on(self, file: Node, location: Location, mode: Mode, driver: str | None) -> Node:
        storage = file.storage
        guessed = driver is None
        if driver is None:
            driver = probe(_head(storage), file.filename)
        storage.lock(*self._locks(mode, raw=driver == "raw"))
        format = formats.get(driver)
        significant = location.pick(_SIGNIFICANT.get(driver, ()))
        node = Node(driver, storage, location, None, describe(driver, significant, file.description))
        if not significant:
            node.plain = file.plain
        node.guessed = guessed
        if guessed and driver == "raw" and mode.writable and not mode.late:
            self.context.warn(Notice(_RAW_WARNING.format(file.filename), plain=True))
        node.name = self._finish_options(location, mode)
        options = take_typed(location, format.open_options)
        data = None
        for name in (option.name for option in format.open_options if option.name in _PARTS):
            data = self._given_part(name, location, mode)
            if data is not None:
                options[name] = True
        try:
            node.image = image = format.open(
                storage,
                writable=mode.writable,
                options=options,
                context=self.context,
                for_check=self.for_check,
                for_info=self.for_info or self._keyless,
            )
            if guessed and driver == "raw" and mode.writable:
                image.guard_first_sector(_probe_content)  # type: ignore[attr-defined]
            self._attach(image, data, mode)
            if image.files:
                self._attach_files(image, location, mode)
            if mode.blocked:
                raise LocationError("Block node is read-only")
        except BaseException:
            if data is not None:
                data.storage.close()
            if node.image is not None:
                node.image.close()
            raise
        return node

    def _attach_files(self, image: Image, location: Location, mode: Mode) -> None:
        """Open the further files that the image names: plain files, never what looks like a protocol; options
        ``extents.N`` may say how."""
        make_room(len(image.files))
        opened: list[Storage] = []
        known: dict[str, Storage] = {}
        try:
            for number, name in enumerate(image.files):
                options = location.take_child(f"extents.{number}")
                if not options and name in known:
                    opened.append(known[name])  # a descriptor may name one file many thousand times
                    continue
                options = {"driver": "file", **options, "filename": beside(image.file, name)}
                child = self.child(Location(None, options), mode, named_by=image.file.name)
                opened.append(child.storage)
                known[name] = child.storage
                child.storage.lock(*self._locks(mode, raw=False))
            image.attach_files(opened)
        except BaseException:
            for storage in opened:
                storage.close()
            raise

    def _given_part(self, name: str, location: Location, mode: Mode) -> Node | None:
        """Open the part `name` of an image that the options describe, None where they do not. Info does
        without the guest's data."""
        needed = name != _DATA_FILE or not self.for_info
        options = location.take_child(name)
        if needed:
            refuse_reference(location, name)
        location.options.pop(name, None)
        if not needed or not options:
            return None
        return self.child(Location(None, options), mode)

    def _attach(self, image: Image, data: Node | None, mode: Mode) -> None:
        """Give the image its external data file (or detached header): `data`, else what it names, which is
        always the name of a plain file (qcow2 sheet 6)."""
        if data is None:
            named = image.data_file
            if self.for_info or named is None or not named.name:
                return
            data = self.child(Location(None, {"filename": named.name}), mode, named_by=image.file.name)
        try:
            if mode.force_share:
                data.storage.lock(*READ_SHARED)
            else:
                data.storage.lock(*(WRITE_DATA_FILE if mode.writable else READ_DATA_FILE))
            image.attach_data_file(data.storage)
            self.data_files.append(data.storage)
        except BaseException:
            data.storage.close()
            raise

    # -- storages

    def child(self, location: Location, mode: Mode, named_by: str | None = None) -> Node:
        """Open what another node stands on: a storage, or a whole image shown as one."""
        driver = take_driver(location)
        if driver is None or is_protocol(driver):
            return self.protocol(location, mode, driver, named_by)
        location.options["driver"] = driver
        node = self._shown(location, mode, named_by)
        node.plain = None
        return node

    def protocol(self, location: Location, mode: Mode, driver: str | None, named_by: str | None) -> Node:
        """Open a storage. Raises QimgError subclasses."""
        filename = location.filename
        given = location.text("filename")
        if filename is not None and given is not None:
            raise LocationError("Can't specify 'file' and 'filename' options at the same time")
        check_encodable(filename or given or "")
        if driver is None:
            driver = _guess_protocol(filename, given)
        kind = storages.get(driver)
        if kind.children:
            return self._over(kind, location, mode, named_by)
        mode = mode.with_options(location)
        options = {option.name for option in kind.open_options}
        if given is None and "filename" in options:
            location.options.pop("filename", None)
        said = {} if filename is None else _parse_name(kind, filename, location)
        description = Location(None, {**said, **location.options, "driver": driver}).pick(kind.identity)
        values = {**said, **take_typed(location, kind.open_options)}
        if mode.native and "aio" in options:
            values.setdefault("aio", "native")
        if named_by is not None:
            self.gate.check(driver, str(values.get("filename", filename or "")), named_by)
        name = self._finish_options(location, mode)
        storage: Storage = kind.from_options(
            values, writable=mode.writable, cache=mode.cache, discard=mode.discard, context=self.context
        )
        try:
            plain = storage.name if storage.named else None
            node = Node(driver, storage, location, plain, description)
            node.check_left()
            self.register(name, node)
            if mode.blocked:
                raise LocationError("Block node is read-only")
        except BaseException:
            storage.close()
            raise
        return node

    def _over(self, kind: type[Storage], location: Location, mode: Mode, named_by: str | None) -> Node:
        """Open a storage that stands on other nodes. Raises QimgError subclasses."""
        said = {} if location.filename is None else _parse_name(kind, location.filename, location)
        mode = mode.with_options(location)
        names = list(_child_names(kind, location))
        description = Location(None, {**said, **location.options, "driver": kind.driver}).pick(kind.identity)
        values = {**said, **take_typed(location, kind.open_options)}
        own_name = self._finish_options(location, mode)
        below: dict[str, Node] = {}
        try:
            for name, is_image in names:
                referred = self._referred(location, name)
                if referred is not None:
                    below[name] = referred
                    continue
                options = location.take_child(name)
                location.options.pop(name, None)
                filename = values.pop(name, None)
                if filename is None and not options:
                    raise LocationError(f'A block device must be specified for "{name}"')
                place = Location(None if filename is None else str(filename), options)
                below[name] = (self._shown if is_image else self.child)(place, mode, named_by)
            storage = kind.over(
                {name: node.storage for name, node in below.items()}, values, context=self.context
            )
        except BaseException:
            for node in below.values():
                node.storage.close()
            raise
        described = _describe_children(below)
        file = {name: described.pop(name) for name in ("file",) if name in described}
        plain = storage.name if storage.named else None
        node = Node(kind.driver, storage, location, plain, {**described, **description, **file})
        storage.name = node.filename
        self.register(own_name, node)
        try:
            node.check_left()
            if mode.blocked:
                raise LocationError("Block node is read-only")
        except BaseException:
            storage.close()
            raise
        return node

    def _shown(self, location: Location, mode: Mode, named_by: str | None) -> Node:
        """Open an image, of whatever format, with its chain, as a storage."""
        from qimg.graph.nested import DiskStorage

        assert self._open_chain is not None
        disk, top = self._open_chain(self, location, mode, named_by)
        return Node(top.driver, DiskStorage(disk), Location(None), top.plain, top.description)

    # -- what all nodes have

    def register(self, name: str | None, node: Node) -> None:
        """`node` is called `name` from now on, None: it has no name."""
        if name is not None:
            self.named[name] = node

    def _referred(self, location: Location, child: str) -> Node | None:
        """The node whose name is all that `location` says of a child. Raises LocationError where none has
        that name."""
        name = location.text(child)
        if name not in self.named:
            refuse_reference(location, child)
            return None
        assert name is not None
        refuse_more(location, child)
        del location.options[child]
        found = self.named[name]
        return Node(found.driver, Borrowed(found.storage), Location(None), found.plain, found.description)

    def _finish_options(self, location: Location, mode: Mode) -> str | None:
        """The options of every node that say nothing about access; its name. Raises LocationError,
        OptionError."""
        name = take_text(location, "node-name")
        if name is not None:
            self._claim(name)
        discard = take_text(location, "discard")
        if discard is not None and discard not in _DISCARD:
            raise OptionError("Invalid discard option", option="discard")
        zeroes = take_text(location, "detect-zeroes")
        if zeroes not in (None, "off", "on", "unmap"):
            raise OptionError(f"invalid parameter value: {zeroes}", option="detect-zeroes")
        if zeroes == "unmap" and (discard is None or not mode.discard):
            message = "setting detect-zeroes to unmap is not allowed without setting"
            message += " discard operation to unmap"
            raise OptionError(message, option="detect-zeroes")
        return name

    def _claim(self, name: str) -> None:
        """Note the node name `name`. Raises LocationError."""
        if not is_identifier(name):
            raise LocationError(f"Invalid node-name: '{name}'")
        if name in self._names:
            raise LocationError(f"Duplicate nodes with node-name='{name}'")
        if len(name) > _MAX_NODE_NAME:
            raise LocationError("Node name too long")
        self._names.add(name)

    def _locks(self, mode: Mode, *, raw: bool) -> tuple[int, int]:
        """The lock set for the storage of an image (common sheet 11). Raw images let others do what they
        want; whoever copies them excludes writers afterwards."""
        if mode.writable and not mode.late:
            return WRITE_SHARED if raw else WRITE_EXCLUSIVE
        self.shared |= mode.force_share
        shares = raw or mode.force_share
        if self.for_info:
            return NO_USE if shares else NO_USE_EXCLUDING_WRITERS
        return READ_SHARED if shares else READ_EXCLUDING_WRITERS


def _head(storage: Storage) -> bytearray:
    """What the format is told from. Raises StorageError."""
    try:
        return storage.read(0, min(PROBE_BYTES, storage.size))
    except StorageError as error:
        message = f"Could not read image for determining its format: {error}"
        raise StorageError(message, errno=error.errno, offset=error.offset) from error


class Borrowed(Filter):
    """A storage that belongs to another node, which locks and closes it."""

    def lock(self, use: int, share: int) -> None:
        pass

    def close(self) -> None:
        pass


def _probe_content(sector: bytes) -> str:
    return probe(sector, "")


def beside(file: Storage, name: str) -> str:
    """The path of a plain file called `name` in an image file. Raises LocationError."""
    if name.startswith("/"):
        return name
    if file.driver not in _LOCAL and not hasattr(file, "disk"):
        raise LocationError(f"Cannot use relative paths with the descriptor file '{file.name}'")
    return file.name[: file.name.rfind("/") + 1] + name


def is_protocol(driver: str) -> bool:
    """Whether `driver` names a storage, False: a format. Raises OptionError (``Unknown driver 'x'``)."""
    if driver in formats.FORMATS:
        return False
    if driver in storages.STORAGES:
        return True
    raise OptionError(f"Unknown driver '{driver}'", option="driver")


def _guess_protocol(filename: str | None, given: str | None) -> str:
    if filename is not None:
        return find_protocol(filename)
    if given is None:
        raise LocationError("Must specify either driver or file")
    from qimg.storage.posix import node_driver

    return node_driver(given)


def _parse_name(kind: type[Storage], filename: str, location: Location) -> dict[str, Value]:
    """The options that a file name means. Raises LocationError, also where they are given as well."""
    said = kind.parse(filename)
    for name in said:
        if name in location.options:
            raise LocationError(f"Option '{name}' cannot be used with a file name")
    return said


def _child_names(kind: type[Storage], location: Location) -> Iterator[tuple[str, bool]]:
    """The children that `location` describes, or has to: name, and whether it is an image and no place.

    Raises LocationError for lists with gaps."""
    for name in kind.children:
        is_image = name in kind.image_children
        if not name.endswith(".*"):
            yield name, is_image
            continue
        prefix = name[:-1]
        numbers = {key[len(prefix) :].partition(".")[0] for key in location.options if key.startswith(prefix)}
        if numbers != {str(number) for number in range(len(numbers))}:
            raise LocationError(f"Option {name[:-2]} is not a valid array")
        yield from ((f"{prefix}{number}", is_image) for number in range(len(numbers)))


def _describe_children(below: dict[str, Node]) -> dict[str, Json]:
    described: dict[str, Json] = {}
    for name, node in below.items():
        group, dot, _ = name.partition(".")
        if dot:
            described.setdefault(group, []).append(node.description)  # type: ignore[union-attr]
        else:
            described[name] = node.description
    return described


# -- options


def take_driver(location: Location) -> str | None:
    """Remove ``driver``; what is not a string counts as absent."""
    driver = location.text("driver")
    location.options.pop("driver", None)
    return None if driver is None else formats.own_name(driver)


def value_text(value: Json) -> str | None:
    """An option value as text, None for null."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        from qimg.graph.jsonopts import plain

        return plain(value)
    raise TypeError("objects and lists are no option values")


def take_text(location: Location, name: str) -> str | None:
    """Remove option `name` and return its text; objects and lists are left where they are."""
    value = location.options.get(name)
    if isinstance(value, dict | list):
        return None
    location.options.pop(name, None)
    return value_text(value)


def take_bool(location: Location, name: str) -> bool | None:
    """Remove option `name` and return its value, None where it is not given. Raises OptionError."""
    text = take_text(location, name)
    return None if text is None else parse_bool(name, text)


def take_typed(location: Location, options: Iterable[Option]) -> dict[str, Value]:
    """Remove those of `options` that are given and return their typed values. Raises OptionError.

    Parts are nodes of their own and stay."""
    values: dict[str, Value] = {}
    for option in options:
        if option.name in _PARTS:
            continue
        for name in location.pick((option.name,)):
            text = take_text(location, name)
            if text is not None:
                values[name] = option.parse(text)
    return values


# -- names


def describe(driver: str, significant: Options, file: dict[str, Json] | None) -> dict[str, Json]:
    """The node as nested options; `significant`: those without which it would show something else."""
    description: dict[str, Json] = {**significant, "driver": driver}
    if "size" in description:
        description["size"] = description.pop("size")
    if file is not None:
        description["file"] = file
    if "key-secret" in description:
        description["key-secret"] = description.pop("key-secret")
    return description
