"""JSON as qemu-img prints it (common sheet, section 14), without the cost of importing json."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qimg.formats.base import Measure
    from qimg.jobs.check import CheckOutcome
    from qimg.jobs.info import ImageInfo
    from qimg.jobs.map import MapEntry

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(letter: str) -> str:
    known = _ESCAPES.get(letter)
    if known is not None:
        return known
    code = ord(letter)
    if 0x20 <= code < 0x7F:
        return letter
    if 0xD800 <= code < 0xE000:  # a byte that is no text
        return "\\uFFFD"
    if code < 0x10000:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"


def _string(text: str) -> str:
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + "".join(map(_escape, text)) + '"'


def dumps(value: object, indent: int = 0) -> str:
    """`value` (dict, list, str, bool, int, None) pretty printed with 4 blanks a level; no final newline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, dict):
        rows = [f"{_string(key)}: {dumps(item, indent + 4)}" for key, item in value.items()]
        return _block("{", rows, "}", indent)
    if isinstance(value, (list, tuple)):
        return _block("[", [dumps(item, indent + 4) for item in value], "]", indent)
    return str(value)


def _block(opening: str, rows: list[str], closing: str, indent: int) -> str:
    inner = " " * (indent + 4)
    body = ",\n".join(inner + row for row in rows)
    return f"{opening}\n{body}\n{' ' * indent}{closing}" if rows else f"{opening}\n{' ' * indent}{closing}"


def _present(rows: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in rows if value is not None}


def info_object(info: ImageInfo) -> dict[str, object]:
    """One image of ``info --output=json``, keys in the order of release 10."""
    specific = info.format_specific
    return _present(
        (
            ("children", [{"name": name, "info": info_object(child)} for name, child in info.children]),
            ("backing-filename-format", info.backing_format),
            ("snapshots", [_snapshot(snapshot) for snapshot in info.snapshots] or None),
            ("virtual-size", info.virtual_size),
            ("filename", info.filename),
            ("cluster-size", info.cluster_size),
            ("format", info.format),
            ("actual-size", info.actual_size),
            ("format-specific", None if specific is None else {"type": info.format, "data": specific}),
            ("full-backing-filename", info.full_backing_filename),
            ("encrypted", info.encrypted or None),
            ("backing-filename", info.backing_filename),
            ("dirty-flag", info.dirty),
        )
    )


def _snapshot(snapshot: object) -> dict[str, object]:
    from qimg.formats.base import SnapshotInfo

    assert isinstance(snapshot, SnapshotInfo)
    return _present(
        (
            ("icount", snapshot.icount),
            ("vm-clock-nsec", snapshot.vm_clock_nsec % 1_000_000_000),
            ("name", snapshot.name),
            ("date-sec", snapshot.date_sec),
            ("date-nsec", snapshot.date_nsec),
            ("vm-clock-sec", snapshot.vm_clock_nsec // 1_000_000_000),
            ("id", snapshot.id),
            ("vm-state-size", snapshot.vm_state_size),
        )
    )


def check_object(outcome: CheckOutcome, filename: str) -> dict[str, object]:
    """The object of ``check --output=json``; counters that are zero or unknown are left out."""
    result = outcome.result
    return _present(
        (
            ("image-end-offset", result.image_end_offset or None),
            ("compressed-clusters", result.compressed_clusters or None),
            ("total-clusters", result.total_clusters or None),
            ("corruptions", result.corruptions or None),
            ("corruptions-fixed", result.corruptions_fixed or None),
            ("check-errors", result.check_errors),
            ("leaks", result.leaks or None),
            ("leaks-fixed", result.leaks_fixed or None),
            ("allocated-clusters", result.allocated_clusters or None),
            ("filename", filename),
            ("format", outcome.format),
            ("fragmented-clusters", result.fragmented_clusters or None),
        )
    )


def measure_object(measure: Measure) -> dict[str, object]:
    """The object of ``measure --output=json``."""
    return _present(
        (
            ("bitmaps", measure.bitmaps),
            ("required", measure.required),
            ("fully-allocated", measure.fully_allocated),
        )
    )


def map_rows(entries: Iterable[MapEntry]) -> Iterator[str]:
    """The text of ``map --output=json`` in pieces, one per extent, without the final newline."""
    opening = "["
    for entry in entries:
        offset = "" if entry.offset is None else f', "offset": {entry.offset}'
        yield (
            f'{opening}{{ "start": {entry.start}, "length": {entry.length}, "depth": {entry.depth}, '
            f'"present": {_flag(entry.present)}, "zero": {_flag(entry.zero)}, "data": {_flag(entry.data)}, '
            f'"compressed": {_flag(entry.compressed)}{offset}}}'
        )
        opening = ",\n"
    yield "]"


def _flag(value: bool) -> str:
    return "true" if value else "false"
