from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.runtimes.conversion import DTYPES, to_torch, to_value
from modelyard_server.runtimes.tensors import (
    MAX_DIMENSION,
    MAX_RANK,
    DType,
    TensorError,
    TensorValue,
    element_count,
)

DIMENSIONS = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, 4194305, 211106198978564]),
    st.integers(),
)
SHAPES = st.lists(DIMENSIONS, max_size=MAX_RANK + 2).map(tuple)
CONTENTS: st.SearchStrategy[Any] = st.one_of(
    st.binary(max_size=64),
    st.lists(st.text(max_size=3), max_size=6).map(tuple),
    st.lists(st.binary(max_size=3), max_size=6).map(tuple),
)


def is_valid(dtype: DType, shape: tuple[int, ...], data: Any) -> bool:
    """The contract once more, in exact integers."""
    if len(shape) > MAX_RANK or not all(0 <= size <= MAX_DIMENSION for size in shape):
        return False
    if math.prod(size for size in shape if size) >= 2**63:
        return False
    count = math.prod(shape)
    if dtype.item_size == 0:
        return not isinstance(data, bytes) and len(data) == count
    if not isinstance(data, bytes) or len(data) != count * dtype.item_size:
        return False
    return dtype is not DType.BOOL or set(data) <= {0, 1}


@given(st.sampled_from(DType), SHAPES, CONTENTS)
def test_a_value_is_valid_or_a_tensor_error(
    dtype: DType, shape: tuple[int, ...], data: Any
) -> None:
    try:
        value = TensorValue(name="x", dtype=dtype, shape=shape, data=data)
    except TensorError as error:
        assert not is_valid(dtype, shape, data)
        assert error.tensor == "x"
        assert len(error.text) < 512
    else:
        assert is_valid(dtype, shape, data)
        assert value.data is data


@given(SHAPES)
def test_a_count_is_exact_or_a_tensor_error(shape: tuple[int, ...]) -> None:
    try:
        count = element_count("x", shape)
    except TensorError:
        pass
    else:
        assert count == math.prod(shape)
        assert 0 <= count < 2**63


FITTING = st.tuples(
    st.sampled_from(sorted(DTYPES, key=lambda dtype: dtype.value)),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.randoms(use_true_random=False),
)


@given(FITTING)
def test_every_fixed_size_value_survives_torch_bit_by_bit(
    drawn: tuple[DType, tuple[int, ...], Any],
) -> None:
    dtype, shape, random = drawn
    data = random.randbytes(math.prod(shape) * dtype.item_size)
    if dtype is DType.BOOL:
        data = bytes(byte & 1 for byte in data)
    value = TensorValue(name="x", dtype=dtype, shape=shape, data=data)
    tensor = to_torch(value)
    assert tensor.dtype == DTYPES[dtype]
    assert tuple(tensor.shape) == shape
    assert to_value("x", tensor) == value
    if tensor.dim() > 1:
        # Also when torch's strides are not ours.
        turned = to_value("x", tensor.transpose(0, 1))
        assert turned.shape == (shape[1], shape[0], *shape[2:])
        again = to_torch(turned).transpose(0, 1).contiguous()
        assert to_value("x", again) == value


def test_the_way_in_copies_nothing() -> None:
    data = bytes(range(64))
    first = to_torch(TensorValue(name="", dtype=DType.BFLOAT16, shape=(32,), data=data))
    second = to_torch(TensorValue(name="", dtype=DType.UINT8, shape=(8, 8), data=data))
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second.view(-1), torch.arange(64, dtype=torch.uint8))
