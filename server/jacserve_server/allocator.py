"""Has the C library give large arrays back to the system as soon as they are freed.

glibc learns from what is freed: after an array of 24 MB has gone, it takes those of up
to 24 MB from its arenas, of which each thread may have one. There they leave holes, and
the memory of a server rises for hours, though what it has in use is level. With a
threshold that is set, it learns no more, and larger arrays are the system's again once
they are freed.
"""

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
# Below, an array costs more to map than to find room for.
_MAPPED_BYTES = 4 * 2**20
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLE = "glibc.malloc."


def give_back(environment: Mapping[str, str] = os.environ) -> bool:
    """Sets the threshold, unless whoever runs this has chosen one.

    Args:
        environment: The variables of this process.

    Returns:
        Whether it is set; not where the C library knows of none.
    """
    if any(name in environment for name in _CHOSEN):
        return False
    if _TUNABLE in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # Of another C library.
    # What is free at an end of an arena is kept up to twice that, as glibc would.
    is_set = mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    return bool(is_set and mallopt(_M_TRIM_THRESHOLD, 2 * _MAPPED_BYTES))
