"""The protocol's names for element types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from modelyard_server.runtimes.tensors import DType

__all__ = ["DATATYPES", "Datatype", "datatype_of"]


@dataclass(frozen=True, slots=True)
class Datatype:
    """An element type of the protocol.

    Attributes:
        name: in requests, answers and metadata.
        dtype: inside.
        field: of InferTensorContents; empty if it travels raw only.
        config_name: in a ModelConfig.
    """

    name: str
    dtype: DType
    field: str
    config_name: str


_ALL: Final = (
    Datatype("BOOL", DType.BOOL, "bool_contents", "TYPE_BOOL"),
    Datatype("INT8", DType.INT8, "int_contents", "TYPE_INT8"),
    Datatype("INT16", DType.INT16, "int_contents", "TYPE_INT16"),
    Datatype("INT32", DType.INT32, "int_contents", "TYPE_INT32"),
    Datatype("INT64", DType.INT64, "int64_contents", "TYPE_INT64"),
    Datatype("UINT8", DType.UINT8, "uint_contents", "TYPE_UINT8"),
    Datatype("UINT16", DType.UINT16, "uint_contents", "TYPE_UINT16"),
    Datatype("UINT32", DType.UINT32, "uint_contents", "TYPE_UINT32"),
    Datatype("UINT64", DType.UINT64, "uint64_contents", "TYPE_UINT64"),
    Datatype("FP16", DType.FLOAT16, "", "TYPE_FP16"),
    Datatype("BF16", DType.BFLOAT16, "", "TYPE_BF16"),
    Datatype("FP32", DType.FLOAT32, "fp32_contents", "TYPE_FP32"),
    Datatype("FP64", DType.FLOAT64, "fp64_contents", "TYPE_FP64"),
    Datatype("BYTES", DType.BYTES, "bytes_contents", "TYPE_STRING"),
)

DATATYPES: Final[Mapping[str, Datatype]] = MappingProxyType({each.name: each for each in _ALL})
"""Every type by its name in requests."""

# Texts travel as byte strings.
_BY_DTYPE = {each.dtype: each for each in _ALL} | {DType.TEXT: DATATYPES["BYTES"]}


def datatype_of(dtype: DType) -> Datatype:
    """What a type is on this wire."""
    return _BY_DTYPE[dtype]
