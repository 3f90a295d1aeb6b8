"""Tensors as numpy arrays, for what a route does between models, and back. Pure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["FLOATS", "INTEGERS", "array_of", "text_of", "value_of"]

FLOATS: Final = frozenset({DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64})
"""Floating types."""

INTEGERS: Final = frozenset(
    {
        *(DType.INT8, DType.INT16, DType.INT32, DType.INT64),
        *(DType.UINT8, DType.UINT16, DType.UINT32, DType.UINT64),
    }
)
"""Types of whole numbers."""

_NUMPY: Final[dict[DType, str]] = {
    DType.BOOL: "?",
    DType.INT8: "i1",
    DType.INT16: "<i2",
    DType.INT32: "<i4",
    DType.INT64: "<i8",
    DType.UINT8: "u1",
    DType.UINT16: "<u2",
    DType.UINT32: "<u4",
    DType.UINT64: "<u8",
    DType.FLOAT16: "<f2",
    DType.FLOAT32: "<f4",
    DType.FLOAT64: "<f8",
}


def array_of(value: TensorValue) -> np.ndarray[Any, Any]:
    """The elements of a tensor of a fixed-size type. Not writable.

    BFLOAT16, which numpy has not, comes as float32.

    Raises:
        TensorError: it holds TEXT or BYTES.
    """
    if not isinstance(value.data, bytes):
        raise TensorError(value.name, f"holds {value.dtype.value}; numbers are needed")
    if value.dtype is DType.BFLOAT16:
        upper = np.frombuffer(value.data, "<u2").astype("<u4") << 16
        return upper.view("<f4").reshape(value.shape)
    return np.frombuffer(value.data, _NUMPY[value.dtype]).reshape(value.shape)


def value_of(name: str, dtype: DType, array: np.ndarray[Any, Any]) -> TensorValue:
    """A tensor of a fixed-size type, of an array whose elements are converted to it."""
    if dtype is DType.BFLOAT16:
        bits = np.ascontiguousarray(array, "<f4").view("<u4")
        # To the nearest, and to even where two are as near; what is no number stays none.
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        halves = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2")
        data = halves.tobytes()
    else:
        data = np.ascontiguousarray(array, _NUMPY[dtype]).tobytes()
    return TensorValue(name=name, dtype=dtype, shape=tuple(array.shape), data=data)


def text_of(value: TensorValue) -> tuple[str, ...]:
    """The elements of a TEXT tensor, row-major.

    Raises:
        TensorError: it holds anything else.
    """
    if value.dtype is not DType.TEXT:
        raise TensorError(value.name, f"holds {value.dtype.value}; TEXT is needed")
    return value.data  # type: ignore[return-value]  # TEXT holds str
