"""LZFSE, decoding only, in plain Python: some megabytes a second.

A string of blocks, each with a magic of four bytes (all integers little-endian):

======== =========================================================================================
``bvx-`` bytes as they are
``bvxn`` LZVN: opcodes of one to three bytes, each with literals and a copy
``bvx1`` literals and (literals, copy, distance) triples, both coded by finite-state entropy; frequencies
         as plain integers
``bvx2`` the same with the frequencies coded and the integers packed
``bvx$`` the end
======== =========================================================================================

The entropy coder's states are a table each: from a state follow a symbol, how many bits to take, and what to
add to them for the next state. Its bit strings are read from their end to their beginning.
"""

from __future__ import annotations

from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    # Of each state: (bits of state and value, bits of the value, base of the next state, base of the value).
    ValueTable = list[tuple[int, int, int, int]]

_END, _PLAIN, _LZVN, _FSE1, _FSE2 = b"bvx$", b"bvx-", b"bvxn", b"bvx1", b"bvx2"

# States and symbols of the four coders, in the order in which their frequencies are stored.
_L_STATES, _M_STATES, _D_STATES, _LITERAL_STATES = 64, 64, 256, 1024
_L_SYMBOLS, _M_SYMBOLS, _D_SYMBOLS, _LITERAL_SYMBOLS = 20, 20, 64, 256
_SYMBOLS = _L_SYMBOLS + _M_SYMBOLS + _D_SYMBOLS + _LITERAL_SYMBOLS

# Bits that follow the symbol of a value.
_L_BITS = (*[0] * 16, 2, 3, 5, 8)
_M_BITS = (*[0] * 16, 3, 5, 8, 11)
_D_BITS = tuple(number // 4 for number in range(_D_SYMBOLS))

_HEADER1 = Struct("<4s6Ii4Hi3H360H2x")
_HEADER2 = Struct("<4sI3Q")
_MAX_LITERALS, _MAX_MATCHES = 40000, 10000

# A coded frequency by its lowest five bits: how long it is, and the frequency where that says it all.
_FREQUENCY_BITS = (2, 3, 2, 5, 2, 3, 2, 8, 2, 3, 2, 5, 2, 3, 2, 14) * 2
_FREQUENCIES = (
    0,
    2,
    1,
    4,
    0,
    3,
    1,
    0,
    0,
    2,
    1,
    5,
    0,
    3,
    1,
    0,
    0,
    2,
    1,
    6,
    0,
    3,
    1,
    0,
    0,
    2,
    1,
    7,
    0,
    3,
    1,
    0,
)
#: Bytes of a bit string taken at once.
_STEP = 16
#: Bits that any single step of decoding may need: four literals, or one triple.
_ENOUGH = 64


def decode(data: bytes, size: int) -> bytes:
    """The content of `data` up to its end mark, which has to be exactly `size` bytes.

    Raises ValueError, IndexError or struct.error for bad data."""
    out = bytearray()
    at = 0
    while True:
        magic = data[at : at + 4]
        if magic == _END:
            break
        if magic == _PLAIN:
            at = _plain(data, at, out)
        elif magic == _LZVN:
            at = _lzvn_block(data, at, out, size)
        elif magic in (_FSE1, _FSE2):
            at = _fse_block(data, at, out, size)
        else:
            raise ValueError(f"a block of unknown kind at {at}")
        if len(out) > size:
            raise ValueError(f"it gives more than {size} bytes")
    if len(out) != size:
        raise ValueError(f"it gives {len(out)} bytes instead of {size}")
    return bytes(out)


def _plain(data: bytes, at: int, out: bytearray) -> int:
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    at += 8
    if at + length > len(data):
        raise ValueError("it ends inside a block")
    out += data[at : at + length]
    return at + length


def _copy(out: bytearray, distance: int, count: int) -> None:
    """Append `count` bytes from `distance` bytes back, which may reach into what is appended."""
    start = len(out) - distance
    if start < 0 or not distance:
        raise ValueError("a copy from before the beginning")
    part = out[start : start + count]
    if len(part) < count:
        part = (part * (count // distance + 1))[:count]
    out += part


# -- LZVN


def _lzvn_block(data: bytes, at: int, out: bytearray, size: int) -> int:
    raw = int.from_bytes(data[at + 4 : at + 8], "little")
    length = int.from_bytes(data[at + 8 : at + 12], "little")
    at += 12
    before = len(out)
    if at + length > len(data) or raw > size - before:
        raise ValueError("it ends inside a block")
    _lzvn(data[at : at + length], out, before + raw)
    if len(out) != before + raw:
        raise ValueError(f"a block gives {len(out) - before} bytes instead of {raw}")
    return at + length


def _lzvn(data: bytes, out: bytearray, end: int) -> None:
    """Opcodes up to the end mark; `out` may grow to `end` bytes."""
    at = distance = 0
    while True:
        code = data[at]
        if code == 0x06:  # end of stream
            return
        if code in (0x0E, 0x16):  # nothing
            at += 1
            continue
        at, literals, count, new = _opcode(data, at, code)
        if literals:
            part = data[at : at + literals]
            if len(part) < literals:
                raise ValueError("it ends inside a run")
            out += part
            at += literals
        if count:
            distance = distance if new is None else new
            _copy(out, distance, count)
        if len(out) > end:
            raise ValueError("a block gives more than it says")


def _opcode(data: bytes, at: int, code: int) -> tuple[int, int, int, int | None]:
    """What the opcode at `at` says: where its literals are, how many, the length of the copy after them and
    its distance, None for that of the last copy."""
    if code >= 0xE0:  # 111x nnnn: literals or a copy alone, 0 for n: 16 + the next byte
        count = code & 0x0F
        at += 1
        if not count:
            count = data[at] + 16
            at += 1
        return (at, count, 0, None) if code < 0xF0 else (at, 0, count, None)
    if code & 0xE0 == 0xA0:  # 101l lmmm ddddddmm dddddddd
        word = data[at + 1] | data[at + 2] << 8
        return at + 3, code >> 3 & 3, ((code & 7) << 2 | word & 3) + 3, word >> 2
    literals, count, kind = code >> 6, (code >> 3 & 7) + 3, code & 7  # llmm mddd
    if 0x70 <= code <= 0x7F or 0xD0 <= code <= 0xDF or (kind == 6 and not literals):
        raise ValueError(f"unknown opcode {code:#x}")
    if kind == 6:
        return at + 1, literals, count, None
    if kind == 7:
        return at + 3, literals, count, data[at + 1] | data[at + 2] << 8
    return at + 2, literals, count, kind << 8 | data[at + 1]


# -- finite-state entropy


class _Block:
    """The header of such a block. Lengths in bytes, `literal_bits` and `triple_bits`: bits in the last byte
    of each string that do not count, as a negative number."""

    raw: int
    literals: int
    triples: int
    literal_length: int
    triple_length: int
    literal_bits: int
    triple_bits: int
    literal_states: Sequence[int]
    states: Sequence[int]
    frequencies: Sequence[int]
    size: int


def _fse_block(data: bytes, at: int, out: bytearray, size: int) -> int:
    block = (_header1 if data[at : at + 4] == _FSE1 else _header2)(data, at)
    before = len(out)
    if block.literals > _MAX_LITERALS or block.literals % 4 or block.triples > _MAX_MATCHES:
        raise ValueError("a block with too many literals or copies")
    if not 0 < block.raw <= size - before:  # an empty one would cost time for nothing
        raise ValueError(f"a block says it gives {block.raw} bytes, of {size} in all")
    start = at + block.size
    middle = start + block.literal_length
    end = middle + block.triple_length
    if end > len(data):
        raise ValueError("it ends inside a block")
    literals = _literals(data, start, middle, block)
    _triples(data, middle, end, block, literals, out, before + block.raw)
    if len(out) != before + block.raw:
        raise ValueError(f"a block gives {len(out) - before} bytes instead of {block.raw}")
    return end


def _header1(data: bytes, at: int) -> _Block:
    block = _Block()
    values: tuple[Any, ...] = _HEADER1.unpack_from(data, at)
    block.raw, _, block.literals, block.triples, block.literal_length, block.triple_length = values[1:7]
    block.literal_bits, block.literal_states = values[7], values[8:12]
    block.triple_bits, block.states = values[12], values[13:16]
    block.frequencies = values[16:]
    block.size = _HEADER1.size
    return block


def _header2(data: bytes, at: int) -> _Block:
    block = _Block()
    _, block.raw, first, second, third = _HEADER2.unpack_from(data, at)
    block.literals = first & 0xFFFFF
    block.literal_length = first >> 20 & 0xFFFFF
    block.triples = first >> 40 & 0xFFFFF
    block.literal_bits = (first >> 60 & 7) - 7
    block.literal_states = [second >> shift & 0x3FF for shift in (0, 10, 20, 30)]
    block.triple_length = second >> 40 & 0xFFFFF
    block.triple_bits = (second >> 60 & 7) - 7
    block.size = third & 0xFFFFFFFF
    block.states = [third >> shift & 0x3FF for shift in (32, 42, 52)]
    if block.size < _HEADER2.size or block.size > _HEADER2.size + 2 * _SYMBOLS or at + block.size > len(data):
        raise ValueError("a block's header is too short or too long")
    block.frequencies = _frequencies(data[at + _HEADER2.size : at + block.size])
    return block


def _frequencies(data: bytes) -> Sequence[int]:
    """The coded frequencies, from the lowest bit on."""
    if not data:
        return [0] * _SYMBOLS
    bits = int.from_bytes(data, "little")
    left = 8 * len(data)
    found = []
    for _ in range(_SYMBOLS):
        code = bits & 31
        length = _FREQUENCY_BITS[code]
        value = _FREQUENCIES[code]
        if length == 8:
            value = 8 + (bits >> 4 & 0x0F)
        elif length == 14:
            value = 24 + (bits >> 4 & 0x3FF)
        found.append(value)
        bits >>= length
        left -= length
    if not 0 <= left < 8:
        raise ValueError("a block's frequencies do not fill their place")
    return found


def _states(states: int, frequencies: Sequence[int]) -> list[tuple[int, int, int]]:
    """(symbol, bits, base of the next state) of each state: a symbol has as many states as its frequency."""
    table: list[tuple[int, int, int]] = []
    for symbol, frequency in enumerate(frequencies):
        if not frequency:
            continue
        if len(table) + frequency > states:
            raise ValueError("a block's frequencies exceed the number of states")
        bits = states.bit_length() - frequency.bit_length()
        long = (2 * states >> bits) - frequency
        for number in range(frequency):
            if number < long:
                table.append((symbol, bits, ((frequency + number) << bits) - states))
            else:
                table.append((symbol, bits - 1, (number - long) << (bits - 1)))
    return table


def _values(states: int, frequencies: Sequence[int], extra: Sequence[int]) -> ValueTable:
    bases = [0]
    for bits in extra:
        bases.append(bases[-1] + (1 << bits))
    return [
        (bits + extra[symbol], extra[symbol], base, bases[symbol])
        for symbol, bits, base in _states(states, frequencies)
    ]


def _open(data: bytes, start: int, end: int, skip: int) -> tuple[int, int, int]:
    """The last bits of the string ``start .. end`` without the `skip` (0 or less) that do not count: the
    bits, how many, and where what is left of the string ends."""
    low = max(start, end - _STEP)
    bits = int.from_bytes(data[low:end], "little")
    count = 8 * (end - low) + skip
    if count < 0 or bits >> count or not -7 <= skip <= 0:
        raise ValueError("a bit string has a bad end")
    return bits, count, low


def _literals(data: bytes, start: int, end: int, block: _Block) -> bytes:
    """All literals of a block: four states take turns."""
    if not block.literals:
        return b""
    table = _states(_LITERAL_STATES, block.frequencies[-_LITERAL_SYMBOLS:])
    bits, left, at = _open(data, start, end, block.literal_bits)
    a, b, c, d = block.literal_states
    out = bytearray()
    append = out.append
    for _ in range(block.literals >> 2):
        if left < _ENOUGH and at > start:
            low = max(start, at - _STEP)
            bits = bits << 8 * (at - low) | int.from_bytes(data[low:at], "little")
            left += 8 * (at - low)
            at = low
        # A shift by less than nothing, where the bits do not suffice, raises ValueError.
        symbol, take, base = table[a]
        left -= take
        a = base + (bits >> left)
        bits &= (1 << left) - 1
        append(symbol)
        symbol, take, base = table[b]
        left -= take
        b = base + (bits >> left)
        bits &= (1 << left) - 1
        append(symbol)
        symbol, take, base = table[c]
        left -= take
        c = base + (bits >> left)
        bits &= (1 << left) - 1
        append(symbol)
        symbol, take, base = table[d]
        left -= take
        d = base + (bits >> left)
        bits &= (1 << left) - 1
        append(symbol)
    return bytes(out)


def _triples(
    data: bytes, start: int, end: int, block: _Block, literals: bytes, out: bytearray, limit: int
) -> None:
    """Do what the block's triples say: append literals, then copy. `out` may grow to `limit` bytes."""
    frequencies = block.frequencies
    l_table = _values(_L_STATES, frequencies[:_L_SYMBOLS], _L_BITS)
    frequencies = frequencies[_L_SYMBOLS:]
    m_table = _values(_M_STATES, frequencies[:_M_SYMBOLS], _M_BITS)
    d_table = _values(_D_STATES, frequencies[_M_SYMBOLS : _M_SYMBOLS + _D_SYMBOLS], _D_BITS)
    bits, left, at = _open(data, start, end, block.triple_bits)
    l_state, m_state, d_state = block.states
    used = distance = 0
    for _ in range(block.triples):
        if left < _ENOUGH and at > start:
            low = max(start, at - _STEP)
            bits = bits << 8 * (at - low) | int.from_bytes(data[low:at], "little")
            left += 8 * (at - low)
            at = low
        take, extra, base, value = l_table[l_state]
        left -= take
        word = bits >> left
        bits &= (1 << left) - 1
        l_state = base + (word >> extra)
        length = value + (word & (1 << extra) - 1)
        take, extra, base, value = m_table[m_state]
        left -= take
        word = bits >> left
        bits &= (1 << left) - 1
        m_state = base + (word >> extra)
        count = value + (word & (1 << extra) - 1)
        take, extra, base, value = d_table[d_state]
        left -= take
        word = bits >> left
        bits &= (1 << left) - 1
        d_state = base + (word >> extra)
        new = value + (word & (1 << extra) - 1)
        if new:
            distance = new
        if used + length > len(literals) or len(out) + length + count > limit:
            raise ValueError("a block uses more literals, or gives more bytes, than it has")
        out += literals[used : used + length]
        used += length
        if count:
            _copy(out, distance, count)
