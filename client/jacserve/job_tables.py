"""Parquet files: a row for each point, a column for each array."""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jacserve.array_files import ArrayTextError
from jacserve.tensors import Array

_MOST_NUMBERS = 1024


def check_installed() -> None:
    """Checks that there is something that writes Parquet files.

    Raises:
        ImportError: pyarrow is not installed.
    """
    _pyarrow("pyarrow")


def _pyarrow(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            'Parquet files need pyarrow. Run: pip install "jacserve[jobs]"'
        ) from error


class TableFile:
    """A Parquet file that grows by groups of rows.

    An array of one axis or more at each point becomes a column of lists of fixed sizes,
    nested as the array is.
    """

    def __init__(
        self,
        path: Path,
        kinds: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    ) -> None:
        """Opens the file.

        Args:
            path: The file.
            kinds: The dtype of each column, and its shape at one point.

        Raises:
            ArrayTextError: Rows are too large, or of numbers that Parquet has not.
            ImportError: pyarrow is not installed.
        """
        counts = [math.prod(shape) for _, shape in kinds.values()]
        if sum(counts) > _MOST_NUMBERS:
            raise ArrayTextError(
                f"a point has {sum(counts):,} numbers, but a row of a Parquet file "
                f"{_MOST_NUMBERS:,} at most. Write to an .npz file."
            )
        for label, (dtype, _) in kinds.items():
            if dtype.kind == "c":
                raise ArrayTextError(
                    f"{label} is {dtype}, but Parquet files have no complex numbers. "
                    "Write to an .npz file."
                )
        if 0 in counts:
            raise ArrayTextError(
                "a Parquet file can't hold arrays without numbers. Write to an .npz "
                "file."
            )
        self._arrow = _pyarrow("pyarrow")
        schema = self._arrow.schema(
            [
                self._arrow.field(label, self._type(*kind), nullable=False)
                for label, kind in kinds.items()
            ]
        )
        self._schema = schema
        parquet = _pyarrow("pyarrow.parquet")
        self._writer: Any = parquet.ParquetWriter(path, schema)

    def _type(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        made = self._arrow.from_numpy_dtype(dtype)
        for size in reversed(shape):
            made = self._arrow.list_(made, size)
        return made

    def write(self, rows: Mapping[str, Array]) -> None:
        """Writes some rows.

        Args:
            rows: The columns.
        """
        columns = [self._column(array) for array in rows.values()]
        table = self._arrow.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table)

    def _column(self, array: Array) -> Any:
        made = self._arrow.array(np.ascontiguousarray(array).reshape(-1))
        for size in reversed(array.shape[1:]):
            made = self._arrow.FixedSizeListArray.from_arrays(made, size)
        return made

    def close(self) -> None:
        """Writes the end of the file; a second time does nothing."""
        self._writer.close()
