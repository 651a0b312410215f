"""Bits of dirty bitmaps, as bytes: bit n of byte n // 8 counted from the least significant (section 9).

Pure functions that never look at one bit after the other: ranges are slices, unions are numbers, and other
granularities are table lookups of whole buffers.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_tables: dict[tuple[Callable[[int, int], bytes], int, int], bytes] = {}
#: Source bytes that are brought to another granularity at once, and the result's size at most.
_PIECE = 4096


def set_bits(bits: bytearray, low: int, high: int) -> None:
    """Set the bits ``low .. high`` (at least one, all inside `bits`)."""
    first, last = low >> 3, high - 1 >> 3
    head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> 7 - (high - 1 & 7)
    if first == last:
        bits[first] |= head & tail
        return
    bits[first] |= head
    bits[last] |= tail
    bits[first + 1 : last] = b"\xff" * (last - first - 1)


def clear_from(bits: bytearray, low: int) -> None:
    """Clear every bit from `low` on."""
    keep = -(-low // 8)
    bits[keep:] = bytes(max(0, len(bits) - keep))
    if low % 8 and keep <= len(bits):
        bits[keep - 1] &= (1 << low % 8) - 1


def unite(bits: bytearray, at: int, more: bytes | bytearray | memoryview) -> None:
    """Set in `bits`, from byte `at` on, what is set in `more`, which fits in."""
    end = at + len(more)
    both = int.from_bytes(bits[at:end], "little") | int.from_bytes(more, "little")
    bits[at:end] = both.to_bytes(len(more), "little")


def rescaled(bits: bytes, granularity: int, wanted: int) -> Iterator[tuple[int, bytes]]:
    """`bits` of one granularity as bits of another: (byte offset, bytes) of the parts that hold set bits.

    A wanted bit is set where any guest byte that it stands for is covered by a set bit. Both granularities
    are powers of two. The last bits may stand for bytes behind the disk's end."""
    shift = wanted.bit_length() - granularity.bit_length()
    if shift >= 0:
        step = max(_PIECE, 1 << shift)
        for at in range(0, len(bits), step):
            piece = bits[at : at + step]
            if piece.count(0) != len(piece):
                yield at >> shift, coarser(piece, shift)
        return
    step = max(1, _PIECE >> -shift)
    for at in range(0, len(bits), step):
        piece = bits[at : at + step]
        if piece.count(0) != len(piece):
            yield at << -shift, finer(piece, -shift)


def coarser(bits: bytes, shift: int) -> bytes:
    """Each ``2 ** shift`` bits joined into one that is set where any of them is."""
    while shift:
        step = min(shift, 3)
        width = 1 << step  # bits that become one, and bytes that become one
        bits += bytes(-len(bits) % width)
        joined = 0
        for part in range(width):
            joined |= int.from_bytes(bits[part::width].translate(_table(_joining, width, part)), "little")
        bits = joined.to_bytes(len(bits) // width, "little")
        shift -= step
    return bits


def finer(bits: bytes, shift: int) -> bytes:
    """Each bit repeated ``2 ** shift`` times."""
    while shift:
        step = min(shift, 3)
        width = 1 << step  # bits that a bit becomes, and bytes that a byte becomes
        spread = bytearray(len(bits) * width)
        for part in range(width):
            spread[part::width] = bits.translate(_table(_spreading, width, part))
        bits = bytes(spread)
        shift -= step
    return bits


def _table(make: Callable[[int, int], bytes], width: int, part: int) -> bytes:
    """One of the tables below, made once."""
    table = _tables.get((make, width, part))
    if table is None:
        table = _tables[make, width, part] = make(width, part)
    return table


def _joining(width: int, part: int) -> bytes:
    """Byte -> its share of the joined byte, when it is the part-th of `width`."""
    each = 8 // width
    group = (1 << width) - 1
    return bytes(
        sum(bool(byte >> number * width & group) << part * each + number for number in range(each))
        for byte in range(256)
    )


def _spreading(width: int, part: int) -> bytes:
    """Byte -> the part-th of the `width` bytes that it becomes."""
    each = 8 // width
    group = (1 << width) - 1
    return bytes(
        sum((byte >> part * each + number & 1) * group << number * width for number in range(each))
        for byte in range(256)
    )
