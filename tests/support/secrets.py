"""Images that need a passphrase: how both programs are told it. All of them have the same one."""

from __future__ import annotations

from pathlib import Path

from qimg.context import Context
from qimg.graph.objects import add_object
from qimg.graph.open import ImageSpec

ID = "key0"
PASSPHRASE = "an open secret"
#: For ``--object``: the passphrase, and another one.
SECRET = f"secret,id={ID},data={PASSPHRASE}"
OTHER = "secret,id=key1,data=something else"
WORDS = ["--object", SECRET, "--object", OTHER]
#: What makes an image encrypted, by format: creation options. The fewest iterations: tests open it often.
AES = f"encrypt.format=aes,encrypt.key-secret={ID}"
LUKS = f"encrypt.format=luks,encrypt.key-secret={ID},encrypt.iter-time=0"
_CRYPT_METHOD = {b"\0\0\0\1": ("qcow", 36), b"\0\0\0\2": ("qcow2", 32), b"\0\0\0\3": ("qcow2", 32)}


def is_encrypted(path: Path) -> bool:
    """Whether the qcow or qcow2 header says so."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] != b"QFI\xfb" or head[4:8] not in _CRYPT_METHOD:
        return False
    _, at = _CRYPT_METHOD[head[4:8]]
    return any(head[at : at + 4])


def options(path: Path | str, format: str = "qcow2", id: str = ID) -> str:
    """An encrypted image as ``--image-opts`` describes it."""
    return f"driver={format},encrypt.key-secret={id},file.filename={path}"


def words(path: Path, format: str | None = "qcow2", *, name: str | None = None) -> list[str]:
    """The words that name an image to a command, encrypted or not; `name`: what to call it there. `format`
    None: qcow2, for commands that are not told."""
    name = str(path) if name is None else name
    if is_encrypted(path):
        return [*WORDS, "--image-opts", options(name, format or "qcow2")]
    return [name] if format is None else ["-f", format, name]


def context(**how: object) -> Context:
    """A context with the two secrets."""
    made = Context(**how)  # type: ignore[arg-type]
    for text in (SECRET, OTHER):
        add_object(text, made.objects)
    return made


def spec(path: Path, format: str = "qcow2") -> ImageSpec:
    """An image, encrypted or not, for `open_disk`."""
    if is_encrypted(path):
        return ImageSpec(options(path, format), image_opts=True)
    return ImageSpec(str(path), format=format)


def where(path: Path, format: str = "qcow2") -> str:
    """An encrypted image as functions of the library take it."""
    return (
        f'json:{{"driver": "{format}", "encrypt.key-secret": "{ID}",'
        f' "file": {{"driver": "file", "filename": "{path}"}}}}'
    )
