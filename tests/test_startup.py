"""Start-up is a budget: what a short command imports is listed here, and nothing else may creep in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qimg
from qimg.crypto.luks import LuksHeader, Scheme

SOURCE = Path(qimg.__file__).parents[1]

#: Modules of the standard library that a short command may load. Each is small or built in.
ALLOWED = {
    "__future__",
    "_abc",
    "_collections",
    "_collections_abc",
    "_operator",
    "_signal",
    "_stat",
    "_struct",
    "abc",
    "array",
    "collections",
    "collections.abc",
    "errno",
    "fcntl",
    "genericpath",
    "itertools",
    "keyword",
    "operator",
    "os",
    "os.path",
    "posixpath",
    "reprlib",
    "stat",
    "struct",
    "time",
}
#: What costs more than a whole short command; named for clear failures, the list above decides.
HEAVY = {
    "argparse",
    "asyncio",
    "ctypes",
    "dataclasses",
    "enum",
    "inspect",
    "json",
    "logging",
    "numpy",
    "pathlib",
    "re",
    "subprocess",
    "threading",
    "typing",
}
#: Of ourselves: what no small image needs.
NOT_NEEDED = {"qimg.api", "qimg.codec", "qimg.cli.objects", "qimg.cli.trace", "qimg.jobs.engine"}

SHOW = (
    "import sys; before = set(sys.modules)\n"
    "from qimg.cli.main import main\n"
    "code = main(sys.argv)\n"
    "sys.stderr.write('\\n'.join(sorted(set(sys.modules) - before)))\n"
    "sys.exit(code)\n"
)


def imported(folder: Path, *words: str) -> set[str]:
    """The modules that a run of qimg adds to a bare interpreter; the run must succeed."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", SHOW, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small image of each format that can be made."""
    folder = tmp_path_factory.mktemp("startup")
    imported(folder, "create", "-q", "-f", "qcow2", "small.qcow2", "64M")
    imported(folder, "create", "-q", "-f", "raw", "small.raw", "1M")
    header = LuksHeader.new(Scheme())
    (folder / "small.luks").write_bytes(header.pack().ljust(header.area_bytes + 4096, b"\0"))
    return folder


COMMANDS = (
    "--version",
    "create -q -f raw new.raw 1M",
    "create -q -f qcow2 new.qcow2 1G",
    "info small.qcow2",
    "info --output=json small.qcow2",
    "info --backing-chain small.qcow2",
    "info -f raw small.raw",
    "info small.luks",
    "map small.qcow2",
    "map --output=json small.qcow2",
    "map --output=json small.raw",
    "check small.qcow2",
    "check --output=json small.qcow2",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_short_command_loads_little(words: str, folder: Path) -> None:
    modules = imported(folder, *words.split())
    others = {name for name in modules if name.partition(".")[0] != "qimg"}
    assert not others & HEAVY
    assert others <= ALLOWED
    assert not {name for name in modules if name in NOT_NEEDED or name.startswith("qimg.vec")}


def test_the_version_needs_no_image_code(folder: Path) -> None:
    modules = imported(folder, "--version")
    assert not {name for name in modules if name.startswith(("qimg.jobs", "qimg.graph", "qimg.formats"))}


@pytest.mark.parametrize(
    ("words", "module"), [("info small.qcow2", "cmd_info"), ("map small.qcow2", "cmd_map")]
)
def test_a_command_loads_its_own_module_only(words: str, module: str, folder: Path) -> None:
    commands = {name for name in imported(folder, *words.split()) if ".cmd_" in name}
    assert commands == {f"qimg.cli.{module}"}


@pytest.mark.slow
def test_info_costs_less_than_two_and_a_half_bare_interpreters(folder: Path) -> None:
    """Best of several tries: the machine does other things as well."""
    cached = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment = {**cached, "PYTHONPATH": str(SOURCE), "PYTHONPYCACHEPREFIX": str(folder / "cache")}

    def cost(*words: str) -> float:
        before = os.times()
        subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True
        )
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    script = "from qimg.cli.main import entry; import sys; sys.argv[0] = 'qimg'; entry()"
    ratios = []
    for _ in range(5):
        bare = sum(cost("-c", "pass") for _ in range(15))
        info = sum(cost("-c", script, "info", "small.qcow2") for _ in range(15))
        ratios.append(info / bare)
        if ratios[-1] < 2.3:
            break
    assert min(ratios) < 2.5, ratios
