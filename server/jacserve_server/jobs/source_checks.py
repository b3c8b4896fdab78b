"""What every source of a job's points is, and what is refused of all of them."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from jacserve.tensors import Array
from jacserve.vocabulary import DTYPES
from jacserve_server.errors import ServiceError, describe_exception
from jacserve_server.jobs.storage import Location

MAX_DECODED_BYTES = 2**32
# Numpy can't make an array of more bytes than this, not even an empty one.
_MAX_BYTES = 2**62
_MAX_RANK = 32
# Addresses may hold credentials.
_ADDRESS = re.compile(r"(\w+)://\S*")


class Source(Protocol):
    """An array in storage, of which rows are read. Used by one thread at a time.

    Attributes:
        shape: Its shape, as the file says it.
        dtype: Its dtype, one of the contract's, in native byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, start: int, stop: int) -> Array:
        """Reads rows.

        Args:
            start: The first row.
            stop: The row after the last.

        Returns:
            New memory in C order.

        Raises:
            ServiceError: The file is broken, or can't be read now.
        """
        ...

    def read_all(self) -> Array:
        """Reads the whole array, in new memory and C order."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


def unreadable(
    location: Location, array: str, fault: str, remedy: str, **values: Any
) -> ServiceError:
    """Returns the error of a source that can't be used.

    Args:
        location: The source.
        array: Which array of it, or "".
        fault: What is wrong with it, after "data/points.npy ...".
        remedy: What to do, without a stop.
        **values: The values in the text.

    Returns:
        SOURCE_UNREADABLE.
    """
    what = f"{array!r} of {location.name}" if array else location.name
    return ServiceError(
        "SOURCE_UNREADABLE", f"{what} {fault}. {remedy}.", path=location.name, **values
    )


@contextlib.contextmanager
def parsing(location: Location, array: str = "") -> Iterator[None]:
    """Makes a ServiceError of whatever the readers of a format raise.

    They raise anything, OSError too, at bytes that are not of their format; the
    storage's own errors are ServiceErrors already.

    Args:
        location: The source that is read.
        array: Which array of it, or "".

    Raises:
        ServiceError: SOURCE_UNREADABLE, or the storage's.
        MemoryError: There is none left.
    """
    try:
        yield
    except (ServiceError, MemoryError):
        # That there is no memory says nothing of the file.
        raise
    except Exception as error:
        said = _ADDRESS.sub(r"\1://...", describe_exception(error))
        raise unreadable(
            location,
            array,
            f"can't be read ({said})",
            "Write it again, or name another",
        ) from error


def checked(
    location: Location, array: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Checks what a file says of an array before anything is made of it.

    Args:
        location: The source.
        array: Which array of it, or "".
        shape: The shape that the file says.
        dtype: The dtype that the file says.

    Returns:
        The shape, and the dtype in native byte order.

    Raises:
        ServiceError: SOURCE_UNREADABLE; no such array can be read.
    """
    if dtype.name not in DTYPES:
        raise unreadable(
            location,
            array,
            f"has dtype {dtype}, which can't be computed with",
            f"Save it as one of {', '.join(DTYPES)}",
            dtype=dtype,
        )
    # Not one axis of zero may hide that the others are absurd.
    count = math.prod(max(size, 1) for size in shape[:_MAX_RANK])
    is_sane = len(shape) <= _MAX_RANK and min(shape, default=0) >= 0
    if not is_sane or count * dtype.itemsize > _MAX_BYTES:
        raise unreadable(
            location,
            array,
            f"says that its shape is {list(shape[:_MAX_RANK])}, which no array has",
            "Write it again",
            shape=list(shape[:_MAX_RANK]),
        )
    return tuple(map(int, shape)), dtype.newbyteorder("=")


def check_decoded(
    location: Location, array: str, what: str, size_bytes: int, remedy: str
) -> None:
    """Refuses what has to be decoded as a whole, and is too much for that.

    Args:
        location: The source.
        array: Which array of it, or "".
        what: What is decoded: "chunks".
        size_bytes: How much it is, decoded.
        remedy: What to do, without a stop.

    Raises:
        ServiceError: SOURCE_UNREADABLE.
    """
    if size_bytes > MAX_DECODED_BYTES:
        raise unreadable(
            location,
            array,
            f"has {what} of {size_bytes:,} bytes, of {MAX_DECODED_BYTES:,} at the most",
            remedy,
            size_bytes=size_bytes,
        )


def check_rows(shape: tuple[int, ...], start: int, stop: int) -> None:
    """Checks that an array has the rows that the server is about to read.

    Args:
        shape: The array's shape.
        start: The first row.
        stop: The row after the last.

    Raises:
        ValueError: It has not.
    """
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"an array of shape {shape} has no rows {start} to {stop}")
