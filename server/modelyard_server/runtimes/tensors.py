"""Tensors inside the server: what crosses the engine seam, as plain data.

A value holds its elements as they came over the wire. It knows nothing of torch or numpy, so that
it can cross into another process, and an identity model never copies it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MAX_DIMENSION", "MAX_RANK", "DType", "TensorError", "TensorValue", "element_count"]

MAX_RANK = 8
"""Most dimensions of a tensor. Real models need 5; the bound keeps every loop over a shape
short.
"""

MAX_DIMENSION = 2**31 - 1
"""Largest single dimension."""


class DType(enum.Enum):
    """Element types. The value is the type's name in error texts.

    Attributes:
        item_size: bytes of one element; 0 for TEXT and BYTES, whose elements vary.
        number: of the type in modelyard.v1.DataType.
    """

    # Attributes of the members and not tables beside them: looking an enum member up in a table
    # takes longer than everything else that is done with the type of a small tensor.
    item_size: int
    number: int

    def __new__(cls, label: str, item_size: int, number: int) -> DType:
        """Makes a member whose value is its label."""
        member = object.__new__(cls)
        member._value_ = label
        member.item_size = item_size
        member.number = number
        return member

    BOOL = ("BOOL", 1, 1)
    INT8 = ("INT8", 1, 2)
    INT16 = ("INT16", 2, 3)
    INT32 = ("INT32", 4, 4)
    INT64 = ("INT64", 8, 5)
    UINT8 = ("UINT8", 1, 6)
    UINT16 = ("UINT16", 2, 7)
    UINT32 = ("UINT32", 4, 8)
    UINT64 = ("UINT64", 8, 9)
    FLOAT16 = ("FLOAT16", 2, 10)
    BFLOAT16 = ("BFLOAT16", 2, 11)
    FLOAT32 = ("FLOAT32", 4, 12)
    FLOAT64 = ("FLOAT64", 8, 13)
    TEXT = ("TEXT", 0, 14)
    BYTES = ("BYTES", 0, 15)


class TensorError(ValueError):
    """A tensor's type, shape and content disagree, or it does not fit the model.

    Attributes:
        tensor: name of the tensor, empty if it has none.
        text: what is wrong and what is expected. Names no paths and no internals: it is shown to
            the client.
    """

    def __init__(self, tensor: str, text: str) -> None:
        super().__init__(f"tensor {tensor!r}: {text}" if tensor else f"tensor: {text}")
        self.tensor = tensor
        self.text = text


def element_count(tensor: str, shape: Sequence[int]) -> int:
    """Number of elements of a shape: its product, 1 for an empty shape.

    Args:
        tensor: name used in the error.
        shape: sizes of the dimensions.

    Raises:
        TensorError: more than MAX_RANK dimensions, a dimension outside 0..MAX_DIMENSION, or a
            product above 2^63 - 1, counted without the zero dimensions so that a zero cannot hide
            an overflow.
    """
    if len(shape) > MAX_RANK:
        raise TensorError(tensor, f"has {len(shape)} dimensions; at most {MAX_RANK} are allowed")
    product = 1
    empty = False
    for dimension in shape:
        if not 0 <= dimension <= MAX_DIMENSION:
            raise TensorError(tensor, f"dimension {dimension} is outside 0..{MAX_DIMENSION}")
        if dimension == 0:
            empty = True
        else:
            product *= dimension
    if product >= 2**63:
        raise TensorError(tensor, "the product of its dimensions does not fit in 63 bits")
    return 0 if empty else product


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorValue:
    """A dense, named, row-major tensor.

    Attributes:
        name: what the model calls it; may be empty where the model has one input.
        dtype: type of the elements.
        shape: sizes of the dimensions, outermost first.
        data: little-endian bytes for fixed-size types, a tuple of str for TEXT, a tuple of bytes
            for BYTES.

    Raises:
        TensorError: type, shape and content disagree.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: bytes | tuple[str, ...] | tuple[bytes, ...]

    def __post_init__(self) -> None:
        count = element_count(self.name, self.shape)
        size = self.dtype.item_size
        if size:
            if not isinstance(self.data, bytes):
                raise TensorError(self.name, f"{self.dtype.value} elements must be raw bytes")
            if len(self.data) != count * size:
                raise TensorError(
                    self.name,
                    f"shape {list(self.shape)} of {self.dtype.value} needs {count * size} bytes; "
                    f"{len(self.data)} were given",
                )
            # Any other byte would make two "true" values that differ.
            if self.dtype is DType.BOOL and self.data.strip(b"\x00\x01"):
                raise TensorError(self.name, "a BOOL byte is neither 0 nor 1")
            return
        if isinstance(self.data, bytes):
            raise TensorError(self.name, f"{self.dtype.value} elements must not be raw bytes")
        if len(self.data) != count:
            raise TensorError(
                self.name,
                f"shape {list(self.shape)} needs {count} elements; {len(self.data)} were given",
            )
