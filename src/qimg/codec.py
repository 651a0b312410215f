"""Compressors behind one table. The only importer of compression libraries, each on first use.

`codec` gives a `Codec`: ``compress(data)`` and ``decompress(data, size)``, both pure, both usable from
many threads at once (the libraries release the interpreter lock).

``deflate``
    Raw deflate without any wrapper, by isal (igzip), or by zlib where isal is missing. Level 2 of isal,
    chosen on 64 KiB clusters of real files, two cores shared with other work; size against
    ``zlib.compressobj(-1, DEFLATED, -12, 9)``, which is what the real program writes:

    ============= ======================= ====== ============ ==============
    level, window size: lib, share, bin   speed  2 threads    zlib, the same
    ============= ======================= ====== ============ ==============
    0, 32 KiB     1.075  -      -         390    -            23 MB/s
    1, 32 KiB     0.998  1.010  1.054     390    350..700
    1,  4 KiB     1.033  1.050  1.094     330    380..640
    2, 32 KiB     0.993  1.005  1.042     370    390..740
    3, 32 KiB     0.978  -      -         130    130..260
    ============= ======================= ====== ============ ==============

    So level 2 is the smallest that costs next to nothing. The window of 32 KiB is more than the 4 KiB that
    the real program uses when it writes; when it reads it takes any (qcow2 sheet, section 5).

``zlib``
    The same in zlib's wrapping (RFC 1950), whose checksum is not looked at. Level 3: the real program writes
    vmdk streams with a window of 32 KiB, so more is needed to come near. Grains of 64 KiB of real files, one
    core, sizes in whole sectors against ``zlib.compress(data, 6)``, which makes what the real program makes:

    ============== ===== ==========
    level          size  speed
    ============== ===== ==========
    isal 1         1.086 600 MB/s
    isal 2         1.078 580
    isal 3         1.059 350
    zlib 1         1.083 104
    zlib 3         1.048  89
    zlib 6         1      52
    ============== ===== ==========

``zstd``
    Level 3, with content size, without checksum.

`unpack` decodes a whole stream, from its beginning to its end, of formats that are only read: ``zlib``,
``bzip2``, ``xz``, ``lzfse`` and ``adc``.
"""

from __future__ import annotations

from qimg.errors import QimgError
from qimg.records import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NamedTuple

    from qimg.storage.base import Bytes


class CodecError(QimgError):
    """Compressed data that does not hold what it should."""


if TYPE_CHECKING:

    class Codec(NamedTuple):
        """``compress(data)``; ``decompress(data, size)`` gives exactly `size` bytes or raises CodecError.
        What follows the compressed data is ignored."""

        compress: Callable[[Bytes], bytes]
        decompress: Callable[[Bytes, int], bytes]

else:
    Codec = record("Codec", ("compress", "decompress"))

_loaded: dict[str, Codec] = {}

_DEFLATE_LEVEL, _ZLIB_LEVEL = 2, 3
_ZSTD_LEVEL = 3
#: Bytes of zstd input decoded between two looks at how much came out: bounds what a bomb can do (a block
#: of 4 bytes stands for up to 128 KiB).
_ZSTD_STEP = 256


def codec(name: str) -> Codec:
    """The codec called `name` (see above). Raises CodecError where its library is missing."""
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = _MAKERS[name]()
    return found


def _short(got: int, size: int) -> CodecError:
    return CodecError(f"Compressed data gives {got} bytes instead of {size}")


# -- deflate


def _make_deflate(*, wrapped: bool = False) -> Codec:
    try:
        from isal import igzip_lib
    except ImportError:
        return _make_zlib(wrapped=wrapped)
    decompressor = igzip_lib.IgzipDecompressor
    how = igzip_lib.DECOMP_ZLIB if wrapped else igzip_lib.DECOMP_DEFLATE
    failure: type[Exception] = igzip_lib.error  # type: ignore[assignment]  # a class, whatever the stub says
    squeeze, wrapper = igzip_lib.compress, igzip_lib.COMP_ZLIB if wrapped else igzip_lib.COMP_DEFLATE
    level = _ZLIB_LEVEL if wrapped else _DEFLATE_LEVEL

    def compress(data: Bytes) -> bytes:
        return squeeze(data, level, wrapper)

    def decompress(data: Bytes, size: int) -> bytes:
        try:
            out: bytes = decompressor(how).decompress(data, size)
        except failure as error:
            raise CodecError(f"Invalid compressed data: {error}") from None
        if len(out) != size:
            raise _short(len(out), size)
        return out

    return Codec(compress, decompress)


def _make_zlib(*, wrapped: bool) -> Codec:
    import zlib

    def compress(data: Bytes) -> bytes:
        stream = zlib.compressobj(-1, zlib.DEFLATED, 15 if wrapped else -12, 9)
        return stream.compress(data) + stream.flush()

    def decompress(data: Bytes, size: int) -> bytes:
        try:
            out = zlib.decompressobj(15 if wrapped else -15).decompress(data, size)
        except zlib.error as error:
            raise CodecError(f"Invalid compressed data: {error}") from None
        if len(out) != size:
            raise _short(len(out), size)
        return out

    return Codec(compress, decompress)


# -- zstd


def _make_zstd() -> Codec:
    try:
        import zstandard
    except ImportError:
        raise CodecError(
            "zstd is not available in this installation", hint="Install the Python package 'zstandard'."
        ) from None
    from _thread import _local

    local: Any = _local()  # compressors and decompressors of zstandard serve one thread each

    def compress(data: Bytes) -> bytes:
        if not hasattr(local, "compressor"):
            local.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        packed: bytes = local.compressor.compress(data)
        return packed

    def decompress(data: Bytes, size: int) -> bytes:
        if not hasattr(local, "decompressor"):
            local.decompressor = zstandard.ZstdDecompressor()
        try:
            if zstandard.frame_content_size(data) == size:
                out: bytes = local.decompressor.decompress(data, allow_extra_data=True)
            else:
                out = _zstd_frames(local.decompressor, data, size)
        except zstandard.ZstdError as error:
            raise CodecError(f"Invalid compressed data: {error}") from None
        if len(out) != size:
            raise _short(len(out), size)
        return out

    return Codec(compress, decompress)


def _zstd_frames(decompressor: Any, data: Bytes, size: int) -> bytes:
    """`size` bytes of one or more frames. The last has to end there (sheet, section 5)."""
    rest = bytes(data)
    parts: list[bytes] = []
    total = 0
    while total < size:
        frame = decompressor.decompressobj()
        at = 0
        while not frame.eof:
            if at >= len(rest):
                raise _short(total, size)
            part = frame.decompress(rest[at : at + _ZSTD_STEP])
            at += _ZSTD_STEP
            total += len(part)
            if total > size:
                raise CodecError(f"Compressed data gives more than {size} bytes")
            parts.append(part)
        rest = rest[at - len(frame.unused_data) :] if frame.unused_data else rest[at:]
    return b"".join(parts)


_MAKERS: dict[str, Callable[[], Codec]] = {
    "deflate": _make_deflate,
    "zlib": lambda: _make_deflate(wrapped=True),
    "zstd": _make_zstd,
}


def compress_deflate(data: Bytes) -> bytes:
    """`data` as raw deflate (see above for level and speed)."""
    return codec("deflate").compress(data)


# -- whole streams

#: Memory for one xz stream: what its dictionary may take.
_XZ_MEMORY = 96 << 20
#: Bytes that a stream is asked for at once: it makes room for them, and more than once while it grows.
_AT_ONCE = 4 << 20


def unpack(name: str, pieces: Iterable[Bytes], out: memoryview) -> None:
    """Fill `out` with the stream called `name` (see above) that `pieces` make up. Its content has to end
    where `out` does, and its checksum to be right; what follows the stream is ignored. Pure.

    Raises CodecError."""
    maker = _STREAMS.get(name)
    if maker is not None:
        _unpack_stream(*maker(), pieces, out)
        return
    from struct import error

    decode = _whole_decoder(name)
    try:
        out[:] = decode(b"".join(pieces), len(out))
    except IndexError:
        raise CodecError("Invalid compressed data: it ends too early") from None
    except (ValueError, error) as reason:
        raise CodecError(f"Invalid compressed data: {reason}") from None


def _whole_decoder(name: str) -> Callable[[bytes, int], bytes]:
    if name == "adc":
        from qimg.adc import decode
    else:
        from qimg.lzfse import decode
    return decode


def _unpack_stream(stream: Any, failure: type[Exception], pieces: Iterable[Bytes], out: memoryview) -> None:
    at = 0
    try:
        for piece in pieces:
            more = True
            while more and not stream.eof:
                part = stream.decompress(piece, min(len(out) - at + 1, _AT_ONCE))
                if at + len(part) > len(out):
                    raise CodecError(f"Compressed data gives more than {len(out)} bytes")
                out[at : at + len(part)] = part
                at += len(part)
                more = not stream.needs_input and (len(part) > 0 or len(piece) > 0)
                piece = b""
            if stream.eof:
                break
    except failure as error:
        raise CodecError(f"Invalid compressed data: {error}") from None
    if not stream.eof:
        raise CodecError("Invalid compressed data: it ends too early")
    if at != len(out):
        raise _short(at, len(out))


def _zlib_stream() -> tuple[Any, type[Exception]]:
    try:
        from isal import igzip_lib
    except ImportError:
        import zlib

        return _ZlibStream(zlib.decompressobj()), zlib.error
    failure: type[Exception] = igzip_lib.error  # type: ignore[assignment]  # a class, whatever the stub says
    return igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_ZLIB), failure


class _ZlibStream:
    """zlib's object with the interface that the others have."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._rest = b""
        self._full = False

    @property
    def eof(self) -> bool:
        """The stream's end has been seen."""
        return bool(self._inner.eof)

    @property
    def needs_input(self) -> bool:
        """There is nothing left to decode."""
        return not self._rest and not self._full

    def decompress(self, data: Bytes, length: int) -> bytes:
        """Up to `length` bytes more."""
        out: bytes = self._inner.decompress(self._rest + data, length)
        self._rest = self._inner.unconsumed_tail
        self._full = len(out) == length
        return out


def _bzip2_stream() -> tuple[Any, type[Exception]]:
    import bz2

    return bz2.BZ2Decompressor(), OSError


def _xz_stream() -> tuple[Any, type[Exception]]:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY), lzma.LZMAError


_STREAMS: dict[str, Callable[[], tuple[Any, type[Exception]]]] = {
    "bzip2": _bzip2_stream,
    "xz": _xz_stream,
    "zlib": _zlib_stream,
}
