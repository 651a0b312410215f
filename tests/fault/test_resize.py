"""A crash or a failing disk during `resize` leaves the old disk or the new one, and leaks at most."""

from __future__ import annotations

from pathlib import Path

import pytest

import qimg
from qimg.storage.base import Filter, Storage
from support import crash
from support.build import build, io, real_content
from support.faults import opened_through
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

K, M = 1 << 10, 1 << 20

#: name -> (layout, options, new size, how)
GROWING = {
    "one more table": ("AB-C", "", 3 * M, "off"),
    "a longer L1 table": ("A" * 16 + "-B", "cluster=512", 20 * M, "off"),
    "reserved tables": ("AB-C", "", M, "metadata"),
    "reserved space": ("AB-C", "cluster=4096", M, "full"),
    "version 2": ("AB-C", "compat=0.10", 3 * M, "metadata"),
    "narrow counts": ("AB-C", "cluster=512,refcount_bits=1", 2 * M, "metadata"),
    "a refcount table that moves": ("AB-C", "cluster=512,refcount_bits=64", 3 * M, "metadata"),
    "subclusters": ("AB0C", "cluster=16384,extended_l2=on", M, "metadata"),
}
#: name -> (layout, options, new size)
SHRINKING = {
    "a few clusters": ("AB-C" * 8, "", 300 * K),
    "whole tables": ("AbC0" * 200, "cluster=512", 30000 - 30000 % 512),
    "version 2": ("AB-C" * 8, "compat=0.10", 300 * K),
    "compressed clusters": ("abCd" * 4, "", 96 * K),
    "subclusters": ("AB0C", "cluster=16384,extended_l2=on", 20 * K),
    "zero clusters": ("A#0#B#", "", 100 * K),
}


def image(
    path: Path, layout: str, options: str, *, size: int | None = None, backing: str | None = None
) -> Path:
    """An image of this layout; ``cluster=N`` among the options is the size of its clusters."""
    words = options.split(",")
    cluster = next((int(word.partition("=")[2]) for word in words if word.startswith("cluster=")), 65536)
    others = ",".join(word for word in words if not word.startswith("cluster="))
    kind = "raw" if backing else "qcow2"
    return build(
        path, layout, options=others, cluster=cluster, size=size, backing=backing, backing_format=kind
    )


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_disk_is_the_old_one_or_the_new_one(name: str, tmp_path: Path) -> None:
    layout, options, size, mode = GROWING[name]
    path = image(tmp_path / "a.q", layout, options)
    after = real_content(path).ljust(size, b"\0")

    def grow() -> None:
        qimg.resize(path, size, preallocation=mode)

    # Space is reserved for growth only, which may be over when the last barrier fails.
    crash.assert_survives_errors(tmp_path, ["a.q"], grow, atomic=True, again=mode == "off")
    crash.assert_survives(tmp_path, ["a.q"], grow, after=after, atomic=True)


@pytest.mark.parametrize("name", SHRINKING)
def test_a_shrinking_disk_is_the_old_one_or_the_new_one(name: str, tmp_path: Path) -> None:
    layout, options, size = SHRINKING[name]
    path = image(tmp_path / "a.q", layout, options)
    after = real_content(path)[:size]

    def shrink() -> None:
        qimg.resize(path, size, shrink=True)

    crash.assert_survives_errors(tmp_path, ["a.q"], shrink, atomic=True, again=True)
    crash.assert_survives(tmp_path, ["a.q"], shrink, after=after, atomic=True)


@pytest.mark.parametrize("size", [100 * K, 600 * K])
def test_snapshots_do_not_notice(size: int, tmp_path: Path) -> None:
    path = image(tmp_path / "a.q", "AB-C0", "")
    run_real(["snapshot", "-c", "one", "a.q"], tmp_path).ok()
    io(path, ["write -q -P 1 64k 64k"])
    run_real(["snapshot", "-c", "two", "a.q"], tmp_path).ok()

    def change() -> None:
        qimg.resize(path, size, shrink=True)

    crash.assert_survives_errors(tmp_path, ["a.q"], change, atomic=True)
    crash.assert_survives(tmp_path, ["a.q"], change, atomic=True)


@pytest.mark.parametrize("size", [100 * K, 40 * M])
def test_bitmaps_follow_or_are_known_to_mean_nothing(size: int, tmp_path: Path) -> None:
    path = image(tmp_path / "a.q", "AB-C", "cluster=512", size=20 * M)
    for words in (["b0", "-g", "512"], ["b1", "--disable"]):
        run_real(["bitmap", "--add", "a.q", *words], tmp_path).ok()
    io(path, ["write -q -P 1 1k 4k", "write -q -P 1 19M 4k"])
    after = real_content(path)[:size].ljust(size, b"\0")

    def change() -> None:
        qimg.resize(path, size, shrink=True)

    crash.assert_survives_errors(tmp_path, ["a.q"], change, atomic=True)
    crash.assert_survives(tmp_path, ["a.q"], change, after=after, atomic=True)
    shown = run_real(["info", "a.q"], tmp_path).ok().out
    assert "in-use" not in shown
    assert shown.count("granularity") == 2


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
@pytest.mark.parametrize("size", [60 * K, 100 * K])
def test_an_overlay_never_shows_what_is_below_in_its_new_part(
    options: str, size: int, tmp_path: Path
) -> None:
    (tmp_path / "back.raw").write_bytes(b"\7" * M)
    path = image(tmp_path / "a.q", "A-", options, size=size, backing="back.raw")
    after = real_content(path).ljust(2 * M, b"\0")

    def grow() -> None:
        qimg.resize(path, 2 * M)

    crash.assert_survives_errors(tmp_path, ["a.q"], grow, atomic=True, again=True)
    crash.assert_survives(tmp_path, ["a.q"], grow, after=after, atomic=True)


@pytest.mark.parametrize("options", ["data_file=d.raw", "data_file=d.raw,data_file_raw=on"])
@pytest.mark.parametrize("size", [100 * K, 3 * M])
def test_a_data_file_keeps_up(
    options: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where data files are looked for
    path = image(tmp_path / "a.q", "AB-C", options)
    content = real_content(path)
    after = content[:size].ljust(size, b"\0")

    def change() -> None:
        qimg.resize(path, size, shrink=True)

    recording = crash.record(tmp_path, ["a.q", "d.raw"], change)
    assert real_content(path) == after
    # The data file alone has no length of its own that counts, so only the image is judged here.
    image_only = Only(tmp_path, recording, [content, after])
    assert image_only.looked_at > 5


class Only:
    """Looks at every state that a power cut may leave of an image with a data file."""

    def __init__(self, folder: Path, recording: crash.Recording, allowed: list[bytes]) -> None:
        self.looked_at = 0
        for state in recording.states():
            for name, content in state.files.items():
                (folder / name).write_bytes(content)
            checked = run_real(["check", "-f", "qcow2", "a.q"], folder)
            assert checked.code in (0, 3), f"{state.what}: {checked.out}{checked.err}"
            found = real_content(folder / "a.q")
            assert found in ([allowed[1]] if state.durable else allowed), state.what
            self.looked_at += 1


class _Small(Filter):
    """A disk with room for so many bytes only."""

    room = 0

    def resize(self, size: int, preallocation: str = "off") -> None:
        if preallocation != "off" and size > self.room:
            import errno

            raise qimg.StorageError("Could not preallocate new data", errno=errno.ENOSPC)
        super().resize(size, preallocation)


def test_reserved_space_is_given_back_where_there_is_not_enough(tmp_path: Path) -> None:
    path = image(tmp_path / "a.q", "AB-C", "cluster=4096")
    before = real_content(path)
    length = path.stat().st_size

    def small(file: Storage) -> Storage:
        limited = _Small(file)
        limited.room = 64 * M
        return limited

    with opened_through(small, "a.q"), pytest.raises(qimg.StorageError, match="preallocate"):
        qimg.resize(path, 256 * M, preallocation="falloc")
    checked = run_real(["check", "a.q"], tmp_path)
    assert checked.code == 0, checked.out + checked.err
    assert path.stat().st_size <= length + 4096
    assert real_content(path) == before
