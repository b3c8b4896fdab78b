"""Threads share few arenas of the C library, unless somebody has chosen otherwise."""

import ctypes
import os
import subprocess
import sys

import pytest

# Each thread takes memory while all others do, and then the arenas are counted.
COUNTS = """
import ctypes, threading
from jacserve_server import allocator

libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
print(allocator.share_arenas(), flush=True)
all_there = threading.Barrier(6)

def take():
    all_there.wait()
    libc.malloc(100_000)
    all_there.wait()

threads = [threading.Thread(target=take) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = libc.fdopen(1, b"w")
libc.malloc_info(0, out)
libc.fclose(out)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc's arenas"
)
@pytest.mark.parametrize(
    ("chosen", "is_set", "most"),
    [
        ({}, "True", 2),
        ({"MALLOC_ARENA_MAX": "5"}, "False", 5),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}, "False", 3),
    ],
)
def test_threads_share_arenas(chosen: dict[str, str], is_set: str, most: int) -> None:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", COUNTS],
        env={**inherited, **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    told, _, info = done.stdout.partition("\n")
    assert told == is_set
    assert info.count("<heap nr=") == most
