"""Whatever can be sent comes back as it was; whatever is read is refused or agrees with itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelyard.tensors import Bfloat16, TensorError, TensorValue, from_tensor, to_tensor
from modelyard.v1.tensor_pb2 import BinaryElements, DataType, Tensor, TextElements

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
# Everything but surrogates, which are no text on their own.
TEXT = st.text(st.characters(codec="utf-8"))


def travelled(value: Any, name: str = "") -> TensorValue:
    """The value after a way over the wire."""
    return from_tensor(Tensor.FromString(to_tensor(value, name).SerializeToString()))


def bits(array: Any) -> bytes:
    return bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())


@given(array=hnp.arrays(DTYPES, SHAPES), name=TEXT, transposed=st.booleans())
def test_numbers_come_back_bit_for_bit(array: Any, name: str, transposed: bool) -> None:
    if transposed:
        array = array.T
    back = travelled(array, name)
    assert isinstance(back, np.ndarray)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    assert bits(back) == bits(array)
    assert back.flags.writeable


@given(array=hnp.arrays(np.uint16, SHAPES))
def test_every_bfloat16_comes_back_and_survives_float32(array: Any) -> None:
    back = travelled(Bfloat16(bits=array))
    assert isinstance(back, Bfloat16)
    np.testing.assert_array_equal(back.bits, array)
    numbers = ~np.isnan(back.to_float32())
    again = Bfloat16.from_float32(back.to_float32())
    np.testing.assert_array_equal(again.bits[numbers], array[numbers])


@given(values=st.lists(TEXT, min_size=1))
def test_text_comes_back(values: list[str]) -> None:
    assert travelled(values) == values


@given(values=st.lists(st.binary(), min_size=1))
def test_byte_strings_come_back(values: list[bytes]) -> None:
    assert travelled(values) == values


@given(
    elements=st.lists(TEXT, min_size=6, max_size=6) | st.lists(st.binary(), min_size=6, max_size=6),
    shape=st.sampled_from([(6, 1), (2, 3), (1, 3, 2)]),
)
def test_arrays_of_text_and_byte_strings_keep_their_shape(
    elements: list[Any], shape: tuple[int, ...]
) -> None:
    array = np.empty(6, dtype=object)
    array[:] = elements
    back = travelled(array.reshape(shape))
    assert isinstance(back, np.ndarray)
    assert back.shape == shape
    assert back.ravel().tolist() == elements


UNADDRESSABLE = [0, 2**31 - 1, 2**31 - 1]
"""No elements, and yet no array can have this shape."""


@st.composite
def any_tensors(draw: st.DrawFn) -> Tensor:
    """Tensors as a broken or hostile peer could send them."""
    data_type: Any = draw(st.sampled_from([*DataType.values(), 16, -1]))
    tensor = Tensor(
        name=draw(TEXT),
        data_type=data_type,
        shape=draw(
            st.lists(st.integers(0, 3) | st.sampled_from([-1, 2**31 - 1, 2**31, 2**62]), max_size=9)
        ),
    )
    match draw(st.sampled_from(["raw", "text", "binary", "none"])):
        case "raw":
            tensor.raw = draw(st.binary(max_size=32))
        case "text":
            tensor.text.CopyFrom(TextElements(values=draw(st.lists(TEXT, max_size=3))))
        case "binary":
            values = draw(st.lists(st.binary(max_size=2), max_size=3))
            tensor.binary.CopyFrom(BinaryElements(values=values))
    return tensor


@given(tensor=any_tensors())
@example(tensor=Tensor(data_type=DataType.DATA_TYPE_INT32, shape=UNADDRESSABLE, raw=b""))
@example(tensor=Tensor(data_type=DataType.DATA_TYPE_TEXT, shape=UNADDRESSABLE))
def test_what_is_read_agrees_with_its_shape_or_is_refused(tensor: Tensor) -> None:
    try:
        value = from_tensor(tensor)
    except TensorError as error:
        assert repr(tensor.name) in str(error)
        return
    shape = (len(value),) if isinstance(value, list) else value.shape
    assert list(shape) == list(tensor.shape)
    content = len(tensor.raw) + len(tensor.text.values) + len(tensor.binary.values)
    assert (math.prod(shape) == 0) == (content == 0)
