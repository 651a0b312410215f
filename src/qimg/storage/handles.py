"""Open files: images of many files need more than a process may have open at first."""

from __future__ import annotations

#: Files that are open besides.
_OTHERS = 64
#: Fewer never need a look at the limit.
_FEW = 256


def make_room(count: int) -> None:
    """Let the process have `count` more files open, as far as the system allows that. Never raises."""
    if count < _FEW:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + _OTHERS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        pass  # Opening says what is wrong.
