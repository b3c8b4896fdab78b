"""The codec: laws over all arrays, and over all malformed bytes."""

import sys

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st

from jacserve import tensors
from jacserve.tensors import MalformedTensorError
from jacserve.v1 import jacobian_pb2 as pb
from jacserve.vocabulary import DTYPES

NUMPY_DTYPES = [name for name in DTYPES if name != "bfloat16"]


def encode(array: npt.ArrayLike) -> pb.Tensor:
    tensor = pb.Tensor()
    tensors.encode_into(tensor, array)
    return tensor


ANY_DTYPE = st.sampled_from(
    [
        np.dtype(name).newbyteorder(order)
        for name in NUMPY_DTYPES
        for order in (">", "<")
    ]
)
ANY_ARRAY = ANY_DTYPE.flatmap(
    lambda dtype: arrays.arrays(
        dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)
    )
)


@given(ANY_ARRAY, st.booleans(), st.data())
def test_any_array_makes_the_round_trip(
    array: np.ndarray, transpose: bool, data: st.DataObject
) -> None:
    view = array.T if transpose else array
    if view.ndim:
        view = view[data.draw(arrays.basic_indices(view.shape, allow_newaxis=True))]
    view = np.asarray(view)
    decoded = tensors.decode(pb.Tensor.FromString(encode(view).SerializeToString()))
    assert decoded.shape == view.shape
    assert decoded.dtype == view.dtype.newbyteorder("=")
    assert decoded.dtype.isnative
    assert decoded.tobytes() == view.astype(decoded.dtype).tobytes()


def test_bfloat16_makes_the_round_trip() -> None:
    x = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    decoded = tensors.decode(encode(x))
    assert decoded.dtype == x.dtype
    assert decoded.tobytes() == x.tobytes()


def test_bfloat16_without_ml_dtypes_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = encode(np.array([1.5], ml_dtypes.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    tensors.dtype_named.cache_clear()
    with pytest.raises(ImportError, match="Install ml_dtypes"):
        tensors.decode(tensor)


def test_the_wire_is_little_endian_and_in_c_order() -> None:
    x = np.array([[1, 2], [3, 4]], ">i2", order="F")
    assert encode(x).data == b"\x01\x00\x02\x00\x03\x00\x04\x00"


@settings(max_examples=500)
@given(
    st.builds(
        pb.Tensor,
        dtype=st.integers(0, 20),
        shape=st.lists(
            st.one_of(st.integers(0, 4), st.integers(-(2**63), 2**63 - 1)), max_size=40
        ),
        data=st.binary(max_size=64),
    )
)
def test_any_message_is_an_array_or_malformed(tensor: pb.Tensor) -> None:
    try:
        array = tensors.decode(tensor)
    except MalformedTensorError:
        return
    assert array.shape == tuple(tensor.shape)
    assert array.nbytes == len(tensor.data)


@pytest.mark.parametrize(
    "bad", [np.array(["a"]), np.array([None]), np.array(["2020"], "M8")]
)
def test_a_dtype_outside_the_contract_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(TypeError, match="can't be sent"):
        encode(bad)
