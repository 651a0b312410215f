"""On-disk structures, declared once: unpack, pack, size, field offsets, dump.

::

    class Header(Struct, order=">"):
        magic: U32
        version: U32
        name: Annotated[bytes, 46]

    header = Header.unpack(buf)
    Header.SIZE, Header.offset_of("version"), header.pack(), header.dump()

The annotation is the layout: U8, U16, U32, U64, S32 or ``Annotated[bytes, n]``. Structures are packed,
without alignment.
"""

from __future__ import annotations

from struct import Struct as _Packer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

U8 = int
U16 = int
U32 = int
U64 = int
S32 = int

_CODES = {"U8": "B", "U16": "H", "U32": "I", "U64": "Q", "S32": "i"}
_BYTES = "Annotated[bytes, "


def _code(annotation: str) -> str:
    if annotation.startswith(_BYTES):
        return annotation[len(_BYTES) : -1] + "s"
    return _CODES[annotation]


class Struct:
    """Base of declared structures. Instances are plain records; equality is by field."""

    SIZE: ClassVar[int]
    FIELDS: ClassVar[tuple[str, ...]]
    _offsets: ClassVar[dict[str, int]]
    _packer: ClassVar[_Packer]

    def __init_subclass__(cls, order: str = ">") -> None:
        names = []
        offsets = {}
        layout = order
        for name, annotation in cls.__annotations__.items():
            if annotation.startswith("ClassVar"):
                continue
            offsets[name] = _Packer(layout).size
            layout += _code(annotation)
            names.append(name)
        cls.FIELDS = tuple(names)
        cls._offsets = offsets
        cls._packer = _Packer(layout)
        cls.SIZE = cls._packer.size

    def __init__(self, **values: int | bytes) -> None:
        """Fields not given are zero (or zero bytes)."""
        blank = self._packer.unpack(bytes(self.SIZE))
        for name, zero in zip(self.FIELDS, blank, strict=True):
            setattr(self, name, values.pop(name, zero))
        if values:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(values)}")

    @classmethod
    def unpack(cls, buf: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Read one structure; `buf` must hold SIZE bytes from `offset` on (struct.error otherwise)."""
        new = cls.__new__(cls)
        new.__dict__.update(zip(cls.FIELDS, cls._packer.unpack_from(buf, offset), strict=True))
        return new

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Byte offset of field `name` inside the structure."""
        return cls._offsets[name]

    def pack(self) -> bytes:
        """The structure's bytes."""
        return self._packer.pack(*[getattr(self, name) for name in self.FIELDS])

    def dump(self) -> str:
        """One line a field, ``offset name value``, for people."""
        rows = []
        for name in self.FIELDS:
            value = getattr(self, name)
            shown = f"{value:#x}" if isinstance(value, int) else repr(value)
            rows.append(f"{self._offsets[name]:5d} {name} {shown}")
        return "\n".join(rows)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.FIELDS)
        return f"{type(self).__name__}({fields})"
