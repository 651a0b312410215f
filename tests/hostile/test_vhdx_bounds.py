"""Whatever a vhdx image claims, opening and checking it takes little memory and little time.

Images are made by hand (`support.vhdx`).
"""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import qimg
from support.vhdx import (
    BAT,
    LOG_GUID,
    META_AT,
    MIB,
    NO_GUID,
    Vhdx,
    bat_entry,
    log_entry,
)

SECONDS = 20
SPACE = 256 << 20

SCRIPT = """
import sys
from qimg.context import Context
from qimg.errors import QimgError
from qimg.formats.vhdx.format import Vhdx
from qimg.storage.posix import PosixFile

def attempt(what):
    try:
        return what()
    except QimgError as error:
        print(type(error).__name__, error)

for how in ({}, {"for_check": True}, {"writable": True}):
    file = PosixFile.open(sys.argv[1], writable="writable" in how)
    image = attempt(lambda: Vhdx().open(file, context=Context(lambda notice: None), **how))
    if image is None:
        continue
    lines = 0
    def count(line):
        global lines
        lines += 1
    attempt(lambda: image.check(count))
    print(lines, "findings")
    for start in (0, image.size // 3 // 512 * 512, max(image.size - (1 << 34), 0)):
        attempt(lambda: len(image.extents(start, min(1 << 34, image.size - start))))
    if "writable" in how:
        attempt(lambda: image.allocate(0, min(512, image.size)))
        attempt(image.flush)
print("done")
"""


def survive(path: Path) -> str:
    """Open the image in every way, in a process that may take little memory and time; what it printed."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        preexec_fn=limit,
        env={**os.environ, "PYTHONPATH": str(Path(qimg.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=SECONDS * 3,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")
    return done.stdout


def test_the_largest_disk_there_can_be_costs_little(tmp_path: Path) -> None:
    """64 TiB in blocks of 1 MiB: a table of 512 MiB, a hole but for its ends."""
    image = Vhdx(size=64 << 40)
    words = (64 << 20) + (64 << 20) // 4096
    image.regions = [(BAT, 8 * MIB, 1024 * MIB, 1), META_AT]
    image.bat = {0: 1100 * MIB | 6, words - 2: 1101 * MIB | 6}
    image.length = 1102 * MIB
    assert "0 findings" in survive(image.write(tmp_path / "x.vhdx"))


def test_a_long_table_that_is_not_empty(tmp_path: Path) -> None:
    """2 TiB in blocks of 1 MiB, all of them at one place: each is a finding, none costs memory."""
    image = Vhdx(size=2 << 40)
    image.regions = [(BAT, 8 * MIB, 32 * MIB, 1), META_AT]
    image.length = 60 * MIB
    image.data = [(8 * MIB, struct.pack("<Q", 50 * MIB | 6) * ((2 << 20) // 16))]
    assert "findings" in survive(image.write(tmp_path / "x.vhdx"))


def test_the_largest_log_full_of_entries_that_are_nearly_right(tmp_path: Path) -> None:
    image = Vhdx()
    image.header.update(log_length=4095 * MIB, log_offset=16 * MIB, log=LOG_GUID)
    image.length = 4200 * MIB
    head = log_entry(sequence=5, flushed=0, last=0, length=4095 * MIB, count=3)
    for number in range(0, 2000, 2):
        image.data.append((16 * MIB + number * 4096, head))
    assert "The log holds more than" in survive(image.write(tmp_path / "x.vhdx"))


def test_the_largest_log_that_is_a_hole(tmp_path: Path) -> None:
    image = Vhdx()
    image.header.update(log_length=4095 * MIB, log_offset=16 * MIB, log=LOG_GUID)
    image.length = 4200 * MIB
    image.data.append((16 * MIB + 2000 * MIB, bat_entry(3, 2, tail=2000 * MIB)))
    assert "contains a log that needs to be replayed" in survive(image.write(tmp_path / "x.vhdx"))


def test_a_parent_locator_of_any_length(tmp_path: Path) -> None:
    keys = {"parent_linkage": "{" + NO_GUID + "}", "relative_path": "nowhere"}
    for patch in (b"\xff\xff", b"\x00\x01", b"\x00\x00"):
        image = Vhdx(parent=keys)
        at = 3 * MIB + 65536 + 8 + 8 + 16 + 4 + 4
        image.patch(at + 18, patch)
        survive(image.write(tmp_path / "x.vhdx"))
    image = Vhdx(parent=dict.fromkeys((f"key{number}" for number in range(250)), "x" * 30000))
    survive(image.write(tmp_path / "y.vhdx"))
