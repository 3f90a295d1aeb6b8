"""Between the server's plain tensors and torch's.

On the way in nothing is copied where we know the model: the torch tensor lies over the bytes that
came from the wire. Python takes those for immutable and shares equal ones, so whoever writes to
them changes other requests; models whose code is not ours get a copy. On the way out the elements
are copied once, out of memory that the model may reuse.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["DTYPES", "to_torch", "to_value"]

DTYPES: Mapping[DType, torch.dtype] = MappingProxyType(
    {
        DType.BOOL: torch.bool,
        DType.INT8: torch.int8,
        DType.INT16: torch.int16,
        DType.INT32: torch.int32,
        DType.INT64: torch.int64,
        DType.UINT8: torch.uint8,
        DType.UINT16: torch.uint16,
        DType.UINT32: torch.uint32,
        DType.UINT64: torch.uint64,
        DType.FLOAT16: torch.float16,
        DType.BFLOAT16: torch.bfloat16,
        DType.FLOAT32: torch.float32,
        DType.FLOAT64: torch.float64,
    }
)

_WIRE_TYPES: Mapping[torch.dtype, DType] = MappingProxyType(
    {dtype: wire for wire, dtype in DTYPES.items()}
)


def to_torch(value: TensorValue, *, device: str = "cpu", writable: bool = False) -> torch.Tensor:
    """Returns a torch tensor of the same type, shape and content.

    Args:
        value: a tensor of a fixed-size type.
        device: where it is to lie.
        writable: the model may write to it. Otherwise it shares the value's bytes on the cpu.

    Raises:
        TensorError: a TEXT or BYTES tensor.
    """
    dtype = DTYPES.get(value.dtype)
    if dtype is None or not isinstance(value.data, bytes):
        raise TensorError(value.name, f"is {value.dtype.value}; the model takes numbers")
    if not value.data:
        return torch.empty(value.shape, dtype=dtype, device=device)
    # Through unsigned integers of the same width, because numpy has no bfloat16, and through
    # DLPack, because torch's other ways in complain about memory that cannot be written.
    raw = np.frombuffer(value.data, dtype=f"<u{dtype.itemsize}")
    if sys.byteorder == "big":
        raw = raw.byteswap()
    tensor = from_dlpack(raw).view(dtype).view(value.shape)
    if device != "cpu":
        return tensor.to(device)
    return tensor.clone() if writable else tensor


def to_value(name: str, tensor: torch.Tensor) -> TensorValue:
    """Returns a model's output as a plain tensor.

    Args:
        name: what the output is called.
        tensor: dense, on any device.

    Raises:
        TypeError: its type does not exist on the wire, or it is not dense.
    """
    dtype = _WIRE_TYPES.get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided:
        raise TypeError(f"output {name!r} is {tensor.dtype}, {tensor.layout}: not a served type")
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    flat = plain.view(-1).view(_BY_WIDTH[plain.dtype.itemsize]).numpy()
    if sys.byteorder == "big":
        flat = flat.byteswap()
    return TensorValue(name=name, dtype=dtype, shape=tuple(plain.shape), data=flat.tobytes())


_BY_WIDTH: Mapping[int, torch.dtype] = MappingProxyType(
    {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
)
