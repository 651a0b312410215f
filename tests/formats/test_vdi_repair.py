"""check -r of vdi (qimg only): afterwards the real check finds nothing, and no block has lost its content."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import qimg
from support import crash
from support.build import content, real_content, write_raw
from support.run import run_peer, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
MAP, COUNT = 512, 388
ABSENT = 0xFFFFFFFF


def make(folder: Path, layout: str, *, options: str = "") -> Path:
    """An image of the real program with blocks of these letters."""
    source = write_raw(folder / "a.raw", layout, cluster=MIB)
    more = ["-o", options] if options else []
    run_real(["convert", "-f", "raw", "-O", "vdi", *more, source, folder / "x"]).ok()
    return folder / "x"


def patch(path: Path, *words: tuple[int, int]) -> None:
    with path.open("r+b") as file:
        for offset, word in words:
            file.seek(offset)
            file.write(struct.pack("<I", word))


def entries(path: Path, count: int) -> list[int]:
    return list(struct.unpack_from(f"<{count}I", path.read_bytes(), MAP))


def repaired(path: Path) -> str:
    """What a repair told; the real check finds nothing afterwards, and neither does ours."""
    found = run_qimg_inprocess(["check", "-f", "vdi", "-r", "all", path])
    assert found.code == 0, found
    run_real(["check", "-f", "vdi", path]).ok()
    assert qimg.check(path, format="vdi").corruptions == 0
    return found.out + found.err


def test_a_sound_image_is_left_as_it_is(tmp_path: Path) -> None:
    path = make(tmp_path, "A-B")
    before = path.read_bytes()
    assert repaired(path) == "No errors were found on the image.\n"
    assert path.read_bytes() == before


def test_an_entry_that_leads_nowhere_is_cleared(tmp_path: Path) -> None:
    path = make(tmp_path, "AB-C")
    patch(path, (MAP + 4, 777), (MAP + 8, 0xFFFFFFF0))
    told = repaired(path)
    assert "Repairing: block index 1 too large, is 777\n" in told
    assert "3 corruptions" in told, "and the number of blocks was wrong"
    assert real_content(path, format="vdi") == content("A--C", cluster=MIB)


def test_blocks_that_share_a_place_get_their_own(tmp_path: Path) -> None:
    path = make(tmp_path, "ABCD")
    patch(path, (MAP + 8, 0))
    expected = real_content(path, format="vdi")
    assert "Repairing: block index 0 also used by 0\n" in repaired(path)
    assert sorted(entries(path, 4)) == [0, 1, 2, 3]
    assert real_content(path, format="vdi") == expected
    run_peer("qemu-io", ["-f", "vdi", "-c", "write -P 9 2M 1M", path]).ok()
    assert real_content(path, format="vdi")[:MIB] == expected[:MIB]


@pytest.mark.parametrize("said", [0, 1, 7])
def test_the_number_of_blocks_is_that_of_the_map(said: int, tmp_path: Path) -> None:
    path = make(tmp_path, "A-BC")
    patch(path, (COUNT, said))
    assert f"allocated blocks mismatch, is 3, should be {said}" in repaired(path)
    run_peer("qemu-io", ["-f", "vdi", "-c", "write -P 9 1M 1M", path]).ok()
    assert real_content(path, format="vdi")[2 * MIB :] == content("A-BC", cluster=MIB)[2 * MIB :]


def test_gaps_are_closed_so_that_the_real_program_overwrites_nothing(tmp_path: Path) -> None:
    """It puts new blocks where the number of blocks says."""
    path = make(tmp_path, "ABCD--")
    patch(path, (MAP, ABSENT), (MAP + 8, 777))
    told = repaired(path)
    assert "allocated blocks mismatch, is 2, should be 4" in told
    assert entries(path, 4) == [ABSENT, 1, ABSENT, 0]
    assert path.stat().st_size == 1024 + 2 * MIB
    for offset in (0, 2, 4, 5):
        run_peer("qemu-io", ["-f", "vdi", "-c", f"write -P {offset + 1} {offset}M 1M", path]).ok()
    found = real_content(path, format="vdi")
    assert (found[MIB : 2 * MIB], found[3 * MIB : 4 * MIB]) == tuple(
        content("ABCD", cluster=MIB)[at * MIB : (at + 1) * MIB] for at in (1, 3)
    )
    run_real(["check", "-f", "vdi", path]).ok()


def test_leaks_only_repairs_nothing(tmp_path: Path) -> None:
    path = make(tmp_path, "AB")
    patch(path, (COUNT, 5))
    before = path.read_bytes()
    found = run_qimg_inprocess(["check", "-f", "vdi", "-r", "leaks", path])
    assert (found.code, "ERROR: allocated blocks mismatch" in found.err) == (2, True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("options", ["", "static=on"])
def test_any_damage_of_the_map_is_repaired(seed: int, options: str, tmp_path: Path) -> None:
    chance = random.Random(seed)
    path = make(tmp_path, "".join(chance.choice("ABC--") for _ in range(9)) + "A", options=options)
    for _ in range(chance.randrange(1, 6)):
        word = chance.choice([chance.randrange(10), ABSENT, ABSENT - 1, 10, 99, chance.getrandbits(32)])
        patch(path, (MAP + 4 * chance.randrange(10), word))
    patch(path, (COUNT, chance.choice([10, 0, chance.randrange(12)])))
    bad = [number for number, word in enumerate(entries(path, 10)) if 10 <= word < ABSENT - 1]
    expected = bytearray(real_content(path, format="vdi"))
    for number in bad:
        expected[number * MIB : (number + 1) * MIB] = bytes(MIB)
    repaired(path)
    assert real_content(path, format="vdi") == expected


def test_a_power_cut_during_a_repair_costs_no_content(tmp_path: Path) -> None:
    path = make(tmp_path, "ABCD-A")
    patch(path, (MAP, ABSENT), (MAP + 8, 3), (MAP + 4 * 5, 777), (COUNT, 9))
    expected = bytearray(real_content(path, format="vdi"))
    expected[5 * MIB :] = bytes(MIB)
    recording = crash.record(tmp_path, ["x"], lambda: qimg.check(path, format="vdi", fix="all"))
    with crash.scratch(tmp_path) as place:
        for state in recording.states(limit=40, seed=3):
            image = place / "x"
            image.write_bytes(state.files["x"])
            assert real_content(image, format="vdi")[: 5 * MIB] == expected[: 5 * MIB], state.what
            repaired(image)
            assert real_content(image, format="vdi") == expected, state.what
