"""An opened vmdk image: a descriptor and extents, one behind the other (vmdk sheet 1, 6, 7)."""

from __future__ import annotations

import errno
from bisect import bisect_right

from qimg.errors import FormatError, NotSupported, StorageError, UnsupportedFeature
from qimg.extent import Runs
from qimg.formats.base import CheckResult, Image, Reference
from qimg.formats.vmdk import descriptor as text
from qimg.formats.vmdk.part import FlatPart, ZeroPart
from qimg.formats.vmdk.structs import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qimg.extent import Extent
    from qimg.formats.vmdk.descriptor import Descriptor, ExtentLine
    from qimg.formats.vmdk.part import Part
    from qimg.formats.vmdk.place import DescriptorPlace
    from qimg.storage.base import Buffer, Bytes, Storage

#: Jobs move pieces of this size at least; larger units over a backing file are not written to.
_MAX_UNIT = 2 << 20
#: Guest bytes that all extents may have together.
_MAX_SIZE = 1 << 62


class VmdkImage(Image):
    """One image. Its parts know nothing of each other; offsets are shifted here."""

    format_name = "vmdk"
    dirty = False

    def __init__(
        self,
        file: Storage,
        descriptor: Descriptor,
        place: DescriptorPlace,
        *,
        writable: bool = False,
        new: bytes | None = None,
    ) -> None:
        """`new`: the image is being created, and this text is to be written to `file`, where it stands apart
        (empty: nothing is). Set the parts with `set_parts`, or have `files` attached."""
        self.file = file
        self.descriptor = descriptor
        self.place = place
        self.content_id = descriptor.cid
        self.backing = None if descriptor.hint is None else Reference(descriptor.hint, "vmdk")
        self.parts: list[Part] = []
        self.size = 0
        self._writable = writable
        self._new = new
        self._fresh = new is not None
        self._starts: list[int] = []
        self._touched: set[int] = set()
        self._attached: list[tuple[str, Storage]] = []
        self._marked = False

    # -- putting it together

    def expect_files(self) -> None:
        """The extents are in files of their own: say which. Raises UnsupportedFeature, FormatError."""
        if self.descriptor.create_type not in text.SEPARATE:
            kind = self.descriptor.create_type
            raise UnsupportedFeature(f"Unsupported image type '{kind}'", file=self.file.name)
        self.files = [line.name for line in self.descriptor.extents if line.name is not None]
        if not self.files:
            self.attach_files([])

    def attach_files(self, storages: list[Storage]) -> None:
        left = iter(storages)
        parts: list[Part] = []
        for line in self.descriptor.extents:
            if line.name is None:
                parts.append(ZeroPart(self.file, line.sectors * SECTOR))
                continue
            part = self._part(line, next(left))
            if line.access == text.READ_ONLY:
                part.read_only = True
            parts.append(part)
        self.set_parts(parts)
        self.own(storages)

    def own(self, storages: list[Storage]) -> None:
        """These belong to the image, and are closed with it."""
        self._attached = [(f"extents.{number}", storage) for number, storage in enumerate(storages)]

    def _part(self, line: ExtentLine, file: Storage) -> Part:
        """Raises FormatError, UnsupportedFeature, StorageError."""
        if line.type in (text.FLAT, text.VMFS):
            if max(line.offset, line.sectors) >= 1 << 53:
                raise FormatError(f"Invalid extent line: {line.render()}", file=self.file.name)
            return FlatPart(file, line.sectors * SECTOR, line.offset * SECTOR, kind=line.type)
        if line.type == text.SE_SPARSE:
            from qimg.formats.vmdk.sesparse import SeSparsePart

            return SeSparsePart(file, writable=self._writable)
        from qimg.formats.vmdk.opening import sparse_part

        return sparse_part(file, kind=line.type, writable=self._writable, covered=self.backing is not None)

    def set_parts(self, parts: list[Part]) -> None:
        """What the disk is made of, in order. Raises FormatError."""
        at = 0
        self._starts = []
        for part in parts:
            self._starts.append(at)
            at += part.size
        if at > _MAX_SIZE:
            raise FormatError("The extents are larger than any disk", file=self.file.name)
        self.parts = parts
        self.size = at
        kinds = {(part.compressed, part.cluster_size) for part in parts}
        self.cluster_size = next(iter(kinds))[1] if len(kinds) == 1 else None
        if len(kinds) > 1:
            self.dirty = None  # type: ignore[assignment]  # unknown, as the real program has it
        self.granularity = max([part.granularity for part in parts], default=SECTOR)
        self.zero_init = all(part.zero_init for part in parts)
        self.can_mark_zero = all(part.can_mark_zero for part in parts)
        self.can_compress = bool(parts) and all(part.can_compress for part in parts)
        self.must_compress = any(part.compressed for part in parts)
        self.can_write = not self._fresh and self._fits_writing()

    def _fits_writing(self) -> bool:
        """Whether whole units of the disk are whole grains of each part."""
        unit = self.granularity
        if any(part.read_only or (part.compressed and not part.can_compress) for part in self.parts):
            return False
        if any(part.compressed != self.must_compress for part in self.parts):
            return False
        if len({id(part.file) for part in self.parts}) < len(self.parts):
            return False  # two parts of one file, which would not know of each other
        if unit == SECTOR:
            return True
        aligned = all(not start % unit for start in self._starts)
        fits = all(not unit % part.granularity for part in self.parts)
        return aligned and fits and not unit & (unit - 1) and unit <= _MAX_UNIT

    def attached(self) -> list[tuple[str, Storage]]:
        return self._attached

    # -- the chain

    def meet_backing(self, below: Image) -> None:
        if self.backing is not None and below.content_id != self.descriptor.parent_cid:
            self.distrust = StorageError(
                f"'{below.file.name}' was changed since '{self.file.name}' was made on top of it",
                errno=errno.EINVAL,
            )

    def record_backing(self, below: Image) -> None:
        cid = below.content_id
        if self.backing is None or cid is None or cid == self.descriptor.parent_cid:
            return
        self.place.update((("parentCID", f"{cid:08x}"),))
        self.descriptor.parent_cid = cid
        self.distrust = None

    # -- reading

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, Part, int, int]]:
        """(number, part, offset in it, length) of what makes up a range."""
        number = bisect_right(self._starts, start) - 1
        end = start + length
        while start < end:
            part = self.parts[number]
            inside = start - self._starts[number]
            step = min(end - start, part.size - inside)
            if step > 0:
                yield number, part, inside, step
            start += step
            number += 1

    def _joined(self, start: int, length: int, ask: Callable[[Part, int, int], list[Extent]]) -> list[Extent]:
        if len(self.parts) == 1:
            return ask(self.parts[0], start, length)
        runs = Runs(start, length)
        for number, part, inside, step in self._pieces(start, length):
            base = self._starts[number]
            for extent in ask(part, inside, step):
                # Parts answer for whole grains, which may reach behind what was asked for, and their end.
                stop = min(extent.start + extent.length, inside + step)
                runs.append(
                    extent.start + base, stop - extent.start, extent.flags, extent.host, extent.source
                )
        return runs.take()

    def extents(self, start: int, length: int) -> list[Extent]:
        return self._joined(start, length, lambda part, at, step: part.extents(at, step))

    def read_into(self, buf: Buffer, guest: int) -> None:
        view = memoryview(buf)
        at = 0
        for _number, part, inside, step in self._pieces(guest, len(view)):
            part.read_into(view[at : at + step], inside)
            at += step

    def format_specific(self) -> dict[str, object]:
        rows: list[object] = []
        for part in self.parts:
            row: dict[str, object] = {"compressed": True} if part.compressed else {}
            row["virtual-size"] = part.size
            row["filename"] = part.file.name
            if part.cluster_size is not None:
                row["cluster-size"] = part.cluster_size
            row["format"] = part.kind
            rows.append(row)
        return {
            "cid": self.content_id,
            "parent-cid": self.descriptor.parent_cid,
            "create-type": self.descriptor.create_type,
            "extents": rows,
        }

    def check(self, report: Callable[[str], None], fix: str | None = None) -> CheckResult:
        if fix is not None:
            raise NotSupported("This image format does not support checks")
        result = CheckResult()
        for start, part in zip(self._starts, self.parts, strict=True):
            result.corruptions += part.check_grains(report, start // SECTOR)
        return result

    # -- writing

    def begin(self) -> None:
        """Before the first change: another CID, so that overlays are not taken to fit any more."""
        if self._fresh or self._marked:
            return
        if not self.can_write:
            raise NotSupported(f"Writing to '{self.file.name}' is not supported (a read-only kind of extent)")
        self.content_id = self.descriptor.cid = self.place.renew_cid(self.descriptor.cid)
        self._marked = True

    def _change(self, start: int, length: int) -> Iterator[tuple[int, Part, int, int]]:
        self.begin()
        for piece in self._pieces(start, length):
            self._touched.add(piece[0])
            yield piece

    def in_place(self, start: int, length: int) -> list[Extent]:
        self.begin()
        self._touch(start, length)
        return self._joined(start, length, lambda part, at, step: part.in_place(at, step))

    def _touch(self, start: int, length: int) -> None:
        self._touched.update(piece[0] for piece in self._pieces(start, length))

    def allocate(self, start: int, length: int) -> list[Extent]:
        self.begin()
        self._touch(start, length)
        return self._joined(start, length, lambda part, at, step: part.allocate(at, step))

    def mark_zero(self, start: int, length: int) -> None:
        for _number, part, inside, step in self._change(start, length):
            part.mark_zero(inside, step)

    def encode(self, data: Bytes) -> bytes | None:
        return self.parts[0].encode(data)

    def write_encoded(self, guest: int, data: bytes) -> None:
        for _number, part, inside, _step in self._change(guest, 1):
            part.write_encoded(inside, data)

    @property
    def wants_flush(self) -> bool:  # type: ignore[override]
        return any(self.parts[number].wants_flush for number in self._touched)

    def flush(self) -> None:
        numbers = range(len(self.parts)) if self._new is not None else sorted(self._touched)
        for number in numbers:
            self.parts[number].flush()
        self._touched.clear()
        if self._new:
            self.file.write(self._new, 0)
            self.file.flush()
        self._new = None

    def resize(self, size: int, preallocation: str = "off", *, shown: int = 0) -> None:
        from qimg.formats.vmdk.resize import resize

        resize(self, size, preallocation, shown)

    def close(self) -> None:
        for part in self.parts:
            part.file.close()
        for _name, storage in self._attached:
            storage.close()
        self.file.close()
