"""Results as people read them. Each function returns text with its final newline."""

from __future__ import annotations

import time

from qimg.units import human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qimg.formats.base import CheckResult, Measure, SnapshotInfo
    from qimg.jobs.compare import Comparison
    from qimg.jobs.info import ImageInfo
    from qimg.jobs.map import MapEntry
    from qimg.options import Option

MAP_HEADER = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"


def info_block(info: ImageInfo, indent: int = 0, path: str = "/") -> str:
    """One image (info sheet, human output of release 10): its lines, then a block for each child node."""
    pad = " " * indent
    lines = [pad + line for line in _describe(info)]
    if info.backing_filename is not None:
        lines.append(f"{pad}backing file: {info.backing_filename}{_resolved(info)}")
    if info.backing_format is not None:
        lines.append(f"{pad}backing file format: {info.backing_format}")
    if info.snapshots:
        lines.append(f"{pad}Snapshot list:")
        lines.extend(pad + line for line in snapshot_table(info.snapshots))
    if info.format_specific:
        lines.append(f"{pad}Format specific information:")
        lines.extend(_specific(info.format_specific, indent + 4))
    text = "\n".join(lines) + "\n"
    for name, child in info.children:
        text += f"{pad}Child node '{path}{name}':\n"
        text += info_block(child, indent + 4, f"{path}{name}/")
    return text


def _describe(info: ImageInfo) -> list[str]:
    size = f"{human_size(info.virtual_size)} ({info.virtual_size} bytes)"
    if info.is_protocol:
        lines = [
            f"filename: {info.filename}",
            f"protocol type: {info.format}",
            f"file length: {size}",
        ]
    else:
        lines = [f"image: {info.filename}", f"file format: {info.format}", f"virtual size: {size}"]
    used = info.actual_size
    lines.append(f"disk size: {'unavailable' if used is None else human_size(used)}")
    if info.encrypted:
        lines.append("encrypted: yes")
    if info.cluster_size is not None:
        lines.append(f"cluster_size: {info.cluster_size}")
    if info.dirty:
        lines.append("cleanly shut down: no")
    return lines


def _resolved(info: ImageInfo) -> str:
    if info.full_backing_filename is None:
        return " (cannot determine actual path)"
    if info.full_backing_filename == info.backing_filename:
        return ""
    return f" (actual path: {info.full_backing_filename})"


def _specific(value: dict[str, object] | list[object], indent: int) -> list[str]:
    """Lines of a JSON-like object or list: blanks for dashes in keys, ``[0]:`` before list items."""
    pad = " " * indent
    lines: list[str] = []
    rows = value.items() if isinstance(value, dict) else ((f"[{n}]", item) for n, item in enumerate(value))
    for key, item in rows:
        shown = f"{pad}{key.replace('-', ' ')}:"
        if isinstance(item, (dict, list)):
            lines.append(shown)
            lines.extend(_specific(item, indent + 4))
        elif isinstance(item, bool):
            lines.append(f"{shown} {'true' if item else 'false'}")
        else:
            lines.append(f"{shown} {item}")
    return lines


def snapshot_table(snapshots: Iterable[SnapshotInfo]) -> list[str]:
    """Header and rows of the snapshot list (snapshot sheet, layout of release 10); dates in local time."""
    lines = [_snapshot_row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")]
    for snapshot in snapshots:
        seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 1_000_000_000)
        clock = (
            f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{nanoseconds // 1_000_000:03}"
        )
        lines.append(
            _snapshot_row(
                snapshot.id,
                snapshot.name,
                human_size(snapshot.vm_state_size),
                _local_time(snapshot.date_sec),
                clock,
                "--" if snapshot.icount is None else str(snapshot.icount),
            )
        )
    return lines


def _snapshot_row(id: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{_left(id, 7)} {_left(tag, 16)} {size:>8} {date:>19} {clock:>15} {icount:>10}"


def _left(text: str, width: int) -> str:
    """`text` filled to `width` bytes (not letters)."""
    return text + " " * (width - len(text.encode("utf-8", "surrogateescape")))


def _local_time(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def check_summary(result: CheckResult) -> str:
    """What ``check`` says at the end (check sheet, human output)."""
    text = _repairs(result) if result.corruptions_fixed or result.leaks_fixed else ""
    if not (result.corruptions or result.leaks or result.check_errors):
        text += "No errors were found on the image.\n"
    if result.corruptions:
        text += (
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it.\n"
        )
    if result.leaks:
        text += (
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data.\n"
        )
    if result.check_errors:
        text += f"\n{result.check_errors} internal errors have occurred during the check.\n"
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        fragmented, compressed = result.fragmented_clusters or 0, result.compressed_clusters or 0
        text += (
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{fragmented * 100 / allocated:.2f}% fragmented, "
            f"{compressed * 100 / allocated:.2f}% compressed clusters\n"
        )
    if result.image_end_offset:
        text += f"Image end offset: {result.image_end_offset}\n"
    return text


def _repairs(result: CheckResult) -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {result.leaks_fixed} leaked clusters\n    {result.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now...\n"
    )


def verdict(comparison: Comparison) -> str:
    """The last line of ``compare``."""
    return {
        "identical": "Images are identical.\n",
        "content": f"Content mismatch at offset {comparison.offset}!\n",
        "size": "Strict mode: Image size mismatch!\n",
        "status": f"Strict mode: Offset {comparison.offset} block status mismatch!\n",
    }[comparison.verdict]


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"


def map_row(entry: MapEntry) -> str:
    """One line of ``map``, for an extent that lies verbatim in a file."""
    assert entry.offset is not None
    return f"{_hex(entry.start):<16}{_hex(entry.length):<16}{_hex(entry.offset):<16}{entry.filename}\n"


def measure_lines(measure: Measure) -> str:
    """The result of ``measure`` in bytes."""
    text = f"required size: {measure.required}\nfully allocated size: {measure.fully_allocated}\n"
    return text if measure.bitmaps is None else f"{text}bitmaps size: {measure.bitmaps}\n"


def option_table(options: Iterable[Option], format: str | None) -> str:
    """``-o help``. With `format`: of the format alone, which the closing lines say."""
    text = f"Supported {format} options:\n" if format is not None else "Supported options:\n"
    text += option_rows(options)
    if format is None:
        return text
    return text + (
        "\nThe protocol level may support further options.\n"
        "Specify the target filename to include those options.\n"
    )


def option_rows(options: Iterable[Option]) -> str:
    """A line for each option, sorted by name (common sheet, section 6)."""
    return "".join(
        f"  {f'{option.name}=<{option.type}>':<22} - {option.help}\n"
        for option in sorted(options, key=lambda option: option.name)
    )
