"""``--object throttle-group``: which limits go together."""

from __future__ import annotations

from qimg.errors import OptionError

#: The largest rate (section 8 of the common sheet), and the largest length of a burst in seconds.
_MAX_RATE = 1_000_000_000_000_000
_MAX_LENGTH = (1 << 32) - 1
_RATES = [f"{what}-{way}" for what in ("bps", "iops") for way in ("total", "read", "write")]


def checked_limits(properties: dict[str, object]) -> dict[str, int]:
    """The limits by name (``bps-total``). Raises OptionError for those that exclude each other, as the real
    program does."""
    limits = {}
    for name, value in properties.items():
        if name.startswith("x-"):
            limits[name[2:]] = _natural(value)
    given = properties.get("limits")
    if isinstance(given, dict):
        limits.update({name: int(value) for name, value in given.items()})
    for name, value in limits.items():
        if name.endswith("-max-length"):
            _check_length(name, value)
    _check_rates(limits)
    for rate in _RATES:
        _check_burst(limits, rate)
    return limits


def _natural(value: object) -> int:
    number = int(str(value))
    if number < 0:
        raise OptionError("Property values cannot be negative")
    return number


def _check_length(name: str, value: int) -> None:
    if value == 0:
        raise OptionError("the burst length cannot be 0", option=name)
    if value > _MAX_LENGTH:
        raise OptionError(f"{name} value must be in the range [0, {_MAX_LENGTH}]", option=name)


def _check_rates(limits: dict[str, int]) -> None:
    for suffix in ("", "-max"):
        for what in ("bps", "iops"):
            total, read, write = (limits.get(f"{what}-{way}{suffix}") for way in ("total", "read", "write"))
            if total and (read or write):
                raise OptionError(
                    "bps/iops/max total values and read/write values cannot be used at the same time"
                )
    if limits.get("iops-size") and not any(limits.get(rate) for rate in _RATES if rate.startswith("iops")):
        raise OptionError("iops size requires an iops value to be set", option="iops-size")


def _check_burst(limits: dict[str, int], rate: str) -> None:
    usual, most = limits.get(rate, 0), limits.get(f"{rate}-max", 0)
    length = limits.get(f"{rate}-max-length", 1)
    if not (0 <= usual <= _MAX_RATE and 0 <= most <= _MAX_RATE):
        raise OptionError(f"bps/iops/max values must be within [0, {_MAX_RATE}]", option=rate)
    if (length > 1 or length < 0) and not most:
        raise OptionError("burst length set without burst rate", option=rate)
    if most and not usual:
        raise OptionError("bps_max/iops_max require corresponding bps/iops values", option=rate)
    if most and most < usual:
        raise OptionError("bps_max/iops_max cannot be lower than bps/iops", option=rate)
