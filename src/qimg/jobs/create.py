"""Creating an image: everything that can be refused is refused before anything is touched."""

from __future__ import annotations

from qimg.context import Notice
from qimg.errors import NotSupported, OpenError, OptionError, QimgError
from qimg.formats import registry
from qimg.formats.base import CreateHelp
from qimg.graph.open import (
    WRITE_EXCLUSIVE,
    WRITE_SHARED,
    ImageSpec,
    Target,
    open_disk,
    resolve_relative,
    target,
)
from qimg.options import BOOL, NUM, SIZE
from qimg.storage.handles import make_room
from qimg.units import SECTOR, UINT64_MAX, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.context import Context
    from qimg.formats.base import Format, Image
    from qimg.options import Option, Value
    from qimg.storage.base import Storage

    Pairs = list[tuple[str, str]]


def find_format(name: str) -> Format:
    """The format that is to be created. Raises OptionError, NotSupported."""
    try:
        found = registry.get(name)
    except OptionError:
        raise OptionError(f"Unknown file format '{name}'", option="format") from None
    if not found.can_create:
        raise NotSupported(f"Format driver '{name}' does not support image creation")
    return found


def creation_options(format: str, name: str | None, *, context: Context) -> tuple[Option, ...]:
    """Options that creating `format` takes; with the target's `name`, those of its protocol too.

    Raises OptionError, LocationError, NotSupported."""
    found = find_format(format)
    if name is None:
        return found.create_options
    return merged_options(found, target(name, context=context))


def merged_options(format: Format, place: Target) -> tuple[Option, ...]:
    """Creation options of a format, and those of the place that it does not have itself."""
    known = {option.name for option in format.create_options}
    return format.create_options + tuple(option for option in place.options if option.name not in known)


class CreatePlan:
    """A creation that passed every check that needs no writing.

    `name` and `format` as given, `size` in guest bytes, `values` the typed options, `shown` what the line
    ``Formatting ...`` lists, in order."""

    def __init__(self, name: str, format: Format, place: Target) -> None:
        self.name = name
        self.driver = format
        self.place = place
        self.options = merged_options(format, place)
        self.size = 0
        self.values: dict[str, Value] = {}
        self.made: list[Target] = []  # further files
        self.texts: dict[str, str] = {}

    @property
    def format(self) -> str:
        """The format's name."""
        return self.driver.name

    @property
    def shown(self) -> list[tuple[str, str]]:
        """(name, text) of every option that is set or has a default, in the format's order."""
        rows = []
        for option in self.options:
            if option.name == "size":
                rows.append(("size", str(self.requested)))
            elif option.name in self.values:
                rows.append((option.name, self._text(option, self.values[option.name])))
            elif option.default is not None:
                rows.append((option.name, self._text(option, option.default)))
        return rows

    def _text(self, option: Option, value: Value) -> str:
        if option.type == BOOL:
            return self.texts.get(option.name, "on" if value else "off")
        if option.type in (SIZE, NUM):
            return str(value)
        return str(value).replace(",", ",,")

    requested = 0

    def remove_new(self, context: Context) -> None:
        """After a failure: delete the files that were not there before. Never raises."""
        for place in (self.place, *self.made):
            place.remove_if_new(context)

    def set_size(self, size: int) -> None:
        """Guest bytes as asked for; whole sectors are made."""
        self.requested = size
        self.size = round_up(size, SECTOR)


def plan_target(
    name: str,
    format: str,
    pairs: Pairs,
    *,
    backing: str | None,
    backing_format: str | None,
    context: Context,
) -> CreatePlan:
    """The part of planning that creating and converting share: format, place, options, backing names.

    Raises OptionError, LocationError, NotSupported."""
    driver = find_format(format)
    plan = CreatePlan(name, driver, target(name, context=context))
    by_name = {option.name: option for option in plan.options}
    for key, text in pairs:
        if key not in by_name:
            raise OptionError(f"Invalid parameter '{key}'", option=key)
        plan.values[key] = by_name[key].parse(text)
        plan.texts[key] = text
    for key, given, what in (
        ("backing_file", backing, "Backing file"),
        ("backing_fmt", backing_format, "Backing file format"),
    ):
        if given is None:
            continue
        if key not in by_name:
            raise NotSupported(f"{what} not supported for file format '{format}'")
        plan.values[key] = given
    if "backing_fmt" in plan.values:
        plan.values["backing_fmt"] = registry.own_name(str(plan.values["backing_fmt"]))
    return plan


def plan_create(
    name: str,
    *,
    format: str = "raw",
    size: int | None = None,
    options: Pairs | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    unsafe: bool = False,
    context: Context,
) -> CreatePlan:
    """Check all that can be checked before the target is touched; `size` in bytes, None: from `options` or
    the backing file. `unsafe`: do not open the backing file (which may be missing).

    Raises QimgError subclasses with the words of the real program's first stage (create sheet)."""
    plan = plan_target(
        name,
        format,
        options or [],
        backing=backing,
        backing_format=backing_format,
        context=context,
    )
    given = plan.values.pop("size", None)
    if given is not None:
        if size is not None:
            raise OptionError("The image size must be specified only once", option="size")
        size = int(given) if given != UINT64_MAX else None
    file = plan.values.get("backing_file")
    if file is not None:
        found = check_backing(plan, str(file), unsafe=unsafe, context=context)
        if size is None and found is not None:
            size = found
    if size is None:
        raise OptionError("Image creation needs a size parameter", option="size")
    plan.set_size(size)
    return plan


def check_backing(plan: CreatePlan, file: str, *, unsafe: bool, context: Context) -> int | None:
    """Check the backing file of a planned image and record its format; returns its size in bytes.

    With `unsafe` it is not opened and the answer is None."""
    if not file:
        raise OptionError("Expected backing file name, got empty string", option="backing_file")
    if file == plan.name:
        raise OptionError(
            "Error: Trying to create an image with the same filename as the backing file",
            option="backing_file",
        )
    if unsafe:
        return None
    recorded = plan.values.get("backing_fmt")
    spec = ImageSpec(
        resolve_relative(plan.name, file),
        format=None if recorded is None else str(recorded),
        force_share=True,
    )
    try:
        with open_disk(spec, context=context, keyless=True) as disk:
            if recorded is None:
                found = disk.top.format_name
                plan.values["backing_fmt"] = found
                context.warn(
                    Notice(
                        "Deprecated use of backing file without explicit backing format"
                        f" (detected format of {found})"
                    )
                )
            return disk.size
    except QimgError as error:
        reason = getattr(error, "reason", error)
        raise QimgError(str(reason), hint="Could not open backing image.") from error


def run_create(plan: CreatePlan, *, context: Context) -> None:
    """Write the planned image. Raises QimgError; a file that was not there before is then removed."""
    with create_image(plan, context=context) as image:
        try:
            image.flush()
        except BaseException:
            image.abandon()
            plan.remove_new(context)
            raise


def create_image(
    plan: CreatePlan, *, context: Context, cache: str = "writeback", filling: bool = False
) -> Image:
    """The planned image, new, empty and open for writing with this cache mode; `Image.flush` makes it
    valid. `filling`: see `CreateHelp`."""
    values = {key: value for key, value in plan.values.items() if key != "size"}
    plan.driver.validate_create(plan.size, values)
    plan.driver.check_secrets(values, context)

    # Raw lets others read and write the new image; the first step of creating it does not.
    locks = WRITE_SHARED if plan.format == "raw" else WRITE_EXCLUSIVE

    def check_place(place: Storage) -> None:
        if locks is WRITE_EXCLUSIVE:
            place.lock(*locks)
        plan.driver.check_place(place, plan.size, values)

    storage = plan.place.create(values, context, cache=cache, check=check_place)

    def make(place: Target, size: int, preallocation: str = "off") -> Storage:
        made = place.create({}, context, cache=cache)
        plan.made.append(place)
        try:
            made.resize(size, preallocation)
        except BaseException:
            made.close()
            raise
        return made

    def open_data_file(name: str, size: int, preallocation: str) -> Storage:
        return make(target(name, context=context), size, preallocation)

    def open_file(name: str, size: int) -> Storage:
        make_room(2 * len(plan.made))
        made = make(Target(name, "file", {"filename": name}), size)
        made.lock(*WRITE_EXCLUSIVE)
        return made

    help = CreateHelp(
        context,
        open_data_file,
        open_file=open_file,
        backing_id=lambda: _backing_id(plan, context),
        filling=filling,
    )
    try:
        image = plan.driver.create(storage, plan.size, values, help)
        if storage.fixed_size and not storage.size and image.cluster_size is not None:
            # A character device swallows what is written; an image must be there afterwards.
            raise NotSupported(f"Image is not in {plan.format} format")
        storage.lock(*locks)
        return image
    except BaseException:
        storage.close()
        plan.remove_new(context)
        raise


def _backing_id(plan: CreatePlan, context: Context) -> int | None:
    """What the planned image has to record of its backing file's content. Raises QimgError."""
    recorded = plan.values.get("backing_fmt")
    spec = ImageSpec(
        resolve_relative(plan.name, str(plan.values["backing_file"])),
        format=None if recorded is None else str(recorded),
        force_share=True,
    )
    try:
        with open_disk(spec, context=context, backing=False) as disk:
            return disk.top.content_id
    except OpenError as error:
        raise QimgError(str(error.reason), hint=error.hint) from error
