"""The node ``blkdebug``: requests fail as rules say, to try out what happens then (protocols sheet 2).

Rules come from options (``inject-error.0.event=none``) and from a file of sections. A rule of the event
``none`` holds always, any other from the first time that its event is raised in its state. Which events a
request raises is said in `_EVENTS`; events inside of a format (``l2_load``) are known by name, never raised.
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from qimg.errors import LocationError, OptionError, StorageError
from qimg.options import BOOL, NUM, SIZE, STR, Option, find
from qimg.storage.base import Filter, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.extent import Extent
    from qimg.options import Value
    from qimg.storage.base import Buffer, Bytes, Storage

    Section = tuple[str, dict[str, str]]

_KINDS = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
#: What fails where a rule does not say.
_FAILING = _KINDS[:-1]
#: What a request raises, first to last.
_EVENTS = {
    "read": ("read_aio",),
    "write": ("pwritev", "write_aio"),
    "write-zeroes": ("pwritev_zero",),
    "flush": ("flush_to_os", "flush_to_disk"),
}
_NAMES = frozenset(
    (
        *("cluster_alloc", "cluster_alloc_bytes", "cluster_alloc_space", "cluster_free", "cor_write"),
        *("cow_read", "cow_write", "empty_image_prepare", "flush_to_disk", "flush_to_os"),
        *("l1_grow_activate_table", "l1_grow_alloc_table", "l1_grow_write_table"),
        *("l1_shrink_free_l2_clusters", "l1_shrink_write_table", "l1_update", "l2_alloc_cow_read"),
        *("l2_alloc_write", "l2_load", "l2_update", "l2_update_compressed", "none", "pwritev"),
        *("pwritev_done", "pwritev_rmw_after_head", "pwritev_rmw_after_tail", "pwritev_rmw_head"),
        *("pwritev_rmw_tail", "pwritev_zero", "read_aio", "read_backing_aio", "read_compressed"),
        *("refblock_alloc", "refblock_alloc_hookup", "refblock_alloc_switch_table"),
        *("refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table"),
        *("refblock_load", "refblock_update", "refblock_update_part", "reftable_grow", "reftable_load"),
        *("reftable_update", "vmstate_load", "vmstate_save", "write_aio", "write_compressed"),
    )
)
_EVENT = Option("event", STR, None, "What has to happen first")
_STATE = Option("state", NUM, 0, "In which state, 0: in any")
_SECTIONS: dict[str, tuple[Option, ...]] = {
    "inject-error": (
        _EVENT,
        _STATE,
        Option("iotype", STR, None, "Which requests fail"),
        Option("errno", NUM, errno.EIO, "With which error"),
        Option("sector", NUM, -1, "Only those that touch this sector of 512 bytes"),
        Option("once", BOOL, False, "Only the first time"),
        Option("immediately", BOOL, False, "Before other requests have been waited for"),
    ),
    "set-state": (_EVENT, _STATE, Option("new_state", NUM, None, "The state from then on")),
}
_MAX_CONFIG = 1 << 20
_SECTOR = 512


class _Rule:
    """A rule of the section `kind`."""

    def __init__(self, kind: str, values: dict[str, Value]) -> None:
        """Raises OptionError."""
        if "event" not in values:
            raise OptionError("Missing event name for rule", option="event")
        self.kind = kind
        self.event = str(values["event"])
        iotype = values.get("iotype")
        for value, known in ((self.event, _NAMES), (iotype, _KINDS)):
            if value is not None and value not in known:
                raise OptionError(f"invalid parameter value: {value}", option="event")
        self.state = int(values.get("state", 0))
        self.new_state = int(values.get("new_state", 0))
        # A rule that is met by an event fails what is read and written; `none` without a type, all requests.
        self.kinds = (
            ("read", "write", "write-zeroes", "discard", "flush") if iotype is None else (str(iotype),)
        )
        self.errno = int(values.get("errno", errno.EIO))
        self.sector = int(values.get("sector", -1))
        self.once = bool(values.get("once", False))
        self.active = self.event == "none"

    def hits(self, kind: str, offset: int, length: int) -> bool:
        if not self.active or kind not in self.kinds:
            return False
        return self.sector < 0 or offset <= self.sector * _SECTOR < offset + max(length, 1)


class BlkDebug(Filter):
    """Fails requests to `child` by rules."""

    driver = "blkdebug"
    children: ClassVar[tuple[str, ...]] = ("image",)
    identity: ClassVar[tuple[str, ...]] = ("driver", "align", "config", "inject-error.*", "set-state.*")
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("config", STR, None, "File of rules"),
        Option("align", SIZE, None, "What requests have to be multiples of"),
        Option("max-transfer", SIZE, None, "Largest request"),
        Option("opt-write-zero", SIZE, None, "Good size for zeroing"),
        Option("max-write-zero", SIZE, None, "Largest zeroing"),
        Option("opt-discard", SIZE, None, "Good size for discarding"),
        Option("max-discard", SIZE, None, "Largest discard"),
        Option("inject-error.*", STR, None, "Errors to be met"),
        Option("set-state.*", STR, None, "Changes of the state"),
    )

    def __init__(self, child: Storage, rules: list[_Rule], config: str, align: int | None) -> None:
        super().__init__(child)
        self.name = f"blkdebug:{config}:{child.name}"
        self._rules = rules
        self._state = 1
        self._counting = allocate_lock()
        limits = child.limits
        self.limits = Limits(
            request_alignment=max(align or 1, limits.request_alignment),
            memory_alignment=limits.memory_alignment,
            preferred_request=limits.preferred_request,
            fast_zero=limits.fast_zero,
            parallel=limits.parallel,
        )

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        config, colon, image = name.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise LocationError("blkdebug requires both config file and image path")
        return {"config": config, "image": image} if config else {"image": image}

    @classmethod
    def over(cls, children: dict[str, Storage], values: dict[str, Value], *, context: Context) -> Self:
        """Raises OptionError, StorageError (the file of rules)."""
        config = str(values.get("config", ""))
        sections = list(_read_config(config)) if config else []
        for kind in _SECTIONS:
            sections += _from_options(kind, values)
        rules = [_Rule(kind, _typed(kind, options)) for kind, options in sections]
        align = values.get("align")
        if align is not None and (int(align) < 1 or int(align) & (int(align) - 1)):
            raise OptionError(f"Cannot meet constraints with align {align}", option="align")
        child = children["image"]
        new = cls(child, rules, config, None if align is None else int(align))
        new.named = child.named and all(name in ("config", "image") for name in values)
        return new

    # -- rules

    def _meet(self, kind: str, offset: int = 0, length: int = 0) -> None:
        """Raise StorageError where a rule says that this request fails."""
        if not self._rules:
            return
        with self._counting:
            for event in _EVENTS.get(kind, ()):
                self._raise_event(event)
            for rule in self._rules:
                if rule.kind == "inject-error" and rule.hits(kind, offset, length):
                    if rule.once:
                        self._rules.remove(rule)
                    raise StorageError(os.strerror(rule.errno), errno=rule.errno, offset=offset)

    def _raise_event(self, event: str) -> None:
        state = self._state
        for rule in self._rules:
            if rule.event == event and rule.state in (0, state):
                if rule.kind == "set-state":
                    self._state = rule.new_state
                else:
                    rule.active = True

    def read_into(self, buf: Buffer, offset: int) -> None:
        self._meet("read", offset, len(buf))
        super().read_into(buf, offset)

    def write(self, buf: Bytes, offset: int) -> None:
        self._meet("write", offset, len(buf))
        super().write(buf, offset)

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        self._meet("write-zeroes", offset, length)
        super().zero(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        self._meet("discard", offset, length)
        super().discard(offset, length)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        self._meet("block-status", start, length)
        yield from super().extents(start, length)

    def flush(self) -> None:
        self._meet("flush")
        super().flush()

    def allocated_bytes(self) -> int | None:
        return None


# -- reading rules


def _typed(kind: str, options: dict[str, str]) -> dict[str, Value]:
    """Values of the options of one rule. Raises OptionError."""
    return {name: find(_SECTIONS[kind], name).parse(text) for name, text in options.items()}


def _from_options(kind: str, values: dict[str, Value]) -> list[Section]:
    """The rules in ``inject-error.0.event=...``, in the order of their numbers. Raises OptionError."""
    rules: dict[int, dict[str, str]] = {}
    for key, value in values.items():
        if not key.startswith(kind + "."):
            continue
        number, _, name = key.removeprefix(kind + ".").partition(".")
        if all(option.name != name for option in _SECTIONS[kind]) or not number.isdecimal():
            raise OptionError(f"[{kind}] section doesn't support the option '{name or number}'", option=key)
        rules.setdefault(int(number), {})[name] = str(value)
    return [(kind, rules[number]) for number in sorted(rules)]


def _read_config(path: str) -> Iterable[Section]:
    """The sections of a file of rules: ``[inject-error]``, then lines ``key = "value"``.

    Raises StorageError, OptionError."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(_MAX_CONFIG)
    except OSError as error:
        number = error.errno or errno.EIO
        message = f"Could not read blkdebug config file: {os.strerror(number)}"
        raise StorageError(message, errno=number) from error
    sections: list[Section] = []
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            kind = line[1:].partition("]")[0].split(" ")[0]
            if kind not in _SECTIONS:
                raise OptionError(f"There is no option group '{kind}'", option=kind)
            sections.append((kind, {}))
            continue
        if not sections:
            raise OptionError("no group defined")
        name, equals, value = line.partition(" = ")
        if not equals:
            raise OptionError(f"Invalid parameter '{line}'")
        find(_SECTIONS[sections[-1][0]], name)
        sections[-1][1][name] = value.strip().removeprefix('"').removesuffix('"')
    return sections
