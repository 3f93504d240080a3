"""What a long-running process gives back to the system of the memory that it freed (glibc only), and when it looks for
what only cycles hold.

glibc keeps what was freed for the next allocation: in an arena per thread, and below a threshold that rises to 32 MiB
with use. A process that now and then holds large buffers so seems to grow for a long time.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_small(threshold: int = 256 * 1024) -> None:
    """Give blocks above `threshold` bytes back as soon as they are freed, and use one arena. Call it before any thread
    starts. It costs a system call for each large block."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, threshold)
        libc.mallopt(_M_TRIM_THRESHOLD, threshold)


def collect_rarely(new: int = 50_000) -> None:
    """Look for cycles after `new` objects more than were freed, instead of 700.

    For a process that makes many objects at once and keeps most of them, as the coordinator of a large fleet does in
    each decision: every collection walks through all that came since the last, and now and then through everything."""
    gc.set_threshold(new)


def give_back() -> None:
    """Collect what only cycles hold, and give everything free back to the system."""
    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def spare_imported(first: Callable[[], object]) -> None:
    """Once for each `first`: call it for what it imports, let go of what it gives, and leave all that is there then out
    of every later collection.

    torch and transformers make about a million objects, and each collection would walk through them. Call it before
    there is anything large: cycles among what is there are never collected any more.
    """
    first()
    gc.collect()
    gc.freeze()


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
