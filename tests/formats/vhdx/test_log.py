"""Changes of more sectors than one log entry holds, by the pieces of the driver; the real program judges."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.formats.vhdx.format import Vhdx as Driver
from qimg.storage.posix import PosixFile
from qimg.storage.record import RecordStorage
from support.run import run_peer, run_real
from support.vhdx import BAT, METADATA, MIB, Vhdx

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

#: Blocks of one sector of the BAT: 512 words, of which one in 4097 is a bitmap's.
FAR = 512
SECTORS = 300


def image(path: Path) -> Path:
    """A disk of blocks of 1 MiB whose BAT has many sectors; in a hole, so that it costs nothing."""
    made = Vhdx(size=SECTORS * FAR * MIB)
    made.regions = [(BAT, 8 * MIB, 2 * MIB, 1), (METADATA, 3 * MIB, MIB, 1)]
    made.length = 10 * MIB
    return made.write(path)


def test_a_batch_over_many_sectors_takes_several_entries_and_one_log_guid(tmp_path: Path) -> None:
    path = image(tmp_path / "x.vhdx")
    recorder = RecordStorage(PosixFile.open(str(path), writable=True))
    with Driver().open(recorder, writable=True, context=Context()) as opened:
        for number in range(SECTORS):
            (place,) = opened.allocate(number * FAR * MIB, 512)
            assert place.source is not None
            assert place.host is not None
            place.source.write(struct.pack("<Q", number + 1) * 64, place.host)
        opened.flush()
    entries = [event.data for event in recorder.events if event.kind == "write" and event.data[:4] == b"loge"]
    assert [struct.unpack_from("<I", entry, 24)[0] for entry in entries] == [126, 126, 48]
    assert [struct.unpack_from("<Q", entry, 16)[0] for entry in entries] == [1, 2, 3]
    assert len({entry[32:48] for entry in entries}) == 1
    assert run_real(["check", "-f", "vhdx", path]).code == 0
    assert qimg.check(path, format="vhdx").corruptions == 0
    for number in (0, 1, 125, 126, 127, 251, 252, 299):
        value = (number + 1) & 0xFF
        words = ["-r", "-f", "vhdx", "-c", f"read -P {value} {number * FAR * MIB} 1", path]
        assert "failed" not in run_peer("qemu-io", words).ok().out
    with qimg.open(path, format="vhdx") as disk:
        for number in range(SECTORS):
            assert disk.read(number * FAR * MIB, 8) == struct.pack("<Q", number + 1)


def test_the_table_changes_only_after_the_data_and_the_entry_are_durable(tmp_path: Path) -> None:
    path = image(tmp_path / "x.vhdx")
    recorder = RecordStorage(PosixFile.open(str(path), writable=True))
    with Driver().open(recorder, writable=True, context=Context()) as opened:
        (place,) = opened.allocate(0, 512)
        assert place.source is not None
        assert place.host is not None
        place.source.write(b"data" * 128, place.host)
        opened.flush()
    kinds = []
    for event in recorder.events:
        if event.kind != "write":
            kinds.append(event.kind)
        elif event.offset in (64 << 10, 128 << 10):
            kinds.append("header with log" if any(event.data[48:64]) else "header")
        else:
            names = {MIB: "entry", 8 * MIB: "table", place.host: "data"}
            kinds.append(names[event.offset])
    assert kinds == [
        *("header", "flush", "header", "flush"),
        *("data", "resize", "flush"),
        *("header with log", "flush"),
        *("entry", "flush"),
        *("table", "flush"),
        *("header", "flush", "header", "flush"),
    ]  # fmt: skip
