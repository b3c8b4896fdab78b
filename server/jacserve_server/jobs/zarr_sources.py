"""Arrays in Zarr stores, of version 2 or 3."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store

from jacserve.tensors import Array
from jacserve_server.jobs.source_checks import (
    Source,
    check_decoded,
    check_rows,
    checked,
    parsing,
    unreadable,
)
from jacserve_server.jobs.storage import (
    Location,
    identity,
    relative_path,
    zarr_store,
)

_MAX_INNER_CHUNKS = 2**27


class ZarrSource:
    """An array of a Zarr store."""

    def __init__(self, location: Location, name: str, array: zarr.Array[Any]) -> None:
        """Checks what the array's metadata says.

        Args:
            location: The store.
            name: The array's path in it, or "".
            array: The open array.

        Raises:
            ServiceError: SOURCE_UNREADABLE.
        """
        self._location = location
        self._name = name
        self._zarr = array
        with parsing(location, name):
            dtype = np.dtype(array.dtype)
            chunk, shard = array.chunks, array.shards
        self.shape, self.dtype = checked(location, name, array.shape, dtype)
        remedy = "Write it in smaller chunks"
        chunk_bytes = math.prod(chunk) * dtype.itemsize
        check_decoded(location, name, "chunks", chunk_bytes, remedy)
        if shard and math.prod(shard) > _MAX_INNER_CHUNKS * math.prod(chunk):
            raise unreadable(
                location,
                name,
                f"has shards of more than {_MAX_INNER_CHUNKS:,} chunks",
                "Write it in smaller shards",
            )
        self._identity = identity(location, name)

    def read(self, start: int, stop: int) -> Array:
        """Reads rows; see Source."""
        check_rows(self.shape, start, stop)
        return self._read(slice(start, stop))

    def read_all(self) -> Array:
        """Reads the whole array; see Source."""
        return self._read(...)

    def _read(self, rows: Any) -> Array:
        with parsing(self._location, self._name):
            array = np.asarray(self._zarr[rows])
            array = np.ascontiguousarray(array, self.dtype).reshape(array.shape)
        # A chunk that is not there is one that was never written, to Zarr. Of a store
        # that is gone or made anew, that would be made-up numbers.
        if identity(self._location, self._name) != self._identity:
            raise unreadable(
                self._location,
                self._name,
                "has changed since the job has opened it",
                "Create the job again when the store stays as it is",
            )
        return array

    def close(self) -> None:
        """Closes the store."""
        self._zarr.store.close()


def open_zarr(location: Location, array: str) -> Source:
    """Opens an array of a Zarr store; see `open_source`."""
    store = zarr_store(location, is_writable=False)
    try:
        name = relative_path(array) if array else ""
    except ValueError as error:
        raise unreadable(
            location, array, f"is no path: it {error}", "Name an array of the store"
        ) from error
    with parsing(location, array):
        found = _found(store, name)
        if isinstance(found, zarr.Array):
            return ZarrSource(location, name, found)
        group = found or _found(store, "")
        if group is None:
            raise unreadable(
                location,
                "",
                "is no Zarr array or group, or is not there",
                "Put it into the storage root, or name another",
            )
        if isinstance(group, zarr.Array):
            raise unreadable(
                location,
                array,
                "can't be named: the store is one array",
                "Leave the array's name out",
            )
        base = name if found else ""
        inner = [f"{base}/{key}".lstrip("/") for key in group.array_keys()]
        if found and len(inner) == 1:
            return ZarrSource(
                location, inner[0], zarr.open_array(store, mode="r", path=inner[0])
            )
    fault = "is a group, of which no array is named" if found else "is not there"
    raise unreadable(
        location,
        array,
        f"{fault}. The group {base!r} has arrays {_listed(inner)}",
        "Name one of them",
    )


def _found(store: Store, path: str) -> zarr.Array[Any] | zarr.Group | None:
    try:
        return zarr.open(store, mode="r", path=path)
    except FileNotFoundError:
        return None


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more or "(none)"
