"""Tensors between the wire and the server: every type both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from modelyard.v1 import inference_service_pb2
from modelyard.v1 import tensor_pb2 as pb
from modelyard_server.runtimes.tensors import MAX_DIMENSION, DType, TensorError, TensorValue
from modelyard_server.services.tensors import (
    item_spans,
    parse_request,
    serialize_batch,
    serialize_response,
    to_value,
)

FIXED = [dtype for dtype in DType if dtype.item_size]


def number_of(dtype: DType) -> int:
    """By its name, not by what the server believes."""
    return int(pb.DataType.Value(f"DATA_TYPE_{dtype.value}"))


def message_of(data_type: int, shape: list[int], name: str = "x", **content: Any) -> pb.Tensor:
    message = pb.Tensor(name=name, shape=shape, **content)
    message.data_type = data_type  # type: ignore[assignment]  # an int is an enum value
    return pb.Tensor.FromString(message.SerializeToString())


def answered(*values: TensorValue) -> inference_service_pb2.PredictResponse:
    """The answer as protobuf reads it."""
    served = inference_service_pb2.Served(model="models/m", device="devices/cpu", cold=True)
    body = serialize_response(values, served)
    response = inference_service_pb2.PredictResponse.FromString(body)
    assert response.served == served
    # Nothing that protobuf would not have written itself.
    assert response.SerializeToString() == body or any(not v.data for v in values)
    return response


def travelled(value: TensorValue) -> TensorValue:
    (message,) = answered(value).outputs
    return to_value(message)


def refused(message: pb.Tensor) -> str:
    with pytest.raises(TensorError) as caught:
        to_value(message)
    return caught.value.text


def test_every_type_of_the_contract_is_known_and_the_other_way_round() -> None:
    in_proto = {name.removeprefix("DATA_TYPE_") for name in pb.DataType.keys()}  # noqa: SIM118
    assert in_proto - {"UNSPECIFIED"} == {dtype.value for dtype in DType}
    assert [dtype.number for dtype in DType] == [number_of(dtype) for dtype in DType]


def test_several_outputs_keep_their_order_and_lengths_of_every_width() -> None:
    values = [
        TensorValue(name=f"t{n}", dtype=DType.UINT8, shape=(n,), data=bytes(n))
        for n in (0, 1, 127, 128, 16_383, 16_384, 2_097_152)
    ]
    values.append(TensorValue(name="n" * 300, dtype=DType.TEXT, shape=(2,), data=("é", "")))
    values.append(TensorValue(name="", dtype=DType.BYTES, shape=(), data=(b"\xff",)))
    assert [to_value(message) for message in answered(*values).outputs] == values


def test_an_answer_may_have_no_outputs() -> None:
    assert not answered().outputs


@pytest.mark.parametrize("dtype", FIXED)
def test_elements_of_fixed_size_come_back_byte_for_byte(dtype: DType) -> None:
    data = bytes([0, 1] * 3 * dtype.item_size)
    value = TensorValue(name="x", dtype=dtype, shape=(2, 3), data=data[: 6 * dtype.item_size])
    (message,) = answered(value).outputs
    assert message.data_type == number_of(dtype)
    assert message.WhichOneof("content") == "raw"
    assert travelled(value) == value


@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_texts_come_back(texts: list[str]) -> None:
    value = TensorValue(name="x", dtype=DType.TEXT, shape=(len(texts),), data=tuple(texts))
    assert travelled(value) == value


@given(blobs=st.lists(st.binary(), max_size=5))
def test_byte_strings_come_back(blobs: list[bytes]) -> None:
    value = TensorValue(name="x", dtype=DType.BYTES, shape=(len(blobs),), data=tuple(blobs))
    assert travelled(value) == value


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_a_tensor_without_elements_comes_back(dtype: DType, shape: tuple[int, ...]) -> None:
    value = TensorValue(name="", dtype=dtype, shape=shape, data=b"" if dtype.item_size else ())
    assert travelled(value) == value
    # Some generators leave an empty content out.
    assert to_value(message_of(number_of(dtype), list(shape), name="")) == value


def test_an_empty_shape_is_one_element() -> None:
    assert to_value(message_of(pb.DATA_TYPE_UINT8, [], raw=b"a")).shape == ()
    assert "needs 1 bytes" in refused(message_of(pb.DATA_TYPE_UINT8, [], raw=b""))
    assert "needs 1 elements" in refused(message_of(pb.DATA_TYPE_TEXT, []))


@pytest.mark.parametrize("dtype", list(DType))
def test_elements_in_the_wrong_place_are_refused(dtype: DType) -> None:
    right = {DType.TEXT: "text", DType.BYTES: "binary"}.get(dtype, "raw")
    contents: dict[str, Any] = {
        "raw": b"",
        "text": pb.TextElements(values=[]),
        "binary": pb.BinaryElements(values=[]),
    }
    for place, content in contents.items():
        message = message_of(number_of(dtype), [0], **{place: content})
        if place == right:
            assert to_value(message).shape == (0,)
        else:
            text = refused(message)
            assert f"`{right}`" in text
            assert f"`{place}`" in text
            assert dtype.value in text


@pytest.mark.parametrize("data_type", [0, 16, 999, -1, 2**31 - 1])
def test_a_type_that_is_none_is_refused(data_type: int) -> None:
    assert refused(message_of(data_type, [0])) == f"data_type {data_type} is unknown"


@pytest.mark.parametrize("dtype", FIXED)
@pytest.mark.parametrize("difference", [-1, 1])
def test_content_of_another_length_than_the_shape_is_refused(dtype: DType, difference: int) -> None:
    raw = bytes(4 * dtype.item_size + difference)
    assert f"needs {4 * dtype.item_size} bytes" in refused(
        message_of(number_of(dtype), [2, 2], raw=raw)
    )


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_elements_than_the_shape_is_refused(count: int) -> None:
    text = message_of(pb.DATA_TYPE_TEXT, [2], text=pb.TextElements(values=["a"] * count))
    assert f"needs 2 elements; {count} were given" in refused(text)
    binary = message_of(pb.DATA_TYPE_BYTES, [2], binary=pb.BinaryElements(values=[b"a"] * count))
    assert f"needs 2 elements; {count} were given" in refused(binary)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([-1], "dimension -1"),
        ([-1, -1], "dimension -1"),
        ([MAX_DIMENSION + 1], "dimension 2147483648"),
        ([2**63 - 1], "dimension"),
        ([MAX_DIMENSION] * 3, "63 bits"),
        ([MAX_DIMENSION] * 3 + [0], "63 bits"),
        ([0] + [MAX_DIMENSION] * 3, "63 bits"),
        ([2**31 - 1, 2**31 - 1, 4], "63 bits"),
        ([1] * 9, "9 dimensions; at most 8"),
        ([0] * 100_000, "100000 dimensions"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_shapes_that_overflow_or_lie_are_refused(shape: list[int], text: str) -> None:
    assert text in refused(message_of(pb.DATA_TYPE_UINT8, shape, raw=b""))
    assert text in refused(message_of(pb.DATA_TYPE_TEXT, shape))


def test_the_largest_shapes_without_elements_are_fine() -> None:
    shape = [MAX_DIMENSION, MAX_DIMENSION, 0]
    assert to_value(message_of(pb.DATA_TYPE_FLOAT64, shape, raw=b"")).shape == tuple(shape)


@pytest.mark.parametrize("byte", [2, 127, 255])
def test_a_bool_byte_is_zero_or_one(byte: int) -> None:
    text = refused(message_of(pb.DATA_TYPE_BOOL, [3], raw=bytes([0, byte, 1])))
    assert "neither 0 nor 1" in text


def test_a_long_name_does_not_make_a_long_error() -> None:
    for message in (
        message_of(0, [], name="n" * 10_000),
        message_of(pb.DATA_TYPE_UINT8, [1], name="n" * 10_000, raw=b""),
        message_of(pb.DATA_TYPE_UINT8, [1], name="n" * 10_000, text=pb.TextElements()),
    ):
        assert len(refused(message)) < 200


@given(
    data_type=st.integers(-1, 20),
    shape=st.lists(st.integers(-2, 2**33) | st.integers(0, 3), max_size=9),
    content=st.sampled_from(["raw", "text", "binary", None]),
    raw=st.binary(max_size=16),
    count=st.integers(0, 4),
)
def test_whatever_comes_is_refused_or_agrees_with_itself(
    data_type: int, shape: list[int], content: str | None, raw: bytes, count: int
) -> None:
    contents: dict[str, Any] = {
        "raw": raw,
        "text": pb.TextElements(values=["a"] * count),
        "binary": pb.BinaryElements(values=[b"a"] * count),
    }
    message = message_of(data_type, shape, **({content: contents[content]} if content else {}))
    try:
        value = to_value(message)
    except TensorError:
        return
    assert travelled(value) == value


class TestBatches:
    def test_items_are_found_among_fields_of_newer_clients(self) -> None:
        items = [inference_service_pb2.PredictRequest(key=key) for key in ("a", "", "c" * 300)]
        body = b"\x12\x01x"
        for item in items:
            body += (
                inference_service_pb2.PredictBatchRequest(items=[item]).SerializeToString()
                + b"\x18\x05"
            )
        found = [parse_request(body[begin:end]) for begin, end in item_spans(body)]
        assert found == [(item, {}) for item in items]
        assert list(inference_service_pb2.PredictBatchRequest.FromString(body).items) == items

    @pytest.mark.parametrize("body", [b"\x0a", b"\x0a\x05ab", b"\x0a" + b"\xff" * 11, b"\x0b"])
    def test_what_is_cut_short_is_no_batch(self, body: bytes) -> None:
        with pytest.raises(DecodeError):
            item_spans(body)

    def test_results_are_what_protobuf_would_write(self) -> None:
        value = TensorValue(name="y", dtype=DType.UINT8, shape=(200,), data=b"b" * 200)
        reply = serialize_response([value], inference_service_pb2.Served(model="models/m"))
        error = inference_service_pb2.PredictBatchError(code=5, message="no")
        body = serialize_batch([reply, error, reply, b""])
        wanted = inference_service_pb2.PredictBatchResponse(
            results=[
                inference_service_pb2.PredictBatchResult(
                    response=inference_service_pb2.PredictResponse.FromString(reply)
                ),
                inference_service_pb2.PredictBatchResult(error=error),
                inference_service_pb2.PredictBatchResult(
                    response=inference_service_pb2.PredictResponse.FromString(reply)
                ),
                inference_service_pb2.PredictBatchResult(
                    response=inference_service_pb2.PredictResponse()
                ),
            ]
        )
        assert inference_service_pb2.PredictBatchResponse.FromString(body) == wanted
        assert serialize_batch([]) == b""
