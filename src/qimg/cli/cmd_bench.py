"""bench: how long many requests of one size take (bench sheet)."""

from __future__ import annotations

from qimg.cli.common import CACHE_MODES, CommandError, Session, format_name, image_spec, size_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.jobs.bench import BenchRequest

_SHORT = "c:d:f:i:no:qs:t:wS:U"
_LONG = {
    "image-opts": "image-opts",
    "force-share": "U",
    "flush-interval=": "flush-interval",
    "pattern=": "pattern",
    "no-drain": "no-drain",
}
#: Options that are plain numbers -> the attribute, the greatest value, what they are called in refusals.
_NUMBERS = {
    "c": ("count", "request count"),
    "d": ("depth", "queue depth"),
    "pattern": ("pattern", "pattern byte"),
    "flush-interval": ("flush_interval", "flush interval"),
}
#: Options that are sizes -> the same.
_SIZES = {"s": ("size", "buffer size"), "S": ("step", "step_size"), "o": ("offset", "offset")}
INT_MAX = (1 << 31) - 1
_BLANKS = " \t\n\v\f\r"


class Request:
    """What to send, and how. `size`, `step`, `offset` in bytes."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.image_opts = False
        self.force_share = False
        self.cache = "writeback"
        self.native = False
        self.write = False
        self.drain = True
        self.count = 75000
        self.depth = 64
        self.pattern = 0
        self.flush_interval = 0
        self.size = 4096
        self.step = 0
        self.offset = 0


def run(session: Session, words: list[str]) -> int:
    """``bench [-c COUNT] [-d DEPTH] [-f FMT] [--flush-interval=N] [-i AIO] [-n] [--no-drain] [-o OFFSET]
    [--pattern=BYTE] [-q] [-s BUFSIZE] [-S STEP] [-t CACHE] [-w] [-U] FILENAME``; the exit code."""
    from qimg.jobs.bench import bench

    request = Request()
    operands = _parse(session, words, request)
    if len(operands) != 1:
        raise CommandError("Expecting one image file name", usage=True)
    job = _job(request, operands[0])

    def announce() -> None:
        session.console.out(_announcement(job))
        session.console.flush()

    seconds = bench(job, started=announce, context=session.context)
    session.console.out(f"Run completed in {seconds:.3f} seconds.\n")
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, _SHORT, _LONG)
    for key, value in options:
        if key in _NUMBERS:
            name, what = _NUMBERS[key]
            setattr(request, name, _number(what, value, 255 if key == "pattern" else INT_MAX))
        elif key in _SIZES:
            name, what = _SIZES[key]
            setattr(request, name, _size(what, value, key))
        elif key == "f":
            request.format = format_name(value)
        elif key == "t":
            if value not in CACHE_MODES:
                raise CommandError("Invalid cache mode")
            request.cache = value
        elif key == "i":
            if value not in ("threads", "native", "io_uring"):
                raise CommandError(f"Invalid aio option: {value}")
            request.native |= value == "native"
        else:
            _switch(request, key)
    return options.operands


def _switch(request: Request, key: str) -> None:
    """An option without a value; ``-q`` means nothing here."""
    if key == "n":
        request.native = True
    elif key == "w":
        request.write = True
    elif key == "U":
        request.force_share = True
    elif key == "no-drain":
        request.drain = False
    elif key == "image-opts":
        request.image_opts = True


def _size(what: str, text: str, key: str) -> int:
    return size_argument(what, text) if key == "o" else size_argument(what, text, high=INT_MAX)


def _number(what: str, text: str, high: int) -> int:
    """A C integer, decimal, octal or hex by its prefix. Raises CommandError."""
    digits = text.lstrip(_BLANKS)
    sign = -1 if digits[:1] == "-" else 1
    if digits[:1] in ("+", "-"):
        digits = digits[1:]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[:1] == "0" else 10
    digits = digits[2:] if base == 16 else digits
    value = -1
    if digits and all(digit in "0123456789abcdef"[:base] for digit in digits.lower()):
        value = sign * int(digits, base)
    if not 0 <= value <= high:
        raise CommandError(f"Invalid {what} specified")
    return value


def _job(request: Request, name: str) -> BenchRequest:
    from qimg.jobs.bench import BenchRequest

    if request.flush_interval and not request.write:
        raise CommandError("--flush-interval is only available in write tests")
    if request.flush_interval and request.flush_interval < request.depth:
        raise CommandError("Flush interval can't be smaller than depth")
    if not request.depth:
        raise CommandError("Invalid queue depth specified")  # nothing in flight: it would never end
    spec = image_spec(
        name,
        format=request.format,
        image_opts=request.image_opts,
        cache=request.cache,
        force_share=request.force_share,
    )
    spec.native = request.native
    return BenchRequest(
        spec,
        count=request.count,
        depth=request.depth,
        size=request.size,
        step=request.step,
        offset=request.offset,
        write=request.write,
        pattern=request.pattern,
        flush_interval=request.flush_interval,
        drain=request.drain,
    )


def _announcement(job: BenchRequest) -> str:
    kind = "write" if job.write else "read"
    text = (
        f"Sending {job.count} {kind} requests, {job.size} bytes each, {job.depth} in parallel"
        f" (starting at offset {job.offset}, step size {job.step})\n"
    )
    if job.flush_interval:
        text += f"Sending flush every {job.flush_interval} requests\n"
    return text
