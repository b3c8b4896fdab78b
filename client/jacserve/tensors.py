"""numpy arrays to `Tensor` messages and back: the only codec, for both sides.

A tensor is a dtype, a shape and the raw little-endian elements in C order. It has
no strides, so a transposed or sliced array can't arrive scrambled; and its byte
count is checked against shape and item size before anything is allocated.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import DTYPES, word

Array = npt.NDArray[Any]

MAX_RANK = 32
MAX_AXIS_SIZE = 2**31 - 1
# Numpy can't make an array of more bytes than this, not even an empty one.
_MAX_BYTES = 2**62


class MalformedTensorError(ValueError):
    """A tensor's dtype, shape and bytes contradict each other."""


@functools.cache
def dtype_named(name: str) -> np.dtype[Any]:
    """Returns the numpy dtype of that name, in native byte order.

    Args:
        name: One of the contract's dtypes, such as "float64" or "bfloat16".

    Returns:
        The dtype.

    Raises:
        ImportError: bfloat16, and ml_dtypes is not installed.
    """
    if name == "bfloat16":
        try:
            ml_dtypes = importlib.import_module("ml_dtypes")
        except ImportError as error:
            raise ImportError(
                "numpy has no bfloat16 of its own. Install ml_dtypes."
            ) from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


_KINDS = ("bool", "int", "float", "complex")


def _kind(dtype: str) -> int:
    """Orders dtypes by what they hold: truth, whole, real and complex numbers."""
    bare = dtype if dtype == "bool" else dtype.removeprefix("u").removeprefix("b")
    return next(rank for rank, kind in enumerate(_KINDS) if bare.startswith(kind))


def cast_target(source: str, accepted: Sequence[str]) -> str | None:
    """Chooses the dtype to convert an array to.

    Args:
        source: The array's dtype.
        accepted: The dtypes to choose from, the widest first.

    Returns:
        The widest of the same kind of number, else of the next kind that holds it;
        None when none does: complex numbers are not made real, nor real ones whole.
    """
    suitable = [dtype for dtype in accepted if _kind(dtype) >= _kind(source)]
    return min(suitable, key=_kind, default=None)


def converted(array: Array, dtype: str) -> Array:
    """Converts an array to a dtype that `cast_target` chose.

    Args:
        array: The array.
        dtype: The dtype's name.

    Returns:
        The converted array.

    Raises:
        ValueError: A whole number does not fit.
    """
    target = dtype_named(dtype)
    result = array.astype(target)
    if target.kind in "iu" and not np.array_equal(result, array):
        raise ValueError(f"it has a number that does not fit into {dtype}")
    return result


@functools.lru_cache(maxsize=64)
def _on_the_wire(dtype: np.dtype[Any]) -> tuple[pb.DType, np.dtype[Any]]:
    """Returns the contract's number of a dtype, and its form on the wire."""
    if dtype.name not in DTYPES:
        raise TypeError(
            f"dtype {dtype} can't be sent. Convert the array to one of "
            f"{', '.join(DTYPES)}."
        )
    little_endian = dtype.newbyteorder("<")
    return DTYPES[dtype.name], dtype if little_endian == dtype else little_endian


def describe_into(tensor: pb.Tensor, array: npt.ArrayLike) -> Array:
    """Describes an array in a tensor, whose bytes are to go on the wire apart.

    Args:
        tensor: An empty message, in its place in the one to be sent.
        array: Anything that numpy makes an array of, of a dtype of the contract.

    Returns:
        The bytes, `tensor.streamed_bytes` of them: a view of the array where it is
        in C order and native byte order, else a copy.

    Raises:
        TypeError: The contract has no such dtype.
    """
    x = np.asarray(array)
    tensor.dtype, _ = _on_the_wire(x.dtype)
    tensor.shape.extend(x.shape)
    tensor.streamed_bytes = x.nbytes
    return bytes_of(x)


def buffer_of(x: Array) -> Array:
    """Returns a buffer of the elements of an array as they go on the wire.

    Args:
        x: An array of a dtype of the contract, whatever its strides and byte order.

    Returns:
        The array itself where possible, else as `bytes_of`.
    """
    is_plain = _on_the_wire(x.dtype)[1] is x.dtype and x.dtype.kind != "V"
    return x if is_plain and x.flags.c_contiguous else bytes_of(x)


def bytes_of(x: Array) -> Array:
    """Returns the elements of an array as they go on the wire, as one row of bytes.

    Args:
        x: An array of a dtype of the contract, whatever its strides and byte order.

    Returns:
        uint8, a view where possible.
    """
    _, little_endian = _on_the_wire(x.dtype)
    rows = np.ascontiguousarray(x, little_endian)
    return rows.reshape(-1).view(np.uint8)


def encode_into(tensor: pb.Tensor, array: npt.ArrayLike) -> None:
    """Encodes an array, whatever its strides and byte order, data and all.

    Args:
        tensor: An empty message, in its place in the one to be sent.
        array: Anything that numpy makes an array of, of a dtype of the contract.

    Raises:
        TypeError: The contract has no such dtype.
    """
    tensor.data = describe_into(tensor, array).tobytes()
    tensor.ClearField("streamed_bytes")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor says of its bytes.

    Attributes:
        dtype: Its dtype, in native byte order.
        shape: Its shape.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    # The dtype on the wire; the very same where that is also this machine's.
    _wire: np.dtype[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Compares the byte orders once."""
        wire = self.dtype.newbyteorder("<")
        wire = self.dtype if wire == self.dtype else wire
        object.__setattr__(self, "_wire", wire)

    def array(self, data: Any) -> Array:
        """Makes an array of a tensor's bytes.

        Args:
            data: A buffer of as many bytes as the spec was checked against.

        Returns:
            The array: a view of the buffer where this machine is little-endian.

        Raises:
            MalformedTensorError: A bool is neither 0 nor 1.
        """
        x: Array = np.ndarray(self.shape, self._wire, data)
        if self.dtype.kind == "b" and (x.view(np.uint8) > 1).any():
            raise MalformedTensorError(
                "a bool is neither 0 nor 1. Send one byte for each."
            )
        return x if self._wire is self.dtype else x.astype(self.dtype)


def spec_of(tensor: pb.Tensor, size_bytes: int) -> TensorSpec:
    """Checks what a tensor says of its bytes, before anything is allocated.

    Args:
        tensor: The message, from anywhere.
        size_bytes: How many bytes it has.

    Returns:
        Its dtype and shape.

    Raises:
        MalformedTensorError: The message does not describe an array.
        ImportError: The tensor is bfloat16, and ml_dtypes is not installed.
    """
    try:
        name = word(DTYPES, tensor.dtype)
    except KeyError:
        raise MalformedTensorError(
            f"dtype {tensor.dtype} is unspecified or unknown. "
            f"Set one of {', '.join(DTYPES)}."
        ) from None
    dtype = dtype_named(name)
    rank = len(tensor.shape)
    if rank > MAX_RANK:
        raise MalformedTensorError(
            f"the shape has {rank} axes, but at most {MAX_RANK} are allowed. "
            "Reshape the array."
        )
    shape = tuple(tensor.shape)
    if shape and not (min(shape) >= 0 and max(shape) <= MAX_AXIS_SIZE):
        raise MalformedTensorError(
            f"the shape {format_shape(shape)} has an axis outside "
            f"0 to {MAX_AXIS_SIZE}. Send the array's own shape."
        )
    expected = math.prod(shape) * dtype.itemsize
    if max(expected, 16 * math.prod(size or 1 for size in shape)) > _MAX_BYTES:
        raise MalformedTensorError(
            f"the shape {format_shape(shape)} is larger than any array can be. "
            "Send the array's own shape."
        )
    if size_bytes != expected:
        raise MalformedTensorError(
            f"shape {format_shape(shape)} of {name} takes {expected} bytes, but data "
            f"has {size_bytes}. Send raw little-endian elements in C order."
        )
    return TensorSpec(dtype, shape)


def decode(tensor: pb.Tensor) -> Array:
    """Decodes a tensor that has its data.

    Args:
        tensor: The message, from anywhere.

    Returns:
        The array, read-only, in native byte order.

    Raises:
        MalformedTensorError: The message does not describe an array.
        ImportError: The tensor is bfloat16, and ml_dtypes is not installed.
    """
    data = tensor.data  # Every access makes a new copy.
    return spec_of(tensor, len(data)).array(data)


def format_shape(shape: tuple[Any, ...]) -> str:
    """Returns a shape as messages show it, such as "[b, 3]"."""
    return f"[{', '.join(map(str, shape))}]"
