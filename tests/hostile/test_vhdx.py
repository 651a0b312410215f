"""Damaged and hostile vhdx images: each row of section 8 of the vhdx sheet costs a clear error, nothing else.

Images are made by hand (`support.vhdx`); what the real program says of them stands beside.
"""

# ruff: noqa: E501  (a defect is a line)
from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.context import Context
from qimg.errors import FormatError, OpenError, QimgError
from support.bounds import bounded
from support.run import run_qimg_inprocess, run_real
from support.vhdx import (
    BAT,
    BAT_AT,
    LOG_GUID,
    LOGICAL,
    META_AT,
    MIB,
    NO_GUID,
    PAGE_83,
    PARAMETERS,
    PHYSICAL,
    SIZE,
    Vhdx,
    bat_entry,
    data_descriptor,
    entry,
    guid,
    log_entry,
    logged,
    sector,
    zero_descriptor,
)

UNKNOWN = "99999999-9999-9999-9999-999999999999"

Change = Callable[[Vhdx], None]


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(image: Vhdx) -> None:
        for one in changes:
            one(image)

    return change


def setting(**values: object) -> Change:
    """Attributes of the image."""
    return lambda image: image.__dict__.update(values)


def head(**values: object) -> Change:
    """Fields of both headers."""
    return lambda image: image.header.update(values)


def item(name: str, value: bytes, flags: int = 4) -> Change:
    """An item of the metadata."""
    return lambda image: image.items.update({name: (value, flags)})


def without(name: str) -> Change:
    return lambda image: image.items.__delitem__(name)


def patched(*patches: tuple[int, bytes]) -> Change:
    return lambda image: image.patches.extend(patches)


def words(words: dict[int, int]) -> Change:
    return lambda image: image.bat.update(words)


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


#: Defect -> (change, part of our message, field that the error names).
ROWS: dict[str, tuple[Change, str, str]] = {
    "signature": (setting(signature=b"vhdxFILE"), "not a VHDX file", "file type.signature"),
    "both headers bad": (
        patched((65536 + 9, b"\x55"), (131072 + 9, b"\x55")), "No valid VHDX header found", "header"),
    "same sequence but different": (
        both(setting(sequences=[7, 7]), lambda image: image.patch(65536, _other_header())),
        "No valid VHDX header found", "header"),
    "version 2": (head(version=2), "No valid VHDX header found", "header"),
    "log version": (head(log_version=1), "Unsupported log version 1", "header.log_version"),
    "log in the header area": (head(log_offset=0), "Invalid log offset", "header.log_offset"),
    "log not aligned": (head(log_offset=MIB + 4096), "Invalid log offset", "header.log_offset"),
    "log length not aligned": (
        head(log_length=MIB - 4096, log=LOG_GUID), "Invalid log length", "header.log_length"),
    "region tables": (
        patched((196608 + 9, b"\x55"), (262144 + 9, b"\x55")), "No valid VHDX region table", "region table.checksum"),
    "too many regions": (setting(region_count=2048), "2048 entries", "region table.count"),
    "no BAT": (setting(regions=[META_AT]), "no BAT region", "region table.entries"),
    "no metadata": (setting(regions=[BAT_AT]), "no metadata region", "region table.entries"),
    "BAT twice": (
        setting(regions=[BAT_AT, META_AT, (BAT, 5 * MIB, MIB, 1)]), "more than one BAT", "region table.entries"),
    "unknown required region": (
        setting(regions=[BAT_AT, META_AT, (UNKNOWN, 5 * MIB, MIB, 1)]), "marked as required", "region.guid"),
    "overlapping regions": (
        setting(regions=[BAT_AT, META_AT, (UNKNOWN, 3 * MIB, MIB, 0)]), "VHDX region", "region table.entries"),
    "region over the log": (
        setting(regions=[(BAT, MIB, MIB, 1), META_AT]), "VHDX region", "region table.entries"),
    "region not aligned": (
        setting(regions=[(BAT, 2 * MIB + 512, MIB, 1), META_AT]), "Invalid offset", "region.offset"),
    "region far away": (
        setting(regions=[(BAT, 1 << 63, MIB, 1), META_AT]), "Invalid offset", "region.offset"),
    "metadata signature": (setting(metadata_signature=b"metaData"), "Invalid metadata signature", "metadata.signature"),
    "too many items": (setting(item_count=2048), "2048 items", "metadata.count"),
    "no block size": (without(PARAMETERS), "no file parameters", "file parameters"),
    "no disk size": (without(SIZE), "no virtual disk size", "virtual disk size"),
    "no identifier": (without(PAGE_83), "no page 83 data", "page 83 data"),
    "no logical sector": (without(LOGICAL), "no logical sector size", "logical sector size"),
    "no physical sector": (without(PHYSICAL), "no physical sector size", "physical sector size"),
    "unknown required item": (item(UNKNOWN, b"1234"), "marked as required", "metadata.guid"),
    "an item twice": (item(SIZE + "!", u64(MIB)), "virtual disk size twice", "metadata.guid"),
    "an item outside": (patched((3 * MIB + 32 + 16, u32(MIB - 4, 8))), "outside the metadata", "metadata.offset"),
    "an item in the table": (patched((3 * MIB + 32 + 16, u32(64, 8))), "outside the metadata", "metadata.offset"),
    "an item too short": (patched((3 * MIB + 32 + 20, u32(4))), "4 bytes long", "metadata.length"),
    "large logical sectors": (
        item(LOGICAL, u32(4096), 6), "sectors of 4096 bytes are not supported", "logical sector size"),
    "odd physical sectors": (item(PHYSICAL, u32(1000), 6), "physical sector size 1000", "physical sector size"),
    "parent without locator": (item(PARAMETERS, u32(MIB, 2)), "no parent locator", "parent locator"),
    "small blocks": (item(PARAMETERS, u32(MIB // 2, 0)), "Invalid block size", "file parameters.block size"),
    "large blocks": (item(PARAMETERS, u32(512 * MIB, 0)), "Invalid block size", "file parameters.block size"),
    "odd blocks": (item(PARAMETERS, u32(3 * MIB, 0)), "Invalid block size", "file parameters.block size"),
    "no blocks": (item(PARAMETERS, u32(0, 0)), "Invalid block size", "file parameters.block size"),
    "short table": (item(SIZE, u64(200 << 30), 6), "The BAT region has", "region.length"),
    "endless disk": (item(SIZE, u64((1 << 64) - 512), 6), "at most", "virtual disk size"),
    "block past the end": (words({5: 1 << 32 | 6}), "VHDX BAT entry 5 start offset 4294967296 points", "bat"),
    "block over the end": (
        both(words({5: 4 * MIB | 6}), setting(length=4 * MIB + 4096)),
        "VHDX BAT entry 5 end offset 5242879 points after end of file (4198400)", "bat"),
    "block beyond all": (words({5: 0x7FFFFFFFFFF00006}), "VHDX BAT entry 5 offset overflow.", "bat"),
    "block over the log": (words({5: MIB | 6}), "overlaps with region 1048576-2097152", "bat"),
    "block over the table": (words({5: 2 * MIB | 6}), "overlaps with region 2097152-3145728", "bat"),
    "block over the metadata": (words({5: 3 * MIB | 6}), "overlaps with region 3145728-4194304", "bat"),
}  # fmt: skip
#: What the real program accepts, or accepts in part, and we refuse.
STRICTER = {
    "block over the headers": (words({5: 6}), "overlaps with region 0-1048576", "bat"),
}
#: The real program does not look at it; so it opens.
LAX = {"an item twice", "an item too short", "odd physical sectors"}


def _other_header() -> bytes:
    image = Vhdx()
    image.header["file"] = UNKNOWN
    image.sequences = [7, 7]
    return image.headers()[0]


def refused(path: Path) -> FormatError:
    """What opening the image raises."""
    with pytest.raises(OpenError) as caught:
        qimg.open(path, format="vhdx")
    reason = caught.value.reason
    assert isinstance(reason, FormatError), repr(reason)
    assert "\n" not in str(reason)
    return reason


@pytest.mark.peer("qemu-img")
def test_the_image_that_the_rows_change_is_sound(tmp_path: Path) -> None:
    image = Vhdx()
    image.block(2, 4 * MIB, b"data" * 1000)
    path = image.write(tmp_path / "x.vhdx")
    assert run_real(["check", "-f", "vhdx", path]).code == 0
    assert qimg.check(path, format="vhdx").corruptions == 0
    run_real(["convert", "-f", "vhdx", "-O", "raw", path, tmp_path / "raw"]).ok()
    with qimg.open(path, format="vhdx") as disk:
        assert disk.read(0, disk.size) == (tmp_path / "raw").read_bytes()


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("row", [*ROWS, *STRICTER])
def test_a_defect_is_an_error_that_names_the_field(row: str, tmp_path: Path) -> None:
    change, message, field = {**ROWS, **STRICTER}[row]
    image = Vhdx()
    change(image)
    path = image.write(tmp_path / "x.vhdx")
    error = refused(path)
    assert message in str(error)
    assert error.field == field
    assert error.file == str(path)
    shown = run_qimg_inprocess(["info", "-f", "vhdx", path])
    assert (shown.code, shown.out) == (1, "")
    assert shown.err.count("\n") == 1
    real = run_real(["info", "-f", "vhdx", path])
    if row not in STRICTER and row not in LAX:
        assert real.code == 1, "the real program opens it"


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("change", "size"),
    [
        (patched((65536 + 9, b"\x55")), 16 * MIB),
        (patched((131072 + 9, b"\x55")), 16 * MIB),
        (setting(sequences=[7, 7]), 16 * MIB),
        (setting(regions=[META_AT, BAT_AT]), 16 * MIB),
        (setting(regions=[BAT_AT, META_AT, (UNKNOWN, 9 * MIB, MIB, 0)]), 16 * MIB),
        (item(UNKNOWN, b"1234", 0), 16 * MIB),
        (item(PHYSICAL, u32(4096), 6), 16 * MIB),
        (item(SIZE, u64(5 * MIB + 700), 6), 5 * MIB + 512),
        (head(log_length=MIB - 4096), 16 * MIB),
        (head(log=LOG_GUID), 16 * MIB),
        (words({3: 0x0FF00 | 1, 4: 5, 7: 3 | 5 << 20}), 16 * MIB),
    ],
)
def test_what_is_odd_but_sound_is_read_as_the_real_program_reads_it(
    change: Change, size: int, tmp_path: Path
) -> None:
    image = Vhdx()
    image.block(2, 4 * MIB, b"data" * 1000)
    change(image)
    path = image.write(tmp_path / "x.vhdx")
    run_real(["convert", "-f", "vhdx", "-O", "raw", path, tmp_path / "raw"]).ok()
    with qimg.open(path, format="vhdx") as disk:
        assert disk.size == size
        assert disk.read(0, size) == (tmp_path / "raw").read_bytes()


def test_the_second_region_table_serves_where_the_first_is_damaged(tmp_path: Path) -> None:
    """The real program looks at the first only."""
    image = Vhdx()
    image.block(2, 4 * MIB, b"data" * 1000)
    image.patch(196608 + 9, b"\x55")
    with qimg.open(image.write(tmp_path / "x.vhdx"), format="vhdx") as disk:
        assert disk.read(2 * MIB, 4000) == b"data" * 1000


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("state", [4, 7])
def test_a_block_in_an_impossible_state_is_an_input_output_error_there(state: int, tmp_path: Path) -> None:
    image = Vhdx()
    image.block(2, 4 * MIB, b"data" * 1000)
    image.bat[5] = 4 * MIB | state
    path = image.write(tmp_path / "x.vhdx")
    words = ["convert", "-f", "vhdx", "-O", "raw", path, tmp_path / "raw"]
    real, ours = run_real(words), run_qimg_inprocess(words)
    assert "error while reading at byte 4194304: Input/output error" in real.err  # the start of its request
    assert ours.code == real.code == 1
    assert "error while reading at byte 5242880: Input/output error" in ours.err
    with qimg.open(path, format="vhdx") as disk:
        assert disk.read(2 * MIB, 4000) == b"data" * 1000
    lines: list[str] = []
    assert qimg.check(path, format="vhdx", report=lines.append).corruptions == 1
    assert lines == [f"VHDX BAT entry 5 has the invalid state {state}"]


def test_check_finds_blocks_that_share_a_place(tmp_path: Path) -> None:
    image = Vhdx(block=2 * MIB)
    image.block(1, 4 * MIB, b"x", length=3 * MIB)
    image.bat.update({3: 4 * MIB | 6, 5: 5 * MIB | 6})
    lines: list[str] = []
    found = qimg.check(image.write(tmp_path / "x.vhdx"), format="vhdx", report=lines.append)
    assert found.corruptions == 2
    assert lines == [
        "VHDX BAT entry 3 at offset 4194304 lies on another one",
        "VHDX BAT entry 5 at offset 5242880 lies on another one",
    ]


# -- the log


def many_descriptors() -> list[tuple[bytes, bytes]]:
    return [data_descriptor(5 * MIB + 4096 * number, bytes([number + 1]) * 4096, 7) for number in range(140)]


def test_descriptors_may_fill_several_sectors(tmp_path: Path) -> None:
    """The real program refuses such an entry, whatever it holds (docs/differences.md)."""
    image = Vhdx()
    image.length = 6 * MIB
    logged(
        image, entry(7, *many_descriptors(), data_descriptor(2 * MIB, sector(5 * MIB | 6), 7), last=6 * MIB)
    )
    path = image.write(tmp_path / "x.vhdx")
    assert qimg.check(path, format="vhdx", fix="all").corruptions_fixed == 1
    with qimg.open(path, format="vhdx") as disk:
        assert disk.read(0, 140 * 4096) == b"".join(bytes([number + 1]) * 4096 for number in range(140))


ODD_SIGNATURE = (zero_descriptor(2 * MIB, 4096, 3)[0].replace(b"zero", b"ZERO"), b"")


@pytest.mark.peer("qemu-img")
def test_a_log_is_replayed_as_the_real_program_replays_it(tmp_path: Path) -> None:
    """Several entries, zeros, data, a longer file, and descriptors that fill a sector."""
    many = many_descriptors()
    cases = {
        "one": [bat_entry(3, 4 * MIB | 6, last=5 * MIB)],
        "two": [bat_entry(3, 2, last=5 * MIB), bat_entry(4, 4 * MIB | 6, tail=0, last=5 * MIB)],
        "own tails": [bat_entry(3, 2, last=5 * MIB), bat_entry(4, 4 * MIB | 6, tail=8192, last=5 * MIB)],
        "zeros": [entry(9, zero_descriptor(2 * MIB, 8192, 9), last=6 * MIB)],
        "zeros, then data": [
            entry(9, zero_descriptor(2 * MIB, 1 << 20, 9)),
            bat_entry(10, 0, 0, 2, last=4 * MIB),
        ],
        "as many as fit one sector": [
            entry(7, *many[:125], data_descriptor(2 * MIB, sector(5 * MIB | 6), 7), last=6 * MIB),
        ],
        "a stale one": [
            bat_entry(3, 4 * MIB | 6, last=5 * MIB),
            log_entry(zero_descriptor(2 * MIB, 4096, 4), sequence=4, flushed=0, last=0, name=UNKNOWN),
        ],
        "a torn one": [bat_entry(3, 4 * MIB | 6, last=5 * MIB), bat_entry(4, 2)[:4100]],
        "two runs": [
            bat_entry(30, 4 * MIB | 6, last=5 * MIB),
            bytes(4096),
            bat_entry(9, 2, tail=12288, last=5 * MIB),
        ],
    }
    for name, entries in cases.items():
        image = Vhdx()
        image.block(2, 4 * MIB, b"data" * 1000)
        if name.startswith("as many"):
            image.length = 6 * MIB
        logged(image, *entries)
        ours, theirs = image.write(tmp_path / "ours"), image.write(tmp_path / "theirs")
        refusal = run_real(["info", "-f", "vhdx", ours])
        assert "contains a log" in refusal.err, name
        assert run_qimg_inprocess(["info", "-f", "vhdx", ours]) == refusal
        words = ["check", "-r", "all", "-f", "vhdx"]
        real = run_real([*words, theirs])
        assert run_qimg_inprocess([*words, ours])._replace(err="") == real._replace(err=""), name
        for path in (ours, theirs):
            run_real(["convert", "-f", "vhdx", "-O", "raw", path, f"{path}.raw"]).ok()
        assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes(), name
        ours_bytes, theirs_bytes = ours.read_bytes(), theirs.read_bytes()
        length = max(len(ours_bytes), len(theirs_bytes))  # only ours gets the length that the log names
        assert ours_bytes[MIB:].ljust(length, b"\0") == theirs_bytes[MIB:].ljust(length, b"\0"), name
        assert ours_bytes[65536 + 48 : 65536 + 64] == ours_bytes[131072 + 48 : 131072 + 64] == guid(NO_GUID)


@pytest.mark.parametrize(
    ("entries", "message", "field"),
    [
        ([bat_entry(3, 2, flushed=9 * MIB)], "written for a file of 9437184 bytes", "log entry.flushed_size"),
        ([bat_entry(3, 2, last=1 << 63)], "Invalid file length", "log entry.last_size"),
        ([entry(3, zero_descriptor(65536, 4096, 3))], "change headers", "log descriptor.offset"),
        ([entry(3, zero_descriptor(MIB + 8192, 4096, 3))], "log itself", "log descriptor.offset"),
        ([entry(3, zero_descriptor(0, 1 << 40, 3))], "change headers", "log descriptor.offset"),
        ([entry(3, zero_descriptor(2 * MIB, 1 << 50, 3))], "behind the end", "log descriptor.offset"),
        ([entry(3, data_descriptor(1 << 40, bytes(4096), 3))], "behind the end", "log descriptor.offset"),
        ([bat_entry(3, 2, tail=40960)], "entries are missing", "log entry.tail"),
        ([entry(3, data_descriptor(2 * MIB, bytes(4096), 4))], "contradict", "log descriptor"),
        ([entry(3, ODD_SIGNATURE)], "contradict", "log descriptor"),
        ([entry(3, zero_descriptor(2 * MIB + 512, 4096, 3))], "contradict", "log descriptor"),
        ([entry(3, zero_descriptor(2 * MIB, 100, 3))], "contradict", "log descriptor"),
        ([entry(3, (data_descriptor(2 * MIB, bytes(4096), 3)[0], b""))], "contradict", "log descriptor"),
    ],
)
def test_a_log_that_cannot_be_right_is_refused(
    entries: list[bytes], message: str, field: str, tmp_path: Path
) -> None:
    image = Vhdx()
    logged(image, *entries)
    path = image.write(tmp_path / "x.vhdx")
    before = path.read_bytes()
    error = refused(path)
    assert message in str(error)
    assert error.field == field
    assert run_qimg_inprocess(["check", "-r", "all", "-f", "vhdx", path]).code == 1
    assert path.read_bytes() == before


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "bad",
    [
        bat_entry(3, 2, length=4096),
        bat_entry(3, 2, length=1 << 31),
        bat_entry(3, 2, length=5000),
        bat_entry(3, 2, count=0xFFFFFFFF),
        bat_entry(0, 2),
        bat_entry(3, 2)[:-1],
        bat_entry(3, 2)[:4096] + bytes(4096),
    ],
)
def test_an_entry_that_is_not_whole_is_none(bad: bytes, tmp_path: Path) -> None:
    image = Vhdx()
    image.block(2, 4 * MIB, b"data" * 1000)
    logged(image, bad.ljust(8192, b"\1"))
    path = image.write(tmp_path / "x.vhdx")
    assert run_real(["check", "-f", "vhdx", path]).code == 0
    with qimg.open(path, format="vhdx") as disk:
        assert disk.read(2 * MIB, 4000) == b"data" * 1000


# -- anything


def sample(folder: Path) -> bytes:
    """A small image with all kinds of blocks and a log that waits."""
    image = Vhdx(size=10 * MIB)
    image.block(2, 4 * MIB, b"data" * 1000)
    image.bat.update({3: 2, 4: 3, 5: 1})
    logged(image, bat_entry(3, 2, 2, 4 * MIB | 6), bat_entry(4, 2, 0, 4 * MIB | 6))
    return image.write(folder / "sample").read_bytes()


#: Where the structures of the sample are: (offset, bytes).
PLACES = ((0, 16), (65536, 96), (131072, 96), (196608, 96), (262144, 96), (MIB, 8192 * 2), (2 * MIB, 128),
          (3 * MIB, 256), (3 * MIB + 65536, 64))  # fmt: skip
VALUES = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF, 0x55])


def resealed(raw: bytearray) -> None:
    """Right checksums, so that what they protect is looked at."""
    from support.vhdx import sealed

    for at, length in ((65536, 4096), (131072, 4096), (196608, 65536), (262144, 65536)):
        raw[at : at + length] = sealed(bytes(raw[at : at + length]))
    length = int.from_bytes(raw[MIB + 8 : MIB + 12], "little")
    if 0 < length <= 1 << 16:
        raw[MIB : MIB + length] = sealed(bytes(raw[MIB : MIB + length]))


def use(path: Path) -> None:
    """Everything that reads, and a repair; raises what is not an error of ours."""
    context = Context(warn=lambda notice: None)

    def attempt(work: Callable[[], object]) -> None:
        try:
            work()
        except QimgError as error:
            assert "\n" not in str(error)

    def read() -> None:
        with qimg.open(path, format="vhdx", context=context) as disk:
            disk.read(0, min(disk.size, 2 * MIB))
            for number, _ in enumerate(disk.extents(0, 1 << 30)):
                if number > 1000:
                    break

    attempt(lambda: qimg.info(path, format="vhdx", context=context))
    attempt(read)
    attempt(lambda: qimg.check(path, format="vhdx", context=context))
    attempt(lambda: qimg.check(path, format="vhdx", fix="all", context=context))
    attempt(read)


@settings(
    max_examples=150, deadline=5000, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    hits=st.lists(
        st.tuples(st.sampled_from(PLACES), st.integers(0, 1 << 14), VALUES), min_size=1, max_size=4
    ),
    seal=st.booleans(),
    clean=st.booleans(),
    cut=st.none() | st.integers(0, 5 * MIB),
)
def test_any_damage_ends_in_a_result_or_an_error_of_ours(
    hits: list[tuple[tuple[int, int], int, int]], seal: bool, clean: bool, cut: int | None, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    if not kept.exists():
        kept.write_bytes(sample(tmp_path))
    raw = bytearray(kept.read_bytes())
    if clean:  # without the log, so that reading gets further
        for at in (65536, 131072):
            raw[at + 48 : at + 64] = bytes(16)
        seal = True
    for (start, length), at, value in hits:
        raw[start + at % length] = value
    if seal:
        resealed(raw)
    hurt = tmp_path / "hurt"
    hurt.write_bytes(raw if cut is None else raw[:cut])
    with bounded():
        use(hurt)
    hurt.unlink()
