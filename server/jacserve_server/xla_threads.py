"""XLA's pool of threads on a CPU: how many they are, and how they behave.

A call of LAPACK for a batch waits, in a thread of the pool, for others of the pool to
do its parts. If as many such calls as the pool has threads run at once, they wait for
ever (jaxlib 0.10). So only one program at a time has any, by `LAPACK`; and `spare` sees
to it that the calls of one program leave a thread free.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

LAPACK = threading.Lock()

_SPARE = 8
_POOL = "tf_XLAEigen"
_NICE = 10


def spare() -> None:
    """Has the pool have more threads than cores, if JAX has not been used yet."""
    os.environ.setdefault("NPROC", str((os.cpu_count() or 1) + _SPARE))


def yield_to_others() -> None:
    """Lets what answers calls go before what computes, where Linux has both compete.

    The pool would otherwise have as many turns as it has threads, and a call that takes
    a microsecond would wait for all of them.
    """
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # It has ended, or may not be asked.
            if (task / "comm").read_text().startswith(_POOL):
                os.setpriority(os.PRIO_PROCESS, int(task.name), _NICE)
