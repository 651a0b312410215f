"""A crash or a failing disk during `amend` leaves the guest's disk alone, and leaks at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qimg
from support import crash
from support.build import build, io, real_content
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

M = 1 << 20


def plain(folder: Path) -> Path:
    """Zero clusters of both kinds, no snapshots."""
    return build(folder / "a.q", "A0#BC-##DE", cluster=4096)


def overlay(folder: Path) -> Path:
    """The same over a backing file."""
    (folder / "back.raw").write_bytes(b"\7" * 65536)
    return build(folder / "a.q", "A0#BC-##DE", cluster=4096, backing="back.raw", backing_format="raw")


def shared(folder: Path) -> Path:
    """The same with snapshots that share tables and clusters."""
    path = overlay(folder)
    run_real(["snapshot", "-c", "one", "a.q"], folder).ok()
    io(path, ["write -q -z 0 4k", "write -q -P 3 4k 4k", "write -q -z -u 12k 4k"])
    run_real(["snapshot", "-c", "two", "a.q"], folder).ok()
    run_real(["snapshot", "-c", "three", "a.q"], folder).ok()
    io(path, ["write -q -z 16k 8k"])
    return path


def old(folder: Path) -> Path:
    """Version 2 with a snapshot that has no extra data."""
    from spec.test_amend import cut_extra_data

    path = build(folder / "a.q", "AB-C", options="compat=0.10")
    run_real(["snapshot", "-c", "s", "a.q"], folder).ok()
    cut_extra_data(path)
    return path


CASES: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "downgrade": (plain, {"compat": "0.10"}),
    "downgrade of an overlay": (overlay, {"compat": "0.10"}),
    "downgrade with snapshots": (shared, {"compat": "0.10"}),
    "upgrade": (old, {"compat": "1.1"}),
    "header": (plain, {"lazy_refcounts": True}),
    "width": (shared, {"refcount_bits": 8}),
    "wider": (plain, {"refcount_bits": 64}),
    "all at once": (old, {"compat": "1.1", "refcount_bits": 32, "lazy_refcounts": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_can_be_seen_changes(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    path = make(tmp_path)
    before = real_content(path)

    def amend() -> None:
        qimg.amend(path, options)

    crash.assert_survives_errors(tmp_path, ["a.q"], amend, atomic=True, again=True)
    crash.assert_survives(tmp_path, ["a.q"], amend, after=before, atomic=True)


def test_a_new_size_together_with_other_options(tmp_path: Path) -> None:
    path = overlay(tmp_path)
    after = real_content(path).ljust(M, b"\0")

    def amend() -> None:
        qimg.amend(path, {"compat": "0.10", "size": M})

    crash.assert_survives_errors(tmp_path, ["a.q"], amend, atomic=True, again=True)
    crash.assert_survives(tmp_path, ["a.q"], amend, after=after, atomic=True)


def test_the_backing_file_changes_at_once_although_its_name_lies_behind_the_first_sector(
    tmp_path: Path,
) -> None:
    from qimg.context import Context
    from qimg.formats.base import Reference
    from qimg.graph.open import ImageSpec, open_disk

    path = overlay(tmp_path)
    (tmp_path / "other.raw").write_bytes(b"\7" * 65536)
    before = real_content(path)

    def change() -> None:
        spec = ImageSpec(str(path), format="qcow2")
        with open_disk(spec, context=Context(), writable=True, backing=False) as disk:
            disk.top.change_backing(Reference("other.raw", "raw"))

    crash.assert_survives_errors(tmp_path, ["a.q"], change, atomic=True, again=True)
    crash.assert_survives(tmp_path, ["a.q"], change, after=before, atomic=True)
    assert "other.raw" in run_real(["info", "a.q"], tmp_path).ok().out
