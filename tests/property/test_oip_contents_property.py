"""Elements of the protocol's tensors: what holds for whatever comes over the wire."""

from __future__ import annotations

import math
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from modelyard_server.errors import Code, Refusal
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.services.oip.contents import as_text, from_raw, from_typed, raw_of, to_typed
from modelyard_server.services.oip.datatypes import DATATYPES, datatype_of
from modelyard_server.services.oip.messages import message
from modelyard_server.services.oip.requests import parse, read_request

SHAPES = st.lists(st.integers(0, 4), max_size=4)
NAMES = st.text(max_size=5)


@st.composite
def tensors(draw: st.DrawFn) -> TensorValue:
    """Any tensor that can be inside."""
    dtype = draw(st.sampled_from(list(DType)))
    shape = draw(SHAPES)
    count = math.prod(shape)
    data: Any
    if dtype is DType.TEXT:
        data = tuple(draw(st.lists(st.text(max_size=4), min_size=count, max_size=count)))
    elif dtype is DType.BYTES:
        data = tuple(draw(st.lists(st.binary(max_size=4), min_size=count, max_size=count)))
    elif dtype is DType.BOOL:
        data = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    else:
        size = count * dtype.item_size
        data = draw(st.binary(min_size=size, max_size=size))
    return TensorValue(name=draw(NAMES), dtype=dtype, shape=tuple(shape), data=data)


@given(tensors())
def test_raw_elements_come_back_as_they_went(value: TensorValue) -> None:
    name = datatype_of(value.dtype).name
    back = from_raw(value.name, name, value.shape, raw_of(value))
    assert (as_text(back) if value.dtype is DType.TEXT else back) == value


@given(tensors())
def test_typed_elements_come_back_as_they_went(value: TensorValue) -> None:
    known = datatype_of(value.dtype)
    contents = message("InferTensorContents")()
    if not to_typed(value, contents):
        assert known.field == ""
        return
    # Over the wire, where a float has 32 bits again.
    contents = message("InferTensorContents").FromString(contents.SerializeToString())
    back = from_typed(value.name, known.name, value.shape, contents)
    if value.dtype is DType.TEXT:
        back = as_text(back)
    if value.dtype in (DType.FLOAT32, DType.FLOAT64):
        # A NaN stays one; which one is the machine's affair.
        assert _numbers(back) == _numbers(value)
    else:
        assert back == value


def _numbers(value: TensorValue) -> list[str]:
    assert isinstance(value.data, bytes)
    code = "f" if value.dtype is DType.FLOAT32 else "d"
    return [repr(number) for (number,) in struct.iter_unpack(f"<{code}", value.data)]


@given(
    datatype=st.sampled_from([*DATATYPES, "", "FP8"]) | st.text(max_size=8),
    shape=st.lists(st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1), max_size=10),
    raw=st.binary(max_size=64),
)
def test_whatever_comes_raw_is_a_tensor_or_an_error_that_says_so(
    datatype: str, shape: list[int], raw: bytes
) -> None:
    try:
        value = from_raw("x", datatype, shape, raw)
    except TensorError as error:
        assert error.text
    else:
        assert raw_of(value) == raw
        if value.dtype is DType.BYTES:
            assert len(value.data) == math.prod(shape)


PARAMETERS = st.dictionaries(
    st.sampled_from(["timeout", "priority", "sequence_id", "triton_x", "modelyard_affinity", "k"])
    | st.text(max_size=4),
    st.one_of(
        st.builds(lambda v: {"bool_param": v}, st.booleans()),
        st.builds(lambda v: {"int64_param": v}, st.integers(-(2**63), 2**63 - 1)),
        st.builds(lambda v: {"uint64_param": v}, st.integers(0, 2**64 - 1)),
        st.builds(lambda v: {"string_param": v}, st.text(max_size=4)),
        st.builds(lambda v: {"double_param": v}, st.floats()),
        st.just({}),
    ),
    max_size=3,
)

CONTENTS = st.one_of(
    st.none(),
    st.builds(lambda v: {"int_contents": v}, st.lists(st.integers(-(2**31), 2**31 - 1))),
    st.builds(lambda v: {"uint_contents": v}, st.lists(st.integers(0, 2**32 - 1))),
    st.builds(lambda v: {"fp32_contents": v}, st.lists(st.floats(width=32))),
    st.builds(lambda v: {"bytes_contents": v}, st.lists(st.binary(max_size=3))),
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A message that a client could send, though none would."""
    request = pb.ModelInferRequest(model_name=draw(NAMES), model_version=draw(NAMES))
    for _ in range(draw(st.integers(0, 3))):
        contents = draw(CONTENTS)
        request.inputs.add(
            name=draw(st.sampled_from(["", "a", "b"])),
            datatype=draw(st.sampled_from([*DATATYPES, "FP8"])),
            shape=draw(st.lists(st.integers(-1, 3), max_size=3)),
            contents=None if contents is None else pb.InferTensorContents(**contents),
        )
    for name, value in draw(PARAMETERS).items():
        request.parameters[name].CopyFrom(pb.InferParameter(**value))
    request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=16), max_size=3)))
    serialized: bytes = request.SerializeToString()
    return serialized


@given(requests() | st.binary(max_size=64))
def test_whatever_is_asked_is_read_or_an_invalid_argument(body: bytes) -> None:
    try:
        asked = read_request(parse(body))
    except Refusal as refusal:
        assert refusal.code is Code.INVALID_ARGUMENT
        assert refusal.violations and refusal.text
    else:
        assert asked.inputs
        assert len({value.name for value in asked.inputs}) == len(asked.inputs)
        assert asked.timeout_s is None or asked.timeout_s > 0
