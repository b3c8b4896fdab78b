"""The results of a job: a Zarr 3 store, written chunk by chunk.

Every array of every quantity is an array of the store, at its path: "jacobian",
"slogdet/0", "value/position". A sparse matrix is a group of its values ("data") and
its indices. Rows that are not computed are NaN, or 0 where the dtype has no NaN;
"status" tells them from others. So the store can be read while it is written.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import zarr
import zarr.abc.store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from jacserve import trees
from jacserve.sparse import Pattern
from jacserve.tensors import Array, dtype_named
from jacserve_server.errors import ServiceError
from jacserve_server.jobs import storage
from jacserve_server.jobs.plans import Task
from jacserve_server.jobs.storage import Location, storage_errors
from jacserve_server.work import Outcome

STATUS = "status"
PENDING, FINITE, NON_FINITE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the results.

    Attributes:
        quantity: What it belongs to.
        path: Where it stands in that.
        dtype: The dtype of its rows.
        shape: The shape of a row.
        mode: How it was differentiated, or "".
        pattern: Where its values stand in a sparse matrix; None where it is dense.
    """

    quantity: str
    path: trees.Path
    dtype: str
    shape: tuple[int, ...]
    mode: str
    pattern: Pattern | None

    @property
    def name(self) -> str:
        """Where it stands in the store."""
        # A key may be anything: "/" or "..", too.
        steps = [quote(str(step), safe="").replace(".", "%2E") for step in self.path]
        of_values = ["data"] if self.pattern is not None else []
        return "/".join([self.quantity, *(step or "%" for step in steps), *of_values])

    @property
    def kept_dtype(self) -> np.dtype[Any]:
        """The dtype in the store. Zarr has no bfloat16, so that its bits are kept."""
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)


def versions() -> dict[str, str]:
    """Returns the versions of what results depend on."""
    names = ("jacserve", "jax", "jaxlib", "numpy", "zarr")
    return {name: version(name) for name in names}


def leaves_of(outcome: Outcome) -> list[Leaf]:
    """Returns what the arrays of a batch's outcome are."""
    outline = outcome.outline
    return [
        Leaf(
            quantity=quantity,
            path=path,
            dtype=array.dtype.name,
            shape=array.shape[1:],
            mode=outline.modes.get(quantity, ""),
            pattern=outline.patterns.get(quantity),
        )
        for (quantity, path), array in zip(outline.arrays, outcome.arrays, strict=True)
    ]


def create(
    task: Task,
    leaves: Sequence[Leaf],
    chunk_size: int,
    circumstances: Mapping[str, Any],
) -> None:
    """Makes a job's store, in place of one whose making was cut short.

    Args:
        task: The job.
        leaves: The arrays of its results.
        chunk_size: The rows of a chunk.
        circumstances: What else is to be known of the results, for the attributes.

    Raises:
        ServiceError: The store can't be written, or something else is there.
    """
    computation, rows = task.computation, task.point_count
    about = {
        "job": task.job,
        "function": computation.function,
        "quantities": list(computation.quantities),
        "wrt": list(computation.wrt),
        "layout": computation.layout,
        "points": rows,
        "inputs": [f"{spec.dtype}{list(spec.shape)}" for spec in computation.inputs],
        **circumstances,
        "arrays": [_described(leaf) for leaf in leaves],
    }
    with storage_errors(task.output):
        _make_room(task)
        store = storage.zarr_store(task.output, is_writable=True)
        group = _create_group(task, store, {"jacserve": about})
        for leaf in leaves:
            more = {"function": computation.function, **_described(leaf)}
            name, kept = leaf.name, leaf.kept_dtype
            _create_array(group, name, rows, chunk_size, kept, leaf.shape, more)
            if leaf.pattern is not None:
                folder = name.removesuffix("/data")
                for label in ("rows", "columns", "row_starts"):
                    indices = getattr(leaf.pattern, label)
                    group.create_array(f"{folder}/{label}", data=indices)
        flags = {
            "flag_values": [PENDING, FINITE, NON_FINITE],
            "flag_meanings": "pending finite non_finite",
        }
        # Last: a store that has it is complete.
        kept = np.dtype(np.uint8)
        _create_array(group, STATUS, rows, chunk_size, kept, (), flags)
        folder = storage.local_path(task.output)
        if folder is not None:
            for path in folder.rglob("*"):
                _sync(path)
            _sync(folder)
            _sync(folder.parent)


def _make_room(task: Task) -> None:
    """Removes what there is of the task's store, and refuses what else there is."""
    location = task.output
    if not storage.exists(location):
        return
    if remove(location, task.job):
        return
    if _job_of(location) is not None or not _is_empty(location):
        raise occupied(location)


def remove(location: Location, job: str) -> bool:
    """Removes a job's store; nothing if what is there is anything else.

    Args:
        location: Where it is.
        job: Whose store it is, if it is one: the job's uid.

    Returns:
        Whether it was.

    Raises:
        ServiceError: It can't be told, or can't be removed.
    """
    if _job_of(location) != job:
        return False
    storage.remove(location)
    return True


def _job_of(location: Location) -> Any:
    """Returns whose store there is; None where there is none of a job."""
    store = storage.zarr_store(location, is_writable=False)
    try:
        about: Any = zarr.open_group(store, mode="r").attrs["jacserve"]
        return about["job"]
    except ServiceError as error:
        if error.reason != "SOURCE_UNREADABLE":
            raise
    except Exception:
        pass  # Whatever it is, it is no store of a job.
    return None


def _is_empty(location: Location) -> bool:
    """Tells whether there is but a folder, as of a server killed at its first file."""
    folder = storage.local_path(location)
    if folder is None or not folder.is_dir():
        return False
    return all(path.match("*.partial") for path in folder.iterdir())


def _create_group(task: Task, store: zarr.abc.store.Store, about: Any) -> zarr.Group:
    """Makes the group; of two jobs that do so at once, for one of them."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": about}
    buffer = default_buffer_prototype().buffer.from_bytes(json.dumps(document).encode())
    sync(store.set_if_not_exists("zarr.json", buffer))
    if _job_of(task.output) != task.job:
        raise occupied(task.output)
    return zarr.open_group(store, mode="r+")


def occupied(location: Location) -> ServiceError:
    """Returns the error of an output that is there already."""
    return ServiceError(
        "MALFORMED_REQUEST",
        f"{location.name} is there already. Name a new store.",
        field="output",
        output=location.name,
    )


def _described(leaf: Leaf) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": leaf.name,
        "quantity": leaf.quantity,
        "path": list(leaf.path),
        "dtype": leaf.dtype,
        "shape": list(leaf.shape),
        "mode": leaf.mode,
    }
    if leaf.pattern is not None:
        about["pattern"] = leaf.pattern.hash
        about["matrix_shape"] = list(leaf.pattern.shape)
    return about


def _create_array(
    group: zarr.Group,
    name: str,
    rows: int,
    chunk_size: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    attributes: Mapping[str, Any],
) -> None:
    group.create_array(
        name,
        shape=(rows, *shape),
        chunks=(min(chunk_size, rows), *(max(size, 1) for size in shape)),
        dtype=dtype,
        fill_value=np.nan if dtype.kind in "fc" else 0,
        # Derivatives are noise to a compressor, which takes longer than they did.
        compressors=None,
        # A folder for each axis of each chunk would be a hundred thousand folders.
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes=dict(attributes),
    )


def remove_partial(location: Location) -> None:
    """Removes the files of chunks that a killed server was writing.

    Args:
        location: A store that nobody writes to now.

    Raises:
        ServiceError: The store can't be used.
    """
    folder = storage.local_path(location)
    if folder is None:
        return
    with storage_errors(location):
        # So Zarr names a file until all of it is written. No array's name has a dot.
        for path in folder.rglob("*.partial"):
            path.unlink(missing_ok=True)


class Results:
    """A job's store, opened. Its methods block; threads may share it."""

    def __init__(self, location: Location, job: str, *, is_writable: bool) -> None:
        """Opens it.

        Args:
            location: The store.
            job: Whose it is.
            is_writable: Whether chunks are to be written; else computed rows are to be
                read.

        Raises:
            ServiceError: It is not there, or another job's.
        """
        self._location = location
        store = storage.zarr_store(location, is_writable=is_writable)
        # Indices that are all zero have no chunk, but rows that are computed have one.
        rows = storage.zarr_store(location, is_writable=False, is_whole=True)
        self._store, self._rows = store, store if is_writable else rows
        self._mode: Literal["r", "r+"] = "r+" if is_writable else "r"
        with _job_errors(location):
            group = zarr.open_group(store, mode=self._mode)
            about: Any = group.attrs["jacserve"]
            if about["job"] != job:
                raise _vanished(location)
            self._status = self._open(STATUS, self._rows)
            self.about: Mapping[str, Any] = about
            self.leaves = [self._leaf(each) for each in about["arrays"]]
            self._arrays = {
                leaf.name: self._open(leaf.name, self._rows) for leaf in self.leaves
            }

    def _open(self, name: str, store: zarr.abc.store.Store) -> Any:
        # To find out whether a chunk is empty takes longer than to write it.
        config = {"write_empty_chunks": True}
        return zarr.open_array(store, path=name, mode=self._mode, config=config)

    def _leaf(self, about: Mapping[str, Any]) -> Leaf:
        pattern = None
        if "pattern" in about:
            folder = about["name"].removesuffix("/data")
            rows, columns = (
                np.asarray(self._open(f"{folder}/{label}", self._store)[:])
                for label in ("rows", "columns")
            )
            m, n = about["matrix_shape"]
            pattern = Pattern((m, n), rows, columns, about["pattern"])
        return Leaf(
            quantity=about["quantity"],
            path=tuple(about["path"]),
            dtype=about["dtype"],
            shape=tuple(about["shape"]),
            mode=about["mode"],
            pattern=pattern,
        )

    def write(self, start: int, arrays: Sequence[Array], finite: Array) -> None:
        """Writes a chunk. It is there when this returns, though the process be killed.

        Args:
            start: Its first row.
            arrays: Its rows of each leaf.
            finite: For each row, whether all of its numbers are finite.

        Raises:
            ServiceError: It can't be written.
        """
        stop = start + len(finite)
        status = np.where(finite, np.uint8(FINITE), np.uint8(NON_FINITE))
        with _job_errors(self._location):
            if not self.is_there():
                raise _vanished(self._location)
            for leaf, rows in zip(self.leaves, arrays, strict=True):
                kept = rows if rows.dtype == leaf.kept_dtype else rows.view(np.uint16)
                self._arrays[leaf.name][start:stop] = kept
            # Last: who sees that a row is computed, sees the row.
            self._status[start:stop] = status

    def is_there(self) -> bool:
        """Tells whether the store has not been taken away."""
        folder = storage.local_path(self._location)
        return folder is None or (folder / "zarr.json").exists()

    def sync(self, indexes: Sequence[int]) -> None:
        """Waits until chunks are on the disk.

        Args:
            indexes: Their places.

        Raises:
            ServiceError: They can't be written there.
        """
        folder = storage.local_path(self._location)
        if folder is None:
            return  # Other storages keep what they have taken.
        arrays = [(leaf.name, self._arrays[leaf.name]) for leaf in self.leaves]
        with _job_errors(self._location):
            for name, array in [*arrays, (STATUS, self._status)]:
                if array.size:
                    for index in indexes:
                        _sync(folder / name / _key(array, index))
                _sync(folder / name)

    def read(self, leaf: Leaf, start: int, stop: int) -> Array:
        """Reads rows of an array.

        Args:
            leaf: One of `leaves`.
            start: The first row.
            stop: The row after the last one.

        Returns:
            The rows, in C order.

        Raises:
            ServiceError: They can't be read.
        """
        with _job_errors(self._location):
            rows = np.ascontiguousarray(self._arrays[leaf.name][start:stop])
        return rows if leaf.dtype != "bfloat16" else rows.view(dtype_named("bfloat16"))

    def read_finite(self, start: int, stop: int) -> Array:
        """Reads for each row whether all of its numbers are finite.

        Args:
            start: The first row.
            stop: The row after the last one.

        Returns:
            One flag for each row.

        Raises:
            ServiceError: They can't be read.
        """
        with _job_errors(self._location):
            return np.asarray(self._status[start:stop]) == FINITE


def _key(array: Any, index: int) -> str:
    return array.metadata.encode_chunk_key((index, *[0] * (array.ndim - 1)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _job_errors(location: Location) -> Iterator[None]:
    """As `storage_errors`; what a job has written was there, and may come back."""
    try:
        with storage_errors(location):
            yield
    except KeyError as error:
        raise _vanished(location) from error
    except ServiceError as error:
        if error.reason != "SOURCE_UNREADABLE":
            raise
        raise _vanished(location) from error


def _vanished(location: Location) -> ServiceError:
    return ServiceError(
        "STORAGE_UNAVAILABLE",
        f"the results in {location.name} are not there any more. Bring them back, and "
        "the job goes on by itself; or delete it.",
        output=location.name,
    )
