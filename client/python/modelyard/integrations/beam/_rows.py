"""Examples of a pipeline as inputs of a model, its answers as predictions, and how large they are.

An example is one row: the dimension along which a batch is put together is not the pipeline's
business. So an array of shape [3] is sent as [1, 3], and what comes back as [1, 2] is given as [2].
A torch tensor is answered with torch tensors, anything else with numpy's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from modelyard.prediction import Inputs, Prediction
from modelyard.tensors import Bfloat16, InputValue, TensorValue

__all__ = ["Decoder", "Encoder", "decode_rows", "encode_row", "size_of"]

Encoder: TypeAlias = Callable[[Any], Inputs]
"""From an example to the inputs of one request."""

Decoder: TypeAlias = Callable[[Prediction], Any]
"""From the answer to one request to a prediction."""

_NUMBER_BYTES: Final = 8


def encode_row(example: object) -> Inputs:
    """Return an example as one row of inputs.

    Args:
        example: a str, bytes, numpy array or scalar, torch tensor, ``Bfloat16``, or a mapping from
            the names of a model's inputs to such values.

    Raises:
        TypeError: anything else; the text says what to do.
    """
    if isinstance(example, Mapping):
        return {str(name): _row_of(value) for name, value in example.items()}
    return _row_of(example)


def _row_of(value: object) -> InputValue:
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)[None]
    if isinstance(value, Bfloat16):
        return Bfloat16(bits=value.bits[None])
    torch = _torch_of(value)
    if torch is not None:
        tensor: Any = value
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype is torch.bfloat16:
            return Bfloat16(bits=tensor.view(torch.int16).numpy().view(np.uint16)[None])
        row: InputValue = tensor.numpy()[None]
        return row
    raise TypeError(
        f"an example is a str, bytes, array or tensor, or a dict of them, got a "
        f"{type(value).__name__}: give the handler an encoder for it"
    )


def decode_rows(prediction: Prediction, *, as_torch: bool = False) -> Any:
    """Return the only row of an answer: of one output its value, of several a dict of them.

    Args:
        prediction: the answer to one example.
        as_torch: numbers as torch tensors; they share memory with the answer.

    Raises:
        ValueError: an output has another number of rows than one.
    """
    rows = {name: _decoded(name, value, as_torch) for name, value in prediction.items()}
    return next(iter(rows.values())) if len(rows) == 1 else rows


def _decoded(name: str, value: TensorValue, as_torch: bool) -> Any:
    if isinstance(value, Bfloat16):
        bits = _only(name, value.bits)
        if not as_torch:
            return Bfloat16(bits=np.asarray(bits))
        import torch

        return torch.from_numpy(np.asarray(bits).view(np.int16)).view(torch.bfloat16)
    row = _only(name, value)
    if as_torch and isinstance(row, np.ndarray | np.generic) and row.dtype.kind in "biuf":
        import torch

        return torch.as_tensor(row)
    return row


def _only(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray) and not value.ndim:
        return value[()]
    if len(value) != 1:
        raise ValueError(
            f"output {name!r} has {len(value)} rows for one example: give the handler a decoder "
            "that knows what they are"
        )
    return value[0]


def is_torch(example: object) -> bool:
    """True for a torch tensor, and for a mapping that has one."""
    if isinstance(example, Mapping):
        return any(_torch_of(value) is not None for value in example.values())
    return _torch_of(example) is not None


def size_of(example: object) -> int:
    """Return how many bytes of content an example has; numbers of Python count for 8."""
    match example:
        case str():
            return len(example.encode(errors="replace"))
        case bytes() | bytearray():
            return len(example)
        case Bfloat16():
            return example.bits.nbytes
        case np.ndarray() if example.dtype.kind == "O":
            return sum(map(size_of, example.flat))
        case np.ndarray() | np.generic():
            return example.nbytes
        case Mapping():
            return sum(size_of(key) + size_of(value) for key, value in example.items())
        case list() | tuple() | set() | frozenset():
            return sum(map(size_of, example))
        case bool() | int() | float() | None:
            return _NUMBER_BYTES
        case _:
            if _torch_of(example) is not None:
                tensor: Any = example
                return int(tensor.nelement() * tensor.element_size())
            return sys.getsizeof(example)


def _torch_of(value: object) -> Any:
    """The module torch if the value is a tensor of it. Does not import it: who has one, has it."""
    torch: Any = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    return torch if tensor is not None and isinstance(value, tensor) else None
