"""The arrays that come with a job, written to .npy files as they come."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from jacserve import tensors
from jacserve.framing import Hole
from jacserve.streaming import Pieces
from jacserve.v1 import jacobian_pb2 as pb
from jacserve_server.errors import ServiceError

# Fewer bytes are not worth handing to a thread.
_GATHERED_BYTES = 8 * 2**20
# Left for the table of jobs, and for whoever else writes.
_SPARE_BYTES = 2**28


def file_name(place: int) -> str:
    """Returns the name of the file of a query's tensor, by its place."""
    return f"{place}.npy"


class Upload:
    """Writes the tensors of a query into a folder.

    `feed` gathers; `begin`, `write` and `finish` write, and may block.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Sequence[pb.Tensor],
        raw: bytes,
        holes: Sequence[Hole],
    ) -> None:
        """Writes nothing yet.

        Args:
            folder: A new folder.
            shapes: The hollow tensors.
            raw: The part that the head came in.
            holes: Where the bytes of those are that have any.
        """
        self._digest = hashlib.sha256()
        self._files: list[BinaryIO] = []
        self._gathered: list[tuple[int, memoryview]] = []
        self._gathered_bytes = 0
        self._folder = folder
        self._shapes = shapes
        self._size_bytes = sum(hole.size for hole in holes)
        with_bytes = [n for n, each in enumerate(shapes) if each.streamed_bytes]
        pairs = list(zip(with_bytes, holes, strict=True))
        self._awaited = [place for place, hole in pairs if hole.start is None]
        self._pieces = Pieces([h.size for h in holes if h.start is None])
        view = memoryview(raw)
        for place, hole in pairs:
            if hole.start is not None:
                data = view[hole.start : hole.start + hole.size]
                self._gathered.append((place, data))

    def begin(self) -> None:
        """Makes the files, and writes what the head has of them.

        Raises:
            ServiceError: There is no room for them.
            OSError: They can't be written.
        """
        self._folder.mkdir(parents=True)
        self._check_room(self._size_bytes)
        for place, tensor in enumerate(self._shapes):
            self._files.append((self._folder / file_name(place)).open("xb"))
            _write_header(self._files[-1], tensor)
        self.write()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come."""
        return self._pieces.is_complete

    def feed(self, raw: bytes) -> bool:
        """Takes the next part.

        Args:
            raw: The part, from anywhere.

        Returns:
            Whether enough has been gathered to be written.

        Raises:
            StreamError: It is not the piece that comes next.
        """
        place, _, data = self._pieces.take(raw)
        self._gathered.append((self._awaited[place], data))
        self._gathered_bytes += len(data)
        return self._gathered_bytes >= _GATHERED_BYTES

    def write(self) -> None:
        """Writes what has been gathered.

        Raises:
            OSError: It can't be written.
        """
        for place, data in self._gathered:
            self._digest.update(data)
            self._files[place].write(data)
        self._gathered, self._gathered_bytes = [], 0

    def finish(self) -> str:
        """Writes and closes all files.

        Returns:
            A hash of all bytes.

        Raises:
            OSError: They can't be written.
        """
        self.write()
        for file in self._files:
            file.flush()
            # The table will say that the job is there, also after a loss of power.
            os.fsync(file.fileno())
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes all files, whatever is in them."""
        for file in self._files:
            file.close()

    def _check_room(self, size_bytes: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if size_bytes + _SPARE_BYTES > free:
            raise ServiceError(
                "STORAGE_UNAVAILABLE",
                f"the arrays take {size_bytes} bytes, but the server has {free} bytes "
                "of disk left for jobs. Free some there, or send fewer points.",
                size_bytes=size_bytes,
                free_bytes=free,
            )


def _write_header(file: BinaryIO, tensor: pb.Tensor) -> None:
    dtype = tensors.spec_of(tensor, tensor.streamed_bytes).dtype
    # Numpy's format has no name for bfloat16, so that its bits are kept.
    kept = np.dtype(np.uint16) if dtype.name == "bfloat16" else dtype
    description = npy.dtype_to_descr(kept.newbyteorder("<"))
    shape = tuple(tensor.shape)
    npy.write_array_header_2_0(
        file, {"descr": description, "fortran_order": False, "shape": shape}
    )
