"""The backing chain: from an opened image to everything below it, one image at a time."""

from __future__ import annotations

import os

from qimg.context import Notice
from qimg.errors import GateError, LimitError, LocationError, NotSupported, OpenError, QimgError
from qimg.formats import registry as formats
from qimg.graph.disk import Disk, Layer
from qimg.graph.location import Location, refuse_more, refuse_reference, resolve_relative
from qimg.graph.nodes import Builder, Mode, Node
from qimg.storage.registry import protocol_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.graph.nodes import Identity
    from qimg.storage.base import Storage

#: Images of one chain. Each costs an open file and a step of recursion when the disk is read.
MAX_CHAIN = 500
#: Format nodes on format nodes (raw over qcow2 ...), of which each costs several steps of recursion.
MAX_NESTING = 32

_NESTING = "Could not open backing file: "
_EMPTY_BACKING = 'Use of "backing": "" is deprecated; use "backing": null instead'


class Base:
    """Which backing image is to be opened for writing as well: the one that is called `name`, None for the
    first. `depth`: where it was found, None: it was not.

    An image has the name that the image above it stores, and every path, relative to the folder of the image
    above it, that leads to the same file (commit sheet)."""

    __slots__ = ("depth", "name")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.depth: int | None = None

    def is_below(self, node: Node, location: Location) -> bool:
        """Whether it is the backing image of `node`, which is at `location`."""
        if self.name is None:
            return True
        assert node.image is not None
        recorded = node.image.backing
        stored = "" if recorded is None else recorded.name
        if self.name == stored:
            return bool(stored)
        given = location.text("file.filename") if location.filename is None else location.filename
        if given is None or protocol_of(given) is not None or protocol_of(self.name) is not None:
            return False
        try:
            wanted = resolve_relative(place_of(node.image.file), self.name)
        except LocationError:
            return False
        return bool(self.name) and os.path.realpath(wanted) == os.path.realpath(given)


class BackingError(QimgError):
    """Opening a backing file failed because of `reason`; the text names every level."""

    def __init__(self, reason: QimgError, depth: int) -> None:
        super().__init__(_NESTING * depth + str(reason), hint=reason.hint)
        self.reason = reason
        self.depth = depth


def open_chain(
    builder: Builder,
    location: Location,
    mode: Mode,
    *,
    named_by: str | None = None,
    backing: bool = True,
    base: Base | None = None,
) -> tuple[Disk, Node]:
    """Open the image at `location` and, with `backing`, all images below it. Gives the disk and its top node.
    `base`, if it is met, is opened for writing, but locked as for reading.

    Raises QimgError subclasses without the top image's name in front; GateError where the gate refuses
    or a backing file comes up a second time.
    """
    nodes: list[Node] = []
    # Images above, also those that this chain is only a part of.
    above = builder.path
    if builder.nesting > MAX_NESTING:
        raise LimitError(f"Images stand on one another more than {MAX_NESTING} times")
    builder.path = set(above)
    builder.nesting += 1
    below: Location | None = location
    names: list[str] = []
    depth = 0
    try:
        while below is not None:
            depth = len(nodes)
            names.append(below.filename or "")
            _bound(depth)
            node = builder.image(below.expand(), mode, named_by=named_by)
            nodes.append(node)
            _meet(node, builder.path)
            mode = mode.read_only()
            below, named_by = _below(builder, node, backing)
            if base is not None and below is not None and base.depth is None and base.is_below(node, below):
                base.depth = len(nodes)
                mode = mode.written_late()
        for depth in reversed(range(len(nodes))):
            nodes[depth].check_left()
        for depth, lower in enumerate(nodes[1:]):
            upper = nodes[depth]
            assert upper.image is not None and lower.image is not None
            upper.image.meet_backing(lower.image)
    except BaseException as error:
        for node in nodes:
            node.close()
        if depth and isinstance(error, QimgError) and not isinstance(error, GateError):
            if builder.for_info:
                # As if each image had been opened by its own name.
                raise OpenError(names[depth], error) from error
            raise BackingError(error, depth) from error
        raise
    finally:
        builder.path = above
        builder.nesting -= 1
    disk, top = Disk([_layer(node) for node in nodes]), nodes[0]
    if top.name is not None:
        from qimg.graph.nested import DiskStorage

        shown = Node(top.driver, DiskStorage(disk), Location(None), top.plain, top.description)
        builder.register(top.name, shown)
    return disk, top


def _layer(node: Node) -> Layer:
    assert node.image is not None
    return Layer(node.image, node.filename, guessed=node.guessed)


def _bound(depth: int) -> None:
    if depth >= MAX_CHAIN:
        raise LimitError(f"The backing chain has more than {MAX_CHAIN} images")


def _meet(node: Node, seen: set[Identity]) -> None:
    """Note the image. Raises GateError if the chain has come round to it again."""
    assert node.image is not None
    file = node.image.file
    place: Identity = (file.driver, file.name)
    try:
        status = os.stat(file.name)
        place = (status.st_dev, status.st_ino)
    except (OSError, ValueError):
        pass  # No file of this machine: its name has to do.
    options = {name: value for name, value in node.description.items() if name != "file"}
    identity = (*place, str(options))
    if identity in seen:
        raise GateError(f"Backing file '{node.filename}' creates an infinite loop.")
    seen.add(identity)


def _below(builder: Builder, node: Node, wanted: bool) -> tuple[Location | None, str | None]:
    """Where the image under `node` is and the name of the image that says so (None: the user's options).

    Takes what the options say of backing files, unless nothing is `wanted` of them.
    """
    location, image = node.location, node.image
    assert image is not None
    value = location.options.get("backing", True)
    if value is None or value == "":
        if value == "":
            builder.context.warn(Notice(_EMPTY_BACKING))
        location.options.pop("backing")
        return None, None
    if not wanted:
        return None, None
    referred = location.text("backing")
    if referred in builder.named and not builder.for_info:
        refuse_more(location, "backing")
        del location.options["backing"]
        return Location(None, {"driver": "raw", "file": referred}), None
    recorded = image.backing
    # Info follows what images say, and takes no options of backing files (the real program neither).
    if not builder.for_info:
        try:
            refuse_reference(location, "backing")
        except LocationError as error:
            raise BackingError(error, 1) from error
    options = {} if builder.for_info else location.take_child("backing")
    if not _can_have_backing(node):
        if options:
            raise NotSupported("Driver doesn't support backing files")
        return None, None
    below = Location(None, options)
    if not builder.for_info:
        location.options.pop("backing", None)
    if recorded is None or not recorded.name:
        return (below, None) if options else (None, None)
    if recorded.format is not None:
        options.setdefault("driver", recorded.format)
    if "file.filename" in options:
        return below, None
    below.filename = resolve_relative(place_of(image.file), recorded.name)
    return below, node.filename


def place_of(file: Storage) -> str:
    """The name of the place beside which an image in `file` finds others. Raises LocationError where there is
    no single one."""
    while file.children:
        if not file.has_directory:
            raise LocationError(f"Cannot generate a base directory for {file.plural}")
        file = file.below()[0][1]
    return file.name


def _can_have_backing(node: Node) -> bool:
    return node.driver in formats.FORMATS and formats.get(node.driver).can_backing
