"""Has the C library keep fewer holes between what is in use.

glibc gives threads arenas of their own, up to eight for each core. What large queries
leave free in one of them is of no use to the others, so the memory of a server rises
for long, though what it has in use is level. A threshold beyond which arrays are the
system's again at once (M_MMAP_THRESHOLD) would hold it lower still, but makes large
answers take twice as long, since each then gets its pages anew.
"""

import ctypes
import os
import threading
import time
from collections.abc import Mapping

_M_ARENA_MAX = -8  # <malloc.h>
_ARENAS = 2
_TRIM_S = 30.0
_VARIABLE, _TUNABLE = "MALLOC_ARENA_MAX", "glibc.malloc.arena_max"


def share_arenas(environment: Mapping[str, str] = os.environ) -> bool:
    """Has all threads share few arenas, unless whoever runs this has chosen a number.

    Args:
        environment: The variables of this process.

    Returns:
        Whether they will; not where the C library has none.
    """
    if _VARIABLE in environment or _TUNABLE in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # Of another C library.
    return bool(mallopt(_M_ARENA_MAX, _ARENAS))


def trim_for_ever(every_s: float = _TRIM_S) -> None:
    """Has whole pages that are free given back to the system, in a thread of its own.

    By itself glibc gives back only what is free at the end of an arena, and something
    small is always in use behind what a burst of calls has left.

    Args:
        every_s: Seconds from one time to the next.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return  # Of another C library.

    def work() -> None:
        while True:
            time.sleep(every_s)
            trim(0)

    threading.Thread(target=work, name="jacserve-trim", daemon=True).start()
