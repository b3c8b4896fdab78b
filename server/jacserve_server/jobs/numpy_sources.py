"""Arrays in .npy and .npz files.

Nothing is mapped into memory: a file that is cut off while it is read is to be an
error, and not the end of the server.
"""

import io
import math
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from jacserve.mapped_files import first_byte
from jacserve.tensors import Array
from jacserve_server.errors import ServiceError
from jacserve_server.jobs.source_checks import (
    Source,
    check_rows,
    checked,
    parsing,
    unreadable,
)
from jacserve_server.jobs.storage import Location, open_file

# A longer header describes no array of numbers.
_MAX_HEADER_LENGTH = 10_000
_PREFIX_BYTES = 2 * _MAX_HEADER_LENGTH
_HEADER_READERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_PIECE_BYTES = 2**20


class NpySource:
    """An array that a file holds as .npy, from some place on."""

    def __init__(
        self,
        location: Location,
        array: str,
        file: Any,
        *,
        start: int,
        size_bytes: int,
        close: Callable[[], None],
    ) -> None:
        """Reads the header.

        Args:
            location: The file.
            array: Which array of it, or "".
            file: The open file, which can seek and read.
            start: The first byte of the array's header.
            size_bytes: The bytes that the file has of header and array.
            close: Closes all that is open.

        Raises:
            ServiceError: SOURCE_UNREADABLE.
        """
        self._location = location
        self._array = array
        self._file = file
        self.close = close
        with parsing(location, array):
            file.seek(start)
            header = io.BytesIO(file.read(min(_PREFIX_BYTES, size_bytes)))
            shape, is_fortran, dtype = _read_header(header)
        self.shape, self.dtype = checked(location, array, shape, dtype)
        self._stored_dtype = dtype
        self._row_bytes = dtype.itemsize * math.prod(self.shape[1:])
        self._start = start + header.tell()
        if is_fortran and len(self.shape) > 1:
            raise unreadable(
                location,
                array,
                "is in Fortran order, in which points don't lie one after another",
                "Save numpy.ascontiguousarray of it",
            )
        needed, held = self._size_bytes, size_bytes - header.tell()
        if held < needed:
            raise self._too_short(needed, held)

    @property
    def _size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def _too_short(self, needed: int, held: int) -> ServiceError:
        return unreadable(
            self._location,
            self._array,
            f"is cut off: its shape {list(self.shape)} takes {needed:,} bytes, and "
            f"there are {held:,}",
            "Write it again, or wait until it is written",
            needed_bytes=needed,
            held_bytes=held,
        )

    def read(self, start: int, stop: int) -> Array:
        """Reads rows; see Source."""
        check_rows(self.shape, start, stop)
        shape = (stop - start, *self.shape[1:])
        return self._read(self._start + start * self._row_bytes, shape)

    def read_all(self) -> Array:
        """Reads the whole array; see Source."""
        return self._read(self._start, self.shape)

    def _read(self, offset: int, shape: tuple[int, ...]) -> Array:
        with parsing(self._location, self._array):
            array = np.empty(shape, self._stored_dtype)
            buffer = array.reshape(-1).view(np.uint8).data
            self._file.seek(offset)
            done = 0
            while done < len(buffer):
                count = self._file.readinto(buffer[done : done + _PIECE_BYTES])
                if not count:
                    held = offset - self._start + done
                    raise self._too_short(self._size_bytes, held)
                done += count
            return array.astype(self.dtype, copy=False)


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f"version {version} of the format is not for numbers")
    read = _HEADER_READERS[version]
    shape, is_fortran, dtype = read(file, max_header_size=_MAX_HEADER_LENGTH)
    return shape, is_fortran, dtype


def open_npy(location: Location, array: str) -> Source:
    """Opens an .npy file; see `open_source`."""
    if array:
        raise unreadable(
            location,
            array,
            "can't be named: an .npy file has one array",
            "Leave the array's name out",
        )
    file = open_file(location)
    try:
        size = file.seek(0, io.SEEK_END)
        return NpySource(location, "", file, start=0, size_bytes=size, close=file.close)
    except BaseException:
        file.close()
        raise


def open_npz(location: Location, array: str) -> Source:
    """Opens an array of an .npz file; see `open_source`."""
    file = open_file(location)
    try:
        return _open_member(location, array, file)
    except BaseException:
        file.close()
        raise


def _open_member(location: Location, array: str, file: BinaryIO) -> Source:
    with parsing(location):
        archive = zipfile.ZipFile(file)
    members = {
        info.filename.removesuffix(".npy"): info
        for info in archive.infolist()
        if info.filename.endswith(".npy")
    }
    name = array or (next(iter(members)) if len(members) == 1 else "")
    if name not in members:
        raise unreadable(
            location,
            array,
            f"is none of its arrays: {_listed(members)}"
            if array
            else f"has {len(members)} arrays, and none is named: {_listed(members)}",
            "Name one of them",
        )
    member = members[name]
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise unreadable(
            location,
            name,
            f"is compressed by method {member.compress_type} of zip",
            "Save it by numpy.savez or numpy.savez_compressed",
        )
    with parsing(location, name):
        # Sees to it, too, that it is the member that the directory says.
        stream = archive.open(member)
        if member.compress_type == zipfile.ZIP_STORED:
            # Read in place: in the stream, to go back is to begin anew.
            start = first_byte(file, member)
            stream.close()
            return NpySource(
                location,
                name,
                file,
                start=start,
                size_bytes=min(member.file_size, member.compress_size),
                close=file.close,
            )

    def close() -> None:
        stream.close()
        file.close()

    # The stream stays where it is between reads, and begins anew by itself when it has
    # to go back.
    return NpySource(
        location, name, stream, start=0, size_bytes=member.file_size, close=close
    )


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more or "it has none"
