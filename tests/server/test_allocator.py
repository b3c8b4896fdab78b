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


# Behind what is freed something stays in use, so that glibc itself gives back nothing.
FREES = """
import ctypes, sys, time
from jacserve_server import allocator

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def held_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

taken = [libc.malloc(4000) for _ in range(25_000)]
for address in taken:
    ctypes.memset(address, 1, 4000)
last = libc.malloc(4000)
for address in taken:
    libc.free(address)
before = held_mib()
if "trim" in sys.argv:
    allocator.trim_for_ever(every_s=0.05)
end = time.monotonic() + float(sys.argv[1])
while before - held_mib() < 80 and time.monotonic() < end:
    time.sleep(0.01)
print(before - held_mib())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc's arenas"
)
def test_what_is_free_is_given_back() -> None:
    def given_back_mib(*arguments: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", FREES, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    assert given_back_mib("1") < 20
    assert given_back_mib("60", "trim") > 80
