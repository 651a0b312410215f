"""Sources and targets of every kind, small, made by the real programs: what the tables of `convert` and
`measure` name. `disks` makes them all; the docstring of `_Disks` lists them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from support.build import build, io, pattern, write_raw
from support.run import run_real

MIB = 1 << 20
#: Sectors of sectors.raw that hold data (the convert sheet's example for ``-S``).
DIRTY_SECTORS = (3, 10, 11, 30, 40, 100, 117, 118, 119, 200)


#: The folder, and what `states` said of it when it was new.
_built: list[tuple[Path, dict[str, tuple[int, int]]]] = []


def disks(factory: pytest.TempPathFactory) -> Path:
    """The folder with all of them, made once in a test run (once in each of its processes). Nobody may change
    a file in it: who links them must not write to the links."""
    if not _built:
        folder = factory.mktemp("disks")
        _Disks(folder).build()
        _built.append((folder, states(folder)))
    folder, new = _built[0]
    assert states(folder) == new, "an earlier test changed files that all tests share"
    return folder


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file in `folder` was changed: for each name its length and time of change."""
    found = {}
    for entry in os.scandir(folder):
        info = entry.stat()
        found[entry.name] = (info.st_size, info.st_mtime_ns)
    return found


class _Disks:
    """Raw sources: mixed, sectors, zeros (written ones), holes, odd (length), tiny, empty, big (9 MiB).

    qcow2 sources: plain, packed, zstd, v2, c512, c4k, c2m, ext (subclusters), rc1, rc64, lazy, pre
    (preallocated), data and dataraw (external data file), marked and stale (bitmaps, an inconsistent one),
    snaps, odd.q (partial last cluster), zero.q (no bytes at all).

    Chains: top > mid > base.raw; short (backing shorter), long (backing longer), ext-over, c512-over,
    packed-over, sub/over.q (relative names). Damage: lost (backing missing), torn (an L1 entry points
    nowhere), future.q (version 4). Targets, copied for each run: t-*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self) -> None:
        self._raw()
        self._qcow2()
        self._snapshots_and_bitmaps()
        self._chains()
        self._damaged()
        self._targets()

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _image(self, name: str, layout: str, options: str = "", **more: object) -> Path:
        return build(self._path(name), layout, options=options, **more)  # type: ignore[arg-type]

    def _raw(self) -> None:
        write_raw(self._path("mixed.raw"), "A0B--CC-0-D----E")
        write_raw(self._path("base.raw"), "RR-R-RRR-RRRRRRR" * 2)
        write_raw(self._path("big.raw"), "AB-C--DDDDDD--EF" * 9)
        with self._path("sectors.raw").open("wb") as file:
            file.truncate(256 * 512)
            for sector in DIRTY_SECTORS:
                file.seek(sector * 512)
                file.write(pattern("S", sector * 512, 512))
        zeros = bytearray(MIB)
        zeros[0x80400:0x80600] = pattern("Z", 0x80400, 512)
        self._path("zeros.raw").write_bytes(zeros)
        with self._path("holes.raw").open("wb") as file:
            file.truncate(5 * MIB)
        write_raw(self._path("odd.raw"), "A-B" + "-" * 13)
        with self._path("odd.raw").open("ab") as file:
            file.write(b"odd!" * 175)
        self._path("tiny.raw").write_bytes(b"abc")
        self._path("empty.raw").write_bytes(b"")

    def _qcow2(self) -> None:
        self._image("plain.q", "A0-#BB--C0-#D--E")
        self._image("packed.q", "ab0-cD-eE#ab----")
        self._image("zstd.q", "ab0-cD-eE#ab----", "compression_type=zstd")
        self._image("v2.q", "A-b-CC--d-------", "compat=0.10")
        self._image("c512.q", "A0-#b" * 40, cluster=512)
        self._image("c4k.q", "A0-#bC-" * 30, cluster=4096)
        self._image("c2m.q", "A-#b", cluster=2 * MIB)
        self._image("rc1.q", "AB-C", "refcount_bits=1")
        self._image("rc64.q", "AB-C", "refcount_bits=64")
        self._image("lazy.q", "AB-C", "lazy_refcounts=on")
        self._image("pre.q", "A--B----", "preallocation=metadata")
        self._image("data.q", "A0-#BB--", "data_file=data.data")
        self._image("dataraw.q", "A0-#BB--", "data_file=dataraw.data,data_file_raw=on")
        self._image("odd.q", "Ab-" + "-" * 12 + "Cd", size=MIB + 512)
        run_real(["create", "-q", "-f", "qcow2", "zero.q", "0"], self.folder).ok()
        ext = self._image("ext.q", "A-b-------------", "extended_l2=on")
        io(
            ext,
            (
                "write -q -P 0x11 70k 2k",
                "write -q -P 0x22 200k 10k",
                "write -q -z 204k 4k",
                "write -q -z 300k 6k",
                "write -q -P 0x33 1021k 3k",
            ),
        )

    def _snapshots_and_bitmaps(self) -> None:
        snaps = self._image("snaps.q", "A-B-C-------")
        # The second snapshot, whose id is 2, is called 1.
        for name, letter in (("one", "X"), ("1", "Y"), ("three", "Z")):
            run_real(["snapshot", "-c", name, "snaps.q"], self.folder).ok()
            io(snaps, (f"write -q -P {ord(letter)} 128k 100k", "write -q -z 0 64k"))
        marked = self._image("marked.q", "A0-#BB--" * 4)
        for name, more in (("b1", ()), ("b2", ("-g", "4096")), ("off", ("--disable",))):
            run_real(["bitmap", "--add", *more, "marked.q", name], self.folder).ok()
        io(marked, ("write -q -P 7 100k 200k", "write -q -P 8 1500k 3k"))
        run_real(["bitmap", "--disable", "marked.q", "b2"], self.folder).ok()
        self._stale(marked)

    def _stale(self, marked: Path) -> None:
        """stale.q is marked.q with its first bitmap in use, as a crash leaves it."""
        image = bytearray(marked.read_bytes())
        offset = _bitmap_directory(image)
        flags = struct.unpack_from(">I", image, offset + 12)[0]
        struct.pack_into(">I", image, offset + 12, flags | 1)
        self._path("stale.q").write_bytes(image)

    def _chains(self) -> None:
        self._image("mid.q", "M-0mM#" * 6, backing="base.raw", backing_format="raw", size=3 * MIB)
        self._image("top.q", "--T0t#----" * 5, backing="mid.q", size=5 * MIB // 2)
        self._image("short.q", "S--0" * 12, backing="base.raw", backing_format="raw", size=3 * MIB)
        self._image("long.q", "L--0", backing="base.raw", backing_format="raw", size=MIB // 2 + 512)
        self._image("packed-over.q", "-p0-", backing="base.raw", backing_format="raw", size=MIB)
        self._image(
            "c512-over.q", "O-0#-" * 30, cluster=512, backing="base.raw", backing_format="raw", size=MIB
        )
        self._image(
            "c2m-over.q", "-O", cluster=2 * MIB, backing="base.raw", backing_format="raw", size=4 * MIB
        )
        over = self._image("ext-over.q", "-" * 16, "extended_l2=on", backing="base.raw", backing_format="raw")
        io(over, ("write -q -P 0x44 66k 2k", "write -q -z 100k 8k", "write -q -P 0x55 700k 70k"))
        sub = self._path("sub")
        sub.mkdir()
        build(sub / "over.q", "-O-0", backing="../base.raw", backing_format="raw", size=MIB)

    def _damaged(self) -> None:
        self._image("lost.q", "A-", backing="base.raw", backing_format="raw")
        run_real(["rebase", "-u", "-F", "raw", "-b", "nowhere.raw", "lost.q"], self.folder).ok()
        torn = bytearray(self._image("torn.q", "AB-C").read_bytes())
        l1 = struct.unpack_from(">Q", torn, 40)[0]
        struct.pack_into(">Q", torn, l1, 0x8000_0000_0000_0200)
        self._path("torn.q").write_bytes(torn)
        future = bytearray(self._path("rc1.q").read_bytes())
        struct.pack_into(">I", future, 4, 4)
        self._path("future.q").write_bytes(future)

    def _targets(self) -> None:
        for name, size in (("small", MIB // 2), ("same", MIB), ("big", 2 * MIB), ("odd", MIB + 700)):
            self._path(f"t-{name}.raw").write_bytes(b"\xee" * size)
        for name in ("t-junk", "t-other.data"):
            self._path(name).write_bytes(b"junk " * 1000)
        self._image("t-old.q", "ZZZZ" * 4)
        write_raw(self._path("t-under.raw"), "U" * 16)
        self._image("t-top.q", "T--0", backing="t-under.raw", backing_format="raw", size=MIB)
        self._image("t-over.q", "Z--Z", backing="base.raw", backing_format="raw", size=MIB)
        os.chmod(self._path("t-junk"), 0o640)


def _bitmap_directory(image: bytearray) -> int:
    """Offset of the bitmap directory: the field of the header extension 0x23852875 (qcow2 sheet)."""
    at = struct.unpack_from(">I", image, 100)[0]
    while True:
        kind, length = struct.unpack_from(">II", image, at)
        if kind == 0x23852875:
            return int(struct.unpack_from(">Q", image, at + 24)[0])
        assert kind, "no bitmaps extension"
        at += 8 + (length + 7) // 8 * 8
