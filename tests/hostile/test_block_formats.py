"""vdi, qed, qcow and vpc images made to hurt: one clear error, in bounded time and memory."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.context import Context
from qimg.errors import FormatError, QimgError
from support.bounds import bounded
from support.build import write_raw

MIB = 1 << 20
FORMATS = {"vdi": {}, "qed": {"cluster_size": 4096, "table_size": 2}, "qcow": {}, "vpc": {"force_size": True}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hostile")
    source = write_raw(folder / "source.raw", "AB-C" * 12)
    found = {}
    for name, options in FORMATS.items():
        qimg.convert(source, folder / name, source_format="raw", format=name, options=options)
        found[name] = (folder / name).read_bytes()
    qimg.convert(source, folder / "packed", source_format="raw", format="qcow", compress=True)
    found["compressed qcow"] = (folder / "packed").read_bytes()
    return found


def everything(path: Path, format: str) -> None:
    """Look at the image by every way that reads, then change it; what comes out is an answer or our error."""
    context = Context(warn=lambda notice: None)
    for action in (
        lambda: qimg.info(path, format=format, context=context),
        lambda: _read(path, format, context),
        lambda: qimg.check(path, format=format, context=context),
        lambda: qimg.check(path, format=format, fix="all", context=context),
        lambda: _write(path, format, context),
    ):
        try:
            action()
        except QimgError as error:
            assert "\n" not in str(error)


def _read(path: Path, format: str, context: Context) -> None:
    with qimg.open(path, format=format, context=context) as disk:
        disk.read(0, min(disk.size, 4 * MIB))
        disk.read(max(0, disk.size - MIB), min(disk.size, MIB))
        for number, _ in enumerate(disk.extents(0, min(disk.size, 1 << 36))):
            if number > 5000:
                break


def _write(path: Path, format: str, context: Context) -> None:
    qimg.bench(path, count=4, depth=1, size=4096, step=70000, write=True, format=format, context=context)


numbers = st.one_of(
    st.integers(0, 8),
    st.sampled_from([0x7F, 0xFF, 0x80, 0xFFFFFFFF, 1 << 31, (1 << 64) - 1, 1 << 62, 1 << 40]),
)


@pytest.mark.parametrize("name", [*FORMATS, "compressed qcow"])
def test_any_damage_ends_in_an_answer_or_an_error(
    name: str, images: dict[str, bytes], tmp_path: Path
) -> None:
    whole, format = images[name], name.split()[-1]
    path = tmp_path / "image"
    order = "<" if format in ("vdi", "qed") else ">"

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(
            st.tuples(st.one_of(st.integers(0, 160), st.integers(0, 20000)), st.sampled_from("BIQ"), numbers),
            min_size=1,
            max_size=3,
        ),
        st.one_of(st.none(), st.integers(0, len(whole))),
    )
    def run(patches: list[tuple[int, str, int]], cut: int | None) -> None:
        data = bytearray(whole)
        for place, kind, value in patches:
            place *= 4 if kind != "B" else 1
            raw = struct.pack(order + kind, value & ((1 << 8 * struct.calcsize("=" + kind)) - 1))
            if place + len(raw) <= len(data):
                data[place : place + len(raw)] = raw
        if format == "vpc" and data[:8] == b"conectix":
            data[64:68] = bytes(4)
            data[64:68] = struct.pack(">I", ~sum(data[:512]) & 0xFFFFFFFF)
        path.write_bytes(data[:cut])
        with bounded():
            everything(path, format)

    run()


def q(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "Q", value)


def i(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "I", value)


#: Format, patches (offset, bytes), the field that the error names, and what it says.
ROWS = [
    ("vdi", [(380, i(8))], "header.block_extra", "8 extra bytes per block"),
    ("vdi", [(76, i(4))], "header.type", "type 4"),
    ("vdi", [(340, i(0))], "header.map_offset", "block map overlaps header or data"),
    ("vdi", [(344, i(512))], "header.map_offset", "block map overlaps header or data"),
    ("vdi", [(384, i(536870784))], "header.map_offset", "reaches past the end of the file"),
    ("vpc", [(528, q(1 << 63, ">"))], "dynamic header.bat_offset", "table offset"),
    ("vpc", [(16, q(1 << 63, ">"))], "footer.data_offset", "Invalid header offset"),
    ("vpc", [(60, i(2, ">"))], "footer.type", "at its beginning"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "patches", "field", "text"), ROWS)
def test_what_cannot_be_is_refused_by_the_name_of_its_field(
    format: str,
    patches: list[tuple[int, bytes]],
    field: str,
    text: str,
    images: dict[str, bytes],
    tmp_path: Path,
) -> None:
    data = bytearray(images[format])
    for offset, raw in patches:
        data[offset : offset + len(raw)] = raw
    if format == "vpc":
        data[64:68] = bytes(4)
        data[64:68] = struct.pack(">I", ~sum(data[:512]) & 0xFFFFFFFF)
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(QimgError, match=text) as found:
        qimg.info(tmp_path / "image", format=format)
    cause: BaseException | None = found.value
    while cause is not None and not isinstance(cause, FormatError):
        cause = cause.__cause__
    assert cause is not None
    assert cause.field == field


def test_a_block_of_vpc_over_its_own_table_is_not_read(images: dict[str, bytes], tmp_path: Path) -> None:
    for sector in (0, 1, 3):
        data = bytearray(images["vpc"])
        data[1536:1540] = i(sector, ">")
        (tmp_path / "image").write_bytes(data)
        with qimg.open(tmp_path / "image", format="vpc") as disk, pytest.raises(QimgError):
            disk.read(0, 512)


MEMORY = """
import resource, sys
import qimg
from qimg.errors import QimgError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for action in (qimg.info, qimg.check):
    try:
        action(sys.argv[1], format=sys.argv[2])
    except QimgError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def sparse(path: Path, data: bytes, length: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(length)


@pytest.mark.parametrize("kind", ["vdi map", "vpc table", "qed tables", "qed file", "qcow table"])
def test_sizes_out_of_all_proportion_cost_neither_memory_nor_time(
    kind: str, images: dict[str, bytes], tmp_path: Path
) -> None:
    path, format = tmp_path / "image", kind.split()[0]
    data = bytearray(images[format])
    if kind == "vdi map":
        data[384:388], data[344:348] = i(400_000_000), i(0x7F000000)
        sparse(path, data[:512], 2 << 30)
    elif kind == "vpc table":
        data[540:544], data[544:548] = i(0x0FFFFFFF, ">"), i(512, ">")
        sparse(path, data[:1536], (1 << 30) + (1 << 20))
    elif kind == "qed tables":
        header = data[:64]
        header[4:8], header[8:12], header[40:48] = i(64 << 20), i(16), q(64 << 20)
        sparse(path, header, 3 << 30)
    elif kind == "qed file":
        sparse(path, data, 8 << 40)
    else:
        data[24:32] = q(400 << 40, ">")
        sparse(path, data[:48], 4096)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path, format], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 256, "MiB"
    assert time.monotonic() - start < 30
