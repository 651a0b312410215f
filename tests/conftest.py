"""Fixtures that every test may use; see ``tests/support`` for the helpers behind them."""

from __future__ import annotations

import os
import stat
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from support import peers

# Before any test imports them: their assertions explain themselves too.
pytest.register_assert_rewrite("spec.differential", "spec.chains")

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.peer(...)``: skip (or fail) before any fixture builds something."""
    for mark in item.iter_markers("peer"):
        for program in mark.args:
            peers.need(program)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """What goes to a regular file need not reach the disk: power cuts are played from recorded barriers
    (`support.crash`), and everybody else sees the page cache. A device may be a view of another file, and is
    flushed."""
    flush = os.fdatasync

    def fdatasync(fd: int) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            flush(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        yield


@pytest.fixture
def qemu_img() -> str:
    """Path of the real qemu-img."""
    return peers.need("qemu-img")


@pytest.fixture
def qemu_io() -> str:
    """Path of the real qemu-io."""
    return peers.need("qemu-io")


@pytest.fixture
def qemu_nbd() -> str:
    """Path of the real qemu-nbd."""
    return peers.need("qemu-nbd")


@pytest.fixture
def nbdkit() -> str:
    """Path of nbdkit."""
    return peers.need("nbdkit")


@pytest.fixture
def nbdcopy() -> str:
    """Path of nbdcopy."""
    return peers.need("nbdcopy")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is also the working directory, so that file names in messages stay short."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty folders, ``real`` and ``ours``, for `support.run.run_both` with commands that write."""
    folders = tmp_path / "real", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
    return folders


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Closing lines: how many tests skipped because a real program is missing, by program."""
    missing: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = _skip_reason(report)
        (missing if reason.startswith(peers.SKIP_PREFIX) else others)[reason] += 1
    if missing:
        terminalreporter.section("tests not run: no real program to compare with", sep="-")
        for reason, count in sorted(missing.items()):
            program = reason.removeprefix(peers.SKIP_PREFIX)
            package = peers.PACKAGES.get(program)
            hint = f" (Debian: apt-get install {package})" if package else ""
            terminalreporter.write_line(f"{count:5d} skipped: {reason}{hint}")
        terminalreporter.write_line("QIMG_REQUIRE_PEERS=1 turns these into failures.")
    if others:
        terminalreporter.section("other skips", sep="-")
        for reason, count in sorted(others.items()):
            terminalreporter.write_line(f"{count:5d} skipped: {reason}")


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The words given to ``pytest.skip``."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
