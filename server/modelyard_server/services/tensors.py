"""Tensors on the wire to tensors inside, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = [
    "StreamItem",
    "item_spans",
    "parse_request",
    "parse_stream_items",
    "serialize_batch",
    "serialize_response",
    "serialize_stream_result",
    "to_value",
]

_DTYPES: dict[int, DType] = {dtype.number: dtype for dtype in DType}

# Tags of length-delimited fields: (field number << 3) | 2.
_RESPONSE_OUTPUTS = b"\x0a"
_RESPONSE_SERVED = b"\x12"
_TENSOR_RAW = b"\x22"

_BATCH_RESULTS = b"\x0a"
_RESULT_RESPONSE = b"\x0a"
_RESULT_ERROR = b"\x12"

_STREAM_RESULTS = b"\x0a"
_STREAM_ID = b"\x08"
_STREAM_RESPONSE = b"\x12"
_STREAM_ERROR = b"\x1a"

_LENGTH_DELIMITED = 2
_ITEMS_FIELD = 1
_INPUTS_FIELD = 2
_RAW_FIELD = 4
_STREAM_REQUEST_FIELD = 2
_LARGE_BYTES = 32 * 1024
"""Below this, copying is cheaper than looking for what need not be copied."""


def parse_request(body: bytes) -> tuple[pb.PredictRequest, dict[int, bytes]]:
    """Parses a PredictRequest.

    Large `raw` contents are cut out of the message before protobuf sees it, which would copy them
    into the message and once more out of it.

    Returns:
        The request, and by position of the input the raw content that was cut out of it.

    Raises:
        DecodeError: the bytes are no PredictRequest.
    """
    request = pb.PredictRequest()
    if len(body) >= _LARGE_BYTES:
        try:
            rest, contents = _cut_contents(body)
        except (IndexError, ValueError):
            pass  # Protobuf says better what is wrong with it, or knows better that it is right.
        else:
            request.ParseFromString(rest)
            return request, contents
    request.ParseFromString(body)
    return request, {}


def item_spans(body: bytes) -> list[tuple[int, int]]:
    """Where the items of a PredictBatchRequest begin and end in it.

    Each is a PredictRequest for parse_request, which does not copy what need not be copied. The
    items of a PredictStreamRequest stand at the same place.

    Raises:
        DecodeError: the bytes are no such message.
    """
    spans: list[tuple[int, int]] = []
    at = 0
    try:
        while at < len(body):
            field, wire_type, begin, at = _next_field(body, at)
            if field == _ITEMS_FIELD and wire_type == _LENGTH_DELIMITED:
                spans.append((begin, at))
    except (IndexError, ValueError) as error:
        raise DecodeError(str(error)) from None
    return spans


class StreamItem(NamedTuple):
    """An item of a PredictStreamRequest.

    Attributes:
        message: with `id` and `timeout`.
        request: what it asks; its own where it has none.
        contents: see parse_request.
        size_bytes: of it as it came.
    """

    message: pb.PredictStreamItem
    request: pb.PredictRequest
    contents: Mapping[int, bytes]
    size_bytes: int


def parse_stream_items(body: bytes) -> list[StreamItem]:
    """Parses a PredictStreamRequest; large contents are cut out as by parse_request.

    Raises:
        DecodeError: the bytes are no PredictStreamRequest.
    """
    if len(body) < _LARGE_BYTES:
        message = pb.PredictStreamRequest.FromString(body)
        size_bytes = len(body) // max(1, len(message.items))
        return [StreamItem(item, item.request, {}, size_bytes) for item in message.items]
    return [_parse_stream_item(body[begin:end]) for begin, end in item_spans(body)]


def _parse_stream_item(body: bytes) -> StreamItem:
    if len(body) >= _LARGE_BYTES:
        try:
            spans = _request_spans(body)
        except (IndexError, ValueError):
            spans = []  # Protobuf says better what is wrong with it.
        if len(spans) == 1:
            start, begin, end = spans[0]
            # An empty one in its place, so that it is still known to be there.
            item = pb.PredictStreamItem.FromString(body[:start] + b"\x12\x00" + body[end:])
            return StreamItem(item, *parse_request(body[begin:end]), len(body))
    item = pb.PredictStreamItem.FromString(body)
    return StreamItem(item, item.request, {}, len(body))


def _request_spans(body: bytes) -> list[tuple[int, int, int]]:
    """Of each request in an item: where its tag is, its content, and its end."""
    spans: list[tuple[int, int, int]] = []
    at = 0
    while at < len(body):
        start = at
        field, wire_type, begin, at = _next_field(body, at)
        if field == _STREAM_REQUEST_FIELD and wire_type == _LENGTH_DELIMITED:
            spans.append((start, begin, at))
    return spans


def _cut_contents(body: bytes) -> tuple[bytes, dict[int, bytes]]:
    """Splits a request into what is left without large raw contents, and those."""
    parts: list[bytes] = []
    contents: dict[int, bytes] = {}
    kept = at = position = 0
    while at < len(body):
        start = at
        field, wire_type, begin, at = _next_field(body, at)
        if field != _INPUTS_FIELD or wire_type != _LENGTH_DELIMITED:
            continue
        inner = begin
        large: list[tuple[int, int, int]] = []  # Of each: its tag, its content, its end.
        raws = 0
        while inner < at:
            tag = inner
            inner_field, inner_type, content, inner = _next_field(body, inner)
            if inner_field == _RAW_FIELD and inner_type == _LENGTH_DELIMITED:
                raws += 1
                if inner - content >= _LARGE_BYTES:
                    large.append((tag, content, inner))
        if inner != at:
            raise ValueError("a tensor's fields do not end where it ends")
        # Twice the same field means the last one; protobuf may sort that out.
        if large and raws == 1:
            tag, content, end = large[0]
            contents[position] = body[content:end]
            # An empty content in its place, so that which one of the oneof was set is not lost.
            head = body[begin:tag] + _TENSOR_RAW + b"\x00" + body[end:at]
            parts += (body[kept:start], b"\x12", _varint(len(head)), head)
            kept = at
        position += 1
    parts.append(body[kept:])
    return b"".join(parts), contents


def _next_field(body: bytes, at: int) -> tuple[int, int, int, int]:
    """The field at an offset: number, wire type, where its content begins and where it ends.

    Raises:
        IndexError, ValueError: it is cut short, or of a wire type that proto3 does not write.
    """
    tag, at = _read_varint(body, at)
    wire_type = tag & 7
    begin = at
    if wire_type == 0:
        _, end = _read_varint(body, at)
    elif wire_type == 1:
        end = at + 8
    elif wire_type == _LENGTH_DELIMITED:
        length, begin = _read_varint(body, at)
        end = begin + length
    elif wire_type == 5:
        end = at + 4
    else:
        raise ValueError("a wire type of groups")
    if end > len(body):
        raise ValueError("cut short")
    return tag >> 3, wire_type, begin, end


def _read_varint(body: bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits and where it ends."""
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def to_value(message: tensor_pb2.Tensor, raw: bytes | None = None) -> TensorValue:
    """The tensor of a message.

    Args:
        message: as it was parsed.
        raw: its raw content, if that was cut out before.

    Raises:
        TensorError: its type, shape and content disagree.
    """
    dtype = _DTYPES.get(message.data_type)
    if dtype is None:
        raise TensorError(message.name[:64], f"data_type {message.data_type} is unknown")
    data: bytes | tuple[str, ...] | tuple[bytes, ...]
    if dtype.item_size:
        wanted, data = "raw", message.raw if raw is None else raw
    elif dtype is DType.TEXT:
        wanted, data = "text", tuple(message.text.values)
    else:
        wanted, data = "binary", tuple(message.binary.values)
    content = message.WhichOneof("content")
    # An absent content is an empty one: an empty `raw` and none look alike to some generators.
    if content is not None and content != wanted:
        raise TensorError(
            message.name[:64], f"{dtype.value} elements belong in `{wanted}`, not in `{content}`"
        )
    return TensorValue(name=message.name, dtype=dtype, shape=tuple(message.shape), data=data)


def serialize_response(outputs: Sequence[TensorValue], served: pb.Served) -> bytes:
    """A serialized PredictResponse.

    The messages around the tensors' bytes are protobuf's to write; the bytes themselves are put
    between them by one join. Setting them as fields and serializing those copies them twice more,
    which at a megabyte is most of what the call costs.
    """
    parts: list[bytes] = []
    for output in outputs:
        head = tensor_pb2.Tensor(name=output.name, shape=output.shape)
        head.data_type = output.dtype.number  # type: ignore[assignment]  # an enum's value
        data = output.data
        if isinstance(data, bytes):
            start = head.SerializeToString() + _TENSOR_RAW + _varint(len(data))
            parts += (_RESPONSE_OUTPUTS, _varint(len(start) + len(data)), start, data)
            continue
        if output.dtype is DType.TEXT:
            head.text.values.extend(data)  # type: ignore[arg-type]  # TEXT holds str
        else:
            head.binary.values.extend(data)  # type: ignore[arg-type]  # BYTES holds bytes
        whole = head.SerializeToString()
        parts += (_RESPONSE_OUTPUTS, _varint(len(whole)), whole)
    last = served.SerializeToString()
    parts += (_RESPONSE_SERVED, _varint(len(last)), last)
    return b"".join(parts)


def serialize_batch(results: Sequence[bytes | pb.PredictBatchError]) -> bytes:
    """A serialized PredictBatchResponse.

    Args:
        results: of each item its serialized PredictResponse, or its error.
    """
    parts: list[bytes] = []
    for result in results:
        if isinstance(result, bytes):
            head, content = _RESULT_RESPONSE, result
        else:
            head, content = _RESULT_ERROR, result.SerializeToString()
        head += _varint(len(content))
        parts += (_BATCH_RESULTS, _varint(len(head) + len(content)), head, content)
    return b"".join(parts)


def serialize_stream_result(item_id: int, result: bytes | pb.PredictBatchError) -> list[bytes]:
    """A result as it stands in a PredictStreamResponse, in parts to be joined.

    Args:
        item_id: of the item; 64 bits, with sign.
        result: its serialized PredictResponse, or its error.
    """
    if isinstance(result, bytes):
        head, content = _STREAM_RESPONSE, result
    else:
        head, content = _STREAM_ERROR, result.SerializeToString()
    head = _STREAM_ID + _varint(item_id & 0xFFFF_FFFF_FFFF_FFFF) + head + _varint(len(content))
    return [_STREAM_RESULTS + _varint(len(head) + len(content)) + head, content]


def _varint(value: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first."""
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
