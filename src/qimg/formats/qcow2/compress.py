"""Compressed clusters: where they go, how they are described, who counts them (sheet, section 5)."""

from __future__ import annotations

from qimg.formats.qcow2.alloc import BatchWriter, HostSpace, file_too_large
from qimg.formats.qcow2.structs import COMPRESSION_ZLIB, L2_COMPRESSED, compressed_shift

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.qcow2.live_refcounts import LiveRefcounts
    from qimg.formats.qcow2.refcounts import Refcounts
    from qimg.storage.base import Bytes, Storage

_SECTOR = 512


class Encoder:
    """Compresses one cluster. Pure: many threads may call one instance."""

    def __init__(self, compression_type: int, cluster_size: int) -> None:
        self._name = "deflate" if compression_type == COMPRESSION_ZLIB else "zstd"
        self._cluster_size = cluster_size
        self._compress: Callable[[Bytes], bytes] | None = None

    def __call__(self, data: Bytes) -> bytes | None:
        """`data`, filled up with zeros to a cluster, compressed; None where that saves nothing."""
        if self._compress is None:
            from qimg.codec import codec

            self._compress = codec(self._name).compress
        if len(data) < self._cluster_size:
            data = bytes(data).ljust(self._cluster_size, b"\0")
        packed = self._compress(data)
        return packed if len(packed) < self._cluster_size else None


class Packer:
    """Packs compressed clusters byte after byte. Each host cluster that one touches counts it.

    Subclasses know where there is room and who counts.
    """

    def __init__(self, file: Storage, cluster_bits: int) -> None:
        self._cluster_size = 1 << cluster_bits
        self._shift = compressed_shift(cluster_bits)
        self._writer = BatchWriter(file)
        self._next = 0  # byte after the last one packed; 0: there is no cluster to go on in

    def put(self, data: Bytes) -> int:
        """Store `data` (less than a cluster); its L2 descriptor. Raises StorageError."""
        assert 0 < len(data) < self._cluster_size
        offset = self._place(len(data))
        last = offset + len(data) - 1
        if last >> self._shift:
            raise file_too_large()
        self._writer.put(offset, data)
        sectors = last // _SECTOR - offset // _SECTOR
        return L2_COMPRESSED | sectors << self._shift | offset

    def _place(self, length: int) -> int:
        """Byte offset for the next `length` bytes, counted."""
        raise NotImplementedError

    def _give_up(self, cluster: int) -> None:
        """One reference less to a host cluster."""
        raise NotImplementedError

    def drop(self, descriptor: int) -> None:
        """Nothing refers to the compressed cluster with this L2 descriptor any more."""
        offset = descriptor & ((1 << self._shift) - 1)
        sectors = (descriptor & (L2_COMPRESSED - 1)) >> self._shift
        last = (offset // _SECTOR + sectors) * _SECTOR
        for cluster in range(offset // self._cluster_size, last // self._cluster_size + 1):
            self._give_up(cluster)

    def flush(self) -> None:
        """Write what is pending, to a whole number of sectors."""
        self._writer.pad(_SECTOR)


class FreshPacker(Packer):
    """Packs into an image that is filled front to back.

    The next one starts where the last ended if it fits into what is left of that host cluster, or if the
    next host cluster is still to be handed out; otherwise in a new cluster. A host cluster whose count is
    at its maximum takes no more.
    """

    def __init__(self, file: Storage, space: HostSpace, refcounts: Refcounts, cluster_bits: int) -> None:
        super().__init__(file, cluster_bits)
        self._space = space
        self._refcounts = refcounts

    def _place(self, length: int) -> int:
        size = self._cluster_size
        cluster, used = divmod(self._next, size)
        offset = self._next
        fits = length <= size - used
        if used and (fits or self._space.end == cluster + 1):
            count = self._refcounts.get(cluster)
            if count < self._refcounts.maximum:
                self._refcounts.set(cluster, count + 1)
                if not fits:
                    self._space.take(1)
                self._next = offset + length
                return offset
        offset = self._space.take(1) * size
        self._next = offset + length
        return offset

    def _give_up(self, cluster: int) -> None:
        count = self._refcounts.get(cluster) - 1
        if count:
            self._refcounts.set(cluster, count)
            return
        if cluster == self._next // self._cluster_size:
            self._next = 0
        self._writer.flush()  # bytes still to be written must not land on what comes there next
        self._refcounts.release(cluster, 1)


class LivePacker(Packer):
    """Packs into an existing image, as `FreshPacker` does. What was packed before it was opened is left
    alone."""

    def __init__(self, file: Storage, refcounts: LiveRefcounts, cluster_bits: int) -> None:
        super().__init__(file, cluster_bits)
        self._refcounts = refcounts

    def _place(self, length: int) -> int:
        size = self._cluster_size
        cluster, used = divmod(self._next, size)
        offset = self._next
        fits = length <= size - used
        room = used and self._refcounts.get(cluster) < self._refcounts.maximum
        if room and (fits or self._refcounts.take_at(cluster + 1)):
            self._refcounts.share(cluster)
            self._next = offset + length
            return offset
        ((cluster, _count),) = self._refcounts.take_any(1)
        self._next = cluster * size + length
        return cluster * size

    def _give_up(self, cluster: int) -> None:
        if cluster == self._next // self._cluster_size:
            self._next = 0
        self._refcounts.release(cluster)

    def restart(self) -> None:
        """Go on in a new cluster."""
        self._next = 0
