"""check -r (qcow2 sheet, section 15)."""

from __future__ import annotations

from qimg.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.formats.base import CheckResult
    from qimg.formats.qcow2.image import Qcow2Image


def repair(image: Qcow2Image, report: Callable[[str], None], fix: str) -> CheckResult:
    """Repair `image`, which is open for writing and was opened for a check."""
    raise NotSupported("Repairing images is not supported yet")
