"""The door of developers, `./dev`, and the script of CI, as far as a test run can see them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("shell", "script"), [("sh", "dev"), ("bash", ".ci/run")])
def test_the_scripts_parse(shell: str, script: str):
    run = subprocess.run([shell, "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert (ROOT / script).stat().st_mode & 0o111


def test_help_names_every_command():
    run = subprocess.run([ROOT / "dev"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    commands = re.findall(r"(?m)^    (\w+)\)", (ROOT / "dev").read_text())
    assert len(commands) >= 6
    for command in commands:
        assert f"./dev {command}" in run.stdout


def test_an_unknown_command_is_refused_by_name():
    run = subprocess.run([ROOT / "dev", "frobnicate"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "no command 'frobnicate'" in run.stderr


def test_without_a_usable_python_it_says_so(tmp_path: Path):
    copy = tmp_path / "dev"
    copy.write_bytes((ROOT / "dev").read_bytes())
    (tmp_path / "requirements.lock").touch()
    run = subprocess.run(
        ["sh", copy, "qimg"],
        env={"PATH": "/usr/bin:/bin", "QIMG_PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "no Python 3.11 or newer" in run.stderr


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_every_locked_package_has_hashes_and_names_no_place(name: str):
    text = (ROOT / name).read_text()
    pins = re.findall(r"(?m)^[a-z0-9.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text)
    assert len(pins) == len(re.findall(r"(?m)^[a-z0-9]", text)) >= 3
    assert "://" not in text
    assert "file:/" not in text


def test_the_development_lock_holds_the_runtime_lock_s_versions():
    def pins(name: str) -> set[str]:
        return set(re.findall(r"(?m)^(\S+==\S+)", (ROOT / name).read_text()))

    assert pins("requirements.lock") <= pins("requirements-dev.lock")
