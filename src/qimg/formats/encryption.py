"""Encrypted data of images: a storage that decrypts what is read and encrypts what is written (luks sheet 3).

A format whose data is encrypted names such a storage as the `source` of its extents, so whoever moves bytes
sees plain ones and need not know. It is addressed as what lies below.
"""

from __future__ import annotations

from qimg.errors import NotSupported
from qimg.extent import MAPPED, ZERO, Extent
from qimg.storage.base import Filter, Limits
from qimg.units import SECTOR, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from qimg.crypto.ciphers import SectorCipher
    from qimg.storage.base import Buffer, Bytes, Storage

#: Bytes encrypted before they are written. A buffer that is kept spares the kernel clearing new pages.
_AT_ONCE = 1 << 20


class Encrypted(Filter):
    """What `child` holds, as plain text. The sector at offset 0 has the number `first_sector`, which may be
    negative: then nothing before number 0 is asked for."""

    #: What lies at an offset is not what is read there.
    addressed = False

    def __init__(self, child: Storage, cipher: SectorCipher, *, first_sector: int = 0) -> None:
        from _thread import _local, allocate_lock

        super().__init__(child)
        below = child.limits
        self.limits = Limits(
            request_alignment=max(SECTOR, below.request_alignment),
            memory_alignment=below.memory_alignment,
            preferred_request=below.preferred_request,
            fast_zero=False,
            parallel=below.parallel,
        )
        self.zero_init = False
        self._cipher = cipher
        self._first_sector = first_sector
        self._local: Any = _local()
        self._changing = allocate_lock()

    def numbered(self, first_sector: int) -> Encrypted:
        """The same storage with other sector numbers; both share memory and lock."""
        other = Encrypted(self.child, self._cipher, first_sector=first_sector)
        other._local, other._changing = self._local, self._changing
        return other

    def read_into(self, buf: Buffer, offset: int) -> None:
        start, end = round_down(offset, SECTOR), round_up(offset + len(buf), SECTOR)
        if (start, end) == (offset, offset + len(buf)):
            self.child.read_into(buf, offset)
            there = (
                min(end, round_up(self.child.size, SECTOR)) - start
            )  # behind the end are zeros, not secrets
            if there > 0:
                self._cipher.decrypt(memoryview(buf)[:there], self._number(offset))
        else:
            whole = bytearray(end - start)
            self.read_into(whole, start)
            memoryview(buf)[:] = memoryview(whole)[offset - start : offset - start + len(buf)]

    def write(self, buf: Bytes, offset: int) -> None:
        start, end = round_down(offset, SECTOR), round_up(offset + len(buf), SECTOR)
        if (start, end) == (offset, offset + len(buf)):
            self._write_sectors(memoryview(buf), offset)
            return
        with self._changing:  # two parts of one sector: neither may be lost
            whole = self.read(start, end - start)
            whole[offset - start : offset - start + len(buf)] = buf
            self._write_sectors(memoryview(whole), start)

    def _write_sectors(self, view: memoryview, offset: int) -> None:
        scratch = self._scratch()
        for at in range(0, len(view), _AT_ONCE):
            part = view[at : at + _AT_ONCE]
            secret = scratch[: len(part)]
            self._cipher.encrypt_into(part, secret, self._number(offset + at))
            self.child.write(secret, offset + at)

    def _scratch(self) -> memoryview:
        """This thread's buffer: page-aligned, so that it serves O_DIRECT."""
        view: memoryview | None = getattr(self._local, "view", None)
        if view is None:
            import mmap

            view = self._local.view = memoryview(mmap.mmap(-1, _AT_ONCE))
        return view

    def _end(self) -> int:
        """The end of the child's last sector, which may be cut short."""
        return round_up(self.child.size, SECTOR)

    def _number(self, offset: int) -> int:
        """The number of the sector at `offset`."""
        return self._first_sector + offset // SECTOR

    def zero(self, offset: int, length: int, unmap: bool = True) -> None:
        """Zeros are written like all other data: what the place itself calls zeros is something else."""
        zeros = memoryview(bytes(min(length, _AT_ONCE)))
        for at in range(offset, offset + length, _AT_ONCE):
            self.write(zeros[: offset + length - at], at)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        inside = max(0, min(length, self._end() - start))
        if inside:
            yield Extent(start, inside, MAPPED, 0, start, self)
        if inside < length:
            yield Extent(start + inside, length - inside, ZERO, 0, start + inside, self)

    def copy_from(self, source: Storage, source_offset: int, offset: int, length: int) -> None:
        raise NotSupported("Encrypted data cannot be copied by the kernel or the server")

    def forget(self) -> None:
        """Wipe the key; nothing can be read or written any more."""
        self._cipher.forget()
