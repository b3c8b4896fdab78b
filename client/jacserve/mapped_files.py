"""Arrays in .npy and .npz files, mapped: a file of any size takes no memory."""

import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from jacserve.tensors import Array

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HEADER_READERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
# What is raised at archives that are broken, encrypted or compressed otherwise.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError
)  # fmt: skip


def map_npy(path: Path) -> Array:
    """Maps the array of an .npy file.

    Args:
        path: The file.

    Returns:
        The array, to be read only.

    Raises:
        OSError: The file can't be read.
        ValueError: It holds no array.
    """
    with path.open("rb") as file:
        return _mapped(file, 0)


def map_npz(path: Path) -> dict[str, Array]:
    """Maps the arrays of an .npz file; those that are compressed from a copy on disk.

    The copies are in the folder of temporary files, until the arrays are gone.

    Args:
        path: The file.

    Returns:
        The arrays by name, to be read only.

    Raises:
        OSError: The file can't be read, or a copy not be made.
        ValueError: It is no .npz file, or holds what is no array.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(file, archive, info)
                for info in archive.infolist()
            }
    except _BROKEN as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _member(file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    # Sees to it, too, that it is the member that the directory says.
    with archive.open(info) as stream:
        if info.compress_type == zipfile.ZIP_STORED:
            return _mapped(file, first_byte(file, info))
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            copy.flush()
            return _mapped(copy, 0)


def first_byte(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Finds where the bytes of a member of an archive begin.

    Args:
        file: The archive.
        member: The member, of which the directory says where its header is.

    Returns:
        The place in the file.
    """
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return member.header_offset + len(header) + name_length + extra_length


def _mapped(file: Any, start: int) -> Array:
    file.seek(start)
    version = npy.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f"version {version} of the format is not for numbers")
    shape, is_fortran, dtype = _HEADER_READERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds objects, and no numbers")
    if 0 in shape:
        return np.empty(shape, dtype)
    order = "F" if is_fortran else "C"
    return np.memmap(file, dtype, "r", file.tell(), shape, order)
