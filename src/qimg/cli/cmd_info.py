"""info: describe images, or their whole chains (info sheet)."""

from __future__ import annotations

from qimg.cli.common import Session, for_each, format_name, image_spec, is_json, one_operand_at_least

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.jobs.info import ImageInfo

_LONG = {
    "format=": "f",
    "output=": "output",
    "backing-chain": "backing-chain",
    "object=": "object",
    "image-opts": "image-opts",
    "force-share": "U",
}


class Request:
    """What to describe, and how."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.output: str | None = None
        self.backing_chain = False
        self.image_opts = False
        self.force_share = False


def run(session: Session, words: list[str]) -> int:
    """``info [--image-opts] [-f FMT] [--output=human|json] [--backing-chain] [-U] FILENAME...``; the exit
    code. Several files are our extension: a blank line between them, in JSON an array."""
    request = Request()
    options = session.options(words, "f:U", _LONG)
    for key, value in options:
        if key == "f":
            request.format = format_name(value)
        elif key == "U":
            request.force_share = True
        elif key == "output":
            request.output = value
        elif key == "image-opts":
            request.image_opts = True
        elif key == "backing-chain":
            request.backing_chain = True
    one_operand_at_least(options.operands)
    show = _show_json if is_json(request.output) else _show_human
    return show(session, request, options.operands)


def _chain(session: Session, request: Request, name: str) -> list[ImageInfo]:
    from qimg.jobs.info import info

    spec = image_spec(
        name, format=request.format, image_opts=request.image_opts, force_share=request.force_share
    )
    return info(spec, backing_chain=request.backing_chain, context=session.context)


def _show_human(session: Session, request: Request, names: list[str]) -> int:
    from qimg.cli.render_text import info_block

    shown = 0

    def show(name: str) -> int:
        nonlocal shown
        for image in _chain(session, request, name):
            session.console.out("\n" + info_block(image) if shown else info_block(image))
            shown += 1
        return 0

    return for_each(session, names, show)


def _show_json(session: Session, request: Request, names: list[str]) -> int:
    from qimg.cli.render_json import dumps, info_object

    objects: list[object] = []

    def show(name: str) -> int:
        chain = [info_object(image) for image in _chain(session, request, name)]
        objects.append(chain if request.backing_chain else chain[0])
        return 0

    code = for_each(session, names, show)
    session.console.out(dumps(objects if len(names) > 1 else objects[0]) + "\n")
    return code
