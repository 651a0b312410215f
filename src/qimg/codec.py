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
    The same in zlib's wrapping (RFC 1950), whose checksum is not looked at.

``zstd``
    Level 3, with content size, without checksum.
"""

from __future__ import annotations

from qimg.errors import QimgError
from qimg.records import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
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

_DEFLATE_LEVEL = 2
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

    def compress(data: Bytes) -> bytes:
        return squeeze(data, _DEFLATE_LEVEL, wrapper)

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
