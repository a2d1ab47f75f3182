"""Memory of the host: what is more than it has is refused, what is freed is kept for the next step.

As glibc comes, it returns large tensors to the system when they are freed, and the system clears
every page of the next ones: 144,000 page faults in a compiled step of DiT-S/2 on a CPU, a tenth of
its time. The batches that a loader puts together on the host fare alike.
"""

import ctypes
import os
from typing import Any

from speed_engine.runtime.checks import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
# Bytes, less than an int holds: of the largest tensor that is kept, and of what stays free at most.
KEPT = 2**30
KEPT_BY_OLD = 2**25


def check_memory(what: str, num_bytes: int, remedy: str) -> None:
    """Refuse what this machine cannot hold, before it is asked for.

    Args:
        what: takes the memory, in the plural.
        num_bytes: that it takes.
        remedy: what to change; a clause.

    Raises:
        UserError: it is more than all of the host's memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise UserError(
            f"{what} take {num_bytes / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB "
            f"of memory; {remedy}."
        )


def keep_freed_memory() -> bool:
    """From now on, where the C library can (glibc's); says whether it can."""
    mallopt = _mallopt()
    if mallopt is None:
        return False
    # Either switch ends glibc's own adjusting of the other. An older glibc takes smaller ones only.
    mapped = any(mallopt(_MMAP_THRESHOLD, size) for size in (KEPT, KEPT_BY_OLD))
    return mapped and bool(mallopt(_TRIM_THRESHOLD, KEPT))


def can_keep_freed_memory() -> bool:
    """Whether the C library has the switch."""
    return _mallopt() is not None


def _mallopt() -> Any:
    return getattr(ctypes.CDLL(None), "mallopt", None)
