"""convert: copy one or several images into a new or an existing one (convert sheet)."""

from __future__ import annotations

from qimg.cli.common import (
    EXCLUSIVE_FORMAT,
    CommandError,
    OptionList,
    Session,
    check_cache,
    format_name,
    image_spec,
    print_creation_options,
    size_argument,
    snapshot_parameter,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.cli.progressbar import ProgressBar
    from qimg.jobs.convert import ConvertRequest, SnapshotParam

_SHORT = "cf:l:m:no:pqr:s:t:B:CF:O:S:T:UW"
_LONG = {
    "object=": "object",
    "image-opts": "image-opts",
    "target-image-opts": "target-image-opts",
    "force-share": "U",
    "salvage": "salvage",
    "target-is-zero": "target-is-zero",
    "bitmaps": "bitmaps",
    "skip-broken-bitmaps": "skip-broken-bitmaps",
}
#: Options without a value -> the attribute of `Request` that they set.
_FLAGS = {
    "c": "compress",
    "n": "existing",
    "p": "progress",
    "q": "quiet",
    "C": "copy_offload",
    "U": "force_share",
    "W": "out_of_order",
    "image-opts": "image_opts",
    "target-image-opts": "target_image_opts",
    "salvage": "salvage",
    "target-is-zero": "target_is_zero",
    "bitmaps": "bitmaps",
    "skip-broken-bitmaps": "skip_broken_bitmaps",
}
#: Options whose value is taken as it is.
_TEXTS = {"B": "backing", "t": "cache", "T": "source_cache"}
#: Options that name a format.
_FORMATS = {"f": "format", "F": "backing_format", "O": "output_format"}

MAX_WORKERS = 16
MAX_SPARSE = 16 << 20
SECTOR = 512


class Request:
    """What to convert, and how. Sizes in bytes."""

    def __init__(self) -> None:
        self.options = OptionList()
        self.format: str | None = None
        self.output_format: str | None = None
        self.backing: str | None = None
        self.backing_format: str | None = None
        self.snapshot: SnapshotParam | None = None
        self.cache = "unsafe"
        self.source_cache = "writeback"
        self.workers = 8
        self.sparse_size: int | None = None
        self.rate_limit = 0
        self.compress = False
        self.existing = False
        self.progress = False
        self.quiet = False
        self.copy_offload = False
        self.force_share = False
        self.out_of_order = False
        self.image_opts = False
        self.target_image_opts = False
        self.salvage = False
        self.target_is_zero = False
        self.bitmaps = False
        self.skip_broken_bitmaps = False


def run(session: Session, words: list[str]) -> int:
    """``convert [OPTIONS] FILENAME [FILENAME2 ...] OUTPUT``; the exit code."""
    from qimg.cli.progressbar import ProgressBar

    request = Request()
    operands = _parse(session, words, request)
    _check_combinations(request)
    if request.options.wants_help:
        name = operands[-1] if len(operands) > 1 else None  # the only one is a source
        print_creation_options(session, request.output_format or "raw", name)
        return 0
    if len(operands) < 2:
        raise CommandError("Must specify image file name")
    check_cache(request.source_cache, source=True)
    bar = ProgressBar(session.console, shown=request.progress and not request.quiet)
    bar.start()
    try:
        _convert(session, request, operands, bar)
        bar.complete()
    finally:
        bar.finish()
    return 0


def _parse(session: Session, words: list[str], request: Request) -> list[str]:
    options = session.options(words, _SHORT, _LONG)
    for key, value in options:
        if key in _FLAGS:
            setattr(request, _FLAGS[key], True)
        elif key in _TEXTS:
            setattr(request, _TEXTS[key], value)
        elif key in _FORMATS:
            setattr(request, _FORMATS[key], format_name(value))
        elif key == "o":
            request.options.add(value)
        elif key == "l":
            request.snapshot = snapshot_parameter(session, value)
        elif key == "s":
            request.snapshot = _old_snapshot_parameter(value)
        elif key == "m":
            request.workers = _worker_count(value)
        elif key == "r":
            request.rate_limit = size_argument("rate limit", value)
        elif key == "S":
            request.sparse_size = _sparse_size(value)
    return options.operands


def _old_snapshot_parameter(text: str) -> SnapshotParam:
    """``-s SNAPSHOT`` as it was before ``-l`` (seed-compat): an id or a name, nothing else."""
    from qimg.jobs.convert import SnapshotParam

    return SnapshotParam(id_or_name=text)


def _worker_count(text: str) -> int:
    """``-m``: a C integer, decimal, octal or hex by its prefix."""
    digits = text.lstrip(" \t\n\v\f\r").removeprefix("+").lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
    digits = digits.removeprefix("0x")
    count = 0
    if digits and not digits.strip("0123456789abcdef"[:base]):
        count = int(digits, base)
    if not 1 <= count <= MAX_WORKERS:
        raise CommandError(
            f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WORKERS}"
        )
    return count


def _sparse_size(text: str) -> int:
    what = "buffer size for sparse output"
    size = size_argument(what, text)
    if size % SECTOR or size > MAX_SPARSE:
        raise CommandError(
            f"Invalid {what} specified. Valid sizes are multiples of {SECTOR} up to {MAX_SPARSE}. "
            "Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def _check_combinations(request: Request) -> None:
    """Refuse options that exclude each other, in the order in which the real program notices them."""
    if request.skip_broken_bitmaps and not request.bitmaps:
        raise CommandError("Use of --skip-broken-bitmaps requires --bitmaps")
    if request.copy_offload and request.compress:
        raise CommandError("Cannot enable copy offloading when -c is used")
    if request.copy_offload and request.sparse_size is not None:
        raise CommandError("Cannot enable copy offloading when -S is used")
    if request.copy_offload and request.salvage:
        raise CommandError("Cannot use copy offloading in salvaging mode")
    if request.target_image_opts and not request.existing:
        raise CommandError("--target-image-opts requires use of -n flag")
    if request.existing and request.options:
        raise CommandError("-o has no effect when skipping image creation")
    if request.target_is_zero and not request.existing:
        raise CommandError("--target-is-zero requires use of -n flag")


def _convert(session: Session, request: Request, operands: list[str], bar: ProgressBar) -> None:
    from qimg.jobs.convert import convert

    job = _job(request, operands)
    check_cache(request.cache, source=False)
    if request.target_image_opts and request.output_format is not None:
        raise CommandError(EXCLUSIVE_FORMAT)
    convert(job, progress=bar, context=session.context)


def _job(request: Request, operands: list[str]) -> ConvertRequest:
    from qimg.jobs.convert import ConvertRequest

    sources = [
        image_spec(
            name,
            format=request.format,
            image_opts=request.image_opts,
            cache=request.source_cache,
            force_share=request.force_share,
        )
        for name in operands[:-1]
    ]
    return ConvertRequest(
        sources,
        operands[-1],
        target_image_opts=request.target_image_opts,
        output_format=request.output_format,
        options=request.options.pairs(),
        create=not request.existing,
        compress=request.compress,
        backing=request.backing,
        backing_format=request.backing_format,
        snapshot=request.snapshot,
        sparse_size=4096 if request.sparse_size is None else request.sparse_size,
        workers=request.workers,
        out_of_order=request.out_of_order,
        copy_offload=request.copy_offload,
        rate_limit=request.rate_limit,
        salvage=request.salvage,
        target_is_zero=request.target_is_zero,
        bitmaps=request.bitmaps,
        skip_broken_bitmaps=request.skip_broken_bitmaps,
        cache=request.cache,
        quiet=request.quiet,
    )
