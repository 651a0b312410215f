"""Where a new image goes: names, kinds of places, and what is done to an existing file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qimg.context import Context
from qimg.errors import QimgError
from qimg.graph.open import target
from support.run import run_real


def _try(name: str) -> str:
    """Our error for creating `name`, empty if it works."""
    try:
        with target(name, context=Context()).create({}, Context()) as storage:
            storage.resize(1 << 20)
    except QimgError as error:
        return str(error)
    return ""


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "name",
    [
        "new.raw",
        "file:new2.raw",
        "file:c:d.raw",
        "dir",
        "",
        "file:",
        "nosuch/x",
        "x:y",
        "json:{}",
        "null-co://",
        "/dev/null",
        "host_device:/dev/null",
    ],
)
def test_a_target_is_accepted_or_refused_as_with_the_real_program(name: str, work: Path) -> None:
    (work / "dir").mkdir()
    real = run_real(["create", "-q", "-f", "raw", name, "1M"], work)
    made = {path.name for path in work.iterdir()}
    for path in work.iterdir():
        if path.is_file():
            path.unlink()
    ours = _try(name)
    assert (f"qemu-img: {name}: {ours}\n" if ours else "") == real.err
    assert {path.name for path in work.iterdir()} == made


def test_a_protocol_that_is_not_written_yet_is_refused_by_name() -> None:
    with pytest.raises(QimgError, match="'gluster' is not supported yet"):
        target("gluster://host/volume/x", context=Context())


def test_options_of_the_place_are_those_of_its_protocol() -> None:
    names = {option.name for option in target("x", context=Context()).options}
    assert names == {"size", "nocow", "preallocation", "extent_size_hint"}
    assert {option.name for option in target("/dev/null", context=Context()).options} == {
        "size",
        "preallocation",
    }


def test_an_existing_file_keeps_its_inode_and_is_not_removed(work: Path) -> None:
    path = work / "a.raw"
    path.write_bytes(b"old")
    inode = path.stat().st_ino
    place = target("a.raw", context=Context())
    place.create({}, Context()).close()
    place.remove_if_new(Context())
    assert path.read_bytes() == b""
    assert path.stat().st_ino == inode


def test_a_new_file_can_be_removed_again(work: Path) -> None:
    place = target("file:a.raw", context=Context())
    place.create({}, Context()).close()
    place.remove_if_new(Context())
    place.remove_if_new(Context())
    assert list(work.iterdir()) == []


def test_an_unused_target_removes_nothing(work: Path) -> None:
    (work / "a.raw").write_bytes(b"old")
    target("a.raw", context=Context()).remove_if_new(Context())
    assert (work / "a.raw").read_bytes() == b"old"


def test_a_parsed_name_makes_no_file(work: Path) -> None:
    target("a.raw", context=Context())
    assert list(work.iterdir()) == []
