"""LUKS images for tests: made quickly, named by options, opened with secrets.

Two things are slow or unsure in the real program: each image that it makes, and each slot that it adds, costs
it two seconds of measuring, and under load the measurement fails. So most images are made by ours with
``iter-time=0`` (1000 iterations), and written to and judged by the real program; `real` repeats what failed
for that reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qimg.context import Context
from qimg.crypto.luks import Header, KeySlot
from qimg.graph.objects import add_object
from support.run import Result, Word, run_peer, run_qimg_inprocess, run_real

#: id -> passphrase of the secrets that tests use.
PASSPHRASES = {"s": "sesame", "w": "wrong", "n": "new", "o": "other"}
SECRETS = [word for id, text in PASSPHRASES.items() for word in ("--object", f"secret,id={id},data={text}")]
#: Header 4 KiB, eight slots of 252 KiB: where data begins with 512-bit keys.
PAYLOAD = 2068480
_UNSURE = "Unable to get accurate CPU usage"


def context() -> Context:
    """A context with the secrets."""
    made = Context(warn=lambda notice: None)
    for text in SECRETS[1::2]:
        add_object(text, made.objects)
    return made


def opts(path: Word, secret: str | None = "s", **more: str) -> str:
    """The option string of the image at `path`."""
    words = {"driver": "luks", "file.filename": str(path), **more}
    if secret is not None:
        words["key-secret"] = secret
    return ",".join(f"{name}={value}" for name, value in words.items())


def name(path: Word, secret: str = "s") -> str:
    """The same as a file name."""
    return "json:" + json.dumps({"driver": "luks", "key-secret": secret, "file.filename": str(path)})


def make(path: Path, size: int = 1 << 20, secret: str = "s", **options: str) -> Path:
    """A new image, made by ours. Raises AssertionError."""
    said = ",".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    words = ["-o", f"key-secret={secret},iter-time=0" + ("," + said if said else "")]
    run_qimg_inprocess(["create", "-q", "-f", "luks", *SECRETS, *words, path, str(size)]).ok()
    return path


def real(words: Sequence[Word], folder: Path | None = None) -> Result:
    """The real program, again and again while it cannot measure its speed."""
    for _ in range(100):
        result = run_real(words, folder)
        if _UNSURE not in result.err:
            break
    return result


def io(path: Path, commands: Sequence[str], secret: str = "s") -> None:
    """Requests to the image at `path` through qemu-io."""
    words = [word for command in commands for word in ("-c", command)]
    done = run_peer("qemu-io", [*SECRETS, "--image-opts", opts(path, secret), *words])
    assert done.code == 0 and "failed" not in done.out, done.out + done.err


def content(path: Path, secret: str = "s", **more: str) -> bytes:
    """What the real program reads."""
    target = path.with_name(path.name + ".plain")
    words: list[Word] = ["convert", *SECRETS, "--image-opts", opts(path, secret, **more), "-O", "raw", target]
    run_real(words).ok()
    found = target.read_bytes()
    target.unlink()
    return found


def our_content(path: Path, secret: str = "s", **more: str) -> bytes:
    """What ours reads."""
    target = path.with_name(path.name + ".ours")
    words: list[Word] = ["convert", *SECRETS, "--image-opts", opts(path, secret, **more), "-O", "raw", target]
    run_qimg_inprocess(words).ok()
    found = target.read_bytes()
    target.unlink()
    return found


def patch(path: Path, field: str, value: int | bytes, slot: int | None = None) -> None:
    """Overwrite one field of the header, or of key slot number `slot`, at `path`."""
    owner = Header if slot is None else KeySlot
    packed = owner(**{field: value}).pack()
    fields = [*owner.FIELDS, None]
    after = fields[fields.index(field) + 1]
    start, end = owner.offset_of(field), owner.SIZE if after is None else owner.offset_of(after)
    with path.open("r+b") as file:
        file.seek(start + (0 if slot is None else Header.SIZE + slot * KeySlot.SIZE))
        file.write(packed[start:end])


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Length and time of change of every file."""
    return {entry.name: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in folder.iterdir()}


def slots(path: Path) -> list[bool]:
    """Which key slots are in use, as the real program says."""
    shown = json.loads(run_real(["info", "--output=json", path]).ok().out)
    return [slot["active"] for slot in shown["format-specific"]["data"]["slots"]]
