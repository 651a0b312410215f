"""The text descriptor: what it says, how it is written, and how one of its values is changed (vmdk sheet 3).

Reading goes by lines and keys; what makes no sense is refused, never guessed.
"""

from __future__ import annotations

from qimg.errors import FormatError, LimitError, OptionError, UnsupportedFeature

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

#: Bytes of text that are read at most.
MAX_TEXT = (1 << 20) - 1
#: Longest names (sheet 3).
_MAX_HINT = 4095
_MAX_EXTENT_NAME = 511
_MAX_TYPE = 127

NO_PARENT = 0xFFFFFFFF

MONOLITHIC_SPARSE = "monolithicSparse"
MONOLITHIC_FLAT = "monolithicFlat"
SPLIT_SPARSE = "twoGbMaxExtentSparse"
SPLIT_FLAT = "twoGbMaxExtentFlat"
STREAM = "streamOptimized"
#: What a descriptor that stands alone may be.
SEPARATE = (MONOLITHIC_FLAT, SPLIT_SPARSE, SPLIT_FLAT, "vmfs", "vmfsSparse", "seSparse")

READ_WRITE, READ_ONLY, NO_ACCESS = "RW", "RDONLY", "NOACCESS"
FLAT, VMFS, SPARSE, VMFS_SPARSE, SE_SPARSE, ZERO = (
    "FLAT",
    "VMFS",
    "SPARSE",
    "VMFSSPARSE",
    "SESPARSE",
    "ZERO",
)
_TYPES = (FLAT, VMFS, SPARSE, VMFS_SPARSE, SE_SPARSE, ZERO)


class ExtentLine:
    """One line ``ACCESS SECTORS TYPE "NAME" [OFFSET]``; `name` is None for ZERO, `offset` in sectors."""

    __slots__ = ("access", "name", "offset", "sectors", "type")

    def __init__(self, access: str, sectors: int, type: str, name: str | None, offset: int = 0) -> None:
        self.access = access
        self.sectors = sectors
        self.type = type
        self.name = name
        self.offset = offset

    def render(self) -> str:
        """The line, without its end."""
        text = f'{self.access} {self.sectors} {self.type} "{self.name}"'
        return f"{text} {self.offset}" if self.type == FLAT else text


class Descriptor:
    """What a descriptor says. `cid` and `parent_cid` are the words that tell one state of the content from
    another; `hint` names the parent, None: none."""

    __slots__ = ("cid", "create_type", "extents", "hint", "parent_cid")

    def __init__(
        self,
        cid: int,
        parent_cid: int,
        create_type: str | None,
        hint: str | None,
        extents: list[ExtentLine],
    ) -> None:
        self.cid = cid
        self.parent_cid = parent_cid
        self.create_type = create_type
        self.hint = hint
        self.extents = extents


def _refuse(message: str, file: str, field: str) -> NoReturn:
    raise FormatError(message, file=file, field=f"descriptor.{field}")


def decode(raw: bytes | bytearray) -> str:
    """The text of a descriptor area, up to the first NUL."""
    return bytes(raw).partition(b"\0")[0].decode("utf-8", "surrogateescape")


def parse(raw: bytes | bytearray, file: str, *, extents: bool = True) -> Descriptor:
    """Read a descriptor. Without `extents` those lines, and the type, are not looked at (embedded text).

    Raises FormatError, UnsupportedFeature."""
    values: dict[str, str] = {}
    lines: list[ExtentLine] = []
    for line in decode(raw).split("\n"):
        text = line.strip(" \t\r")
        if not text or text.startswith("#"):
            continue
        if text.split(None, 1)[0] in (READ_WRITE, READ_ONLY, NO_ACCESS):
            if extents:
                lines.append(_extent_line(text, file))
            continue
        key, equals, value = text.partition("=")
        if equals:
            values.setdefault(key.strip().lower(), value.strip(" \t"))
    create_type = _text(values, "createtype", file, _MAX_TYPE)
    if extents and create_type is None:
        _refuse("invalid VMDK image descriptor", file, "createType")
    return Descriptor(
        _word(values, "CID", file),
        _word(values, "parentCID", file),
        create_type,
        _text(values, "parentfilenamehint", file, _MAX_HINT) or None,
        lines,
    )


def _text(values: dict[str, str], key: str, file: str, longest: int) -> str | None:
    """A quoted value, None where the key is missing."""
    value = values.get(key)
    if value is None:
        return None
    if value.startswith('"'):
        text, quote, _ = value[1:].partition('"')
        if not quote:
            _refuse("invalid VMDK image descriptor (a quote is not closed)", file, key)
    else:
        text = value
    if len(text) > longest:
        _refuse(f"invalid VMDK image descriptor ({key} is too long)", file, key)
    return text


def _word(values: dict[str, str], key: str, file: str) -> int:
    """A hexadecimal word of 32 bits."""
    text = values.get(key.lower(), "")
    if not 0 < len(text) <= 8 or text.strip("0123456789abcdefABCDEF"):
        _refuse(f"invalid VMDK image descriptor (no valid {key})", file, key)
    return int(text, 16)


def _extent_line(text: str, file: str) -> ExtentLine:
    """Raises FormatError, UnsupportedFeature."""
    access, _, rest = text.partition(" ")
    sectors, _, rest = rest.strip().partition(" ")
    kind, _, rest = rest.strip().partition(" ")
    rest = rest.strip()
    if access == NO_ACCESS:
        raise UnsupportedFeature(f"Unsupported access to an extent: {text}", file=file)
    if not sectors.isascii() or not sectors.isdigit() or len(sectors) > 18 or not int(sectors):
        _refuse(f"Invalid extent line: {text}", file, "extent")
    if kind not in _TYPES:
        raise UnsupportedFeature(f"Unsupported extent type '{kind}'", file=file)
    if kind == ZERO and not rest:
        return ExtentLine(access, int(sectors), kind, None)
    name, after = _quoted_name(rest)
    words = after.split()
    if kind == FLAT:
        valid = bool(words) and words[0].isascii() and words[0].isdigit() and len(words[0]) <= 18
    else:
        valid = not words
    if not name or not valid:
        _refuse(f"Invalid extent line: {text}", file, "extent")
    return ExtentLine(access, int(sectors), kind, name, int(words[0]) if kind == FLAT else 0)


def _quoted_name(text: str) -> tuple[str, str]:
    """The name in front of `text` and what follows it; an empty name where there is none."""
    if not text.startswith('"'):
        return "", ""
    name, quote, after = text[1:].partition('"')
    return (name if quote and len(name) <= _MAX_EXTENT_NAME else "", after)


# -- writing


class DiskData:
    """The lines ``ddb.*`` of a new image."""

    def __init__(self, size: int, *, adapter: str, hardware: str, tools: str) -> None:
        """`size` of the disk in bytes, which gives the geometry."""
        self.heads = 16 if adapter == "ide" else 255
        self.cylinders = size // (63 * self.heads * 512)
        self.adapter = adapter
        self.hardware = hardware
        self.tools = tools

    def render(self) -> str:
        """The lines."""
        rows = (
            ("virtualHWVersion", self.hardware),
            ("geometry.cylinders", str(self.cylinders)),
            ("geometry.heads", str(self.heads)),
            ("geometry.sectors", "63"),
            ("adapterType", self.adapter),
            ("toolsVersion", self.tools),
        )
        return "".join(f'ddb.{key} = "{value}"\n' for key, value in rows)


def render(new: Descriptor, data: DiskData) -> bytes:
    """The text of a new descriptor (sheet 3.1). Raises LimitError where it gets too long for readers."""
    parent = "\n" if new.hint is None else f'parentFileNameHint="{new.hint}"\n'
    text = (
        "# Disk DescriptorFile\n"
        "version=1\n"
        f"CID={new.cid:08x}\n"
        f"parentCID={new.parent_cid:08x}\n"
        f'createType="{new.create_type}"\n'
        f"{parent}"
        "# Extent description\n"
        f"{''.join(line.render() + chr(10) for line in new.extents)}"
        "\n"
        "# The Disk Data Base\n"
        "#DDB\n"
        "\n"
        f"{data.render()}"
    ).encode("utf-8", "surrogateescape")
    if len(text) > MAX_TEXT:
        raise LimitError("The image needs more extents than a descriptor can name")
    return text


def check_value(option: str, text: str) -> None:
    """Raise OptionError for what cannot stand between quotes."""
    if any(letter in '"\n\r\0' for letter in text):
        raise OptionError(f"Parameter '{option}' must not contain quotes or line ends", option=option)


def replaced(raw: bytes, values: Iterable[tuple[str, str]], sectors: int | None = None) -> bytes:
    """The descriptor area `raw` with other values (as they stand behind ``=``) for keys that it has, and
    other `sectors` in the first extent line.

    The text grows or shrinks; bytes behind its end are dropped."""
    text = raw.partition(b"\0")[0]
    lines = text.split(b"\n")
    for key, value in values:
        wanted = key.lower().encode()
        for at, line in enumerate(lines):
            found, equals, old = line.partition(b"=")
            if equals and found.strip().lower() == wanted:
                end = old[len(old.rstrip()) :]
                blank = old[: len(old) - len(old.lstrip())]
                lines[at] = found + b"=" + blank + value.encode("utf-8", "surrogateescape") + end
                break
    for at, line in enumerate(lines):
        words = line.split(b" ", 2)
        if sectors is not None and words[0].decode("latin-1") in (READ_WRITE, READ_ONLY) and len(words) == 3:
            lines[at] = b" ".join((words[0], str(sectors).encode(), words[2]))
            break
    return b"\n".join(lines)
