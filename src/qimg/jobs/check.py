"""check: the consistency of one image."""

from __future__ import annotations

from qimg.errors import NotSupported, QimgError, StorageError
from qimg.graph.open import open_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.context import Context
    from qimg.formats.base import CheckResult, Image
    from qimg.graph.open import ImageSpec


def _checked_again(image: Image, report: Callable[[str], None], repaired: CheckResult) -> CheckResult:
    """The state after a repair, with what was fixed."""
    result = image.check(report)
    result.corruptions_fixed = repaired.corruptions_fixed
    result.leaks_fixed = repaired.leaks_fixed
    return result


class CheckFailed(QimgError):
    """The check could not be carried out to its end."""


class CheckOutcome:
    """`result` of checking the image `filename` of `format`."""

    __slots__ = ("filename", "format", "result")

    def __init__(self, filename: str, format: str, result: CheckResult) -> None:
        self.filename = filename
        self.format = format
        self.result = result


def check(
    spec: ImageSpec, *, report: Callable[[str], None], context: Context, fix: str | None = None
) -> CheckOutcome:
    """Check; each finding goes to `report` as one line. Without `fix` nothing is changed; ``leaks`` and
    ``all`` repair, and the result then tells what was fixed and what is left.

    The whole chain is opened, only the top image is checked. Raises NotSupported where the format has no
    check or no repair, CheckFailed where it cannot be finished, OpenError."""
    with open_disk(
        spec, context=context, writable=fix is not None, for_check=True, raw_shares_all=True
    ) as disk:
        try:
            result = disk.top.check(report, fix)
            if result.corruptions_fixed or result.leaks_fixed:
                result = _checked_again(disk.top, report, result)
        except NotSupported:
            raise
        except StorageError as error:
            raise CheckFailed(f"Check failed: {error.reason}") from error
        except QimgError as error:
            raise CheckFailed(f"Check failed: {error}") from error
        return CheckOutcome(disk.filename, disk.top.format_name, result)
