"""What new vmdk images look like in the file, and what others make of them (vmdk sheet 3, 4; RFC 1950)."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

import qimg
from qimg.errors import QimgError
from qimg.storage.record import FLUSH, RecordStorage
from support.build import content, write_raw
from support.faults import opened_through
from support.run import run_peer, run_qimg_inprocess, run_real

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
SECTOR = 512
GRAIN = 65536
LAYOUT = "AB-0C--A0-AAAA--BC-0" * 3
KINDS = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)


def without_cids(data: bytes) -> bytes:
    """Bytes of an image with the words that are random taken out (the real program's have no fixed width)."""
    if data.startswith(b"# Disk"):
        return re.sub(rb"CID=[0-9a-f]{1,8}\n", b"CID=\n", data.partition(b"\0")[0])
    text = re.sub(rb"CID=[0-9a-f]{1,8}\n", b"CID=\n", data[512 : 21 * 512].partition(b"\0")[0])
    return data[:512] + text.ljust(20 * 512, b"\0") + data[21 * 512 :] if data[:4] == b"KDMV" else data


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: without_cids(path.read_bytes()).rstrip(b"\0") for path in folder.iterdir()}


def both(tmp_path: Path, *words: str, source: str | None = None) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files that each program leaves in its own folder."""
    found = []
    for name, run in (("real", run_real), ("ours", run_qimg_inprocess)):
        folder = tmp_path / name
        folder.mkdir()
        if source is not None:
            write_raw(folder / "a.raw", source)
        run(words, folder).ok()
        found.append(files(folder))
    return found[0], found[1]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "words",
    [
        *((f"subformat={kind}", "5M") for kind in KINDS[:-1]),
        ("subformat=streamOptimized", "5M"),
        ("subformat=monolithicSparse", "513"),
        ("subformat=monolithicSparse", "5G"),
        ("subformat=monolithicSparse,adapter_type=lsilogic,compat6=on,toolsversion=12", "100M"),
        ("subformat=monolithicSparse,adapter_type=buslogic,hwversion=13", "100M"),
        ("subformat=monolithicSparse,adapter_type=legacyESX,zeroed_grain=on", "100M"),
        ("subformat=streamOptimized,zeroed_grain=on", "100M"),
    ],
)
def test_a_new_image_is_the_real_programs_byte_for_byte(tmp_path: Path, words: tuple[str, str]) -> None:
    options, size = words
    real, ours = both(tmp_path, "create", "-f", "vmdk", "-o", options, "disk.name.vmdk", size)
    assert ours == real


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", ["plain", ".hid", "a.b.c.vmdk", "co:lon.vmdk", "back\\slash.vmdk"])
@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_extent_files_have_the_real_programs_names(tmp_path: Path, name: str, kind: str) -> None:
    real, ours = both(tmp_path, "create", "-f", "vmdk", "-o", f"subformat={kind}", f"./{name}", "1M")
    assert ours == real


@pytest.mark.peer("qemu-img")
def test_a_split_image_of_more_than_2_gib_has_an_extent_for_each(tmp_path: Path) -> None:
    for kind in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        for name, run in (("real", run_real), ("ours", run_qimg_inprocess)):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            run(["create", "-f", "vmdk", "-o", f"subformat={kind}", "d.vmdk", "5G"], folder).ok()
        real, ours = (
            {path.name: path.stat().st_size for path in (tmp_path / name).iterdir() if path.name != "d.vmdk"}
            for name in ("real", "ours")
        )
        assert ours == real


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_converted_image_is_the_real_programs_byte_for_byte(tmp_path: Path, kind: str) -> None:
    words = ("convert", "-O", "vmdk", "-o", f"subformat={kind}", "-f", "raw", "a.raw", "d.vmdk")
    real, ours = both(tmp_path, *words, source=LAYOUT)
    assert ours == real


@pytest.mark.peer("qemu-img")
def test_an_overlay_names_its_parent_and_the_state_it_was_made_for(tmp_path: Path) -> None:
    run_real(["create", "-f", "vmdk", "base.vmdk", "1M"], tmp_path).ok()
    run_qimg_inprocess(["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "o.vmdk"], tmp_path).ok()
    run_peer("qemu-io", ["-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", "o.vmdk"], tmp_path).ok()
    read = run_peer("qemu-io", ["-c", "read -P 0 64k 64k", "o.vmdk"], tmp_path)
    assert (read.code, "failed" in read.out) == (0, False)


@pytest.mark.parametrize("size", [2 * TIB, 8 * TIB, 64 * TIB])
@pytest.mark.peer("qemu-img")
def test_huge_disks_can_be_made(tmp_path: Path, size: int) -> None:
    path = tmp_path / "d.vmdk"
    qimg.create(path, format="vmdk", size=size)
    assert f"({size} bytes)" in run_real(["info", path]).ok().out
    assert path.stat().st_blocks * 512 < 64 * MIB


@pytest.mark.peer("qemu-img")
def test_a_split_image_may_have_more_files_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    path = tmp_path / "d.vmdk"
    size = 3 * TIB
    qimg.create(path, format="vmdk", size=size, options={"subformat": "twoGbMaxExtentSparse"})
    assert len(list(tmp_path.iterdir())) == 1537
    assert qimg.info(path, format="vmdk").virtual_size == size


@pytest.mark.parametrize(
    ("options", "size", "word"),
    [
        ({}, (1 << 50) + 512, "too large"),
        ({"subformat": "twoGbMaxExtentSparse"}, 1 << 50, "too large"),
        ({"hwversion": 'a"b'}, MIB, "quotes"),
        ({"toolsversion": "a\nb"}, MIB, "line ends"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_made(
    tmp_path: Path, options: dict[str, object], size: int, word: str
) -> None:
    with pytest.raises(QimgError, match=word):
        qimg.create(tmp_path / "d.vmdk", format="vmdk", size=size, options=options)
    assert not list(tmp_path.iterdir())


def test_a_creation_that_fails_removes_all_files_it_made(tmp_path: Path) -> None:
    (tmp_path / "d-f003.vmdk").mkdir()
    with pytest.raises(QimgError):
        qimg.create(
            tmp_path / "d.vmdk", format="vmdk", size=7 * GIB, options={"subformat": "twoGbMaxExtentFlat"}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["d-f003.vmdk"]


def test_a_conversion_never_writes_over_its_source_by_way_of_an_extent(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "d-flat.vmdk", LAYOUT)
    words = [
        "convert",
        "-U",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        "subformat=monolithicFlat",
        source.name,
        "d.vmdk",
    ]
    assert run_qimg_inprocess(words, tmp_path).code == 1
    assert source.read_bytes() == content(LAYOUT)
    assert not (tmp_path / "d.vmdk").exists()


def test_the_same_input_gives_the_same_file_at_a_given_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source = write_raw(tmp_path / "a.raw", LAYOUT)
    for kind in KINDS:
        made = []
        for name in ("one", "two"):
            (tmp_path / kind / name).mkdir(parents=True)
            path = tmp_path / kind / name / "d.vmdk"
            qimg.convert(source, path, source_format="raw", format="vmdk", options={"subformat": kind})
            made.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
        assert made[0] == made[1]


# -- streams


def make_stream(folder: Path, layout: str = LAYOUT, size: int | None = None) -> Path:
    source = write_raw(folder / "a.raw", layout, size=size) if size else write_raw(folder / "a.raw", layout)
    path = folder / "s.vmdk"
    qimg.convert(source, path, source_format="raw", format="vmdk", options={"subformat": "streamOptimized"})
    return path


class Importer:
    """Reads a stream as an importer of VMware does: from front to back, by its markers alone."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        magic, version, flags, capacity, grain, _, _, entries, _, directory, overhead = struct.unpack_from(
            "<4sIIQQQQIQQQ", data
        )
        assert (magic, version, flags & 0x30000, grain, entries) == (b"KDMV", 3, 0x30000, 128, 512)
        assert directory == (1 << 64) - 1
        assert data[73:79] == b"\n \r\n\x01\0"
        self.disk = bytearray(capacity * SECTOR)
        self.table: dict[int, int] = {}
        self.tables: dict[int, int] = {}
        self.at = overhead * SECTOR
        self.last = -1
        while self.step():
            pass
        assert self.at == len(data)

    def step(self) -> bool:
        value, size, kind = struct.unpack_from("<QII", self.data, self.at)
        place = self.at // SECTOR
        if size:
            self.grain(value, self.data[self.at + 12 : self.at + 12 + size], place)
            self.at += -(-(12 + size) // SECTOR) * SECTOR
            return True
        body = self.data[self.at + SECTOR : self.at + SECTOR + value * SECTOR]
        assert not any(self.data[self.at + 16 : self.at + SECTOR])
        self.at += SECTOR + len(body)
        if kind == 1:
            assert value == 4
            number = self.last // GRAIN // 512
            found = dict(enumerate(struct.unpack("<512I", body)))
            assert {index: word for index, word in found.items() if word} == self.table
            self.tables[number] = place + 1
            self.table = {}
        elif kind == 2:
            words = struct.unpack(f"<{len(body) // 4}I", body)
            assert {number: word for number, word in enumerate(words) if word} == self.tables
            self.directory = place + 1
        elif kind == 3:
            assert struct.unpack_from("<Q", body, 56) == (self.directory,)
            assert body[:56] + bytes(8) + body[64:] == self.data[:56] + bytes(8) + self.data[64:512]
        else:
            assert (kind, value) == (0, 0)
            return False
        return True

    def grain(self, sector: int, code: bytes, place: int) -> None:
        start = sector * SECTOR
        assert start > self.last and not start % GRAIN
        if self.last >= 0 and start // GRAIN // 512 != self.last // GRAIN // 512:
            assert not self.table, "the table of the grains before comes first"
        self.last = start
        self.table[start // GRAIN % 512] = place
        plain = zlib.decompress(code)
        assert len(plain) == GRAIN
        part = memoryview(self.disk)[start : start + GRAIN]
        part[:] = plain[: len(part)]


@pytest.mark.parametrize("size", [None, 60 * GRAIN - 3 * SECTOR])
def test_an_importer_reads_a_stream_from_front_to_back(tmp_path: Path, size: int | None) -> None:
    path = make_stream(tmp_path, size=size)
    assert Importer(path.read_bytes()).disk == (tmp_path / "a.raw").read_bytes()


def test_an_importer_reads_a_stream_of_many_tables(tmp_path: Path) -> None:
    layout = "A" + "-" * 600 + "BC" + "-" * 2000 + "A" * 3 + "-" * 509 + "B"
    path = make_stream(tmp_path, layout)
    found = Importer(path.read_bytes())
    assert len(found.tables) == 4
    assert found.disk == (tmp_path / "a.raw").read_bytes()


def test_an_importer_reads_an_empty_stream(tmp_path: Path) -> None:
    path = make_stream(tmp_path, "-" * 20)
    assert not any(Importer(path.read_bytes()).disk)


def test_a_stream_is_written_without_a_step_back(tmp_path: Path) -> None:
    recorders: list[RecordStorage] = []

    def wrap(file: object) -> RecordStorage:
        recorders.append(RecordStorage(file))  # type: ignore[arg-type]
        return recorders[-1]

    with opened_through(wrap, "s.vmdk"):
        make_stream(tmp_path, LAYOUT * 4)
    (recorder,) = recorders
    at = 0
    for event in recorder.events:
        if event.kind == FLUSH or not event.length:
            continue
        assert (event.kind, event.offset) == ("write", at)
        at += event.length
    assert at == (tmp_path / "s.vmdk").stat().st_size


@pytest.mark.peer("7z")
@pytest.mark.parametrize(
    "kind", ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse", "monolithicFlat"]
)
def test_7_zip_extracts_what_went_in(tmp_path: Path, kind: str) -> None:
    source = write_raw(tmp_path / "a.raw", LAYOUT)
    qimg.convert(source, tmp_path / "d.vmdk", source_format="raw", format="vmdk", options={"subformat": kind})
    run_peer("7z", ["e", "-y", "-tvmdk", f"-o{tmp_path / 'out'}", tmp_path / "d.vmdk"]).ok()
    (extracted,) = (tmp_path / "out").iterdir()
    assert extracted.read_bytes() == source.read_bytes()


@pytest.mark.peer("vmdkinfo")
@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("monolithicSparse", "Monolithic sparse"),
        ("streamOptimized", "Stream optimized"),
        ("twoGbMaxExtentSparse", "2GB extent sparse"),
        ("twoGbMaxExtentFlat", "2GB extent flat"),
        ("monolithicFlat", "Monolithic flat"),
    ],
)
def test_libvmdk_knows_every_kind(tmp_path: Path, kind: str, shown: str) -> None:
    source = write_raw(tmp_path / "a.raw", LAYOUT)
    qimg.convert(source, tmp_path / "d.vmdk", source_format="raw", format="vmdk", options={"subformat": kind})
    out = run_peer("vmdkinfo", [tmp_path / "d.vmdk"]).ok().out
    assert re.search(rf"Disk type:\s+{shown}\n", out)
    assert f"({len(content(LAYOUT))} bytes)" in out


# -- measure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"zeroed_grain": "on"}])
def test_measure_says_how_large_a_conversion_makes_the_files(
    tmp_path: Path, kind: str, options: dict[str, str]
) -> None:
    if options and kind.endswith("Flat"):
        options = {"hwversion": "9"}
    source = write_raw(tmp_path / "a.raw", LAYOUT)
    chosen = {**options, "subformat": kind}
    found = qimg.measure(source, format="raw", output_format="vmdk", options=chosen)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "disk.vmdk"
    qimg.convert(source, target, source_format="raw", format="vmdk", options=chosen, sparse_size=0)
    whole = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    if kind == "streamOptimized":
        assert whole <= found.fully_allocated  # it cannot know how well grains compress
    else:
        assert whole == found.fully_allocated
    target.unlink()
    qimg.convert(source, target, source_format="raw", format="vmdk", options=chosen)
    whole = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    if kind == "streamOptimized":
        assert whole <= found.required
    else:
        # Written zeros are data for whoever only looks at the map of the file.
        assert whole <= found.required <= found.fully_allocated
