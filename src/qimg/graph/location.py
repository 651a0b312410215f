"""What a name means: plain files, ``protocol:`` prefixes, ``json:{...}``, option strings (protocols sheet).

Everything becomes a `Location`: a file name that is still to be interpreted, or None, and one flat dict of
options with dotted keys (``file.filename``), as the reference program has it.
"""

from __future__ import annotations

import sys

from qimg.context import Notice
from qimg.errors import LocationError, OptionError
from qimg.options import split_pairs
from qimg.storage.registry import PREFIXES, get, protocol_of, supported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qimg.graph.jsonopts import Json

    Options = dict[str, Json]

JSON_PREFIX = "json:"

_REFERENCE_AND_MORE = "Cannot reference an existing block device with additional options or a new filename"
ID_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


class Location:
    """Where a node is: `filename` (None: only options say) and `options`, flat with dotted keys.

    Option values are what JSON gave (str, int, float, bool, None, or an empty object or list); option
    strings give str only.
    """

    __slots__ = ("filename", "options")

    def __init__(self, filename: str | None, options: Options | None = None) -> None:
        self.filename = filename
        self.options: Options = {} if options is None else options

    def expand(self) -> Location:
        """A ``json:`` file name turned into options; those given already win. Raises LocationError."""
        if self.filename is None or not self.filename.startswith(JSON_PREFIX):
            return self
        return Location(None, {**parse_json(self.filename), **self.options})

    def text(self, name: str) -> str | None:
        """The option `name` if it is a string."""
        value = self.options.get(name)
        return value if isinstance(value, str) else None

    def pick(self, names: Iterable[str]) -> Options:
        """Those of its options that `names` have; ``server.*``: all that begin with ``server.``."""
        found: Options = {}
        for name in names:
            if name.endswith(".*"):
                found.update((key, self.options[key]) for key in self.options if key.startswith(name[:-1]))
            elif name in self.options:
                found[name] = self.options[name]
        return found

    def take_child(self, name: str) -> Options:
        """Remove the options of child `name` (``name.``...) and return them without that prefix."""
        prefix = name + "."
        keys = [key for key in self.options if key.startswith(prefix)]
        return {key[len(prefix) :]: self.options.pop(key) for key in keys}


def parse_json(text: str) -> Options:
    """The options of a ``json:{...}`` name. Raises LocationError with the reference program's words."""
    from qimg.graph import jsonopts

    try:
        value = jsonopts.parse(text[len(JSON_PREFIX) :])
    except LocationError as error:
        raise LocationError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(value, dict):
        raise LocationError("Invalid JSON object given")
    return flatten(value)


def flatten(nested: dict[str, Json]) -> Options:
    """Nested objects and lists as dotted keys, ``children.0.driver``; a nested value wins over a dotted one.

    Empty objects and lists stay as values, so that they are seen as what they are.
    """
    flat: Options = {}
    below: Options = {}
    # Depth first with a list of what is left, for the nesting may be deep.
    left: list[tuple[str, Json, bool]] = [(key, value, False) for key, value in reversed(nested.items())]
    while left:
        key, value, inside = left.pop()
        if isinstance(value, dict) and value:
            left += [(f"{key}.{name}", member, True) for name, member in reversed(value.items())]
        elif isinstance(value, list) and value:
            left += [(f"{key}.{index}", member, True) for index, member in reversed(list(enumerate(value)))]
        else:
            (below if inside else flat)[key] = value
    flat.update(below)
    return flat


def parse_option_string(text: str, warn: Callable[[Notice], None]) -> Options:
    """``key=value,...`` of ``--image-opts``; a first element without ``=`` is ``file=`` that element.

    Later duplicates win. Bare words are on (``noword``: off), with a warning. Raises OptionError.
    """
    options: Options = {}
    pairs = split_pairs(text) if text else []
    if len(pairs) > 1 and pairs[-1] == ("", None):
        pairs.pop()
    for index, (name, value) in enumerate(pairs):
        key = name
        if value is None and index == 0:
            key, value = "file", name
        elif value is None:
            key, value = (name[2:], "off") if name.startswith("no") else (name, "on")
            if name not in ("help", "?"):
                hint = f"Please use {key}={value} instead"
                warn(Notice(f"short-form boolean option '{name}' deprecated", hint=hint))
        if key == "id" and not is_identifier(value):
            raise OptionError("Parameter 'id' expects an identifier", option="id", hint=ID_HINT)
        options[key] = value
    return options


def is_identifier(text: str) -> bool:
    """A letter, then letters, digits and ``-._``: ids of objects and names of nodes."""
    return (
        text.isascii() and text[:1].isalpha() and all(letter.isalnum() or letter in "-._" for letter in text)
    )


def check_encodable(filename: str) -> None:
    """Raise LocationError for text that is no file name on this system (it comes from callers only)."""
    try:
        filename.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
    except UnicodeEncodeError:
        raise LocationError(f"{filename!a} cannot be encoded as a file name") from None


def find_protocol(filename: str) -> str:
    """Name of the storage that a plain file name means. Looks at the node's kind, opens nothing.

    Raises LocationError (``Unknown protocol 'x'``).
    """
    from qimg.storage.posix import node_driver

    check_encodable(filename)
    driver = node_driver(filename)
    if driver != "file":
        return driver
    prefix = protocol_of(filename)
    if prefix is None:
        return "file"
    if prefix not in PREFIXES:
        raise LocationError(f"Unknown protocol '{prefix}'")
    return PREFIXES[prefix]


def refuse_reference(location: Location, child: str) -> None:
    """Raise LocationError where option `child` is a string: the name of a node that there is not."""
    text = location.text(child)
    if text is not None:
        refuse_more(location, child)
        raise LocationError(f"Cannot find device='{text}' nor node-name='{text}'")


def refuse_more(location: Location, child: str) -> None:
    """Raise LocationError where more than a reference is said of `child`."""
    if location.filename is not None or any(name.startswith(f"{child}.") for name in location.options):
        raise LocationError(_REFERENCE_AND_MORE)


def resolve_relative(overlay: str, backing: str) -> str:
    """The backing name `backing` as seen from the overlay's file name: relative names are relative to the
    overlay's directory; absolute, ``protocol:`` and ``json:`` names stay.

    Raises LocationError where the overlay has no directory.
    """
    if not backing or backing.startswith("/") or protocol_of(backing) is not None:
        return backing
    driver = PREFIXES.get(protocol_of(overlay) or "", "")
    if driver in supported() and not get(driver).has_directory:
        raise LocationError(f"Cannot generate a base directory for {get(driver).plural}")
    if overlay.startswith(JSON_PREFIX):
        overlay = _json_file(overlay)
        if not overlay:
            message = "Could not determine absolute backing filename, but backing filename "
            raise LocationError(f"{message}'{backing}' present")
    cut = max(overlay.rfind("/"), _prefix_end(overlay)) + 1
    return overlay[:cut] + backing


def _prefix_end(name: str) -> int:
    prefix = protocol_of(name)
    return -1 if prefix is None else len(prefix)


def _json_file(text: str) -> str:
    """The innermost file name below the ``file`` children of a ``json:`` name, empty where there is none."""
    try:
        options = parse_json(text)
    except LocationError:
        return ""
    location = Location(None, options)
    while child := location.take_child("file"):
        location = Location(None, child)
    return location.text("filename") or ""
