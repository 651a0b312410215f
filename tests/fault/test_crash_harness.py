"""The harness of `support.crash` itself: it finds the faults of careless programs, and none in careful ones.

The programs write a guest cluster of an image that the real program made, with bytes laid out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qimg.errors import QimgError
from qimg.storage import registry
from qimg.storage.base import Storage
from support import crash
from support.build import build, content
from support.qcow2 import COPIED, Anatomy, u16, u64

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

CLUSTER = 65536
LAYOUT = "A-B-"
AFTER = bytearray(content(LAYOUT))
AFTER[CLUSTER : 2 * CLUSTER] = b"n" * CLUSTER


class Parts(NamedTuple):
    """What a program has to write: (offset, bytes)."""

    data: tuple[int, bytes]
    count: tuple[int, bytes]
    link: tuple[int, bytes]


Steps = list[str]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "image", LAYOUT)


def parts(image: Path) -> Parts:
    anatomy = Anatomy(image)
    new = anatomy.clusters
    return Parts(
        (new * CLUSTER, b"n" * CLUSTER),
        (anatomy.blocks[0] + 2 * new, u16(1)),
        (anatomy.entry(1), u64(new * CLUSTER | COPIED)),
    )


def program(image: Path, steps: str) -> Callable[[], None]:
    """A program that does these steps: d data, c count, l link, F barrier."""
    todo = parts(image)
    kinds = {"d": todo.data, "c": todo.count, "l": todo.link}

    def run() -> None:
        with opened(image) as file:
            for step in steps:
                if step == "F":
                    file.flush()
                else:
                    offset, data = kinds[step]
                    file.write(data, offset)

    return run


def opened(image: Path) -> Storage:
    return registry.get("file").from_options({"filename": str(image)}, writable=True)


def test_a_program_that_writes_in_order_passes(image: Path) -> None:
    recording = crash.assert_survives(image.parent, ["image"], program(image, "dcFlF"), after=bytes(AFTER))
    assert [event.kind for _, event in recording.events] == ["write", "write", "flush", "write", "flush"]


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ("dclF", "check: 2"),  # the link can overtake the count
        ("dlFcF", "check: 2"),
        ("cFdlF", "exceeding the end of the file"),  # the link can overtake the data
        ("dcFl", "reads as"),  # never made durable
        ("dc", "at the end: image: \n1 leaked"),
    ],
)
def test_a_program_that_writes_out_of_order_is_found_out(steps: str, complaint: str, image: Path) -> None:
    with pytest.raises(AssertionError, match=complaint):
        crash.assert_survives(image.parent, ["image"], program(image, steps), after=bytes(AFTER))


def test_a_write_in_the_wrong_place_is_found_out(image: Path) -> None:
    anatomy = Anatomy(image)
    first = anatomy.number(anatomy.entry(0)) & 0xFFFFFFFFFFFE00

    def run() -> None:
        with opened(image) as file:
            file.write(b"x" * 512, first)
            file.flush()
            file.write(anatomy.raw[first : first + 512], first)
            file.flush()

    with pytest.raises(AssertionError, match="sector at 0x0 reads as 7878"):
        crash.assert_survives(image.parent, ["image"], run)
    crash.assert_survives(image.parent, ["image"], run, between=[b"x" * 512 + content(LAYOUT)[512:]])


def test_what_is_to_happen_at_once_may_not_be_seen_half_done(image: Path) -> None:
    anatomy = Anatomy(image)
    first = anatomy.number(anatomy.entry(0)) & 0xFFFFFFFFFFFE00

    def run() -> None:
        with opened(image) as file:
            file.write(b"x" * 2048, first)
            file.flush()

    crash.assert_survives(image.parent, ["image"], run)
    with pytest.raises(AssertionError, match="neither the old content nor the new"):
        crash.assert_survives(image.parent, ["image"], lambda: swap(run, image), atomic=True)


def swap(run: Callable[[], None], image: Path) -> None:
    """Other bytes than those that are there."""
    with opened(image) as file:
        place = Anatomy(image).number(Anatomy(image).entry(0)) & 0xFFFFFFFFFFFE00
        file.write(b"y" * 2048, place)
        file.flush()


def test_a_discard_of_what_is_still_in_use_is_found_out(image: Path) -> None:
    anatomy = Anatomy(image)
    second = anatomy.number(anatomy.entry(2)) & 0xFFFFFFFFFFFE00

    def run() -> None:
        with opened(image) as file:
            file.discard(second, CLUSTER)
            file.write(u64(0), anatomy.entry(2))
            file.flush()
            file.write(u16(0), anatomy.blocks[0] + 2 * (second // CLUSTER))
            file.flush()

    # Without the backing file both read as zeros where space is given back as such; rubbish shows.
    with pytest.raises(AssertionError, match="reads as d5800001"):
        crash.assert_survives(image.parent, ["image"], run)


def test_a_file_that_is_cut_too_early_is_found_out(image: Path) -> None:
    anatomy = Anatomy(image)
    assert anatomy.number(anatomy.entry(2)) & 0xFFFFFFFFFFFE00 == (anatomy.clusters - 1) * CLUSTER

    def run() -> None:
        with opened(image) as file:
            file.write(u64(0), anatomy.entry(2))
            file.resize((anatomy.clusters - 1) * CLUSTER)
            file.flush()
            file.write(u16(0), anatomy.blocks[0] + 2 * (anatomy.clusters - 1))
            file.flush()

    with pytest.raises(AssertionError, match="check: 2"):
        crash.assert_survives(image.parent, ["image"], run)


def test_errors_are_put_at_every_change(image: Path) -> None:
    before = image.read_bytes()
    crash.assert_survives_errors(image.parent, ["image"], program(image, "dcFlF"), again=True)
    assert image.read_bytes() == before
    with pytest.raises(AssertionError, match="Input/output error at change 4: image: check: 2"):
        crash.assert_survives_errors(image.parent, ["image"], program(image, "dFlcF"))


def test_an_error_that_is_swallowed_is_found_out(image: Path) -> None:
    run = program(image, "dcFlF")

    def careless() -> None:
        try:
            run()
        except QimgError:
            return

    with pytest.raises(AssertionError, match="Input/output error at change 1: image: sector at 0x10000"):
        crash.assert_survives_errors(image.parent, ["image"], careless)
