"""Opens the arrays that jobs read their points from."""

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from types import MappingProxyType

from jacserve_server.jobs.numpy_sources import open_npy, open_npz
from jacserve_server.jobs.parquet_sources import open_parquet
from jacserve_server.jobs.source_checks import Source, unreadable
from jacserve_server.jobs.storage import Location
from jacserve_server.jobs.zarr_sources import open_zarr

__all__ = ["Source", "open_source"]

_OPENERS: Mapping[str, Callable[[Location, str], Source]] = MappingProxyType(
    {
        ".npy": open_npy,
        ".npz": open_npz,
        ".zarr": open_zarr,
        ".parquet": open_parquet,
    }
)


def open_source(location: Location, array: str = "") -> Source:
    """Opens an array in storage, of whatever format its name says. Blocks.

    Args:
        location: The file or store.
        array: Which array of it: the name of an array of an .npz file, the path of one
            in a Zarr group, or columns of a Parquet file, separated by commas. Empty
            where there is one only, and for all columns.

    Returns:
        The array, none of which is read yet. To be closed.

    Raises:
        ServiceError: It is not there, no array that can be computed with, or can't be
            read now. `field` is left to the caller.
    """
    suffix = PurePosixPath(location.path).suffix.lower()
    if suffix not in _OPENERS:
        raise unreadable(
            location,
            "",
            f"ends in {suffix!r}, of which the server reads no arrays",
            f"Save it as one of {', '.join(_OPENERS)}",
            suffix=suffix,
        )
    return _OPENERS[suffix](location, array)
