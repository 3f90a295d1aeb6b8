"""Values of Python and numpy as tensors of the contract, and back.

===========================================  ===================  ==============================
value                                        tensor               comes back as
===========================================  ===================  ==============================
``str``                                      TEXT [1]             ``list`` of one ``str``
``list`` or ``tuple`` of ``str``             TEXT [n]             ``list[str]``
numpy array of ``str`` (U, T or object)      TEXT, same shape     ``list[str]`` if one-dimensional,
                                                                  else object array
``bytes``, ``list[bytes]``, array (S, obj.)  BYTES, likewise      likewise
numpy array of bool, int, uint or float      of the same type     array of the same type and shape
numpy scalar                                 same, shape []       array of shape ()
``Bfloat16``, or an array of ml_dtypes'      BFLOAT16             ``Bfloat16``
``bfloat16``
===========================================  ===================  ==============================

Arrays may have any byte order and any memory order, be empty or have no dimension. Arrays that
come back are the caller's own: in native byte order, contiguous and writable. Nothing is guessed:
lists of numbers, Python numbers and other libraries' tensors are refused with ``TypeError``, since
their element type would be somebody's guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modelyard.v1 import tensor_pb2

__all__ = [
    "MAX_DIMENSION",
    "MAX_RANK",
    "Bfloat16",
    "InputValue",
    "TensorError",
    "TensorValue",
    "from_tensor",
    "to_tensor",
]

MAX_RANK: Final = 8
"""Most dimensions of a tensor."""

MAX_DIMENSION: Final = 2**31 - 1
"""Largest size of one dimension."""

_MAX_ELEMENTS: Final = 2**63 - 1

# By kind and size rather than by numpy's type objects, of which "int64" has several.
_DATA_TYPES: Final[Mapping[tuple[str, int], tensor_pb2.DataType.ValueType]] = MappingProxyType(
    {
        ("b", 1): tensor_pb2.DATA_TYPE_BOOL,
        ("i", 1): tensor_pb2.DATA_TYPE_INT8,
        ("i", 2): tensor_pb2.DATA_TYPE_INT16,
        ("i", 4): tensor_pb2.DATA_TYPE_INT32,
        ("i", 8): tensor_pb2.DATA_TYPE_INT64,
        ("u", 1): tensor_pb2.DATA_TYPE_UINT8,
        ("u", 2): tensor_pb2.DATA_TYPE_UINT16,
        ("u", 4): tensor_pb2.DATA_TYPE_UINT32,
        ("u", 8): tensor_pb2.DATA_TYPE_UINT64,
        ("f", 2): tensor_pb2.DATA_TYPE_FLOAT16,
        ("f", 4): tensor_pb2.DATA_TYPE_FLOAT32,
        ("f", 8): tensor_pb2.DATA_TYPE_FLOAT64,
    }
)

_WIRE_TYPES: Final[Mapping[tensor_pb2.DataType.ValueType, np.dtype[Any]]] = MappingProxyType(
    {
        # bool is read as bytes first, because not every byte is one.
        data_type: np.dtype("u1" if kind == "b" else f"<{kind}{size}")
        for (kind, size), data_type in _DATA_TYPES.items()
    }
    | {tensor_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2")}
)


class TensorError(ValueError):
    """A value that is no tensor of the contract, or a tensor that contradicts itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bfloat16:
    """An array of bfloat16, which numpy does not have.

    ``numpy.asarray`` turns it into float32, exactly.

    Args:
        bits: array of uint16, any shape: the upper half of each float32. Not copied.

    Raises:
        TypeError: ``bits`` is no array of uint16.
    """

    bits: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if not _is_array_of(self.bits, np.uint16):
            raise TypeError(
                f"Bfloat16 takes the bits as a numpy array of uint16, got {_described(self.bits)}: "
                "use Bfloat16.from_float32 for values"
            )

    @staticmethod
    def from_float32(values: NDArray[np.float32]) -> Bfloat16:
        """Return float32 values rounded to bfloat16: to nearest, ties to even; NaN stays NaN.

        Raises:
            TypeError: ``values`` is no array of float32.
        """
        if not _is_array_of(values, np.float32):
            raise TypeError(f"from_float32 takes an array of float32, got {_described(values)}")
        # order="C" instead of ascontiguousarray, which would give a dimension to 0-d arrays.
        wide = values.astype(np.float32, order="C").view(np.uint32)
        upper = wide >> np.uint32(16)
        # Only NaNs can overflow, and they are replaced below.
        with np.errstate(over="ignore"):
            rounded = (wide + (np.uint32(0x7FFF) + (upper & np.uint32(1)))) >> np.uint32(16)
        # Rounding could carry a NaN's payload over into the sign, or lose it and leave infinity.
        quiet_nan = upper | np.uint32(0x40)
        bits = np.where(np.isnan(values), quiet_nan, rounded)
        return Bfloat16(bits=np.asarray(bits, dtype=np.uint16))

    def to_float32(self) -> NDArray[np.float32]:
        """Return the same values as float32, which holds every bfloat16 exactly."""
        wide = self.bits.astype(np.uint32, order="C")
        return np.asarray(wide << np.uint32(16), dtype=np.uint32).view(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return self.bits.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("bfloat16 becomes an array by conversion: copy=False is not possible")
        values = self.to_float32()
        return values if dtype is None else values.astype(dtype)


InputValue: TypeAlias = (
    str | bytes | Sequence[str] | Sequence[bytes] | NDArray[Any] | np.generic | Bfloat16
)
"""What can be sent as a tensor. Sequences are lists or tuples."""

TensorValue: TypeAlias = NDArray[Any] | list[str] | list[bytes] | Bfloat16
"""What a tensor is read as."""


def to_tensor(value: InputValue, name: str = "") -> tensor_pb2.Tensor:
    """Return a value as a tensor message.

    Args:
        value: see the table of this module.
        name: what the model calls it.

    Raises:
        TypeError: a value of a type that is not in the table; the text says what to do with it.
        TensorError: a shape beyond the contract's limits, text that is no Unicode, or an empty
            list, which could be one of text as well as one of bytes.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a tensor must be a str, got {_described(name)}")
    tensor = tensor_pb2.Tensor(name=name)
    match value:
        case str() | bytes():
            _set_elements(tensor, [value], (1,))
        case list() | tuple():
            if not value:
                raise TensorError(
                    f"tensor {name!r}: an empty list could hold text or bytes: use "
                    "numpy.empty(0, dtype=numpy.str_) or numpy.empty(0, dtype=numpy.bytes_)"
                )
            _set_elements(tensor, value, (len(value),))
        case Bfloat16():
            _set_raw(tensor, tensor_pb2.DATA_TYPE_BFLOAT16, value.bits)
        # A masked array would lose its mask.
        case np.ndarray() if not isinstance(value, np.ma.MaskedArray):
            _set_array(tensor, value)
        case np.generic():
            _set_array(tensor, np.asarray(value))
        case _:
            raise _unsupported(name, value)
    return tensor


def from_tensor(tensor: tensor_pb2.Tensor) -> TensorValue:
    """Return what a tensor message holds; see the table of this module.

    Raises:
        TensorError: an unknown type, a shape beyond the contract's limits, or content that does
            not agree with type and shape.
    """
    data_type = tensor.data_type
    shape = tuple(tensor.shape)
    count = _checked_element_count(tensor.name, shape)
    if data_type == tensor_pb2.DATA_TYPE_TEXT:
        texts = list(tensor.text.values)
        _check_content(tensor, "text", count, len(texts), "values")
        return texts if len(shape) == 1 else _object_array(tensor.name, texts, shape)
    if data_type == tensor_pb2.DATA_TYPE_BYTES:
        strings = list(tensor.binary.values)
        _check_content(tensor, "binary", count, len(strings), "values")
        return strings if len(shape) == 1 else _object_array(tensor.name, strings, shape)
    wire_type = _WIRE_TYPES.get(data_type)
    if wire_type is None:
        raise TensorError(
            f"tensor {tensor.name!r}: data type {int(data_type)} is not known to this version"
        )
    raw = tensor.raw
    _check_content(tensor, "raw", count * wire_type.itemsize, len(raw), "bytes")
    read_only = np.frombuffer(raw, dtype=wire_type) if raw else np.empty(0, dtype=wire_type)
    # A copy even where none is needed, so that the array can be written to.
    elements = _shaped(tensor.name, read_only.astype(wire_type.newbyteorder("=")), shape)
    if data_type == tensor_pb2.DATA_TYPE_BFLOAT16:
        return Bfloat16(bits=elements)
    if data_type == tensor_pb2.DATA_TYPE_BOOL:
        if elements.size and elements.max() > 1:
            raise TensorError(f"tensor {tensor.name!r}: a byte of BOOL is neither 0 nor 1")
        return elements.view(np.bool_)
    return elements


def _set_array(tensor: tensor_pb2.Tensor, array: NDArray[Any]) -> None:
    dtype = array.dtype
    if dtype.kind in "USTO":
        elements = array.ravel(order="C").tolist()
        if dtype.kind == "O" and not elements:
            raise TensorError(
                f"tensor {tensor.name!r}: an empty array of objects could hold text or bytes: "
                "use dtype numpy.str_ or numpy.bytes_"
            )
        _set_elements(tensor, elements, array.shape, empty_is_bytes=dtype.kind == "S")
        return
    # ml_dtypes, where somebody uses it: a type of its own kind, known by its name.
    if dtype.name == "bfloat16" and dtype.itemsize == 2:
        _set_raw(tensor, tensor_pb2.DATA_TYPE_BFLOAT16, array.view(np.uint16))
        return
    data_type = _DATA_TYPES.get((dtype.kind, dtype.itemsize))
    if data_type is None:
        raise TypeError(
            f"tensor {tensor.name!r}: arrays of {dtype} cannot be sent: convert to bool, "
            "int8 to int64, uint8 to uint64, float16, float32, float64, text or bytes"
        )
    _set_raw(tensor, data_type, array)


def _set_raw(
    tensor: tensor_pb2.Tensor, data_type: tensor_pb2.DataType.ValueType, array: NDArray[Any]
) -> None:
    _checked_element_count(tensor.name, array.shape)
    tensor.data_type = data_type
    tensor.shape.extend(array.shape)
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    tensor.raw = little_endian.tobytes(order="C")


def _set_elements(
    tensor: tensor_pb2.Tensor,
    elements: Sequence[Any],
    shape: tuple[int, ...],
    *,
    empty_is_bytes: bool = False,
) -> None:
    _checked_element_count(tensor.name, shape)
    first = elements[0] if elements else (b"" if empty_is_bytes else "")
    kind = str if isinstance(first, str) else bytes
    for index, element in enumerate(elements):
        if not isinstance(element, kind):
            raise _unsupported(f"{tensor.name}[{index}]", element, wanted=kind)
    tensor.shape.extend(shape)
    if kind is bytes:
        tensor.data_type = tensor_pb2.DATA_TYPE_BYTES
        # SetInParent: content that is empty is still content.
        tensor.binary.SetInParent()
        tensor.binary.values.extend(elements)
        return
    tensor.data_type = tensor_pb2.DATA_TYPE_TEXT
    tensor.text.SetInParent()
    try:
        tensor.text.values.extend(elements)
    except UnicodeEncodeError as error:
        raise TensorError(
            f"tensor {tensor.name!r}: text that is no Unicode (lone surrogates): {error.reason}"
        ) from error


def _checked_element_count(name: str, shape: Sequence[int]) -> int:
    if len(shape) > MAX_RANK:
        raise TensorError(f"tensor {name!r}: {len(shape)} dimensions, at most {MAX_RANK} may be")
    product = 1
    for size in shape:
        if not 0 <= size <= MAX_DIMENSION:
            raise TensorError(
                f"tensor {name!r}: a dimension of size {size}, 0 to {MAX_DIMENSION} may be"
            )
        # Without the zeros, so that a zero cannot hide an overflow.
        product *= size or 1
    if product > _MAX_ELEMENTS:
        raise TensorError(f"tensor {name!r}: the product of shape {list(shape)} is above 2^63 - 1")
    return 0 if 0 in shape else product


def _check_content(
    tensor: tensor_pb2.Tensor, field: str, needed: int, present: int, unit: str
) -> None:
    content = tensor.WhichOneof("content")
    # No content at all is right where none is needed.
    if content not in (field, None):
        raise TensorError(
            f"tensor {tensor.name!r}: the elements are in {content!r}, this type has them in "
            f"{field!r}"
        )
    if needed != present:
        raise TensorError(
            f"tensor {tensor.name!r}: {present} {unit} in {field!r}, shape {list(tensor.shape)} "
            f"needs {needed}"
        )


def _object_array(
    name: str, elements: Sequence[str | bytes], shape: tuple[int, ...]
) -> NDArray[Any]:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return _shaped(name, array, shape)


def _shaped(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return array.reshape(shape)
    except ValueError as error:
        # The count was checked: what is left is an empty array whose other dimensions no memory
        # can address.
        raise TensorError(
            f"tensor {name!r}: no array can have shape {list(shape)}: its dimensions without the "
            "zeros are too large"
        ) from error


def _unsupported(name: str, value: object, *, wanted: type | None = None) -> TypeError:
    if wanted is not None and isinstance(value, str | bytes):
        advice = f"the elements before it are {wanted.__name__}, and one tensor holds one type"
    elif isinstance(value, bool | int | float | complex):
        advice = "make an array of the type the model takes, for instance numpy.float32"
    elif isinstance(value, bytearray | memoryview):
        advice = "use bytes(...)"
    elif isinstance(value, np.ma.MaskedArray):
        advice = "use .filled(...) to decide what masked elements are"
    else:
        advice = "use str, bytes, a list of either, or a numpy array"
    return TypeError(f"tensor {name!r}: cannot send {_described(value)}: {advice}")


def _is_array_of(value: object, dtype: type[np.generic]) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
