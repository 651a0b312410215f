"""The tests' own helpers: a wrong oracle would make every other test worthless."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import build, holders, peers, release7, run

INFO_10 = """\
image: a.q
file format: qcow2
virtual size: 10 MiB (10485760 bytes)
disk size: 204 KiB
cluster_size: 65536
Snapshot list:
ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT
1       s1                    0 B 2026-11-22 20:12:16  0000:00:00.000          0
12      two words         1.5 MiB 2026-11-22 20:12:17  0101:02:03.004         --
Format specific information:
    compat: 1.1
Child node '/file':
    filename: a.q
    protocol type: file
    file length: 384 KiB (393216 bytes)
    disk size: 204 KiB

image: base.q
file format: raw
Child node '/file':
    filename: base.q
    Child node '/file/x':
        filename: deeper
"""

INFO_7 = """\
image: a.q
file format: qcow2
virtual size: 10 MiB (10485760 bytes)
disk size: 204 KiB
cluster_size: 65536
Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         s1                    0 B 2026-11-22 20:12:16 00:00:00.000          0
12        two words         1.5 MiB 2026-11-22 20:12:17101:02:03.004           \n\
Format specific information:
    compat: 1.1

image: base.q
file format: raw
"""


def test_the_normaliser_turns_a_10_layout_into_that_of_7_and_nothing_else():
    assert release7.info_human(INFO_10) == INFO_7
    assert release7.info_human(INFO_7) == INFO_7


def test_the_normaliser_drops_children_from_json_and_keeps_the_rest_as_it_stands():
    ours = (
        '{\n    "children": [\n        {\n            "name": "file",\n            "info": {\n'
        '                "children": [\n                ],\n                "virtual-size": 1\n'
        '            }\n        }\n    ],\n    "virtual-size": 2,\n    "x": [\n    ]\n}\n'
    )
    assert release7.info_json(ours) == '{\n    "virtual-size": 2,\n    "x": [\n    ]\n}\n'


def test_the_normaliser_drops_compressed_from_map():
    ours = '[{ "start": 0, "length": 1, "data": true, "compressed": false, "offset": 5}]\n'
    assert release7.map_json(ours) == '[{ "start": 0, "length": 1, "data": true, "offset": 5}]\n'


def test_the_real_snapshot_table_is_what_the_normaliser_makes(qemu_img: str, work: Path):
    build.build(work / "a.q", "A0-")
    run.run_real(["snapshot", "-c", "s1", "a.q"], work).ok()
    real = run.run_real(["snapshot", "-l", "a.q"], work).lines
    fields = real[2].split()
    # the same values in the 10.0 layout, with its printf widths, then back
    date, clock = f"{fields[4]} {fields[5]}", "00" + fields[6]
    ours = f"{fields[0]:<7} {fields[1]:<16} {'0 B':>8} {date} {clock:>15} {'0':>10}"
    text = f"{real[0]}\n{release7._TABLE_HEAD}\n{ours}\n"
    assert release7.snapshot_table(text).splitlines() == real


@pytest.mark.parametrize("cluster", [4096, 65536])
def test_a_layout_builds_the_image_that_it_draws(qemu_img: str, qemu_io: str, work: Path, cluster: int):
    base = build.build(work / "base.q", "BB-B", cluster=cluster)
    top = build.build(work / "top.q", "A0-#c", cluster=cluster, backing="base.q")
    below = build.content("BB-B", cluster=cluster)
    assert build.real_content(base) == below
    assert build.real_content(top) == build.content("A0-#c", cluster=cluster, below=below)
    rows = release7.parsed_map(run.run_real(["map", "--output=json", "top.q"], work).ok().out)
    kinds = [(row["start"], row["data"], row["zero"], row["present"], "offset" in row) for row in rows]
    assert kinds == [
        (0, True, False, True, True),
        (cluster, False, True, True, False),
        (2 * cluster, False, True, False, False),
        (3 * cluster, False, True, True, True),
        (4 * cluster, True, False, True, False),
    ]


def test_the_pattern_reads_as_its_own_address():
    assert build.pattern("A", 0x10008, 8) == b"A\0\0\0\0\1\0\x08"
    assert build.content("A-", cluster=16) == b"A" + bytes(7) + b"A" + bytes(6) + b"\x08" + bytes(16)


def test_a_raw_file_of_a_layout_has_its_holes(tmp_path: Path):
    path = build.write_raw(tmp_path / "a.raw", "A-0A")
    assert path.read_bytes() == build.content("A-0A")
    assert path.stat().st_blocks * 512 == 2 * build.CLUSTER


def test_a_holder_keeps_its_locks_until_the_block_ends(qemu_io: str, qemu_img: str, work: Path):
    build.build(work / "a.q", "A")
    with holders.qemu_io_holding(work / "a.q"):
        assert "lock" in run.run_real(["info", "a.q"], work).err
    run.run_real(["info", "a.q"], work).ok()


def test_a_served_image_can_be_reached_through_its_socket(qemu_nbd: str, qemu_img: str, work: Path):
    build.build(work / "a.q", "A-")
    with holders.qemu_nbd_serving(work / "a.q", read_only=True) as socket:
        assert run.run_real(["info", f"nbd+unix:///?socket={socket}"], work).code == 0


def test_a_missing_peer_skips_by_name_or_fails_where_peers_are_required(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QIMG_REQUIRE_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs no-such-program"):
        peers.need("no-such-program")
    monkeypatch.setenv("QIMG_REQUIRE_PEERS", "1")
    with pytest.raises(pytest.fail.Exception, match="QIMG_REQUIRE_PEERS"):
        peers.need("no-such-program")


def test_runs_in_process_catch_output_at_the_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main = pytest.importorskip("qimg.cli.main", reason="the command line is not there yet")

    def speak() -> int:
        os.write(1, b"one\n")
        print("two")
        subprocess.run(["sh", "-c", "echo three >&2"], check=True)
        print(os.getcwd())
        return 3

    monkeypatch.setattr(main, "main", speak)
    before = os.getcwd()
    result = run.run_qimg_inprocess([], tmp_path)
    assert result == run.Result(3, f"one\ntwo\n{tmp_path}\n", "three\n")
    assert os.getcwd() == before
