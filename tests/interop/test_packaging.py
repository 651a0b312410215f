"""What `pip install .` leaves on a machine: a command, a typed package, and a program that drops in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Installed:
    """An environment with qimg installed from a wheel of this tree."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        tag = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.packages = folder / "lib" / tag / "site-packages"

    def run(self, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run something with nothing of this tree on the path."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77 (requirements-dev.lock)")
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    # pip builds inside the source tree: give it a copy, as a user's checkout would be.
    wanted = ("src", "bin", "pyproject.toml", "README.md", "LICENSE")
    for name in wanted:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    target = folder / "environment"
    venv.create(target, with_pip=False, symlinks=True)
    made = Installed(target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(source)]
    install = [*pip, "--python", str(made.python), "install", "--no-deps", "--no-index"]
    run = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = folder.glob("qimg-*.whl")
    run = subprocess.run([*install, str(wheel)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    # The dependencies of the environment that runs the tests; its own link to this tree is not followed.
    (made.packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def test_the_command_runs_from_the_environment_it_was_installed_into(installed: Installed, tmp_path: Path):
    run = installed.run(installed.bin / "qimg", "--version", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("qimg version ")
    where = installed.run(installed.python, "-c", "import qimg; print(qimg.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).parent == installed.packages / "qimg"


def test_the_module_runs_as_the_command_does(installed: Installed, tmp_path: Path):
    module = installed.run(installed.python, "-m", "qimg", "--version", cwd=tmp_path)
    command = installed.run(installed.bin / "qimg", "--version", cwd=tmp_path)
    assert (module.returncode, module.stdout) == (0, command.stdout)


def test_called_through_a_link_named_qemu_img_it_calls_itself_so(installed: Installed, tmp_path: Path):
    link = tmp_path / "qemu-img"
    link.symlink_to(installed.bin / "qimg")
    run = installed.run(link, "info", "nosuch", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("qemu-img: Could not open 'nosuch'")
    usage = installed.run(link, "--help", cwd=tmp_path)
    assert usage.returncode == 0
    assert "usage: qemu-img [standard options] command [command options]" in usage.stdout


def test_an_image_made_by_the_installed_command_is_one(installed: Installed, tmp_path: Path):
    run = installed.run(installed.bin / "qimg", "create", "-q", "-f", "qcow2", "a.qcow2", "1M", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "a.qcow2").read_bytes()[:4] == b"QFI\xfb"


def test_the_package_carries_its_types_and_its_licence(installed: Installed):
    assert (installed.packages / "qimg" / "py.typed").exists()
    (info,) = installed.packages.glob("qimg-*.dist-info")
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_every_package_of_the_source_tree_is_installed(installed: Installed):
    source = {path.relative_to(ROOT / "src") for path in (ROOT / "src" / "qimg").rglob("*.py")}
    here = {path.relative_to(installed.packages) for path in (installed.packages / "qimg").rglob("*.py")}
    assert here == source


def test_the_command_starts_without_the_imports_of_a_generated_entry_point(
    installed: Installed, tmp_path: Path
):
    script = (installed.bin / "qimg").read_text()
    assert "import re" not in script
    assert script.count("\n") < 15
