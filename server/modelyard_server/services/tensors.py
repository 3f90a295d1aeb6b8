"""Tensors on the wire to tensors inside, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelyard.v1 import tensor_pb2
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["to_message", "to_value"]

_DTYPES: dict[int, DType] = {
    tensor_pb2.DATA_TYPE_BOOL: DType.BOOL,
    tensor_pb2.DATA_TYPE_INT8: DType.INT8,
    tensor_pb2.DATA_TYPE_INT16: DType.INT16,
    tensor_pb2.DATA_TYPE_INT32: DType.INT32,
    tensor_pb2.DATA_TYPE_INT64: DType.INT64,
    tensor_pb2.DATA_TYPE_UINT8: DType.UINT8,
    tensor_pb2.DATA_TYPE_UINT16: DType.UINT16,
    tensor_pb2.DATA_TYPE_UINT32: DType.UINT32,
    tensor_pb2.DATA_TYPE_UINT64: DType.UINT64,
    tensor_pb2.DATA_TYPE_FLOAT16: DType.FLOAT16,
    tensor_pb2.DATA_TYPE_BFLOAT16: DType.BFLOAT16,
    tensor_pb2.DATA_TYPE_FLOAT32: DType.FLOAT32,
    tensor_pb2.DATA_TYPE_FLOAT64: DType.FLOAT64,
    tensor_pb2.DATA_TYPE_TEXT: DType.TEXT,
    tensor_pb2.DATA_TYPE_BYTES: DType.BYTES,
}
_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_CONTENT = {DType.TEXT: "text", DType.BYTES: "binary"}


def to_value(message: tensor_pb2.Tensor) -> TensorValue:
    """The tensor of a message.

    Raises:
        TensorError: its type, shape and content disagree.
    """
    dtype = _DTYPES.get(message.data_type)
    if dtype is None:
        raise TensorError(message.name[:64], f"data_type {message.data_type} is unknown")
    content = message.WhichOneof("content")
    wanted = _CONTENT.get(dtype, "raw")
    # An absent content is an empty one: an empty `raw` and none look alike to some generators.
    if content is not None and content != wanted:
        raise TensorError(
            message.name[:64], f"{dtype.value} elements belong in `{wanted}`, not in `{content}`"
        )
    data: bytes | tuple[str, ...] | tuple[bytes, ...]
    match dtype:
        case DType.TEXT:
            data = tuple(message.text.values)
        case DType.BYTES:
            data = tuple(message.binary.values)
        case _:
            data = message.raw
    return TensorValue(name=message.name, dtype=dtype, shape=tuple(message.shape), data=data)


def to_message(value: TensorValue, message: tensor_pb2.Tensor) -> None:
    """Writes a tensor into an empty message."""
    message.name = value.name
    message.data_type = _TYPES[value.dtype]  # type: ignore[assignment]  # an int is an enum value
    message.shape.extend(value.shape)
    if isinstance(value.data, bytes):
        message.raw = value.data
    elif value.dtype is DType.TEXT:
        message.text.values.extend(_strings(value.data))
    else:
        message.binary.values.extend(_byte_strings(value.data))


def _strings(data: Sequence[str] | Sequence[bytes]) -> Iterable[str]:
    return (element for element in data if isinstance(element, str))


def _byte_strings(data: Sequence[str] | Sequence[bytes]) -> Iterable[bytes]:
    return (element for element in data if isinstance(element, bytes))
