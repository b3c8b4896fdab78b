"""Sparse matrices: a pattern that many share, and the values of each.

A pattern depends on a function and the shapes of its inputs alone, so it crosses the
wire once; from then on a client names its hash and gets values only.
"""

import functools
import hashlib
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jacserve import tensors
from jacserve.tensors import Array
from jacserve.v1 import jacobian_pb2 as pb

SparseLayout = Literal["csr", "coo"]


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Where a sparse matrix can be other than zero, ordered by row, then column.

    Attributes:
        shape: m and n.
        rows: The row of each entry, int32 [nnz].
        columns: The column of each entry, int32 [nnz].
        hash: Identifies it: equal patterns have equal hashes.
    """

    shape: tuple[int, int]
    rows: Array
    columns: Array
    hash: str

    @staticmethod
    def of(shape: tuple[int, int], rows: Array, columns: Array) -> "Pattern":
        """Makes a pattern of its entries, and hashes it.

        Args:
            shape: m and n.
            rows: The row of each entry, ascending.
            columns: The column of each entry, ascending in each row.

        Returns:
            The pattern.
        """
        rows, columns = rows.astype(np.int32), columns.astype(np.int32)
        digest = hashlib.sha256(f"{shape[0]} {shape[1]}\n".encode())
        digest.update(rows.astype("<i4").tobytes())
        digest.update(columns.astype("<i4").tobytes())
        return Pattern(shape, rows, columns, digest.hexdigest()[:32])

    @property
    def nnz(self) -> int:
        """The number of entries."""
        return len(self.rows)

    @property
    def row_starts(self) -> Array:
        """Where each row's entries start, and the last one's end: int32 [m + 1]."""
        return np.searchsorted(self.rows, np.arange(self.shape[0] + 1)).astype(np.int32)

    def __repr__(self) -> str:
        """Shows the size instead of the entries."""
        m, n = self.shape
        return f"<Pattern {m} x {n}, nnz={self.nnz}>"


@dataclass(frozen=True, slots=True, eq=False)
class SparseMatrix:
    """One sparse matrix, or a stack of them with one pattern.

    Attributes:
        data: The values of the entries, [nnz], or [b, nnz] for a stack.
        pattern: Where they stand.
    """

    data: Array
    pattern: Pattern

    @property
    def shape(self) -> tuple[int, ...]:
        """[m, n], or [b, m, n] for a stack."""
        return (*self.data.shape[:-1], *self.pattern.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values."""
        return self.data.dtype

    @property
    def nnz(self) -> int:
        """The number of entries of one matrix; some may be zero by chance."""
        return self.pattern.nnz

    @property
    def indices(self) -> Array:
        """Row and column of each entry, int32 [nnz, 2]."""
        return np.stack([self.pattern.rows, self.pattern.columns], axis=1)

    @property
    def fits_scipy(self) -> bool:
        """Whether scipy has such arrays: it has no stacks and no 16-bit numbers."""
        return self.data.ndim == 1 and self.dtype.itemsize > 2

    def todense(self) -> Array:
        """Returns the same numbers as an array of this shape."""
        dense = np.zeros(self.shape, self.dtype)
        dense[..., self.pattern.rows, self.pattern.columns] = self.data
        return dense

    def to_scipy(self, layout: SparseLayout = "csr") -> Any:
        """Returns one matrix as a scipy.sparse array.

        Args:
            layout: "csr" for a csr_array, "coo" for a coo_array.

        Returns:
            The array; it shares its values with this one, and has its own indices.

        Raises:
            ImportError: scipy is not installed.
            ValueError: This is a stack, or of 16-bit numbers.
        """
        if not self.fits_scipy and self.data.ndim == 1:
            raise ValueError(
                f"scipy has no sparse arrays of {self.dtype}. Use todense()."
            )
        if self.data.ndim > 1:
            raise ValueError(
                "scipy has no stacks of sparse matrices. Take them one by one: "
                "`for matrix in matrices`."
            )
        sparse = importlib.import_module("scipy.sparse")
        pattern = self.pattern
        if layout == "csr":
            parts = (self.data, pattern.columns.copy(), pattern.row_starts)
            return sparse.csr_array(parts, shape=pattern.shape)
        parts = (self.data, (pattern.rows.copy(), pattern.columns.copy()))
        return sparse.coo_array(parts, shape=pattern.shape)

    def __len__(self) -> int:
        """The number of matrices of a stack, or of rows of one."""
        return self.shape[0]

    def __getitem__(self, place: int) -> "SparseMatrix":
        """Takes one matrix of a stack."""
        if self.data.ndim == 1:
            raise TypeError(
                "this is one matrix, not a stack. Use todense() or to_scipy()."
            )
        return SparseMatrix(self.data[place], self.pattern)

    def __iter__(self) -> "Iterator[SparseMatrix]":
        """Takes the matrices of a stack one by one."""
        return (self[place] for place in range(len(self)))

    def __repr__(self) -> str:
        """Shows shape and entries instead of numbers."""
        shape = tensors.format_shape(self.shape)
        return f"<SparseMatrix {self.dtype}{shape}, nnz={self.nnz}>"


@functools.cache
def has_scipy() -> bool:
    """Tells whether scipy is installed."""
    return importlib.util.find_spec("scipy") is not None


def from_dense(array: Array) -> SparseMatrix:
    """Makes a sparse matrix, or a stack of them, of dense ones.

    Args:
        array: [m, n], or [b, m, n].

    Returns:
        The entries that are other than zero, in any matrix of a stack.
    """
    is_entry = (array != 0).any(axis=0) if array.ndim > 2 else array != 0
    rows, columns = np.nonzero(is_entry)
    m, n = array.shape[-2:]
    return SparseMatrix(array[..., rows, columns], Pattern.of((m, n), rows, columns))


def describe_pattern(pattern: Pattern, layout: str) -> tuple[pb.Pattern, list[Array]]:
    """Describes a pattern, whose indices are to go on the wire apart.

    Args:
        pattern: The pattern.
        layout: "csr" leaves out the rows, "coo" the starts of the rows.

    Returns:
        The hollow message, and the bytes of its tensors in the order of its fields.
    """
    m, n = pattern.shape
    message = pb.Pattern(hash=pattern.hash, row_count=m, column_count=n)
    payloads = [tensors.describe_into(message.columns, pattern.columns)]
    if layout == "csr":
        payloads.append(tensors.describe_into(message.row_starts, pattern.row_starts))
    else:
        payloads.append(tensors.describe_into(message.rows, pattern.rows))
    return message, [payload for payload in payloads if payload.size]


def decode_pattern(message: pb.Pattern, payloads: Iterator[Any]) -> Pattern:
    """Decodes a pattern.

    Args:
        message: The hollow message.
        payloads: The bytes of its tensors come next in it.

    Returns:
        The pattern.
    """
    m, n = message.row_count, message.column_count
    columns = _indices(message.columns, payloads)
    if message.HasField("rows"):
        rows = _indices(message.rows, payloads)
    else:
        starts = _indices(message.row_starts, payloads)
        counts = np.diff(starts)
        is_whole = len(starts) == m + 1 and starts[0] == 0 and (counts >= 0).all()
        if not is_whole or starts[-1] != len(columns):
            raise ValueError("the row starts of a pattern contradict its columns")
        rows = np.repeat(np.arange(m, dtype=np.int32), counts)
    if len(rows) != len(columns) or not (_within(rows, m) and _within(columns, n)):
        raise ValueError("the indices of a pattern contradict each other or its shape")
    for indices in (rows, columns):
        indices.flags.writeable = False  # Many matrices share them.
    return Pattern((m, n), rows, columns, message.hash)


def _indices(tensor: pb.Tensor, payloads: Iterator[Any]) -> Array:
    size = tensor.streamed_bytes
    spec = tensors.spec_of(tensor, size)
    if (spec.dtype, len(spec.shape)) != (np.dtype(np.int32), 1):
        raise ValueError("the indices of a pattern are not a row of int32")
    return spec.array(next(payloads) if size else b"")


def _within(indices: Array, size: int) -> bool:
    return not len(indices) or bool(indices.min() >= 0 and indices.max() < size)


class PatternCache:
    """The patterns that a client has seen, by what it asked. Thread-safe."""

    _CAPACITY = 64

    def __init__(self) -> None:
        """Starts empty."""
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, Mapping[str, Pattern]] = OrderedDict()

    def find(self, query: pb.Query) -> Mapping[str, Pattern]:
        """Returns the patterns that the like of a query had before, by hash."""
        with self._lock:
            return self._known.get(_signature(query), {})

    def learn(self, query: pb.Query, patterns: Iterable[Pattern]) -> None:
        """Keeps the patterns that an answer came with, or was spared."""
        found = {each.hash: each for each in patterns}
        if not found:
            return
        with self._lock:
            self._known[_signature(query)] = found
            self._known.move_to_end(_signature(query))
            while len(self._known) > self._CAPACITY:
                self._known.popitem(last=False)

    def forget(self, query: pb.Query) -> None:
        """Forgets the patterns of a query's like: the server has others now."""
        with self._lock:
            self._known.pop(_signature(query), None)


def _signature(query: pb.Query) -> Any:
    shapes = tuple(
        (given.name, given.tensor.dtype, *given.tensor.shape) for given in query.inputs
    )
    asked = (*query.quantities,), (*query.wrt,)
    return query.function, asked, query.mode, query.layout, shapes
