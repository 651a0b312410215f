"""One short run of the program on the newest CPython of this machine, in an environment of its own.

The tests run on one interpreter; this says whether the locked packages install and qimg works on the newest.
Usage: ``python tools/smoke.py [PYTHON]``. Needs nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE = "import sys, ensurepip, venv; print(*sys.version_info[:3], sys.version_info.releaselevel)"


def candidates() -> list[Path]:
    """Every python3.N on PATH, in the usual folders and in pyenv's."""
    folders = [Path(part) for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if part]
    folders += [Path("/usr/bin"), Path("/usr/local/bin")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders += sorted(pyenv.glob("versions/3.*/bin"))
    found = [sys.executable]
    for folder in folders:
        found += [str(path) for path in folder.glob("python3.[0-9]*") if path.name[9:].isdigit()]
    return [Path(path) for path in dict.fromkeys(found)]


def version(python: Path) -> tuple[int, ...] | None:
    """Version of a released interpreter that can make environments; None for anything else."""
    try:
        run = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = run.stdout.split()
    if run.returncode != 0 or words[-1:] != ["final"]:
        return None
    return tuple(int(word) for word in words[:-1])


def newest() -> Path:
    """The newest CPython."""
    known = {path: number for path in candidates() if (number := version(path)) is not None}
    return max(known, key=lambda path: known[path])


def steps(python: Path, work: Path) -> None:
    """create, convert (plain, compressed, back), check, compare, info, map and measure."""

    def qimg(*words: str) -> str:
        command = [str(python), "-X", "dev", str(ROOT / "bin" / "qimg"), *words]
        run = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, check=False)
        print(f"  qimg {' '.join(words)}: {run.returncode}")
        if run.returncode != 0 or run.stderr:
            sys.exit(f"{run.stdout}{run.stderr}smoke: unexpected exit code or words on standard error")
        return run.stdout

    content = (ROOT / "LICENSE").read_bytes() * 100
    (work / "a.raw").write_bytes(content + bytes(3 << 20) + content[: -(len(content) % 512)])
    qimg("create", "-f", "qcow2", "empty.qcow2", "1T")
    qimg("convert", "-O", "qcow2", "a.raw", "plain.qcow2")
    qimg("convert", "-c", "-O", "qcow2", "a.raw", "small.qcow2")
    qimg("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "a.raw", "zstd.qcow2")
    for name in ("plain", "small", "zstd"):
        qimg("check", f"{name}.qcow2")
        qimg("compare", "a.raw", f"{name}.qcow2")
    qimg("convert", "-O", "raw", "small.qcow2", "back.raw")
    qimg("compare", "a.raw", "back.raw")
    qimg("info", "--output=json", "plain.qcow2")
    qimg("map", "--output=json", "small.qcow2")
    qimg("measure", "-O", "qcow2", "a.raw")
    if (work / "small.qcow2").stat().st_size >= (work / "plain.qcow2").stat().st_size:
        sys.exit("smoke: compression made nothing smaller")


def main() -> None:
    """Make the environment and run the steps in it."""
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    print(f"smoke run on {chosen} ({'.'.join(map(str, version(chosen) or ()))})")
    scratch = Path(tempfile.mkdtemp(prefix="qimg-smoke-"))
    try:
        subprocess.run([chosen, "-m", "venv", scratch / "venv"], check=True)
        python = scratch / "venv" / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--require-hashes", "--only-binary", ":all:", "-r", str(ROOT / "requirements.lock")]
        subprocess.run(install, check=True)
        where = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        Path(where, "qimg-src.pth").write_text(f"{ROOT / 'src'}\n")
        steps(python, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
