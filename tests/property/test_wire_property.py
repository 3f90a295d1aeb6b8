"""Messages that are cut and joined by hand say what protobuf says of them."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.services.tensors import (
    parse_request,
    parse_stream_items,
    serialize_response,
    serialize_stream_result,
    to_value,
)

LARGE = 40_000


def tensors() -> st.SearchStrategy[tensor_pb2.Tensor]:
    raw = st.builds(
        lambda name, size: tensor_pb2.Tensor(
            name=name, data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[size], raw=b"\x12" * size
        ),
        st.text(max_size=5),
        st.sampled_from([0, 1, 100, LARGE, 3 * LARGE]),
    )
    text = st.builds(
        lambda values: tensor_pb2.Tensor(
            data_type=tensor_pb2.DATA_TYPE_TEXT,
            shape=[len(values)],
            text=tensor_pb2.TextElements(values=values),
        ),
        st.lists(st.text(max_size=LARGE // 2), max_size=3),
    )
    return st.one_of(raw, text)


@given(key=st.text(max_size=10), inputs=st.lists(tensors(), max_size=4))
def test_a_request_parses_as_protobuf_parses_it(key: str, inputs: list[tensor_pb2.Tensor]) -> None:
    request = pb.PredictRequest(key=key, inputs=inputs)
    if inputs:
        request.parameters.update({"top_k": 3})
    parsed, contents = parse_request(request.SerializeToString())
    assert parsed.key == key
    assert parsed.parameters == request.parameters
    assert [to_value(m, contents.get(i)) for i, m in enumerate(parsed.inputs)] == [
        to_value(m) for m in inputs
    ]
    large = {i for i, m in enumerate(inputs) if len(m.raw) >= LARGE}
    assert contents.keys() == large


@given(noise=st.binary(max_size=60), at=st.integers(0, 2 * LARGE), cut=st.booleans())
@example(noise=b"", at=7, cut=True)
@example(noise=b"\xff" * 12, at=3, cut=False)
def test_a_damaged_request_is_refused_or_read_as_protobuf_reads_it(
    noise: bytes, at: int, cut: bool
) -> None:
    whole = pb.PredictRequest(
        key="k",
        inputs=[
            tensor_pb2.Tensor(
                data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[LARGE], raw=b"\x01" * LARGE
            )
        ],
    ).SerializeToString()
    at %= len(whole)
    body = whole[:at] if cut else whole[:at] + noise + whole[at + len(noise) :]
    expected: pb.PredictRequest | None = pb.PredictRequest()
    try:
        assert expected is not None
        expected.ParseFromString(body)
    except DecodeError:
        expected = None
    try:
        parsed, contents = parse_request(body)
    except DecodeError:
        assert expected is None
        return
    assert expected is not None
    for i, raw in contents.items():
        parsed.inputs[i].raw = raw
    assert parsed == expected


@given(outputs=st.lists(tensors(), max_size=4), model=st.text(max_size=300))
def test_a_response_is_what_protobuf_would_have_written(
    outputs: list[tensor_pb2.Tensor], model: str
) -> None:
    values = [to_value(output) for output in outputs]
    served = pb.Served(model=model, cold=True)
    parsed = pb.PredictResponse.FromString(serialize_response(values, served))
    assert parsed.served == served
    assert [to_value(output) for output in parsed.outputs] == values


@st.composite
def stream_items(draw: st.DrawFn) -> pb.PredictStreamItem:
    item = pb.PredictStreamItem(id=draw(st.integers(-(2**63), 2**63 - 1)))
    if draw(st.booleans()):
        item.timeout.seconds = draw(st.integers(-1, 10**6))
    if draw(st.booleans()):
        inputs = draw(st.lists(tensors(), max_size=3))
        item.request.CopyFrom(pb.PredictRequest(key=draw(st.text(max_size=5)), inputs=inputs))
    return item


@given(items=st.lists(stream_items(), max_size=5), twice=st.booleans(), noise=st.binary(max_size=9))
def test_items_of_a_stream_parse_as_protobuf_parses_them(
    items: list[pb.PredictStreamItem], twice: bool, noise: bytes
) -> None:
    body = pb.PredictStreamRequest(items=items).SerializeToString()
    if twice and items:
        # An item whose request stands in it in two parts, which protobuf puts together.
        whole = items[0].SerializeToString()
        more = pb.PredictStreamItem(request=pb.PredictRequest(version="v")).SerializeToString()
        body += b"\x0a" + bytes(_length(len(whole) + len(more))) + whole + more
    body += noise
    expected: pb.PredictStreamRequest | None
    try:
        expected = pb.PredictStreamRequest.FromString(body)
    except DecodeError:
        expected = None
    try:
        found = parse_stream_items(body)
    except DecodeError:
        assert expected is None
        return
    assert expected is not None
    assert len(found) == len(expected.items)
    for item, wanted in zip(found, expected.items, strict=True):
        request = pb.PredictRequest()
        request.CopyFrom(item.request)
        for i, raw in item.contents.items():
            request.inputs[i].raw = raw
        assert request == wanted.request
        assert item.message.HasField("request") == wanted.HasField("request")
        assert (item.message.id, item.message.timeout) == (wanted.id, wanted.timeout)


def _length(size: int) -> list[int]:
    """A length as protobuf writes it."""
    encoded = []
    while size >= 0x80:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    return [*encoded, size]


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(max_size=200), st.booleans())))
def test_results_of_a_stream_are_what_protobuf_would_have_written(
    results: list[tuple[int, str, bool]],
) -> None:
    wanted = pb.PredictStreamResponse()
    parts: list[bytes] = []
    for item_id, text, is_error in results:
        result = wanted.results.add(id=item_id)
        if is_error:
            error = pb.PredictBatchError(message=text)
            result.error.CopyFrom(error)
            parts += serialize_stream_result(item_id, error)
        else:
            served = pb.Served(model=text)
            result.response.served.CopyFrom(served)
            parts += serialize_stream_result(item_id, serialize_response([], served))
    assert pb.PredictStreamResponse.FromString(b"".join(parts)) == wanted


def test_byte_strings_travel_too() -> None:
    value = TensorValue(name="b", dtype=DType.BYTES, shape=(2,), data=(b"\x00", b"yes"))
    parsed = pb.PredictResponse.FromString(serialize_response([value], pb.Served()))
    assert to_value(parsed.outputs[0]) == value
