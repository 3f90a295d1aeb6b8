"""Tensors and errors as bytes and JSON, and back.

What comes back is checked in full: it was written by the process in which models run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from modelyard_server.execution.engine import ModelFailed
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.segments import Segment, SegmentPool, SegmentTable
from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, OptionError
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = [
    "INLINE_BYTES",
    "PackedTensors",
    "RemoteError",
    "decode_error",
    "decode_tensors",
    "encode_error",
    "encode_tensors",
    "understand",
]

T = TypeVar("T")

INLINE_BYTES = 2**16
"""Largest tensor that goes through the socket; larger ones go through a segment."""

_ALIGNMENT = 64
_DTYPES = {dtype.number: dtype for dtype in DType}
_LENGTH = struct.Struct("<I")


class RemoteError(Exception):
    """An error of a type that only the worker knows. Its class is named like that type.

    Attributes:
        log_text: the full story with the traceback, for the server's log and for nobody else.
    """

    def __init__(self, log_text: str) -> None:
        super().__init__(log_text)
        self.log_text = log_text


def understand(read: Callable[[], T]) -> T:
    """Reads something out of a message.

    Raises:
        MalformedMessage: it cannot be read.
    """
    try:
        return read()
    except MalformedMessage:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise MalformedMessage(f"{type(error).__name__}: {error}") from None


# --- Tensors --------------------------------------------------------------------------------------


class PackedTensors:
    """Tensors that are ready to be sent.

    Attributes:
        described: what goes into the header, a list for each tensor: name, number of its type,
            shape, number of the segment or 0 for the body, where it begins there, bytes.
        body: what goes into the body, in order.
        body_bytes: size of that.
        segment: where the large ones lie; None if there are none.
    """

    __slots__ = ("body", "body_bytes", "described", "segment")

    def __init__(self) -> None:
        self.described: list[list[Any]] = []
        self.body: list[bytes] = []
        self.body_bytes = 0
        self.segment: Segment | None = None


def encode_tensors(tensors: Sequence[TensorValue], pool: SegmentPool) -> PackedTensors:
    """Makes tensors ready to be sent: copies the large ones into a segment, if there is room."""
    packed = PackedTensors()
    contents = [
        tensor.data if isinstance(tensor.data, bytes) else _join(tensor.data) for tensor in tensors
    ]
    large_bytes = sum(_aligned(len(data)) for data in contents if len(data) > INLINE_BYTES)
    if large_bytes:
        packed.segment = pool.take(large_bytes)
    filled = 0
    for tensor, data in zip(tensors, contents, strict=True):
        size = len(data)
        if packed.segment is not None and size > INLINE_BYTES:
            number, begin = packed.segment.number, filled
            packed.segment.map[begin : begin + size] = data
            filled += _aligned(size)
        else:
            number, begin = 0, packed.body_bytes
            packed.body.append(data)
            packed.body_bytes += size
        packed.described.append(
            [tensor.name, tensor.dtype.number, list(tensor.shape), number, begin, size]
        )
    return packed


def decode_tensors(
    described: object, body: memoryview, segments: SegmentTable
) -> tuple[TensorValue, ...]:
    """The tensors that were sent.

    Args:
        described: as in PackedTensors.
        body: of the frame.
        segments: of the side that sent them.

    Raises:
        MalformedMessage: they are no tensors.
    """
    if not isinstance(described, list):
        raise MalformedMessage("the tensors are no list")
    return tuple([_decode_tensor(item, body, segments) for item in described])


def _decode_tensor(item: Any, body: memoryview, segments: SegmentTable) -> TensorValue:
    try:
        name, dtype_number, shape, segment, begin, size = item
        dtype = _DTYPES[dtype_number]
    except (LookupError, TypeError, ValueError):
        raise MalformedMessage("a tensor is not described as it should be") from None
    if (
        type(name) is not str
        or type(shape) is not list
        or type(segment) is not int
        or type(begin) is not int
        or type(size) is not int
        or not all(type(dimension) is int for dimension in shape)
    ):
        raise MalformedMessage("a tensor is not described as it should be")
    if segment:
        data = segments.read(segment, begin, size)
    elif begin < 0 or size < 0 or begin > len(body) - size:
        raise MalformedMessage(f"{size} bytes at {begin} are not in the body")
    else:
        data = bytes(body[begin : begin + size])
    try:
        content = data if dtype.item_size else _split(dtype, data)
        return TensorValue(name=name, dtype=dtype, shape=tuple(shape), data=content)
    except ValueError as error:  # TensorError and UnicodeDecodeError are among them.
        raise MalformedMessage(str(error)) from None


def _join(values: tuple[str, ...] | tuple[bytes, ...]) -> bytes:
    """Elements of varying length: the number of them, their lengths, and then all of them."""
    elements = [
        value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        for value in values
    ]
    lengths = struct.pack(f"<{len(elements)}I", *map(len, elements))
    return b"".join((_LENGTH.pack(len(elements)), lengths, *elements))


def _split(dtype: DType, data: bytes) -> tuple[str, ...] | tuple[bytes, ...]:
    if len(data) < _LENGTH.size:
        raise MalformedMessage("elements without their number")
    (count,) = _LENGTH.unpack_from(data)
    begin = _LENGTH.size * (1 + count)
    if begin > len(data):
        raise MalformedMessage(f"{count} elements without their lengths")
    elements: list[bytes] = []
    for length in struct.unpack_from(f"<{count}I", data, _LENGTH.size):
        elements.append(data[begin : begin + length])
        begin += length
    if begin != len(data):
        raise MalformedMessage("elements are not as long as they are said to be")
    if dtype is DType.TEXT:
        return tuple([element.decode("utf-8", "surrogatepass") for element in elements])
    return tuple(elements)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# --- Errors ---------------------------------------------------------------------------------------


def encode_error(error: BaseException, log_text: str) -> list[Any]:
    """An error as values of JSON.

    Args:
        error: what was raised.
        log_text: the story of it, used if its type says nothing to the other side.
    """
    match error:
        case ModelFilesError():
            return ["files", error.text, error.transient]
        case OptionError():
            return ["option", error.option, error.text]
        case TensorError():
            return ["tensor", error.tensor, error.text]
        case ModelFailed():
            return ["failed", error.exception_type, error.log_text]
        case LoadCancelled():
            return ["cancelled"]
        case MemoryError():
            return ["memory"]
        case _:
            return ["other", type(error).__name__, log_text]


def decode_error(encoded: object) -> Exception:
    """The error that was sent.

    Raises:
        MalformedMessage: it is none.
    """
    match encoded:
        case ["files", str(text), bool(transient)]:
            return ModelFilesError(text, transient=transient)
        case ["option", str(option), str(text)]:
            return OptionError(option, text)
        case ["tensor", str(tensor), str(text)]:
            return TensorError(tensor, text)
        case ["failed", str(name), str(text)]:
            return ModelFailed(name, text)
        case ["cancelled"]:
            return LoadCancelled()
        case ["memory"]:
            return MemoryError()
        case ["other", str(name), str(text)]:
            return _named(name)(text)
        case _:
            raise MalformedMessage("an error is not one")


def _named(name: str) -> type[RemoteError]:
    """A class of that name: the texts that clients see are made from names of types."""
    if not name.isidentifier() or len(name) > 100:
        return RemoteError
    return type(name, (RemoteError,), {"__doc__": RemoteError.__doc__})
