"""Columns of numbers, and of lists of them, in Parquet files."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jacserve.tensors import Array
from jacserve_server.errors import ServiceError
from jacserve_server.jobs.source_checks import (
    Source,
    check_decoded,
    check_rows,
    checked,
    parsing,
    unreadable,
)
from jacserve_server.jobs.storage import Location, open_file


class ParquetSource:
    """Some columns of a Parquet file, of which one row group at a time is decoded."""

    def __init__(
        self, location: Location, name: str, file: pq.ParquetFile, columns: list[str]
    ) -> None:
        """Checks the columns' types.

        Args:
            location: The file.
            name: The columns' names as asked for, or "".
            file: The open file.
            columns: The columns; several form the last axis.

        Raises:
            ServiceError: SOURCE_UNREADABLE.
        """
        self._location = location
        self._name = name
        self._file = file
        self._columns = columns
        groups = [
            file.metadata.row_group(n).num_rows
            for n in range(file.metadata.num_row_groups)
        ]
        if min(groups, default=0) < 0:
            raise self._unreadable("has a row group of fewer rows than none")
        self._starts = [0, *itertools.accumulate(groups)]
        self._decoded: tuple[int, Array] | None = None
        inner, dtype = self._type_of_rows()
        shape = (self._starts[-1], *inner)
        self.shape, self.dtype = checked(location, name, shape, dtype)
        group_bytes = max(groups, default=0) * math.prod(inner) * dtype.itemsize
        remedy = "Write it with smaller row groups"
        check_decoded(location, name, "row groups", group_bytes, remedy)

    def _unreadable(
        self, fault: str, remedy: str = "Write it again", **values: Any
    ) -> ServiceError:
        return unreadable(self._location, self._name, fault, remedy, **values)

    def _type_of_rows(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        schema = self._file.schema_arrow
        types = [schema.field(column).type for column in self._columns]
        if len(types) == 1:
            return self._parsed(self._columns[0], types[0])
        dtypes: dict[str, str] = {}
        for column, kind in zip(self._columns, types, strict=True):
            if not _is_number(kind):
                raise self._unreadable(
                    f"has a column {column!r} of {kind}; only columns of numbers are "
                    "put together",
                    "Name one column, or several of numbers",
                )
            dtypes[column] = str(kind)
        if len(set(dtypes.values())) > 1:
            listed = ", ".join(f"{k!r} of {v}" for k, v in list(dtypes.items())[:10])
            raise self._unreadable(
                f"has columns of several types: {listed}",
                "Name columns of one type, or write them so",
            )
        return (len(types),), np.dtype(types[0].to_pandas_dtype())

    def _parsed(self, column: str, kind: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Returns shape and dtype of one row of a column."""
        is_known = True
        sizes: list[int] = []
        bare = _storage(kind)
        while _is_list(bare):
            is_known = is_known and pa.types.is_fixed_size_list(bare)
            sizes.append(bare.list_size if is_known else -1)
            bare = _storage(bare.value_type)
        if not _is_number(bare):
            raise self._unreadable(
                f"has type {kind} in column {column!r}, which is no number, and no "
                "list of numbers",
                "Name a column of numbers, or of lists of one length",
            )
        if isinstance(kind, pa.FixedShapeTensorType):
            if kind.permutation not in (None, list(range(len(kind.shape)))):
                raise self._unreadable(
                    "holds tensors in another order than their axes'",
                    "Write them in C order",
                )
            sizes = list(kind.shape)
        elif not is_known:
            sizes = self._measured(column, len(sizes))
        return tuple(sizes), np.dtype(bare.to_pandas_dtype())

    def _measured(self, column: str, depth: int) -> list[int]:
        """Returns the lengths of the first row's lists, if all rows can have them."""
        filled = [
            n for n, (a, b) in enumerate(itertools.pairwise(self._starts)) if b > a
        ]
        if not filled:
            raise self._unreadable(
                "has no rows, so that the length of its lists is unknown",
                "Write it with lists of a fixed size",
            )
        batches = self._file.iter_batches(
            batch_size=1, row_groups=filled[:1], columns=[column], use_threads=False
        )
        sizes: list[int] = []
        values = _unwrapped(next(batches).column(0))
        for _ in range(depth):
            size = len(values.flatten()) // max(len(values), 1)
            sizes.append(size)
            values = _unwrapped(values.flatten())
        leaf = self._leaf(column)
        for group in filled:
            metadata = self._file.metadata.row_group(group)
            # An empty list counts as one value.
            expected = metadata.num_rows * max(math.prod(sizes), 1)
            if metadata.column(leaf).num_values != expected:
                raise self._unreadable(
                    f"has lists of several lengths: row 0 has {sizes}, but not all "
                    f"of rows {self._starts[group]} to {self._starts[group + 1] - 1}",
                    "Write lists of one length",
                )
        return sizes

    def _leaf(self, column: str) -> int:
        """Returns the place of a column among those of the file's own schema."""
        place = self._file.schema_arrow.get_field_index(column)
        fields = list(self._file.schema_arrow)[:place]
        return sum(_leaf_count(field.type) for field in fields)

    def read(self, start: int, stop: int) -> Array:
        """Reads rows; see Source."""
        check_rows(self.shape, start, stop)
        with parsing(self._location, self._name):
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
            for group, (first, end) in enumerate(itertools.pairwise(self._starts)):
                low, high = max(start, first), min(stop, end)
                if low < high:
                    rows = self._row_group(group)
                    out[low - start : high - start] = rows[low - first : high - first]
            return out

    def read_all(self) -> Array:
        """Reads all rows; see Source."""
        return self.read(0, self.shape[0])

    def _row_group(self, group: int) -> Array:
        if self._decoded is None or self._decoded[0] != group:
            self._decoded = None
            self._decoded = group, self._decode(group)
        return self._decoded[1]

    def _decode(self, group: int) -> Array:
        first, end = self._starts[group : group + 2]
        table = self._file.read_row_group(
            group, columns=self._columns, use_threads=False
        )
        if table.num_rows != end - first:
            raise self._unreadable(
                f"has {table.num_rows} rows in a row group of {end - first}"
            )
        if len(self._columns) == 1:
            return self._rows(table.column(self._columns[0]), self.shape[1:], first)
        out = np.empty((end - first, len(self._columns)), self.dtype)
        for place, column in enumerate(self._columns):
            out[:, place] = self._rows(table.column(column), (), first)
        return out

    def _rows(self, column: Any, inner: tuple[int, ...], first: int) -> Array:
        pieces: list[Array] = []
        for chunk in column.chunks:
            pieces.append(self._array(chunk, inner, first))
            first += len(chunk)
        empty = np.empty((0, *inner), self.dtype)
        return np.concatenate([empty, *pieces]) if len(pieces) != 1 else pieces[0]

    def _array(self, values: Any, inner: tuple[int, ...], first: int) -> Array:
        shape, per_row = (len(values), *inner), 1
        values = _unwrapped(values)
        while _is_list(values.type):
            self._refuse_nulls(values, first, per_row)
            # A tensor's axes are one list.
            size = values.type.list_size if _is_fixed(values.type) else inner[0]
            if not _is_fixed(values.type):
                lengths = values.value_lengths().to_numpy(zero_copy_only=False)
                wrong = np.flatnonzero(lengths != size)
                if wrong.size:
                    place = int(wrong[0])
                    row = first + place // max(per_row, 1)
                    raise self._unreadable(
                        f"has a list of length {lengths[place]} in row {row}, "
                        f"and of length {size} before",
                        "Write lists of one length",
                        row=row,
                    )
            per_row *= size
            inner = inner[1:]
            values = _unwrapped(values.flatten())
        self._refuse_nulls(values, first, per_row)
        return values.to_numpy(zero_copy_only=False).reshape(shape)

    def _refuse_nulls(self, values: Any, first: int, per_row: int) -> None:
        if values.null_count:
            place = pc.index(values.is_null(), True).as_py()
            row = first + place // max(per_row, 1)
            raise self._unreadable(
                f"has no value (null) in row {row}",
                "Fill it, or leave its row out",
                row=row,
            )

    def close(self) -> None:
        """Closes the file."""
        self._decoded = None
        self._file.close(force=True)


def _storage(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _unwrapped(values: Any) -> Any:
    return values.storage if isinstance(values, pa.ExtensionArray) else values


def _is_fixed(kind: Any) -> bool:
    return pa.types.is_fixed_size_list(kind)


def _is_list(kind: Any) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or _is_fixed(kind)


def _is_number(kind: Any) -> bool:
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _leaf_count(kind: Any) -> int:
    kind = _storage(kind)
    return sum(_leaf_count(kind.field(n).type) for n in range(kind.num_fields)) or 1


def open_parquet(location: Location, array: str) -> Source:
    """Opens columns of a Parquet file; see `open_source`."""
    file = open_file(location)
    try:
        with parsing(location, array):
            table = pq.ParquetFile(
                file, pre_buffer=False, page_checksum_verification=True
            )
            columns = _chosen(location, array, table.schema_arrow.names)
            return ParquetSource(location, array, table, columns)
    except BaseException:
        file.close()
        raise


def _chosen(location: Location, array: str, names: Sequence[str]) -> list[str]:
    # A name may have a comma in it.
    asked = [array] if array in names else array.split(",") if array else list(names)
    listed = ", ".join(map(repr, names[:10])) + (" ..." if len(names) > 10 else "")
    for column in asked:
        if names.count(column) != 1 or asked.count(column) != 1:
            raise unreadable(
                location,
                array,
                f"is not to be had: column {column!r} is there {names.count(column)} "
                f"times, and asked for {asked.count(column)} times. There are {listed}"
                if array
                else f"has {names.count(column)} columns called {column!r}",
                "Name columns of the file, each once",
            )
    if not asked:
        raise unreadable(location, array, "has no columns", "Write it again")
    return asked
