"""Named tuples without the price of importing `collections` (2 to 4 ms of a start-up of 12)."""

from __future__ import annotations

from _operator import itemgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def record(name: str, fields: tuple[str, ...], defaults: tuple[object, ...] = ()) -> type[Any]:
    """A tuple class with named `fields`, the last of them with `defaults`, and `_replace`.

    What `typing.NamedTuple` says in the type checker's branch beside each use, at run time.
    """
    arguments = ", ".join(fields)
    create = eval(  # so that a call costs what a call of a lambda costs, as with namedtuple
        f"lambda _class, {arguments}: _new(_class, ({arguments},))", {"_new": tuple.__new__}
    )
    create.__defaults__ = defaults

    def replace(self: tuple[object, ...], **changes: object) -> tuple[object, ...]:
        values = [changes.pop(field, value) for field, value in zip(fields, self, strict=True)]
        if changes:
            raise ValueError(f"{name} has no field {', '.join(changes)}")
        return tuple.__new__(type(self), values)

    def show(self: tuple[object, ...]) -> str:
        pairs = (f"{field}={value!r}" for field, value in zip(fields, self, strict=True))
        return f"{name}({', '.join(pairs)})"

    members: dict[str, object] = {field: property(itemgetter(number)) for number, field in enumerate(fields)}
    members.update(__slots__=(), __new__=create, _replace=replace, __repr__=show, _fields=fields)
    return type(name, (tuple,), members)
