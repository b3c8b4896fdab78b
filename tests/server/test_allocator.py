"""Large arrays are the system's again once they are freed."""

import ctypes
import os
import subprocess
import sys

import pytest

MIB = 2**20
# Frees 24 MiB, from which glibc would learn to take 8 MiB from an arena.
LEARNS = f"""
import ctypes
from jacserve_server import allocator

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    ).split()]

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Info
is_set = allocator.give_back()
libc.free(libc.malloc({24 * MIB}))
before = libc.mallinfo2().hblkhd
libc.malloc({8 * MIB})
print(is_set, libc.mallinfo2().hblkhd - before >= {8 * MIB})
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)
@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({}, "True True"),
        # What it does by itself, and goes on doing where somebody has chosen.
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False True"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, "False False"),
    ],
)
def test_memory_is_given_back_unless_somebody_chose(
    chosen: dict[str, str], told: str
) -> None:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", LEARNS],
        env={**inherited, **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == told
