"""snapshot: list, create, apply and delete internal snapshots (snapshot sheet)."""

from __future__ import annotations

from qimg.cli.common import CommandError, Session, image_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.graph.open import ImageSpec

_LONG = {"object=": "object", "image-opts": "image-opts", "force-share": "U"}
_ACTIONS = "lacd"


class Request:
    """What to do (`action`: l, a, c, d; None: only open the image) and with which snapshot."""

    def __init__(self) -> None:
        self.action: str | None = None
        self.snapshot = ""
        self.image_opts = False
        self.force_share = False


def run(session: Session, words: list[str]) -> int:
    """``snapshot [--image-opts] [-U] [-q] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILENAME``; the exit
    code. Without an action the image is opened for writing, and that is all."""
    request = Request()
    operands = _parse(session, words, request)
    if len(operands) != 1:
        raise CommandError("Expecting one image file name", usage=True)
    spec = image_spec(
        operands[0], format=None, image_opts=request.image_opts, force_share=request.force_share
    )
    if request.action == "l":
        _list(session, spec)
    else:
        _change(session, request, spec)
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, "la:c:d:qU", _LONG)
    for key, value in options:
        if key in _ACTIONS:
            if request.action is not None:
                raise CommandError("Cannot mix '-l', '-a', '-c', '-d'", usage=True)
            request.action, request.snapshot = key, value
        elif key == "U":
            request.force_share = True
        elif key == "image-opts":
            request.image_opts = True
    return options.operands


def _list(session: Session, spec: ImageSpec) -> None:
    from qimg.jobs.snapshot import snapshots

    found = snapshots(spec, context=session.context)
    if found:
        from qimg.cli.render_text import snapshot_table

        session.console.out("\n".join(("Snapshot list:", *snapshot_table(found))) + "\n")


def _change(session: Session, request: Request, spec: ImageSpec) -> None:
    from qimg.jobs import snapshot as jobs

    try:
        if request.action is None:
            jobs.try_open(spec, context=session.context)
        elif request.action == "a":
            jobs.apply_snapshot(spec, request.snapshot, context=session.context)
        elif request.action == "c":
            jobs.create_snapshot(spec, request.snapshot, context=session.context)
        else:
            jobs.delete_snapshot(spec, request.snapshot, context=session.context)
    except jobs.SnapshotFailed as error:
        if error.detail is not None:
            session.console.error(error.detail)
        raise
