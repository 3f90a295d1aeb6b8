"""Tensors on the wire to tensors inside, and back."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["serialize_response", "to_value"]

_DTYPES: dict[int, DType] = {dtype.number: dtype for dtype in DType}

# Tags of length-delimited fields: (field number << 3) | 2.
_RESPONSE_OUTPUTS = b"\x0a"
_RESPONSE_SERVED = b"\x12"
_TENSOR_RAW = b"\x22"


def to_value(message: tensor_pb2.Tensor) -> TensorValue:
    """The tensor of a message.

    Raises:
        TensorError: its type, shape and content disagree.
    """
    dtype = _DTYPES.get(message.data_type)
    if dtype is None:
        raise TensorError(message.name[:64], f"data_type {message.data_type} is unknown")
    data: bytes | tuple[str, ...] | tuple[bytes, ...]
    if dtype.item_size:
        wanted, data = "raw", message.raw
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
