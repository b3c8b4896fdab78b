"""Regions of memory that a server shares with its worker.

Only the server makes them, and seals their size: a worker that made one smaller would
have the kernel kill the server. They are used again and again, because fresh pages cost
more than to send what is in them.
"""

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

_LEAST_BYTES = 2**16
# A region is taken for what is at least so small a part of it.
_LARGEST_SHARE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Memory that both sides see.

    Attributes:
        id: Its name.
        size_bytes: Its size.
        descriptor: The file that it is.
        memory: The memory.
    """

    id: int
    size_bytes: int
    descriptor: int
    memory: memoryview

    def close(self) -> None:
        """Lets go of it; of its memory when the last array in it has gone."""
        os.close(self.descriptor)
        file = self.memory.obj
        with suppress(BufferError):
            self.memory.release()
            if isinstance(file, mmap.mmap):
                file.close()


class RegionPool:
    """The regions shared with one worker. Used from one event loop."""

    def __init__(self, max_idle_bytes: int) -> None:
        """Starts empty.

        Args:
            max_idle_bytes: The most that is kept while it is not used.
        """
        self._max_idle_bytes = max_idle_bytes
        self._numbers: Iterator[int] = count()
        self._idle: list[Region] = []
        self._all: dict[int, Region] = {}
        self._dropped: list[int] = []

    def take(self, size_bytes: int) -> tuple[Region, bool]:
        """Returns a region of at least so many bytes, and whether it is new.

        Args:
            size_bytes: How many.

        Raises:
            OSError: There is no memory for it.
        """
        fitting = [
            region
            for region in self._idle
            if size_bytes <= region.size_bytes <= self._most(size_bytes)
        ]
        if fitting:
            region = min(fitting, key=lambda region: region.size_bytes)
            self._idle.remove(region)
            return region, False
        # Pages that nobody touches take no memory.
        region = _made(next(self._numbers), _rounded(size_bytes))
        self._all[region.id] = region
        return region, True

    def give(self, region: Region) -> None:
        """Takes a region back that nobody uses any more."""
        if region.id not in self._all:
            region.close()
            return
        self._idle.append(region)
        while sum(each.size_bytes for each in self._idle) > self._max_idle_bytes:
            oldest = self._idle.pop(0)
            self._dropped.append(oldest.id)
            self._all.pop(oldest.id).close()

    def dropped(self) -> tuple[int, ...]:
        """Returns the regions that the worker may forget, each once."""
        found = tuple(self._dropped)
        self._dropped.clear()
        return found

    def close(self) -> None:
        """Lets go of all regions; those in use when they are given back."""
        for region in self._idle:
            region.close()
        self._idle.clear()
        self._all.clear()

    def _most(self, size_bytes: int) -> int:
        return max(_LARGEST_SHARE * size_bytes, _LEAST_BYTES)


def opened(descriptor: int, size_bytes: int) -> memoryview:
    """Returns the memory of a region that was received, and closes its descriptor.

    Args:
        descriptor: The file that it is.
        size_bytes: Its size.
    """
    try:
        return memoryview(mmap.mmap(descriptor, size_bytes))
    finally:
        os.close(descriptor)


def _made(number: int, size_bytes: int) -> Region:
    descriptor = _file(size_bytes)
    try:
        memory = memoryview(mmap.mmap(descriptor, size_bytes))
    except BaseException:
        os.close(descriptor)
        raise
    return Region(number, size_bytes, descriptor, memory)


def _file(size_bytes: int) -> int:
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.truncate(size_bytes)
            return os.dup(file.fileno())
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    descriptor = os.memfd_create("jacserve", flags)
    try:
        os.ftruncate(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _rounded(size_bytes: int) -> int:
    return max(1 << max(size_bytes - 1, 0).bit_length(), _LEAST_BYTES)
